"""One record of a data file, and the paths in it. Every error about a value names its place in the file."""

import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from rawloop.audio import MARK
from rawloop.errors import UserError, first_few

T = TypeVar("T")
SHOWN = 5  # missing files in a message


@dataclass(frozen=True)
class Record:
    """A JSON object of a data file. `place` is its place in `file`: `samples[3]` or `line 7`."""

    values: Mapping[str, Any]
    file: Path
    place: str

    def __str__(self) -> str:
        name = self.identity()
        return f"{self.file} {self.place}" + ("" if name is None else f" (id {quoted(name)})")

    @property
    def source(self) -> str:
        """Name of the file, and the place in it."""
        return f"{self.file.name} {self.place}"

    def identity(self) -> Any:
        """Return the id of the record, of any type, or None."""
        return next((self.values[key] for key in ("id", "audio_id") if self.values.get(key) not in (None, "")), None)

    def fail(self, message: str) -> NoReturn:
        """Raise a UserError that names this record."""
        raise UserError(f"{self}: {message}")

    def text(self, *keys: str) -> str | None:
        """Return the value of one of `keys`, which have the same meaning, stripped; None if none is given.

        Null and empty strings count as not given, as converters write them for absent values.
        """
        found: dict[str, str] = {}
        for key in keys:
            value = self.values.get(key)
            if value is not None and not isinstance(value, str):
                self.fail(f"'{key}' is {show(value)}: it must be a string")
            if value and value.strip():
                found.setdefault(value.strip(), key)
        return self.only(found)

    def only(self, found: Mapping[T, str], place: str = "") -> T | None:
        """Return the only value in `found` (value -> its key), or None. Refuses several, as the keys mean the same."""
        if len(found) > 1:
            named = " and ".join(f"'{key}' is {quoted(value)}" for value, key in found.items())
            self.fail(f"{place}{named}, which should be the same: take one out")
        return next(iter(found), None)

    def words(self, *keys: str) -> str | None:
        """Return `text(*keys)`, and refuse it if no tokenizer accepts it."""
        text = self.text(*keys)
        return None if text is None else self.speakable(text)

    def speakable(self, text: str) -> str:
        """Return `text` unchanged. Refuses half a surrogate pair, which JSON can contain and no tokenizer accepts."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                self.fail(f"the text {show(text)} has half a character (a lone surrogate) at {error.start}: mend it")
        return text

    def without(self, known: frozenset[str]) -> dict[str, Any]:
        """Return all values except those of the `known` keys."""
        return {key: value for key, value in self.values.items() if key not in known}


class DoubledKey(ValueError):
    """A JSON object with the same key twice, so that its value is ambiguous."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    keys = [key for key, _ in pairs]
    doubled = next(key for key in keys if keys.count(key) > 1)
    name = next((f" with the id {values[key]!r}" for key in ("id", "audio_id") if values.get(key)), "")
    raise DoubledKey(f"the key '{doubled}' occurs twice in an object{name}: take one of them out")


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, or DoubledKey if an object has a key twice."""
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def quoted(value: object) -> str:
    """Return the repr of a value, without its middle if it is longer than a path."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


def key_names(keys: Iterable[str]) -> str:
    """Return the first keys of an object in a line. Keys that would break the line are quoted."""
    return first_few((key if key.isprintable() and key.strip() else quoted(key) for key in keys), most=12)


