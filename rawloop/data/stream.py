"""Reads the values of a data file one after another, so that a file of gigabytes needs little memory.

It knows JSONL, a list of records, and an object with a list `samples`. For any other file, and for a damaged one, it
gives up: the file is then read whole, which finds the mistake or its meaning.
"""

import json
from collections.abc import Generator, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rawloop.data.record import DECODER, DoubledKey, parse_json
from rawloop.files import open_regular

CHUNK = 2**20  # characters that are read at once
LONGEST = 2**25  # characters in which a value must end; the first line of JSONL must end within `CHUNK`
NUMBER = 64  # characters after a number without which it may be cut
BLANKS = " \t\n\r"
SAMPLES = "samples"


class NotStreamed(Exception):
    """The file must be read whole."""


def stream_values(file: Path) -> Generator[tuple[str, Any], None, dict[str, Any] | None]:
    """Yield the place and the value of each record of a data file.

    Returns the keys beside `samples`, with the list itself empty; None for other formats.

    Raises:
        NotStreamed: read it whole. Records that were yielded before are right.
    """
    try:
        with TextIOWrapper(open_regular(file), encoding="utf-8-sig") as stream:
            if _is_lines(stream):
                stream.seek(0)
                yield from _lines(stream)
                return None
            stream.seek(0)
            return (yield from _listed(_Scanner(stream)))
    except (ValueError, RecursionError, OSError) as error:
        raise NotStreamed from error


def _is_lines(stream: TextIOWrapper) -> bool:
    """Return whether the first line is a whole JSON value, and another line follows."""
    for line in iter(lambda: stream.readline(CHUNK), ""):
        if line.strip():
            try:
                parse_json(line)
            except ValueError:
                return False
            return any(rest.strip() for rest in iter(lambda: stream.readline(CHUNK), ""))
    return False


def _lines(stream: TextIOWrapper) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield f"line {number}", parse_json(line)


def _listed(scan: "_Scanner") -> Generator[tuple[str, Any], None, dict[str, Any] | None]:
    """Yield the records of a list, or of the list `samples` of an object; see `stream_values`."""
    if scan.peek() == "[":
        yield from scan.items("record")
        scan.end()
        return None
    beside: dict[str, Any] = {}
    scan.take("{")
    while scan.peek() != "}" or beside:
        name = scan.value()
        scan.take(":")
        if not isinstance(name, str) or name in beside:
            raise NotStreamed
        if name == SAMPLES and scan.peek() == "[":
            beside[name] = []
            yield from scan.items(SAMPLES)
        else:
            beside[name] = scan.value()
        if scan.take(",}") == "}":
            scan.end()
            if not isinstance(beside.get(SAMPLES), list):
                raise NotStreamed
            return beside
    raise NotStreamed


class _Scanner:
    """Takes JSON values from a stream. Raises NotStreamed, or ValueError, where they are not what was expected."""

    def __init__(self, stream: TextIOWrapper) -> None:
        self.stream, self.text, self.place = stream, "", 0

    def peek(self) -> str:
        """Return the next character that is no blank, or "" at the end."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in BLANKS:
                    return self.text[self.place]
                self.place += 1
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Take one of these characters."""
        found = self.peek()
        if not found or found not in expected:
            raise NotStreamed
        self.place += 1
        return found

    def end(self) -> None:
        """Refuse anything after the last value."""
        if self.peek():
            raise NotStreamed

    def items(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield the place and value of each item of a list."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        number = 0
        while True:
            yield f"{name}[{number}]", self.value()
            number += 1
            if self.take(",]") == "]":
                return

    def value(self) -> Any:
        """Take a whole value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
            except DoubledKey:
                raise
            except json.JSONDecodeError:
                if len(self.text) - self.place > LONGEST or not self._more():
                    raise
                continue
            if not isinstance(value, dict | list | str) and len(self.text) - end < NUMBER and self._more():
                continue  # the number may go on
            self.place = end
            return value

    def _more(self) -> bool:
        chunk = self.stream.read(CHUNK)
        self.text, self.place = self.text[self.place :] + chunk, 0
        return bool(chunk)
