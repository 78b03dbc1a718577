"""Checks before step 0: label census, loss verdict, causality probe."""

from typing import TYPE_CHECKING

from rawloop.lazy import importer

if TYPE_CHECKING:
    from rawloop.diagnose.causality import Movement, probe
    from rawloop.diagnose.census import Census, take_census
    from rawloop.diagnose.checks import run_checks
    from rawloop.diagnose.report import ChecksConfig, Report
    from rawloop.diagnose.verdict import Reading, Verdict, judge, read_losses
else:
    __getattr__ = importer(
        __name__,
        {
            "Census": "rawloop.diagnose.census",
            "ChecksConfig": "rawloop.diagnose.report",
            "Movement": "rawloop.diagnose.causality",
            "Reading": "rawloop.diagnose.verdict",
            "Report": "rawloop.diagnose.report",
            "Verdict": "rawloop.diagnose.verdict",
            "judge": "rawloop.diagnose.verdict",
            "probe": "rawloop.diagnose.causality",
            "read_losses": "rawloop.diagnose.verdict",
            "run_checks": "rawloop.diagnose.checks",
            "take_census": "rawloop.diagnose.census",
        },
    )

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
