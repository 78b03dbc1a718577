"""The watch passes its exam: faults in loops as people write them are found by cause and place; others are quiet."""

from collections.abc import Callable
from typing import Any

import pytest

from rawloop.watch.findings import Cause, Finding, Place
from tests.faults import first
from tests.faults.exam import CONTROLS, FAULTS, answer
from tests.faults.form import Control, Fault, best_of_ranks, score

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
# One fault of each group, and two healthy loops, are enough for every change; `slow` has the others.
QUICK = frozenset(
    {
        "log of a silent clip in the loss",
        "a softmax by hand overflows as its temperature falls",
        "NaN in a loaded weight",
        "clipped before unscale_",
        "the last codebook is left out of the loss",
        "an id outside of one codebook",
        "padding is a target",
        "the learning rate jumps",
        "the same clips on both ranks",
        "run: NaN in the base model",
        "a scaler's first skips",
        "a filler row of padding",
    }
)


def cases(of: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=[] if case.name in QUICK else [pytest.mark.slow]) for case in of]


@pytest.mark.parametrize("fault", cases(FAULTS))
def test_a_fault_is_found_by_cause_and_place(fault: Fault, run_ranks: Callable[..., list[Any]]) -> None:
    by_rank = answer(fault, run_ranks)
    verdict = best_of_ranks(fault, by_rank).verdict
    said = "\n\n".join(finding.text() for findings in by_rank for finding in findings)
    assert verdict == "found", said or "nothing is said"


@pytest.mark.parametrize("control", cases(CONTROLS))
def test_a_healthy_loop_gives_no_alarm(control: Control, run_ranks: Callable[..., list[Any]]) -> None:
    by_rank = answer(control, run_ranks)
    alarms = [finding.text() for findings in by_rank for finding in findings if not finding.ordinary]
    assert alarms == []


def test_names_are_unique_and_the_quick_cases_are_among_them() -> None:
    names = [fault.name for fault in FAULTS]
    assert len({*names}) == len(names)
    assert {*names, *(control.name for control in CONTROLS)} >= QUICK


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
