"""The page of one run."""

from pathlib import Path

from rawloop.report import details
from rawloop.report.outcome import facts, outcome
from rawloop.report.page import Note, Section, render
from rawloop.report.panels import (
    MOST_OTHERS,
    codebook_maps,
    draw_panel,
    loss_panels,
    other_panels,
    time_line,
    training_panels,
)
from rawloop.report.runs import RunData, read_run


def report(folder: Path, is_running: bool | None = None) -> str:
    """Return the page of a run.

    Args:
        folder: the run folder.
        is_running: whether a process trains it now; None if that is not known.

    Raises:
        UserError: the folder is no run, or has neither metrics nor events.
    """
    run = read_run(folder)
    sections = [details.findings(run), Section("Settings", tables=[facts(run)]), *figures(run)]
    sections += [details.warnings(run), details.incidents(run), details.checks(run), details.census(run)]
    sections += [details.capsules(run), details.sounds(run)]
    return render(run.name, sections, outcome(run, is_running))


def figures(run: RunData) -> list[Section]:
    """Return the sections with figures. All of them have the same axis of steps."""
    others = other_panels(run.series)
    more = len(others) - MOST_OTHERS
    notes = [Note(f"{more:,} more metrics are in metrics.jsonl.")] if more > 0 else []
    return [
        Section(
            "Losses", figures=[*(draw_panel(panel, run) for panel in loss_panels(run.series)), *codebook_maps(run)]
        ),
        Section(
            "Training",
            figures=[*(draw_panel(panel, run) for panel in training_panels(run.series)), *time_line(run)],
        ),
        Section("Other metrics", notes, [draw_panel(panel, run) for panel in others[:MOST_OTHERS]]),
    ]
