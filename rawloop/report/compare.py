"""The page of several runs: which settings differ, where the losses part, and all curves over each other."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rawloop.errors import UserError
from rawloop.report.outcome import ended
from rawloop.report.page import Note, Section, Table, render
from rawloop.report.panels import MOST_OTHERS, figures, panels
from rawloop.report.plots import COLORS
from rawloop.report.runs import CONFIG, RunData, read_run

Runs = Mapping[str, RunData]
OF_THE_FOLDER = ("output", "resume")  # settings that differ between any two runs
OF_THE_START = ("world_size", "device", "torch", "transformers", "peft")


def compare(folders: Sequence[Path], running: Sequence[bool | None]) -> str:
    """Return the page of several runs. The first is the one that the others are compared with.

    Args:
        folders: the run folders, two to eight.
        running: for each, whether a process trains it now; None if that is not known.

    Raises:
        UserError: too few or too many folders, one twice, or one that is no run.
    """
    if not 2 <= len(folders) <= len(COLORS):
        raise UserError(f"--compare has {len(folders)} run(s): name 2 to {len(COLORS)} run folders")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"--compare names a run twice: {', '.join(map(str, folders))}")
    read = [read_run(folder) for folder in folders]
    names = [run.name for run in read]
    runs = {run.name if names.count(run.name) == 1 else str(run.folder): run for run in read}
    ends = {name: ended(run, is_running) for (name, run), is_running in zip(runs.items(), running, strict=True)}
    lead = [Note(f"{note.head} {note.text}", note.tone, f"{name}:") for name, note in ends.items()]
    lead += [Note(text, "warning", "Not read:") for run in read for text in run.unreadable]
    sections = [Section("Where the losses part", list(_partings(runs))), Section("Values", tables=[_values(runs)])]
    sections += [_settings(runs), *figures(runs)]
    return render(f"{len(runs)} runs: {', '.join(runs)}", sections, lead)


def _partings(runs: Runs) -> Iterator[Note]:
    """Yield, for every run but the first, the first step at which a loss is not bitwise that of the first run."""
    (first, reference), *others = runs.items()
    expected = _losses(reference)
    for name, run in others:
        found = _losses(run)
        common = [place for place in expected if place in found]
        apart = [place for place in common if not _equal(expected[place], found[place])]
        if not common:
            yield Note(f"no step has a loss in both this run and {first}.", "warning", f"{name}:")
        elif not apart:
            yield Note(f"bit for bit the losses of {first}, up to step {max(common)[0]:,}.", "good", f"{name}:")
        else:
            step, loss = min(apart)
            numbers = f"{found[step, loss]!r}, not {expected[step, loss]!r}"
            more = f"; {len(apart):,} of {len(common):,} losses in common differ"
            yield Note(f"first apart from {first} at step {step:,}: {loss} is {numbers}{more}.", head=f"{name}:")


def _losses(run: RunData) -> dict[tuple[int, str], float]:
    """Return the losses of a run by step and name; of a step that was logged twice, the later ones."""
    return {
        (int(step), name): value
        for name, (steps, values) in run.series.items()
        if name.removeprefix("eval_").split("/")[0] == "loss"
        for step, value in zip(steps.tolist(), values.tolist(), strict=True)
    }


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _values(runs: Runs) -> Table:
    """Return the final and best values of all runs, a column for each."""
    rows: list[list[object]] = [["steps", *(run.last_step for run in runs.values())]]
    rows.append(["updates skipped", *(len(run.of_kind("skip")) for run in runs.values())])
    rows.append(["fallbacks", *(len(run.of_kind("fallback")) for run in runs.values())])
    rows.append(["best evaluation", *(_best(run) for run in runs.values())])
    for found in panels(dict.fromkeys(name for run in runs.values() for name in run.series)).values():
        for name in (name for panel in found[:MOST_OTHERS] for name in panel.metrics if name != "eval_seconds"):
            rows.append([f"last {name}", *(_last(run, name) for run in runs.values())])
    return Table(["", *runs], rows)


def _best(run: RunData) -> str:
    value = run.best.get("value")
    return f"{value:.6g} at step {run.best.get('step')}" if isinstance(value, float | int) else "-"


def _last(run: RunData, name: str) -> object:
    return float(run.series[name].values[-1]) if name in run.series else "-"


def _settings(runs: Runs) -> Section:
    """Return the settings that differ, and the machines and versions that do."""
    without = [name for name, run in runs.items() if not run.config]
    notes = [Note(f"{', '.join(without)}: no {CONFIG}, so no settings.", "warning")] if without else []
    of = [_machine(run) | run.settings() for run in runs.values()]
    keys = [key for key in dict.fromkeys(key for one in of for key in one) if key not in OF_THE_FOLDER]
    rows = [[key, *(str(one.get(key, "-")) for one in of)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    notes += [] if rows or without else [Note("none.")]
    return Section("Settings that differ", notes, tables=[Table(["", *runs], rows)])


def _machine(run: RunData) -> dict[str, Any]:
    starts = run.of_kind("start")
    return {name: starts[-1][name] for name in OF_THE_START if name in starts[-1]} if starts else {}
