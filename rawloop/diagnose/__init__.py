"""Checks before step 0: label census, loss verdict, causality probe."""

from rawloop.diagnose.causality import Movement, probe
from rawloop.diagnose.census import Census, take_census
from rawloop.diagnose.checks import run_checks
from rawloop.diagnose.report import ChecksConfig, Report
from rawloop.diagnose.verdict import Reading, Verdict, judge, read_losses

__all__ = [
    "Census",
    "ChecksConfig",
    "Movement",
    "Reading",
    "Report",
    "Verdict",
    "judge",
    "probe",
    "read_losses",
    "run_checks",
    "take_census",
]