def show(value: object) -> str:
    """Return a short repr of a value, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


@dataclass
class Files:
    """Resolves the paths of a data file, refuses paths outside the data folder, and collects missing files.

    Each folder is resolved once, and each file costs a single lstat, so that 600,000 clips take seconds.

    Args:
        root: folder of the data file; relative paths start here.
        allow_outside: allow paths outside `root`.
        check: check that each file exists. Otherwise a link inside `root` to a file outside is not noticed.
    """

    root: Path
    allow_outside: bool = False
    check: bool = True
    missing: list[tuple[str, Record]] = field(default_factory=list)
    looked_up: dict[str, None] = field(default_factory=dict)  # the paths of files that the samples depend on
    _folders: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._base = os.path.realpath(self.root)

    def resolve(self, value: str, record: Record) -> Path:
        """Return the resolved path of `value`, a path or file:// url in `record`."""
        path = os.path.join(self._base, local_path(value, record))
        try:
            encoded = os.fsencode(path)  # Linux allows names that are not UTF-8
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            record.fail(f"{quoted(value)} is no path: it has a character that no file name has")
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            record.fail(f"{quoted(value)} is a folder: name a file")
        if MARK in name:
            record.fail(
                f"{quoted(value)} has {MARK} in its name, which stands for a segment: give 'offset' and 'duration'"
            )
        if folder not in self._folders:
            real = os.path.realpath(folder)
            self._folders[folder] = real, self._inside(real)
        folder, inside = self._folders[folder]
        path = os.path.join(folder, name)
        if self.check:
            self.looked_up[path] = None
        if self.check and self._is_link(path, value, record):
            path = os.path.realpath(path)
            inside = self._inside(path)
            if self._is_link(path, value, record):
                record.fail(f"{quoted(value)} is a link that leads to itself")
        if not inside and not self.allow_outside:
            record.fail(
                f"{quoted(value)} leaves the data folder {self._base} (it is {quoted(path)}): "
                "move the file there, or allow it with --data.allow_outside true"
            )
        return Path(path)

    def raise_missing(self) -> None:
        """Raise a UserError that names missing files, if there are any."""
        if not self.missing:
            return
        shown = [f"{quoted(value)} of {record}{self._hint(value)}" for value, record in self.missing[:SHOWN]]
        noun = "file is" if len(self.missing) == 1 else "files are"
        named = first_few([*shown, *self.missing[SHOWN:]], "; ", SHOWN)
        raise UserError(f"{len(self.missing)} audio {noun} missing: {named}. Restore them or remove these samples")

    def _hint(self, value: str) -> str:
        """Return a clause about an existing file with a similar name, or an empty string."""
        slashes = value.replace("\\", "/")
        if slashes != value:
            exists = os.path.exists(os.path.join(self._base, slashes))
            return f" (write / for \\{': that file exists' if exists else ', which separates folders on Windows only'})"
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, value)
            if other != value and os.path.exists(os.path.join(self._base, other)):
                return f" (the same name exists in the Unicode form {form}: rename the file, or write it in that form)"
        folder, name = os.path.split(os.path.join(self._base, value))
        names = os.listdir(folder) if os.path.isdir(folder) else []
        similar = next((other for other in names if other.casefold() == name.casefold()), None)
        return f" (there is {similar!r}: mind upper and lower case)" if similar else ""

    def _inside(self, path: str) -> bool:
        return os.path.commonpath((self._base, path)) == self._base

    def _is_link(self, path: str, value: str, record: Record) -> bool:
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            self.missing.append((value, record))
            return False
        except OSError as error:
            record.fail(f"{quoted(value)} cannot be looked up: {error.strerror}")
        if stat.S_ISDIR(mode):
            record.fail(f"{quoted(value)} is a folder: name a file")
        return stat.S_ISLNK(mode)


def local_path(value: str, record: Record) -> str:
    """Return the path of a path or file:// url, and refuse other urls."""
    scheme, found, _ = value.partition(":")
    if not found or not scheme.isalnum():
        return value
    if scheme == "file":
        url = urlsplit(value)
        if url.netloc not in ("", "localhost"):
            record.fail(f"{quoted(value)} is on another machine: copy the file and name it by its path")
        return unquote(url.path)
    if scheme == "data":
        record.fail("audio inside the data file (data: url) is not read: write it to a file and name it by its path")
    if value[len(scheme) :].startswith("://"):
        record.fail(f"{quoted(value)} is a remote file: download it first and name it by its path")
    return value
