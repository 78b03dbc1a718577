"""The page of one run."""

from pathlib import Path

from rawloop.report import details
from rawloop.report.outcome import facts, outcome
from rawloop.report.page import Section, render
from rawloop.report.panels import figures
from rawloop.report.runs import read_run


def report(folder: Path, is_running: bool | None = None) -> str:
    """Return the page of a run.

    Args:
        folder: the run folder.
        is_running: whether a process trains it now; None if that is not known.

    Raises:
        UserError: the folder is no run, or has neither metrics nor events.
    """
    run = read_run(folder)
    sections = [details.findings(run), Section("Settings", tables=[facts(run)]), *figures({run.name: run})]
    sections += [details.incidents(run), details.checks(run), details.census(run)]
    sections += [details.capsules(run), details.sounds(run)]
    return render(run.name, sections, outcome(run, is_running))
