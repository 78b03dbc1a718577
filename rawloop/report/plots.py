"""Figures: lines over steps, a map of codebooks, and marks on a time line, as SVG in the colors of the page.

No value is hidden. A nan or an infinity is a mark at the edge of its figure. Where a line has more points than the
figure has pixels, a band from the least to the greatest value of each pixel is drawn, with the mean inside.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from rawloop.report.page import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from numpy.typing import ArrayLike

COLORS = ("#3b7dd8", "#d9622b", "#2e9e6b", "#b8479e", "#a08000", "#7068d8", "#c7424f", "#3f8f9f")
INK, LINE, ALARM = "#010203", "#040506", "#070809"  # stand for colors of the page, which a dark page changes
OF_THE_PAGE = {INK: "currentColor", LINE: "var(--line)", ALARM: "var(--alarm)"}
DOTS = 72  # units of the drawing per inch
WIDTH, HEIGHT = 5.0, 2.5  # inches: on a phone, a unit is a pixel
LEFT, RIGHT, TOP, BOTTOM = 0.8, 0.14, 0.1, 0.36  # inches around the axes: a layout by measure takes as long as the rest
PIXELS = 400  # a line has at most twice as many points
HUGE = 1e150  # beyond it, the scale of an axis overflows


@dataclass(frozen=True)
class Line:
    """Values over steps, (points,) each; `color` is an index into COLORS. `dots` marks every point."""

    name: str
    steps: "ArrayLike"
    values: "ArrayLike"
    color: int = 0
    dots: bool = False


Span = tuple[float, float]


def span_of(steps: Any) -> Span:
    """Return the first and last of some steps, (points,), as the axis of figures; it is never of length zero."""
    first, last = (min(steps), max(steps)) if len(steps) else (0.0, 0.0)
    return first, max(last, first + 1)


def draw_lines(
    title: str, lines: Sequence[Line], *, span: Span | None = None, log: bool = False, best: Span | None = None
) -> Figure:
    """Draw lines into one figure.

    Args:
        title: above the figure.
        lines: at least one.
        span: the first and last step of the axis; default: those of the lines.
        log: a logarithmic axis, if the values span more than a factor of ten.
        best: the step and value of a point to mark.
    """
    import numpy as np

    said: list[str] = []
    arrays = [(line, np.asarray(line.steps, float), np.asarray(line.values, float)) for line in lines]
    span = span or span_of(np.concatenate([steps for _, steps, _ in arrays]))
    with drawing_of(span) as (drawing, axes):
        log = log and _make_log(axes, np.concatenate([values for _, _, values in arrays]))
        for line, steps, values in arrays:
            said += _draw_line(axes, line, steps, values, span, log)
        if best is not None and abs(best[1]) < HUGE:
            axes.axvline(best[0], color=LINE, linestyle="--")
            axes.plot(*best, "*", color=COLORS[2], markersize=12, clip_on=False)
        svg = as_svg(drawing)
    legend = [(COLORS[line.color % len(COLORS)], line.name) for line in lines] if len(lines) > 1 or best else []
    legend += [(COLORS[2], f"best {best[1]:.4g} at step {best[0]:,.0f}")] if best else []
    return Figure(title, svg, legend, " ".join(dict.fromkeys(said)))


def _make_log(axes: "Axes", values: Any) -> bool:
    """Give the axes a logarithmic scale if the values above zero span a factor of ten. Return whether they do."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    above = values[np.isfinite(values) & (values > 0) & (values < HUGE)]
    decades = np.log10(above.max()) - np.log10(above.min()) if len(above) else 0.0
    if decades < 1:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    return True


def _draw_line(axes: "Axes", line: Line, steps: Any, values: Any, span: Span, log: bool) -> Iterator[str]:
    """Draw a line, and yield what its caption must say."""
    import numpy as np

    color = COLORS[line.color % len(COLORS)]
    shown = np.isfinite(values) & (np.abs(values) < HUGE)
    if log:
        shown &= values > 0
    yield from _draw_hidden(axes, line.name, steps[~shown], values[~shown], span)
    values = np.where(shown, values, np.nan)
    if len(steps) > 2 * PIXELS:
        number = len(steps)
        steps, low, values, high = envelope(steps, values, span)
        axes.fill_between(steps, low, high, color=color, alpha=0.3, linewidth=0)
        yield f"{number:,} points are drawn as {len(steps)}: a band from least to greatest, the mean inside."
    padded = np.isfinite(np.concatenate(([np.nan], values, [np.nan])))
    alone = padded[1:-1] & ~padded[:-2] & ~padded[2:]
    axes.plot(steps, values, color=color, marker="." if line.dots else None)
    axes.plot(steps[alone], values[alone], ".", color=color, markersize=8, clip_on=False)


def _draw_hidden(axes: "Axes", name: str, steps: Any, values: Any, span: Span) -> Iterator[str]:
    """Mark the values that have no place on the axis at its edges."""
    import numpy as np

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
    import numpy as np

    return np.clip(((steps - span[0]) / (span[1] - span[0]) * PIXELS).astype(int), 0, PIXELS - 1)


def envelope(steps: Any, values: Any, span: Span) -> tuple[Any, Any, Any, Any]:
    """Return mean step, least, mean and greatest value of each pixel that has points; nan where all values are.

    Args:
        steps: (points,), in any order.
        values: (points,); nan where there is no value.
        span: the first and last step of the axis.
    """
    import numpy as np

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


@contextmanager
def drawing_of(
    span: Span, height: float = HEIGHT, left: float = LEFT, bottom: float = BOTTOM
) -> "Iterator[tuple[Drawing, Axes]]":
    """Give a figure with one pair of axes over steps, in the style of the page; sizes in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing
    from matplotlib.ticker import MaxNLocator

    style: Any = {
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
    with rc_context(style):
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


def as_svg(drawing: "Drawing") -> str:
    """Return a figure as an SVG element without prolog, without names of sites, in the colors of the page."""
    out = StringIO()
    drawing.savefig(
        out, format="svg", dpi=2 * DOTS, transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = out.getvalue()
    head, bracket, rest = text[text.index("<svg") :].partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    for color, of_the_page in OF_THE_PAGE.items():
        rest = rest.replace(color, of_the_page)
    rest = re.sub(r"\n +", "\n", rest)
    return f'<svg viewBox="{box}" role="img"{bracket}{rest}'
