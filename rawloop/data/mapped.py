"""A file of records and arrays that one process builds once and all others map, such as the index of a data set.

    the records | the arrays, each at a multiple of 8 | a description, JSON | its length, its CRC-32 and `MARK`

Records are read at their place, and arrays are mapped. So ranks and workers share their memory, and it does not grow
with the samples that they have read. The file can always be built again: it is written under a temporary name and
renamed, used only if its key is the expected one, and never changed.
"""

import json
import mmap
import os
import struct
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

import numpy as np

from rawloop.data.locking import locked
from rawloop.errors import RawloopError
from rawloop.files import in_words, replacing

T = TypeVar("T")
Say = Callable[[str], None]
MARK = b"rawloop1"  # with the version of the layout
TAIL = struct.Struct("<QI8s")
FOLDER = "index"
EVERY = 5.0  # seconds between two lines about the same work


class Writer:
    """Writes records; the arrays and the description follow at the end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.size = stream, 0

    def add(self, record: bytes) -> int:
        """Write a record, and return the position of its end."""
        self._stream.write(record)
        self.size += len(record)
        return self.size

    def finish(self, key: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Write the arrays (1 dimension) and the description."""
        places = {}
        for name, values in arrays.items():
            self.add(bytes(-self.size % 8))
            content = np.ascontiguousarray(values).tobytes()
            places[name] = [values.dtype.str, len(values), self.size, zlib.crc32(content)]
            self.add(content)
        text = json.dumps({"key": key, "end": self.size, "arrays": places, "meta": meta}).encode()
        self.add(text)
        self.add(TAIL.pack(len(text), zlib.crc32(text), MARK))


class Mapped:
    """An open file. `arrays` are mapped; `meta` are the JSON values of its builder. It may be pickled and forked.

    Raises:
        ValueError: the file is damaged, cut short, or not the one with this key.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key = file, key
        self._stream = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._stream)
        size = os.fstat(self._stream).st_size
        end = os.pread(self._stream, TAIL.size, max(0, size - TAIL.size))
        length, crc, mark = TAIL.unpack(end) if len(end) == TAIL.size else (0, 0, b"")
        if mark != MARK or length > size - TAIL.size:
            raise ValueError("its end is missing")
        text = os.pread(self._stream, length, size - TAIL.size - length)
        if zlib.crc32(text) != crc:
            raise ValueError("its end is not what was written")
        described = json.loads(text)
        if described["end"] + length + TAIL.size != size:
            raise ValueError(f"it has {size} bytes, and was written with {described['end'] + length + TAIL.size}")
        if described["key"] != key:
            raise OtherKey
        self.meta: dict[str, Any] = described["meta"]
        self.arrays = self._map(described["arrays"])

    def _map(self, places: Mapping[str, Any]) -> dict[str, np.ndarray]:
        whole = mmap.mmap(self._stream, 0, access=mmap.ACCESS_READ)
        arrays = {}
        for name, (kind, count, place, crc) in places.items():
            arrays[name] = np.frombuffer(whole, kind, count, place) if count else np.empty(0, kind)
            if zlib.crc32(arrays[name].data) != crc:
                raise ValueError(f"its array '{name}' is not what was written")
        return arrays

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes of a record. Raises RawloopError if the file has become shorter."""
        content = os.pread(self._stream, stop - start, start)
        if len(content) < stop - start:
            raise self.damaged("it has become shorter")
        return content

    def damaged(self, why: object) -> RawloopError:
        """Return the error for a file that was damaged after it was opened."""
        return RawloopError(f"{self.file} is damaged ({why}): delete it, and start again")

    def __reduce__(self) -> Any:
        return Mapped, (self.file, self.key)


class OtherKey(ValueError):
    """The file was built from other data or with other settings."""


def open_or_build(
    folder: Path,
    name: str,
    key: str,
    build: Callable[[Writer, Say], None],
    say: Say,
    is_current: Callable[[Mapped], bool] = lambda file: True,
) -> Mapped:
    """Open `folder/index/name`, or build it first.

    If several processes need the file, one builds it, and the others wait and say so. If the folder cannot be written,
    the file is built in the system's folder of temporary files.

    Args:
        folder: of the cached codes.
        name: of the file.
        key: of everything that the file is made from.
        build: writes the file; it must call `Writer.finish` with `key`. It gets a function for lines about its work.
        say: prints a line.
        is_current: whether a file with this key may be used.

    Raises:
        RawloopError: whatever `build` raises, or no disk takes the file.
    """
    place = _writable(folder / FOLDER)
    for where in dict.fromkeys((folder / FOLDER, place)):
        if (found := _opened(where / name, key, say)) and is_current(found):
            return found
    if place != folder / FOLDER:
        say(f"{folder / FOLDER} cannot be written: the index is built in {place}, and again on the next machine")
    file = place / f"{name}.lock"  # one for each file: to build one of them may need another
    with locked(file, _Waiting(name, file, say)) as lock:
        # It may have been built meanwhile, by the process that held the lock.
        if (found := _opened(place / name, key, lambda line: None)) and is_current(found):
            return found
        start, tell = time.monotonic(), _Telling(lock, say)
        try:
            with replacing(place / name) as stream:
                build(Writer(stream), tell)
        except OSError as error:
            raise RawloopError(f"{place / name} cannot be written: {in_words(error)}") from error
        if tell.lines:
            say(f"{place / name} was built in {time.monotonic() - start:.0f} s; later starts use it")
        return Mapped(place / name, key)


def _opened(file: Path, key: str, say: Say) -> Mapped | None:
    try:
        return Mapped(file, key)
    except (FileNotFoundError, NotADirectoryError, OtherKey):
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        say(f"{file} is damaged ({error}): it is not used, and built again")
        return None


def _writable(folder: Path) -> Path:
    """Return `folder`, made if it does not exist, or this user's folder of temporary files if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    own = Path(tempfile.gettempdir()) / f"rawloop-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(own)
    except OSError as error:
        raise RawloopError(f"neither {folder} nor {own} can be written: {in_words(error)}") from error
    if status.st_uid != os.getuid() or own.is_symlink():
        raise RawloopError(f"{own} belongs to somebody else, and {folder} cannot be written: set TMPDIR or data.codes")
    return own


class _Waiting:
    """Says every few seconds that another process builds, and what that process has said last."""

    def __init__(self, name: str, lock: Path, say: Say) -> None:
        self.name, self.lock, self.say, self.next = name, lock, say, time.monotonic() + EVERY

    def __call__(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + EVERY
        self.say(f"waiting for the process that builds the index: {self.lock.read_text() or self.name}")


class _Telling:
    """Says lines, and writes the last one into the lock's file, for the processes that wait."""

    def __init__(self, lock: TextIO, say: Say) -> None:
        self.lock, self.say, self.lines = lock, say, 0
        lock.truncate(0)

    def __call__(self, line: str) -> None:
        self.say(line)
        self.lines += 1
        self.lock.truncate(0)  # it is open for appending
        self.lock.write(line)
        self.lock.flush()


def told(things: Iterable[T], what: str, total: int | None, say: Say) -> Iterator[T]:
    """Yield `things`, and say every few seconds how many there were, of `total` if it is known."""
    due = time.monotonic() + EVERY
    for number, thing in enumerate(things, 1):
        yield thing
        if number % 256 == 0 and time.monotonic() >= due:
            due = time.monotonic() + EVERY
            say(f"{what}: {number:,}{f' of {total:,}' if total else ''}")


def hash64(text: str) -> int:
    """Return 64 bits of the BLAKE2b of a text, which may be a path that is not UTF-8."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
