"""The index of cached clips by path and by content, as a mapped file: no process holds the rows in its memory."""

import json
import os
from array import array
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from rawloop.data.mapped import Mapped, Say, Writer, hash64, open_or_build
from rawloop.data.shards import Row, read_index_file, row_files, shard_file
from rawloop.errors import RawloopError
from rawloop.files import in_words, sha256_file

LAYOUT = 1
NOT_WRITTEN = -1  # the place of codes that are not in their shard, or have another shape than their row says
RECENT = 1024


class Rows:
    """The rows of a codec's folder, newest first where a path has several. `faults` has the message of each bad shard.

    Args:
        folder: of the codec.
        codebooks: of its codes.
        say: prints a line about building it.
    """

    def __init__(self, folder: Path, codebooks: int, say: Say = lambda line: None) -> None:
        key = _key(folder, codebooks)
        name = f"{folder.name}.rows"
        self._file: Mapped = open_or_build(
            folder.parent, name, key, lambda writer, tell: _build(folder, codebooks, key, writer, tell), say
        )
        self.key = key
        self.faults = {int(number): why for number, why in self._file.meta["faults"].items()}
        self._recent: dict[str, int | None] = {}  # the numbers of paths that were asked for last, and their rows
        self._read: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self._file.arrays["ends"])

    def row(self, number: int) -> Row:
        """Return a row by its number."""
        if number not in self._read:
            if len(self._read) >= RECENT:
                self._read.clear()
            ends = self._file.arrays["ends"]
            content = self._file.read(int(ends[number - 1]) if number else 0, int(ends[number]))
            try:
                self._read[number] = Row(*json.loads(content.decode()))
            except (ValueError, TypeError) as error:
                raise self._file.damaged(error) from error
        return self._read[number]

    def place(self, number: int) -> int:
        """Return the position of a row's codes in their shard, or `NOT_WRITTEN`."""
        return int(self._file.arrays["places"][number])

    def number(self, path: str) -> int | None:
        """Return the number of the newest row of a path, or None."""
        if path not in self._recent:
            if len(self._recent) >= RECENT:
                self._recent.clear()
            found = (number for number in self._with("path", path) if self.row(number).path == path)
            self._recent[path] = next(found, None)
        return self._recent[path]

    def with_content(self, sha256: str) -> int | None:
        """Return the number of a row that has the codes of this content, or None."""
        rows = ((number, self.row(number)) for number in self._with("content", sha256))
        fitting = [number for number, row in rows if row.sha256 == sha256 and row.frames]
        return next((number for number in fitting if self.place(number) != NOT_WRITTEN), next(iter(fitting), None))

    def _with(self, column: str, text: str) -> Iterator[int]:
        """Yield the rows with this hash of a path or a content, newest first."""
        hashes, order = self._file.arrays[f"{column} hashes"], self._file.arrays[f"{column} order"]
        wanted = np.uint64(hash64(text))
        end = int(np.searchsorted(hashes, wanted, side="right"))
        while end and hashes[end - 1] == wanted:
            end -= 1
            yield int(order[end])


def _key(folder: Path, codebooks: int) -> str:
    """Return a digest of the index files, and of the size and time of each shard. Raises RawloopError."""
    facts: list[Any] = [LAYOUT, codebooks, os.path.realpath(folder)]
    for file in [*row_files(folder), *sorted(folder.glob("shard-*"))]:
        try:
            facts.append((file.name, _state(file)))
        except OSError as error:  # told by what reads it
            facts.append((file.name, error.errno))
    return sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()


def _state(file: Path) -> Any:
    """Return what identifies the content of a file: of a large one, size and time."""
    if not file.name.startswith("shard-"):
        return sha256_file(file)
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _build(folder: Path, codebooks: int, key: str, writer: Writer, say: Say) -> None:
    ends, shards, frames = array("q"), array("q"), array("q")
    hashes = {"path": array("Q"), "content": array("Q")}
    files = row_files(folder)
    for number, file in enumerate(files, 1):
        for row in read_index_file(file, folder):
            ends.append(writer.add(json.dumps(row, separators=(",", ":")).encode()))
            shards.append(row.shard)
            frames.append(row.frames)
            hashes["path"].append(hash64(row.path))
            hashes["content"].append(hash64(row.sha256))
        if number % 32 == 0:
            say(f"index of the cached clips: {number} of {len(files)} files, {len(ends):,} clips")
    columns = {name: np.frombuffer(values, np.uint64) for name, values in hashes.items()}
    numbers = np.frombuffer(shards, np.int64)
    places, faults = _places(folder, codebooks, numbers, np.frombuffer(frames, np.int64), columns["content"])
    arrays = {"ends": np.frombuffer(ends, np.int64), "places": places}
    for name, values in columns.items():
        order = np.argsort(values, kind="stable")
        arrays |= {f"{name} hashes": values[order], f"{name} order": order.astype(np.uint32)}
    writer.finish(key, arrays, {"faults": faults})


def _places(
    folder: Path, codebooks: int, shards: np.ndarray, frames: np.ndarray, contents: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the position of each row's codes, from the headers of the shards, and the message of each bad shard."""
    places = np.full(len(shards), NOT_WRITTEN, np.int64)
    faults: dict[int, str] = {}
    for number, rows in _groups(shards):
        if number < 0:
            continue
        try:
            known = {hash64(name): place for name, place in read_header(shard_file(folder, number)).items()}
        except FileNotFoundError:
            faults[number] = "the file is gone"
            continue
        except (OSError, ValueError) as error:
            faults[number] = in_words(error) if isinstance(error, OSError) else str(error)
            continue
        for row in rows.tolist():
            place = known.get(int(contents[row]))
            if place is not None and place[1:] == (frames[row], codebooks):
                places[row] = place[0]
    return places, faults


def _groups(shards: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each shard's number, and the rows that name it."""
    order = np.argsort(shards, kind="stable")
    starts = np.flatnonzero(np.diff(shards[order], prepend=-2)) if len(shards) else order
    for rows in np.split(order, starts[1:]) if len(shards) else ():
        yield int(shards[rows[0]]), rows


def read_header(file: Path) -> dict[str, tuple[int, int, int]]:
    """Return the codes in a shard by content: their position, frames and codebooks.

    Raises:
        ValueError: the shard is damaged.
        FileNotFoundError: it is gone.
        RawloopError: it cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header of {length} bytes is not in a file of {size}")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            places = {name: _place(8 + length, entry) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RawloopError(f"{file} cannot be read: {error.strerror}") from error
    end = max((place + 2 * frames * books for place, frames, books in places.values()), default=0)
    if end > size:
        raise ValueError(f"its header promises {end} bytes, it has {size}")
    return places


def _place(start: int, entry: Any) -> tuple[int, int, int]:
    """Return the place of an entry's codes in the file, and their shape."""
    (frames, books), (first, last) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != "U16" or min(frames, books, first) < 0 or last - first != 2 * frames * books:
        raise ValueError(f"it has a tensor other than codes: {entry}")
    return start + first, frames, books
