"""Which metrics go into which figure, for one run and for several."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rawloop.report.page import Figure, Note, Section
from rawloop.report.plots import Line, Span, draw_lines, draw_map, draw_time_line
from rawloop.report.runs import RunData, Series

LOSS = re.compile(r"(?:eval_)?loss(?:/([^/]+))?")
CODEBOOK = re.compile(r"(eval_)?loss/(.+)/(\d+)")
NOT_DRAWN = re.compile(r"epoch|skipped|eval_targets/.*")
KNOWN = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "loss_scale": "Loss scale",
    "samples_per_second": "Samples per second",
    "tokens_per_second": "Tokens per second, without padding",
    "audio_seconds_per_second": "Seconds of audio per second",
    "padding": "Share of positions that are padding",
    "mfu": "Model FLOPs utilisation (MFU)",
    "step_seconds": "Seconds per step",
    "data_wait": "Share of time waiting for data",
    "eval_seconds": "Seconds per evaluation",
}
LOGARITHMIC = ("grad_norm", "loss_scale")
EVENTS = ("start", "restore", "fallback", "skip", "finding", "capsule", "bad_sample", "warning", "save", "best", "stop")
ALARMS = ("skip", "finding", "bad_sample")
MOST_OTHERS = 30


class Panel(NamedTuple):
    """A figure of metrics that are drawn together."""

    title: str
    metrics: Sequence[str]


def panels(names: Iterable[str]) -> dict[str, list[Panel]]:
    """Return the panels by section: of the loss and each stream, of training and memory, and of all other metrics."""
    there = list(names)
    losses: dict[str, list[str]] = {}
    for name in there:
        if found := LOSS.fullmatch(name):
            losses.setdefault(found[1] or "", []).append(name)
    streams = [Panel(f"Loss of '{s}'" if s else "Loss, all streams", sorted(losses[s])[::-1]) for s in sorted(losses)]
    training = [name for name in KNOWN if name in there] + [name for name in there if "memory" in name]
    taken = {*training, *(name for panel in streams for name in panel.metrics)}
    hidden = [name for name in there if NOT_DRAWN.fullmatch(name) or CODEBOOK.fullmatch(name)]
    others = [name for name in there if name not in taken and name not in hidden]
    found_panels = {"Losses": streams}
    for title, metrics in (("Training", training), ("Other metrics", others)):
        found_panels[title] = [Panel(KNOWN.get(name, name), [name]) for name in metrics]
    return found_panels


def figures(runs: Mapping[str, RunData]) -> list[Section]:
    """Return the sections with figures. Of several runs, each metric has a figure, with a line for each run."""
    names = dict.fromkeys(name for run in runs.values() for name in run.series)
    span = (0.0, max(run.span[1] for run in runs.values()))
    sections = []
    for title, found in panels(names).items():
        if len(runs) > 1:
            found = [Panel(name, [name]) for panel in found for name in panel.metrics]
        drawn, notes = [_draw(panel, runs, span) for panel in found[:MOST_OTHERS]], []
        if len(found) > MOST_OTHERS:
            notes = [Note(f"{len(found) - MOST_OTHERS:,} more metrics are in metrics.jsonl.")]
        for name, run in runs.items():
            label = f" of {name}" if len(runs) > 1 else ""
            if title == "Losses":
                drawn += _codebook_maps(run, label)
            elif title == "Training":
                drawn += _time_line(run, f"Events{label}")
        sections.append(Section(title, notes, drawn))
    return sections


def _draw(panel: Panel, runs: Mapping[str, RunData], span: Span) -> Figure:
    """Draw the metrics of one run, with the best evaluation marked, or one metric of several runs."""
    several = len(runs) > 1
    lines = [
        Line(label if several else name, *run.series[name], place + color)
        for place, (label, run) in enumerate(runs.items())
        for color, name in enumerate(panel.metrics)
        if name in run.series
    ]
    best = None if several else _best_of(panel, next(iter(runs.values())))
    log = set(panel.metrics) <= set(LOGARITHMIC)
    return draw_lines(panel.title, lines, span=span, log=log, best=best, legend=several)


def _best_of(panel: Panel, run: RunData) -> Span | None:
    """Return step and value of a panel's evaluation loss where the run was best."""
    for name in panel.metrics:
        if name.startswith("eval_loss"):
            steps, values = run.series[name]
            at = (steps == run.best.get("step")).nonzero()[0]
            return (float(steps[at[-1]]), float(values[at[-1]])) if len(at) else None
    return None


def _codebook_maps(run: RunData, label: str) -> list[Figure]:
    """Draw a map for each stream with codebooks, of the training and of the evaluation loss."""
    maps: dict[str, dict[str, Series]] = {}
    for name, series in run.series.items():
        if found := CODEBOOK.fullmatch(name):
            title = f"{'Evaluation loss' if found[1] else 'Loss'} of '{found[2]}' by codebook{label}"
            maps.setdefault(title, {})[found[3]] = series
    ordered = sorted(maps.items(), key=lambda one: one[0].startswith("Eval"))
    return [draw_map(title, {book: rows[book] for book in sorted(rows, key=int)}, run.span) for title, rows in ordered]


def _time_line(run: RunData, title: str) -> list[Figure]:
    """Draw all events of a run on one time line; none if there are none."""
    rows = {kind: [max(0, event["step"]) for event in run.of_kind(kind)] for kind in EVENTS}
    rows = {kind: steps for kind, steps in rows.items() if steps}
    return [draw_time_line(title, rows, run.span, ALARMS)] if rows else []
