"""The watch passes its exam: faults in loops as people write them are found by cause and place, healthy ones are quiet.

`NOT_FOUND` is exact: a fault that is missed and not on it fails a test, and so does one on it that is found.
`NOT_QUIET` likewise has the healthy loops with an alarm.
"""

from collections.abc import Callable
from typing import Any

import pytest

from rawloop.watch.findings import Cause, Finding, Place
from tests.faults import first, runs, second_runs
from tests.faults.exam import CONTROLS, FAULTS, answer
from tests.faults.form import Control, Fault, best_of_ranks, score

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
NOT_FOUND: frozenset[str] = frozenset()
NOT_QUIET: frozenset[str] = frozenset()
# one run is enough for every change
SLOW = frozenset(case.name for case in (*runs.FAULTS[1:], *runs.CONTROLS, *second_runs.FAULTS))


def cases(of: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in SLOW else []) for case in of]


@pytest.mark.parametrize("fault", cases(FAULTS))
def test_a_fault_is_found_by_cause_and_place(fault: Fault, run_ranks: Callable[..., list[Any]]) -> None:
    by_rank = answer(fault, run_ranks)
    verdict = best_of_ranks(fault, by_rank).verdict
    said = "\n\n".join(finding.text() for findings in by_rank for finding in findings)
    if fault.name in NOT_FOUND:
        assert verdict != "found", f"'{fault.name}' is found: take it off NOT_FOUND"
    else:
        assert verdict == "found", said or "nothing is said"


@pytest.mark.parametrize("control", cases(CONTROLS))
def test_a_healthy_loop_gives_no_alarm(control: Control, run_ranks: Callable[..., list[Any]]) -> None:
    by_rank = answer(control, run_ranks)
    alarms = [finding.text() for findings in by_rank for finding in findings if not finding.ordinary]
    if control.name in NOT_QUIET:
        assert alarms != [], f"'{control.name}' is quiet: take it off NOT_QUIET"
    else:
        assert alarms == []


def test_names_are_unique_and_the_list_of_what_is_not_found_is_one_of_faults() -> None:
    names = [fault.name for fault in FAULTS]
    assert len({*names}) == len(names)
    assert {*names} >= NOT_FOUND
    assert {control.name for control in CONTROLS} >= NOT_QUIET


def test_only_the_right_cause_and_place_among_the_first_alarms_count() -> None:
    fault = next(fault for fault in first.FAULTS if fault.loop is first.HalfOverflow)
    right = Place("forward", module="blocks.1.mlp.proj")

    def finding(whose: Any = "precision", place: Place = right, what: str = "an overflow", **more: Any) -> Finding:
        return Finding("not_finite", what, (Cause(whose, what, place),), 0, **more)

    wrong = finding("data", Place())
    assert score(fault, [finding()]).verdict == "found"
    assert score(fault, [wrong, wrong, finding()]).verdict == "found"
    assert score(fault, [wrong, wrong, wrong, finding()]).verdict == "missed"
    assert score(fault, [finding(place=Place(module="blocks.1.mlp.fc"))]).verdict == "cause only"
    assert score(fault, [finding("data")]).verdict == "place only"
    assert score(fault, [finding(ordinary=True)]).verdict == "missed"
    assert best_of_ranks(fault, [[wrong], [finding()]]).verdict == "found"
