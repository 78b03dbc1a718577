"""Figures hide no value: what has no place on an axis is a mark, and long lines keep their extremes."""

import math
import re

import numpy as np
import pytest

from rawloop.report.page import Figure
from rawloop.report.plots import Line, draw_lines, draw_map, draw_time_line, envelope, span_of

NAN, INF = math.nan, math.inf


def crosses(figure: Figure) -> list[tuple[float, float]]:
    """The places of the marks of hidden values."""
    found = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--alarm\)', figure.svg)
    return [(float(x), float(y)) for x, y in found]


def test_values_that_are_not_finite_are_marks() -> None:
    figure = draw_lines("loss", [Line("loss", range(6), [1.0, NAN, 2.0, INF, -INF, 1e308])])
    assert figure.caption == (
        "An x marks values of loss without a place on the axis: 1 nan, 2 inf, 1 -inf, first at step 1."
    )
    places = crosses(figure)
    assert len(places) == 4
    top, bottom = min(y for _, y in places), max(y for _, y in places)
    assert [y for _, y in sorted(places)] == [top, top, bottom, top]
    assert bottom - top > 100
    assert crosses(draw_lines("loss", [Line("loss", [0, 1], [1.0, 2.0])])) == []


def test_a_line_of_nan_alone_and_a_single_point() -> None:
    assert len(crosses(draw_lines("a", [Line("a", [0, 1, 2], [NAN] * 3)], log=True))) == 3
    single = draw_lines("a", [Line("a", [5], [1.0])])
    assert single.caption == ""
    assert "NaN" not in single.svg
    for values, dots in (([NAN, 1.0, NAN], 1), ([1.0, 2.0, NAN], 0), ([NAN, NAN, NAN], 0), ([1.0, NAN, 2.0], 2)):
        values = [*values, *[NAN] * 60]  # a line with few points has a dot at each
        figure = draw_lines("a", [Line("a", range(63), values)])
        assert len(re.findall(r"<use [^>]*fill: #3b7dd8", figure.svg)) == dots


def test_a_logarithmic_axis_marks_what_is_not_above_zero() -> None:
    line = Line("grad_norm", range(5), [1.0, 1000.0, 0.0, -1.0, 5e-324])
    assert "2 zero or less, first at step 2" in draw_lines("a", [line], log=True).caption
    assert draw_lines("a", [line]).caption == ""
    assert draw_lines("a", [Line("a", [0, 1], [2.0, 3.0])], log=True).caption == ""
    assert draw_lines("a", [Line("a", [0, 1], [0.0, -3.0])], log=True).caption == ""


def test_a_long_line_keeps_its_extremes() -> None:
    steps, values = np.arange(10000.0), np.sin(np.arange(10000.0))
    values[1234], values[777], values[5000:5100] = 50.0, -40.0, NAN
    at, low, mean, high = envelope(steps, values, span_of(steps))
    assert len(at) == 400
    assert (np.nanmax(high), np.nanmin(low)) == (50.0, -40.0)
    assert np.isnan(mean).sum() == 4  # of 25 values each, without any
    there = np.isfinite(mean)
    assert (low[there] <= mean[there]).all()
    assert (mean[there] <= high[there]).all()
    assert (np.diff(at) > 0).all()
    order = np.random.default_rng(0).permutation(len(steps))
    for once, again in zip((at, low, mean, high), envelope(steps[order], values[order], span_of(steps)), strict=True):
        np.testing.assert_allclose(once, again, atol=1e-12)


def test_a_long_line_is_small_and_says_so() -> None:
    steps = np.arange(143_000)
    values = np.random.default_rng(0).normal(size=len(steps))
    values[::7] = NAN
    figure = draw_lines("loss", [Line("loss", steps, values)])
    assert len(figure.svg) < 120_000
    assert "143,000 points are drawn as 400" in figure.caption
    assert "20,429 nan" in figure.caption


def test_the_legend_names_the_lines_and_the_best() -> None:
    lines = [Line("a", [0, 1], [1.0, 2.0]), Line("b", [0, 1], [1.0, 0.5], 9)]
    assert [name for _, name in draw_lines("x", lines, best=(1, 0.5)).legend] == ["a", "b", "best 0.5 at step 1"]
    assert draw_lines("x", lines[:1]).legend == []


@pytest.mark.parametrize("number", [1, 12, 5000])
def test_a_map_of_codebooks(number: int) -> None:
    steps = np.arange(float(number))
    rows = {str(k): (steps, np.full(number, 3.0 + k)) for k in range(8)}
    figure = draw_map("codebooks", rows, span_of(steps))
    assert "0  3.000" in figure.svg
    assert "7  10.000" in figure.svg
    assert "not finite" not in figure.caption
    assert len(figure.svg) < 60_000
    rows["3"][1][:] = NAN
    assert "not finite" in draw_map("codebooks", rows, span_of(steps)).caption


def test_a_time_line_counts_its_events() -> None:
    figure = draw_time_line("events", {"skip <i>": range(5000), "save": [10, 20]}, (0, 5000), ["skip <i>"])
    assert "skip &lt;i&gt; 5,000" in figure.svg
    assert "save 2" in figure.svg
    assert figure.svg.count("<use") < 450
