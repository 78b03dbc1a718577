"""Figures: lines over steps, a map of codebooks, and marks on a time line, as SVG in the colors of the page.

No value is hidden. A nan or an infinity is a mark at the edge of its figure. Where a line has more points than the
figure has pixels, a band from the least to the greatest value of each pixel is drawn, with the mean inside.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from rawloop.report.page import Figure

COLORS = ("#3b7dd8", "#d9622b", "#2e9e6b", "#b8479e", "#a08000", "#7068d8", "#c7424f", "#3f8f9f")
NAN_COLOR = COLORS[6]  # in a map
INK, LINE, ALARM = "#010203", "#040506", "#070809"  # stand for colors of the page, which a dark page changes
OF_THE_PAGE = {INK: "currentColor", LINE: "var(--line)", ALARM: "var(--alarm)"}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and selectable
    "svg.hashsalt": "rawloop",  # the same run gives the same page
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "lines.linewidth": 1.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), INK),
}
DOTS = 72  # units of the drawing per inch
# Sizes are in inches; on a phone, a unit is a pixel. To place axes by measure takes as long as all the rest.
WIDTH, HEIGHT, RIGHT, TOP = 5.0, 2.5, 0.14, 0.1
LEFT, BOTTOM = 0.8, 0.36
ROW, MAP_LEFT, MAP_BOTTOM, NAMES_LEFT = 0.3, 1.0, 0.9, 1.6  # of maps and time lines
PIXELS = 400  # a line has at most twice as many points
BARS = 40  # of a histogram, at most
FEW = 60  # every point of a line with fewer is a dot
HUGE = 1e150  # beyond it, the scale of an axis overflows
SPIKE = 20.0  # if the greatest value is so many times the median, the axis is logarithmic
BRIGHTEST = 80  # percent of the values of a map: the first ones are so high that they would take all colors

Span = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values over steps, (points,) each; `color` is an index into COLORS."""

    name: str
    steps: ArrayLike
    values: ArrayLike
    color: int = 0


def span_of(steps: Any) -> Span:
    """Return the first and last of some steps, (points,), as the axis of figures; it is never of length zero."""
    first, last = min(steps), max(steps)
    return first, max(last, first + 1)


def draw_lines(
    title: str,
    lines: Sequence[Line],
    *,
    span: Span | None = None,
    log: bool = False,
    best: Span | None = None,
    legend: bool = False,
) -> Figure:
    """Draw lines into one figure.

    Args:
        title: above the figure.
        lines: at least one.
        span: the first and last step of the axis; default: those of the lines.
        log: a logarithmic axis, if the values span more than a factor of ten. Values with a spike get one anyway.
        best: the step and value of a point to mark.
        legend: name a single line too.
    """
    said: list[str] = []
    arrays = [(line, np.asarray(line.steps, float), np.asarray(line.values, float)) for line in lines]
    span = span or span_of(np.concatenate([steps for _, steps, _ in arrays]))
    with _drawing(span) as (drawing, axes):
        log = _make_log(axes, np.concatenate([values for _, _, values in arrays]), log)
        for line, steps, values in arrays:
            said += _draw_line(axes, line, steps, values, span, log)
        if best is not None and abs(best[1]) < HUGE:
            axes.axvline(best[0], color=LINE, linestyle="--")
            axes.plot(*best, "*", color=COLORS[2], markersize=12, clip_on=False)
        svg = _as_svg(drawing)
    legend = legend or len(lines) > 1 or best is not None
    names = [(COLORS[line.color % len(COLORS)], line.name) for line in lines if legend]
    names += [(COLORS[2], f"best {best[1]:.4g} at step {best[0]:,.0f}")] if best else []
    return Figure(title, svg, names, " ".join(dict.fromkeys(said)))


