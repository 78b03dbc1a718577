"""Figures that are no lines: a map of the losses of codebooks, and events on a time line."""

from collections.abc import Mapping, Sequence
from typing import Any

from rawloop.report.page import Figure
from rawloop.report.plots import (
    ALARM,
    BOTTOM,
    COLORS,
    HUGE,
    PIXELS,
    RIGHT,
    TOP,
    WIDTH,
    Span,
    as_svg,
    drawing_of,
    envelope,
)

ROW, MAP_LEFT, MAP_BOTTOM, NAMES_LEFT = 0.3, 1.0, 0.9, 1.6  # inches
BRIGHTEST = 80  # percent of the values: the first ones are so high that they would take all colors
NAN_COLOR = "#c7424f"


def draw_map(title: str, rows: Mapping[str, tuple[Any, Any]], span: Span) -> Figure:
    """Draw one row of colors per name: its value over steps. Each row names its last value.

    Args:
        title: above the figure.
        rows: name -> (steps, values), (points,) each; at least one.
        span: the first and last step of the axis.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    drawn = {}
    for name, (steps, values) in rows.items():
        shown = np.where(np.isfinite(values) & (np.abs(values) < HUGE), values, np.nan)
        drawn[name] = envelope(steps, shown, span)[::2] if len(steps) > 2 * PIXELS else (steps, shown)
    every = np.concatenate([values for _, values in drawn.values()])
    there = every[np.isfinite(every)]
    low, high = np.percentile(there, (0, BRIGHTEST)) if len(there) else (0.0, 1.0)
    scale = Normalize(low, high)
    height = ROW * len(rows) + MAP_BOTTOM + TOP
    with drawing_of(span, height, MAP_LEFT, MAP_BOTTOM) as (drawing, axes):
        colors = colormaps["viridis"].with_extremes(bad=NAN_COLOR)
        for row, (steps, values) in enumerate(drawn.values()):
            edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
            edges[0], edges[-1] = min(edges[0], span[0]), max(edges[-1], span[1])
            image = axes.pcolormesh(
                edges, [row - 0.5, row + 0.5], values[None], cmap=colors, norm=scale, rasterized=True
            )
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_yticks(range(len(rows)), [f"{name}  {values[-1]:.3f}" for name, (_, values) in rows.items()])
        place = MAP_LEFT / WIDTH, 0.3 / height, 1 - (MAP_LEFT + RIGHT) / WIDTH, 0.12 / height
        drawing.colorbar(image, cax=drawing.add_axes(place), orientation="horizontal", extend="max")
        svg = as_svg(drawing)
    bad = "" if len(there) == len(every) else " Red is a value that is not finite."
    bright = f"The brightest color is {high:.4g} and above."
    return Figure(title, svg, caption=f"Nats per target; a row is a codebook, with its last value. {bright}{bad}")


def draw_time_line(title: str, rows: Mapping[str, Sequence[int]], span: Span, alarms: Sequence[str] = ()) -> Figure:
    """Draw a row of marks per kind of event, at the steps of its events; the kinds `alarms` in the alarm's color."""
    import numpy as np

    with drawing_of(span, ROW * len(rows) + BOTTOM + TOP, NAMES_LEFT) as (drawing, axes):
        for row, (name, steps) in enumerate(rows.items()):
            at = np.unique(np.asarray(steps, float)) if len(steps) < PIXELS else _thinned(steps, span)
            color = ALARM if name in alarms else COLORS[row % len(COLORS)]
            axes.plot(at, np.full(len(at), row), "|", color=color, markersize=14, markeredgewidth=2, clip_on=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [f"{name} {len(steps):,}" for name, steps in rows.items()])
        return Figure(title, as_svg(drawing))


def _thinned(steps: Sequence[int], span: Span) -> Any:
    """Return one step for each pixel that has any."""
    import numpy as np

    at = np.asarray(steps, float)
    return envelope(at, at, span)[0]
