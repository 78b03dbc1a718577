"""`rawloop report RUN`: one HTML page of a run, or of several with `--compare`.

It only reads, so it may run while the run is training.
"""

from os.path import expanduser
from pathlib import Path

from rawloop.checkpoint.run_folder import is_locked
from rawloop.cli import read_options
from rawloop.files import readable
from rawloop.report.page import check_output, check_packages, write_page

REPORT, COMPARISON = "report.html", "compare.html"


def run(argv: list[str]) -> None:
    """Write the page, and print its path."""
    values = read_options("report", argv)
    check_packages()
    folders = [Path(expanduser(name)) for name in values.compare or [values.run]]
    default = Path(COMPARISON) if values.compare else folders[0] / REPORT
    output = Path(expanduser(values.output)) if values.output else default
    if values.output:
        check_output(output)
    running = [is_locked(folder) for folder in folders]
    if values.compare:
        from rawloop.report.compare import compare

        page = compare(folders, running)
    else:
        from rawloop.report.one import report

        page = report(folders[0], running[0])
    write_page(output, page)
    print(f"wrote {output} ({readable(output.stat().st_size)})", flush=True)