def _make_log(axes: Axes, values: Any, wanted: bool) -> bool:
    """Give the axes a logarithmic scale if it is wanted or needed. Return whether they have one."""
    there = values[np.isfinite(values)]
    has_spike = len(there) and (there > 0).all() and there.max() > SPIKE * np.median(there)
    above = there[(there > 0) & (there < HUGE)]
    decades = np.log10(above.max()) - np.log10(above.min()) if len(above) else 0.0
    if decades < 1 or not (wanted or has_spike):
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _draw_line(axes: Axes, line: Line, steps: Any, values: Any, span: Span, log: bool) -> Iterator[str]:
    """Draw a line, and yield what its caption must say."""
    color = COLORS[line.color % len(COLORS)]
    shown = np.isfinite(values) & (np.abs(values) < HUGE)
    if log:
        shown &= values > 0
    yield from _draw_hidden(axes, line.name, steps[~shown], values[~shown], span)
    values, number = np.where(shown, values, np.nan), len(steps)
    if number > 2 * PIXELS:
        steps, low, values, high = envelope(steps, values, span)
        axes.fill_between(steps, low, high, color=color, alpha=0.3, linewidth=0)
        yield f"{number:,} points are drawn as {len(steps)}: a band from least to greatest, the mean inside."
    padded = np.isfinite(np.concatenate(([np.nan], values, [np.nan])))
    alone = padded[1:-1] & ~padded[:-2] & ~padded[2:]
    axes.plot(steps, values, color=color, marker="." if number < FEW else None)
    axes.plot(steps[alone], values[alone], ".", color=color, markersize=8, clip_on=False)


def _draw_hidden(axes: Axes, name: str, steps: Any, values: Any, span: Span) -> Iterator[str]:
    """Mark the values that have no place on the axis at its edges."""
    if not len(steps):
        return
    edges = np.where((values <= 0) | (values == -np.inf), 0.03, 0.97)
    marks = np.unique(np.stack([_pixels(steps, span), edges]), axis=1)
    at = span[0] + (marks[0] + 0.5) / PIXELS * (span[1] - span[0])
    axes.plot(at, marks[1], "x", color=ALARM, transform=axes.get_xaxis_transform(), clip_on=False)
    kinds = ["nan" if v != v else "inf" if v >= HUGE else "-inf" if v <= -HUGE else "zero or less" for v in values]
    counts = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))
    yield f"An x marks values of {name} without a place on the axis: {counts}, first at step {steps.min():,.0f}."


def _pixels(steps: Any, span: Span) -> Any:
    """Return the pixel of each step, from 0 to PIXELS - 1."""
    return np.clip(((steps - span[0]) / (span[1] - span[0]) * PIXELS).astype(int), 0, PIXELS - 1)


def envelope(steps: Any, values: Any, span: Span) -> tuple[Any, Any, Any, Any]:
    """Return mean step, least, mean and greatest value of each pixel that has points; nan where all values are.

    Args:
        steps: (points,), in any order.
        values: (points,); nan where there is no value.
        span: the first and last step of the axis.
    """
    pixels = _pixels(steps, span)
    order = np.argsort(pixels, kind="stable")
    pixels, steps, values = pixels[order], steps[order], values[order]
    starts = np.flatnonzero(np.diff(pixels, prepend=-1))
    sizes = np.diff(starts, append=len(pixels))
    there = np.isfinite(values)
    counts = np.add.reduceat(there.astype(float), starts)
    sums = np.add.reduceat(np.where(there, values, 0.0), starts)
    mean = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    return np.add.reduceat(steps, starts) / sizes, low, mean, high


def draw_histogram(title: str, values: Sequence[float], unit: str) -> Figure:
    """Draw how often values occur, (values,) and all finite. The caption has the least, the median and the greatest."""
    array = np.asarray(values, float)
    counts, edges = np.histogram(array, bins=min(BARS, max(5, len(np.unique(array)))))
    low, high = float(edges[0]), float(edges[-1])
    with _drawing((low, high)) as (drawing, axes):
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=COLORS[0], edgecolor="none")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        svg = _as_svg(drawing)
    three = (array.min(), float(np.median(array)), array.max())
    least, middle, greatest = (f"{value:.4g}" for value in three)
    return Figure(title, svg, caption=f"{unit}: least {least}, median {middle}, greatest {greatest}")


