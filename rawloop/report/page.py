"""One self-contained HTML page from sections of notes, figures, tables and clips. It loads nothing from a network."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from rawloop.errors import UserError
from rawloop.files import in_words, replace_file

Tone = Literal["plain", "good", "warning", "alarm"]
SUFFIXES = (".html", ".htm")
NEEDED = {"jinja2": "Jinja2", "matplotlib": "matplotlib"}


class Note(NamedTuple):
    """A paragraph; its tone is its color. `head` is in bold before the text."""

    text: str
    tone: Tone = "plain"
    head: str = ""


class Table(NamedTuple):
    """A table; one without rows is not shown. Numbers stand at the right; a float has up to six digits."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


class Figure(NamedTuple):
    """A drawing as SVG, with a legend of (color, name) above it and a caption below it. `plots` makes figures."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()
    caption: str = ""


class Clip(NamedTuple):
    """A sound, as a data: URI."""

    name: str
    uri: str


class Cell(NamedTuple):
    """A text, and a sound and a picture above it, as data: URIs, or ""."""

    text: str
    audio: str = ""
    picture: str = ""


class Grid(NamedTuple):
    """Cells in rows, each with a name, below the names of the columns."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


class Section(NamedTuple):
    """A part of a page. What it has is shown in this order."""

    title: str
    notes: Sequence[Note] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    clips: Sequence[Clip] = ()
    grid: Grid = Grid((), ())


def check_packages() -> None:
    """Raise UserError if a page cannot be made for lack of a package. Call it before the work that the page shows."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        are = "which is" if len(missing) == 1 else "which are"
        needed = " and ".join(missing)
        raise UserError(f"a page needs {needed}, {are} not installed: run `pip install 'rawloop[report]'`")


def check_output(path: Path) -> None:
    """Raise UserError if a page cannot be written to `path`, or would replace a file that is no page."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"the page's file is '{path}': its name must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"the page's file is '{path}', which is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"the page's file is '{path}', but there is no folder '{path.parent}': create it first")


def render(title: str, sections: Iterable[Section], lead: Sequence[Note] = ()) -> str:
    """Return the page as HTML. All text is escaped; only `Figure.svg` is taken as it is.

    Args:
        title: the page's title.
        sections: its parts, in order; empty ones are left out.
        lead: the first paragraphs, before any section: the outcome in words.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # optional

    loader = PackageLoader("rawloop", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = _cell
    environment.tests["a_number"] = _is_number
    shown = [s for s in sections if s.notes or s.figures or s.clips or s.grid.rows or any(t.rows for t in s.tables)]
    return environment.get_template("page.jinja").render(title=title, sections=shown, lead=lead)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if _is_number(value) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_page(path: Path, page: str) -> None:
    """Write a page. A failure leaves the file as it was.

    Raises:
        UserError: the file cannot be written.
    """
    check_output(path)
    try:
        replace_file(path, page.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"the page cannot be written to '{path}': {in_words(error)}") from error
