"""What the readers of foreign layouts yield: an entry for each clip or conversation, or the reason why there is none.

One bad line costs that line only. Files are read line by line, so a large one costs no memory.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rawloop.data.record import parse_json, show
from rawloop.errors import UserError
from rawloop.files import open_regular

T = TypeVar("T")
BROKEN_LINE, NO_TEXT, NO_CLIP = "broken line", "empty transcript", "no audio named"


class Unusable(Exception):
    """An entry cannot be used: a reason that many may share, and what is special about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class LeftOut:
    """An entry that is left out; `place` is where it stands."""

    place: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Entry:
    """A clip or a conversation. `values` are keys of rawloop's record, without id and clip.

    `audio` is a path as it is written there, or None for a text; `content` is the clip's file, if it has no path.
    """

    place: str
    id: str
    values: dict[str, Any]
    audio: str | None = None
    speaker: str | None = None
    content: bytes | None = None


Found = Entry | LeftOut


@dataclass(frozen=True)
class Layout:
    """A source whose layout is known: its name, the folder in which relative paths start, and its reader."""

    title: str
    root: Path
    read: Callable[[], Iterator[Found]]
    is_text: bool = False


def each(rows: Iterable[tuple[str, T | Unusable]], make: Callable[[str, T], Iterable[Entry]]) -> Iterator[Found]:
    """Yield the entries that `make` returns for the place and value of each row, or why it has none."""
    for place, row in rows:
        try:
            if isinstance(row, Unusable):
                raise row
            yield from make(place, row)
        except Unusable as error:
            yield LeftOut(place, error.reason, error.detail)


def text_lines(file: Path) -> Iterator[tuple[str, str | Unusable]]:
    """Yield place and text of each line that is not blank. A `.gz` file is unpacked.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        for number, text in enumerate(_unpacked(file), 1):
            if isinstance(text, Unusable) or text.strip():
                yield f"{file.name} line {number}", text
    except (EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged ({error}): fetch it again") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _unpacked(file: Path) -> Iterator[str | Unusable]:
    with open_regular(file) as raw:
        lines = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        yield _decoded(next(lines, b""), "utf-8-sig")
        yield from (_decoded(line, "utf-8") for line in lines)


def _decoded(line: bytes, encoding: str) -> str | Unusable:
    try:
        return line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Unusable(BROKEN_LINE, f"it is not UTF-8 (byte {error.start} of the line)")


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """Yield place and object of each line of a JSONL file. Raises like `text_lines`."""
    for place, line in text_lines(file):
        yield place, line if isinstance(line, Unusable) else _object(line)


def _object(line: str) -> dict[str, Any] | Unusable:
    try:
        value = parse_json(line)
    except ValueError as error:
        return Unusable(BROKEN_LINE, f"it is not JSON ({error})")
    return value if isinstance(value, dict) else Unusable(BROKEN_LINE, f"it is {show(value)}, and no object")


def transcript(value: object) -> str:
    """Return the words of a clip. Raises Unusable if there are none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(NO_TEXT)
    if not isinstance(value, str):
        raise Unusable(NO_TEXT, f"it is {show(value)}: it must be a string")
    return value.strip()


def name_of(value: object) -> str | None:
    """Return an id or a speaker as text, or None if there is none."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def without_nulls(**values: Any) -> dict[str, Any]:
    """Return the values that are given."""
    return {key: value for key, value in values.items() if value is not None}
