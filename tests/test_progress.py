"""Progress: what a person reads while a run trains, and how much time is left."""

import pytest

from rawloop.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89.4, "89 s"),
        (91, "2 min"),
        (5000, "83 min"),
        (5400, "1 h 30 min"),
        (12000, "3 h 20 min"),
        (47.4 * 3600, "47 h 24 min"),
        (50 * 3600, "2 d 2 h"),
    ],
)
def test_times_as_people_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_that_is_left_has_the_evaluations_in_it_and_is_told_once_in_full() -> None:
    said: list[str] = []
    with Progress(25, log=said.append, evaluate_every=10) as progress:
        progress.show(0, {"eval_loss": 6.0, "eval_seconds": 100.0})
        assert progress.seconds_left(0) is None
        progress.show(5, {"loss": 5.0, "step_seconds": 2.0})
        assert progress.seconds_left(5) == 20 * 2 + 3 * 100  # at the steps 10, 20 and 25
        progress.show(10, {"loss": 4.0, "step_seconds": 3.0})
        progress.show(10, {"eval_loss": 4.5, "eval_seconds": 50.0})
        progress.show(25, {"loss": 3.0, "step_seconds": 3.0})
    assert progress.seconds_left(10) == 15 * 3 + 2 * 50
    assert said == [
        "step 0/25  eval_loss 6.0000",
        "step 5/25  loss 5.0000  left 6 min",
        "about 6 min to the end: 20 steps of 2 s, 3 evaluations of 100 s",
        "step 10/25  loss 4.0000  left 4 min",
        "step 10/25  eval_loss 4.5000",
        "step 25/25  loss 3.0000",
    ]


def test_without_evaluations_or_an_end_nothing_is_made_up() -> None:
    said: list[str] = []
    with Progress(8, log=said.append) as progress:
        progress.show(2, {"loss": 5.0, "step_seconds": 2.0})
    with Progress(None, log=said.append) as progress:
        progress.show(2, {"loss": 5.0, "step_seconds": 2.0})
    assert said == ["step 2/8  loss 5.0000  left 12 s", "about 12 s to the end: 6 steps of 2 s", "step 2  loss 5.0000"]
