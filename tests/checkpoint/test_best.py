"""Best tracking: only a valid, finite, better value wins."""

import math
from typing import Any

import pytest

from rawloop.checkpoint import BestTracker
from rawloop.checkpoint.best import Mode
from rawloop.errors import CheckpointError


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (None, (None, None)),
        ({"metric": "eval_loss", "value": 3.0, "step": 6}, (3.0, 6)),
        ({"metric": "eval_loss", "value": 4.0, "step": 5}, (4.0, 5)),  # the one that it should hold was never written
        ({"metric": "eval_loss", "value": 2.0, "step": 9}, (3.0, 6)),  # to come again, or given up
        ({"metric": "eval_loss", "value": 3.5, "step": 9}, (None, None)),  # would not have taken its place
        ({"metric": "wer", "value": 3.0, "step": 6}, (None, None)),
    ],
)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_is_believed_as_far_as_the_slot_bears_it_out(
    kept: dict[str, Any] | None, left: tuple[float | None, int | None], mode: Mode
) -> None:
    sign = 1 if mode == "min" else -1
    tracker = BestTracker("eval_loss", mode)
    tracker.value, tracker.step, tracker.worse_in_a_row = sign * 3.0, 6, 2
    tracker.agree_with(kept and {**kept, "mode": mode, "value": sign * kept["value"]})
    assert (tracker.value, tracker.step) == (left[0] and sign * left[0], left[1])
    assert tracker.worse_in_a_row == 2  # patience does not begin anew


def test_only_a_better_valid_finite_value_wins() -> None:
    best = BestTracker()
    seen = [(1, 3.0, True), (2, math.nan, True), (3, 0.0, False), (4, 3.0, True), (5, -math.inf, True), (6, 2.9, True)]
    assert [best.consider(*each) for each in seen] == [True, False, False, False, False, True]
    assert (best.value, best.step) == (2.9, 6)


def test_nothing_is_best_before_the_first_valid_value() -> None:
    best = BestTracker("score", "max")
    assert not best.consider(1, math.inf, True)
    assert (best.value, best.step) == (None, None)
    assert best.consider(2, -5.0, True)
    assert not best.consider(3, -6.0, True)
    assert best.consider(4, -4.0, True)


def test_state_comes_back() -> None:
    best, other = BestTracker(), BestTracker()
    best.consider(7, 0.5, True)
    other.load_state_dict(best.state_dict())
    assert (other.value, other.step) == (0.5, 7)
    assert not other.consider(8, 0.6, True)


def test_patience_is_used_up_by_evaluations_that_are_not_the_best() -> None:
    best = BestTracker(patience=2)
    told = []
    for step, value, valid in [(0, 3.0, True), (1, 4.0, True), (2, 2.0, True), (3, 2.0, True), (4, 1.0, False)]:
        best.consider(step, value, valid)
        told.append(best.exhausted)
    assert told == [False, False, False, False, True]
    other, endless = BestTracker(patience=3), BestTracker()
    for tracker in (other, endless):
        tracker.load_state_dict(best.state_dict())
        assert not tracker.exhausted  # patience is the config's, the count the checkpoint's
    other.consider(5, 2.5, True)
    assert other.exhausted


def test_the_best_of_another_metric_means_nothing_here() -> None:
    with pytest.raises(CheckpointError, match=r"tracks the best eval_loss \(min\), this run is configured for wer"):
        BestTracker("wer").load_state_dict(BestTracker().state_dict())


def test_an_evaluation_that_is_seen_again_after_a_resume_is_not_counted_again() -> None:
    best = BestTracker(patience=2)
    for step, value in ((1, 1.0), (2, 2.0)):
        best.consider(step, value, True)
    again = BestTracker(patience=2)
    again.load_state_dict(best.state_dict())
    assert not again.consider(2, 2.0, True)
    assert not again.exhausted
    assert again.consider(2, 0.5, True)  # a better one counts
    again.load_state_dict({name: value for name, value in best.state_dict().items() if name != "considered"})
    again.consider(3, 2.0, True)
    assert again.exhausted
