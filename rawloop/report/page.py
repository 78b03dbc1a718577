"""One self-contained HTML page from sections of notes, figures, tables and clips. It loads nothing from a network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rawloop.errors import UserError
from rawloop.files import in_words, replace_file

Tone = Literal["plain", "good", "warning", "alarm"]
SUFFIXES = (".html", ".htm")
NEEDED = {"jinja2": "Jinja2", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class Note:
    """A paragraph; its tone is its color. `head` is in bold before the text."""

    text: str
    tone: Tone = "plain"
    head: str = ""


@dataclass(frozen=True)
class Table:
    """A table. Numbers stand at the right; a float has up to six digits. `title` may be empty."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG, with a legend of (color, name) above it and a caption below it. `plots` makes figures."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()
    caption: str = ""


@dataclass(frozen=True)
class Clip:
    """A sound, as a data: URI."""

    name: str
    uri: str


@dataclass(frozen=True)
class Section:
    """A part of a page. What it has is shown in this order."""

    title: str
    notes: Sequence[Note] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    clips: Sequence[Clip] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.notes or self.figures or self.tables or self.clips)


def check_packages() -> None:
    """Raise UserError if a page cannot be made for lack of a package. Call it before the work that the page shows."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"a page needs {' and '.join(missing)}, which {verb} not installed: run `pip install 'rawloop[report]'`"
        )


def check_output(path: Path) -> None:
    """Raise UserError if a page cannot be written to `path`, or would replace a file that is no page."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"the page's file is '{path}': its name must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"the page's file is '{path}', which is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"the page's file is '{path}', but there is no folder '{path.parent}': create it first")


def cell(value: object) -> str:
    """Return a value as a cell of a table shows it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def is_number(value: object) -> bool:
    """Whether a cell of a table stands at the right."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def render(title: str, sections: Iterable[Section], lead: Sequence[Note] = ()) -> str:
    """Return the page as HTML. All text is escaped; only `Figure.svg` is taken as it is.

    Args:
        title: the page's title.
        sections: its parts, in order; empty ones are left out.
        lead: the first paragraphs, before any section: the outcome in words.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # optional

    environment = Environment(
        loader=PackageLoader("rawloop", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell
    environment.tests["a_number"] = is_number
    shown = [section for section in sections if not section.is_empty]
    return environment.get_template("page.jinja").render(title=title, sections=shown, lead=lead)


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