def draw_map(title: str, rows: Mapping[str, tuple[Any, Any]], span: Span) -> Figure:
    """Draw one row of colors per name: its value over steps. Each row names its last value.

    Args:
        title: above the figure.
        rows: name -> (steps, values), (points,) each; at least one.
        span: the first and last step of the axis.
    """
    drawn = []
    for steps, values in rows.values():
        shown = np.where(np.isfinite(values) & (np.abs(values) < HUGE), values, np.nan)
        drawn.append(envelope(steps, shown, span)[::2] if len(steps) > 2 * PIXELS else (steps, shown))
    every = np.concatenate([values for _, values in drawn])
    there = every[np.isfinite(every)]
    low, high = np.percentile(there, (0, BRIGHTEST)) if len(there) else (0.0, 1.0)
    colors: Any = {"cmap": colormaps["viridis"].with_extremes(bad=NAN_COLOR), "norm": Normalize(low, high)}
    height = ROW * len(rows) + MAP_BOTTOM + TOP
    with _drawing(span, height, MAP_LEFT, MAP_BOTTOM) as (drawing, axes):
        for row, (steps, values) in enumerate(drawn):
            edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
            edges[0], edges[-1] = min(edges[0], span[0]), max(edges[-1], span[1])
            image = axes.pcolormesh(edges, [row - 0.5, row + 0.5], values[None], rasterized=True, **colors)
        axes.grid(visible=False)
        _name_rows(axes, [f"{name}  {values[-1]:.3f}" for name, (_, values) in rows.items()])
        place = MAP_LEFT / WIDTH, 0.3 / height, 1 - (MAP_LEFT + RIGHT) / WIDTH, 0.12 / height
        drawing.colorbar(image, cax=drawing.add_axes(place), orientation="horizontal", extend="max")
        svg = _as_svg(drawing)
    bad = "" if len(there) == len(every) else " Red is a value that is not finite."
    bright = f"The brightest color is {high:.4g} and above."
    return Figure(title, svg, caption=f"Nats per target; a row is a codebook, with its last value. {bright}{bad}")


def draw_time_line(title: str, rows: Mapping[str, Sequence[int]], span: Span, alarms: Sequence[str] = ()) -> Figure:
    """Draw a row of marks per kind of event, at the steps of its events; the kinds `alarms` in the alarm's color."""
    with _drawing(span, ROW * len(rows) + BOTTOM + TOP, NAMES_LEFT) as (drawing, axes):
        for row, (name, steps) in enumerate(rows.items()):
            at = np.unique(np.asarray(steps, float))
            at = envelope(at, at, span)[0] if len(at) > PIXELS else at
            color = ALARM if name in alarms else COLORS[row % len(COLORS)]
            axes.plot(at, np.full(len(at), row), "|", color=color, markersize=14, markeredgewidth=2, clip_on=False)
        _name_rows(axes, [f"{name} {len(steps):,}" for name, steps in rows.items()])
        return Figure(title, _as_svg(drawing))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)


@contextmanager
def _drawing(
    span: Span, height: float = HEIGHT, left: float = LEFT, bottom: float = BOTTOM
) -> Iterator[tuple[Drawing, Axes]]:
    """Give a figure with one pair of axes over steps, in the style of the page; sizes in inches."""
    with rc_context(STYLE):
        drawing = Drawing(figsize=(WIDTH, height), dpi=DOTS)
        axes = drawing.subplots()
        drawing.subplots_adjust(left / WIDTH, bottom / height, 1 - RIGHT / WIDTH, 1 - TOP / height)
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axes.set_xlim(*span)
        yield drawing, axes


def _as_svg(drawing: Drawing) -> str:
    """Return a figure as an SVG element without prolog, without names of sites, in the colors of the page."""
    out = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawing.savefig(out, format="svg", dpi=2 * DOTS, transparent=True, metadata=metadata)
    text = out.getvalue()
    head, bracket, rest = text[text.index("<svg") :].partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    for color, of_the_page in OF_THE_PAGE.items():
        rest = rest.replace(color, of_the_page)
    rest = re.sub(r"\n +", "\n", rest)
    return f'<svg viewBox="{box}" role="img"{bracket}{rest}'
