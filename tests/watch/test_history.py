"""A number's own history."""

import math

import pytest

from rawloop.watch.history import History


def test_median_and_deviation_of_the_last_values() -> None:
    history = History(window=5, least=3)
    assert math.isnan(history.median)
    assert not history.is_known
    for value in (100.0, 1.0, 2.0, math.nan, 3.0, 4.0, 5.0):
        history.add(value)
    assert list(history.values) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert (history.median, history.smallest, history.largest) == (3.0, 1.0, 5.0)
    assert history.zscore(6.0) == pytest.approx(3 / 1.4826)


def test_equal_values_leave_one_by_one() -> None:
    history = History(window=2)
    for value in (1.0, 1.0, 2.0):
        history.add(value)
    assert (history.median, history.smallest) == (1.5, 1.0)


def test_what_stands_out() -> None:
    history = History()
    for step in range(19):
        history.add(1 + step % 5 / 10)
    assert not history.stands_out(50.0)  # too little history
    history.add(1.2)
    assert history.stands_out(2.5)
    assert not history.stands_out(1.5)
    assert not history.stands_out(math.nan)
    constant = History()
    for _ in range(30):
        constant.add(2.0)
    assert not constant.stands_out(2.0001)
    assert constant.stands_out(2.2)
