"""Best tracking: only a valid, finite, better value wins."""

import math
from typing import Any

import pytest

from rawloop.checkpoint.best import BestRecord, BestTracker, Mode
from rawloop.errors import CheckpointError


@pytest.mark.parametrize(
    ("written", "believed"),
    [
        (None, None),
        (("eval_loss", 3.0, 6), (3.0, 6)),
        (("eval_loss", 4.0, 5), (4.0, 5)),  # the better one was never written
        (("eval_loss", 2.0, 9), (3.0, 6)),  # of a continuation that was given up
        (("eval_loss", 3.5, 9), (3.5, 9)),  # would not have taken the place of a better one
        (("wer", 3.0, 6), None),
    ],
)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_is_believed_only_if_its_model_was_written(
    written: tuple[str, float, int] | None, believed: tuple[float, int] | None, mode: Mode
) -> None:
    sign = 1 if mode == "min" else -1
    tracker = BestTracker("eval_loss", mode)
    tracker.value, tracker.step, tracker.worse_in_a_row = sign * 3.0, 6, 2
    tracker.agree_with(BestRecord(written[0], mode, sign * written[1], written[2]) if written else None)
    assert tracker.record == (BestRecord("eval_loss", mode, sign * believed[0], believed[1]) if believed else None)
    assert tracker.worse_in_a_row == (2 if believed else 0)  # patience does not begin anew


def test_nothing_is_believed_of_a_best_slot_before_the_first_evaluation() -> None:
    """As after going back to the beginning: the run is the one that was not stopped."""
    tracker = BestTracker()
    tracker.agree_with(BestRecord("eval_loss", "min", 2.0, 9))
    assert tracker.consider(0, 5.0, True)


@pytest.mark.parametrize("content", [None, [], {}, {"metric": "x"}, {"metric": "x", "value": None, "step": 1}])
def test_a_record_that_cannot_be_read_is_none(content: Any) -> None:
    assert BestRecord.read(content) is None
    assert BestRecord.read({"metric": "x", "value": 1, "step": 2}) == BestRecord("x", "min", 1.0, 2)


def test_only_a_better_valid_finite_value_wins() -> None:
    best = BestTracker()
    seen = [(1, 3.0, True), (2, math.nan, True), (3, 0.0, False), (4, 3.0, True), (5, -math.inf, True), (6, 2.9, True)]
    assert [best.consider(*each) for each in seen] == [True, False, False, False, False, True]
    assert (best.value, best.step) == (2.9, 6)


def test_nothing_is_best_before_the_first_valid_value() -> None:
    best = BestTracker("score", "max")
    assert not best.consider(1, math.inf, True)
    assert best.record is None
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
