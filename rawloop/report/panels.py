"""Which metrics go into which figure, for one run and for several."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rawloop.report.marks import draw_map, draw_time_line
from rawloop.report.page import Figure
from rawloop.report.plots import COLORS, Line, Span, draw_lines
from rawloop.report.runs import RunData, Series

CODEBOOK = re.compile(r"(eval_)?loss/(.+)/(\d+)")
NOT_DRAWN = re.compile(r"epoch|skipped|eval_targets/.*")
KNOWN = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "loss_scale": "Loss scale",
    "samples_per_second": "Samples per second",
}
LOGARITHMIC = ("grad_norm", "loss_scale")
ROWS = ("start", "restore", "fallback", "skip", "finding", "capsule", "bad_sample", "warning", "save", "best", "stop")
ALARMS = ("skip", "finding", "bad_sample")
SPIKE = 20.0  # if the greatest loss is so many times the median, the axis is logarithmic
MOST_OTHERS = 30


@dataclass(frozen=True)
class Panel:
    """A figure of metrics that are drawn together."""

    title: str
    metrics: Sequence[str]


def loss_panels(names: Iterable[str]) -> list[Panel]:
    """Return a panel for the loss, and one for each stream."""
    pairs: dict[str, list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(?:eval_)?loss(?:/([^/]+))?", name)
        if found:
            pairs.setdefault(found[1] or "", []).append(name)
    ordered = sorted(pairs.items(), key=lambda pair: pair[0] != "")
    return [Panel(f"Loss of '{s}'" if s else "Loss, all streams", sorted(found)[::-1]) for s, found in ordered]


def training_panels(names: Iterable[str]) -> list[Panel]:
    """Return a panel for each known metric of training, and for each of memory."""
    there = list(names)
    known = [Panel(title, [name]) for name, title in KNOWN.items() if name in there]
    return known + [Panel(name, [name]) for name in there if "memory" in name]


def other_panels(names: Iterable[str]) -> list[Panel]:
    """Return a panel for each metric that no other panel has."""
    there = list(names)
    taken = {name for panel in [*loss_panels(there), *training_panels(there)] for name in panel.metrics}
    return [
        Panel(name, [name])
        for name in there
        if name not in taken and not NOT_DRAWN.fullmatch(name) and not CODEBOOK.fullmatch(name)
    ]


def draw_panel(panel: Panel, run: RunData) -> Figure:
    """Draw the metrics of a panel, with the best evaluation marked."""
    lines = [
        Line(name, *run.series[name], color, dots=len(run.series[name].steps) < 60)
        for color, name in enumerate(panel.metrics)
    ]
    losses = [name for name in panel.metrics if name.startswith("eval_loss")]
    best = next((mark for name in losses if (mark := _best_of(run, name))), None)
    return draw_lines(panel.title, lines, span=run.span, log=_is_log(panel.metrics, [run]), best=best)


def draw_overlay(name: str, runs: Mapping[str, RunData], span: Span) -> Figure:
    """Draw one metric of several runs; each has the color of its place."""
    lines = [
        Line(label, *run.series[name], color, dots=len(run.series[name].steps) < 60)
        for color, (label, run) in enumerate(runs.items())
        if name in run.series
    ]
    figure = draw_lines(name, lines, span=span, log=_is_log([name], list(runs.values())))
    legend = figure.legend or [(COLORS[line.color], line.name) for line in lines]
    return Figure(figure.title, figure.svg, legend, figure.caption)


def codebook_maps(run: RunData, label: str = "") -> list[Figure]:
    """Draw a map for each stream with codebooks, of the training and of the evaluation loss."""
    maps: dict[str, dict[str, Series]] = {}
    for name, series in run.series.items():
        if found := CODEBOOK.fullmatch(name):
            title = f"{'Evaluation loss' if found[1] else 'Loss'} of '{found[2]}' by codebook{label}"
            maps.setdefault(title, {})[found[3]] = series
    ordered = sorted(maps.items(), key=lambda one: one[0].startswith("Eval"))
    return [
        draw_map(title, dict(sorted(rows.items(), key=lambda row: int(row[0]))), run.span) for title, rows in ordered
    ]


def time_line(run: RunData, title: str = "Events") -> list[Figure]:
    """Draw all events of a run on one time line; none if there are none."""
    rows = {kind: [max(0, event["step"]) for event in run.of_kind(kind)] for kind in ROWS}
    rows = {kind: steps for kind, steps in rows.items() if steps}
    return [draw_time_line(title, rows, run.span, ALARMS)] if rows else []


def _best_of(run: RunData, name: str) -> Span | None:
    """Return step and value of an evaluation metric where the run was best."""
    steps, values = run.series[name]
    at = (steps == run.best.get("step")).nonzero()[0]
    return (float(steps[at[-1]]), float(values[at[-1]])) if len(at) else None


def _is_log(names: Sequence[str], runs: Sequence[RunData]) -> bool:
    import numpy as np

    if set(names) <= set(LOGARITHMIC):
        return True
    values = np.concatenate([run.series[name].values for run in runs for name in names if name in run.series])
    there = values[np.isfinite(values)]
    return bool(len(there) and (there > 0).all() and there.max() > SPIKE * np.median(there))
