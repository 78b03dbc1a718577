"""How cached codes lie on disk: immutable shards of codes, and beside each the index rows it brought.

    <cache>/<codec hash>-<sample rate>/codec.json
                                       shard-00000.safetensors   one tensor per clip, (frames, codebooks) uint16
                                       files-00000.jsonl         one row per audio file: path, size, mtime, hash, shard

Of clips that are decoded only, for models that take no codes, there are rows without shards; see `heard_at`.

A clip's tensor is named by the SHA-256 of the audio file. Both files are written whole, then renamed: first the codes,
then the rows that point at them, so that a kill at any moment loses only what was not yet written. Later rows replace
earlier ones of the same path. Paths in the folder of the cache, or beside it, are stored relative to it, so that all
move together.

Shards are read, not mapped: a mapped file that loses its end under its reader kills the process (SIGBUS).
"""

import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from rawloop.contracts import CodecInfo
from rawloop.errors import RawloopError, UserError

FORMAT = 1
CODEC_FILE = "codec.json"
HEARD = "heard-"
BESIDE = ".." + os.sep
NUMBERED = re.compile(r"(?:shard|files)-(\d+)\.")


class Row(NamedTuple):
    """What the index knows of one audio file, as it was when it was encoded.

    `size` in bytes, `mtime_ns` since the epoch. `bad` is the reason why the clip has no codes, and `skip` whether its
    samples are to be left out; `sha256`, `shard`, `frames` and `crc` are those of its codes.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str = ""
    shard: int = -1
    frames: int = 0
    crc: int = 0
    bad: str | None = None
    skip: bool = False


# What a row may hold in each place; a bool is no number here.
COLUMNS: dict[str, set[type]] = {
    **{name: {str} for name in ("path", "sha256")},
    **{name: {int} for name in ("size", "mtime_ns", "shard", "frames", "crc")},
    "bad": {str, type(None)},
    "skip": {bool},
}


def codec_folder(cache: Path, codec: CodecInfo) -> Path:
    """Return the folder that holds the codes of one codec."""
    return cache / f"{codec.hash[:16]}-{codec.sample_rate}"


def is_codec_folder(cache: Path, codec: CodecInfo) -> bool:
    """Whether there is anything of one codec in the cache."""
    return (codec_folder(cache, codec) / CODEC_FILE).is_file()


def heard_at(sample_rate: int) -> CodecInfo:
    """Return what stands for the codec where clips are decoded only: a frame is a sample, and there are no codes."""
    return CodecInfo(f"{HEARD}{sample_rate:06d}", sample_rate, 1, 1, float(sample_rate))


def shard_file(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def read_codec(folder: Path) -> CodecInfo:
    """Return the codec whose codes lie in `folder`.

    Raises:
        RawloopError: codec.json is damaged or of another format.
    """
    file = folder / CODEC_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise RawloopError(f"{file} is of another format: delete {folder} and run `rawloop prepare` again")
        codec = CodecInfo(**values)
        counts = (codec.sample_rate, codec.codebooks, codec.codebook_size)
        if not isinstance(codec.hash, str) or not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("it has values of other types")
        if not isinstance(codec.frame_rate, int | float) or not 0 < codec.frame_rate < math.inf:
            raise ValueError(f"its frame_rate is {codec.frame_rate}")
        return codec
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise RawloopError(f"{file} is damaged ({error}): delete {folder} and run `rawloop prepare` again") from error
    except OSError as error:
        raise RawloopError(f"{file} cannot be read: {error.strerror}") from error


def read_rows(folder: Path) -> dict[str, Row]:
    """Return the index: the newest row of every audio file, by absolute path.

    Raises:
        RawloopError: an index file is damaged.
    """
    base = os.path.realpath(folder.parent.parent)
    above = os.path.dirname(base)
    rows: dict[str, Row] = {}
    for file in sorted(folder.glob("files-*.jsonl")):
        try:
            # One call of the parser for the whole file: 600,000 rows in about two seconds.
            lines = file.read_text(encoding="utf-8").splitlines()
            read = json.loads(f"[{','.join(lines)}]")
            new = {(full := _full(path, base, above)): Row(full, *rest) for path, *rest in read}
            _check_types(list(new.values()))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RawloopError(f"{file} is damaged ({error}): delete it and run `rawloop prepare` again") from error
        except OSError as error:
            raise RawloopError(f"{file} cannot be read: {error.strerror}") from error
        rows.update(new)
    return rows


def _full(path: str, base: str, above: str) -> str:
    return os.path.join(above, path[len(BESIDE) :]) if path.startswith(BESIDE) else os.path.join(base, path)


def _check_types(rows: list[Row]) -> None:
    """Refuse rows that hold other values than rows do, and paths that no file can have."""
    for name, column in zip(Row._fields, zip(*rows, strict=True), strict=False):
        found = set(map(type, column))
        if not found <= COLUMNS[name]:
            raise TypeError(f"{name} is a {' or a '.join(sorted(kind.__name__ for kind in found - COLUMNS[name]))}")
    for row in rows:
        if "\0" in row.path or not (row.path.isascii() or os.fsencode(row.path)):
            raise ValueError(f"{row.path!r} is no path")


class Shard:
    """The codes in one file. The file is open only while it is read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header of {length} bytes is not in a file of {size}")
            try:
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                self.places = {name: _place(8 + length, entry) for name, entry in header.items()}
            except (AttributeError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"its header cannot be read: {error}") from error
        end = max((place + 2 * frames * books for place, frames, books in self.places.values()), default=0)
        if end > size:
            raise ValueError(f"its header promises {end} bytes, it has {size}")

    def codes(self, sha256: str) -> Tensor:
        """Return the codes of a content, (frames, codebooks) uint16."""
        if sha256 not in self.places:
            raise ValueError(f"it has no codes of {sha256}")
        place, frames, books = self.places[sha256]
        with open(self.file, "rb") as stream:
            stream.seek(place)
            content = bytearray(stream.read(2 * frames * books))
        if len(content) < 2 * frames * books:
            raise ValueError(f"it ends before byte {place + 2 * frames * books}")
        if not content:
            return torch.empty(frames, books, dtype=torch.uint16)
        return torch.frombuffer(content, dtype=torch.uint16).view(frames, books)


def _place(start: int, entry: Any) -> tuple[int, int, int]:
    """Return where a tensor of codes begins in its file, and its shape."""
    (frames, books), (first, last) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != "U16" or min(frames, books, first) < 0 or last - first != 2 * frames * books:
        raise ValueError(f"it holds a tensor that is no codes: {entry}")
    return start + first, frames, books


def write_file(file: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Raises:
        RawloopError: the disk is full or refuses.
    """
    part = file.with_name(file.name + ".part")
    try:
        with open(part, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RawloopError(f"{file} cannot be written: {error.strerror}") from error


def checksum(codes: Tensor) -> int:
    """Return the CRC-32 of codes (frames, codebooks) uint16."""
    return zlib.crc32(codes.contiguous().numpy().data)


@dataclass
class ShardWriter:
    """Collects codes and index rows and writes them shard by shard. Made by `open_writer`.

    A shard is closed after `shard_clips` clips or `shard_seconds` seconds, so that a kill loses little.
    """

    folder: Path
    codec: CodecInfo
    rows: dict[str, Row]
    shard_clips: int
    shard_seconds: float
    _codes: dict[str, Tensor] = field(default_factory=dict)
    _fresh: list[Row] = field(default_factory=list)
    _opened: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._base = os.path.realpath(self.folder.parent.parent) + os.sep
        self._above = os.path.dirname(self._base[:-1]) + os.sep
        written = (NUMBERED.match(file.name) for file in self.folder.iterdir())
        self._number = 1 + max((int(found[1]) for found in written if found), default=-1)
        lost = missing_shards(self.folder, self.rows.values())
        self._contents = {row.sha256: row for row in self.rows.values() if row.frames and row.shard not in lost}

    def find(self, sha256: str) -> Row | None:
        """Return a row whose codes are those of this content, or None. Safe to call from other threads."""
        return self._contents.get(sha256)

    def add(self, row: Row, codes: Tensor | None = None) -> None:
        """Take up an audio file's row, with its codes (frames, codebooks) int64 unless they are cached already."""
        if codes is not None:
            self._codes[row.sha256] = codes = codes.to(torch.uint16).contiguous()
            row = row._replace(shard=self._number, frames=len(codes), crc=checksum(codes))
        if row.frames:
            self._contents[row.sha256] = row
        self.rows[row.path] = row
        self._fresh.append(row)
        if len(self._fresh) >= self.shard_clips or time.monotonic() - self._opened > self.shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Write all that has been taken up: codes first, then the rows that point at them."""
        if self._codes:
            write_file(shard_file(self.folder, self._number), save(self._codes))
        if self._fresh:
            lines = [json.dumps(self._stored(row), separators=(",", ":")) for row in self._fresh]
            write_file(self.folder / f"files-{self._number:05d}.jsonl", "\n".join(lines).encode())
            self._number += 1
        self._codes, self._fresh, self._opened = {}, [], time.monotonic()

    def _stored(self, row: Row) -> list[Any]:
        path = row.path.removeprefix(self._base)
        if self._above != os.sep and path.startswith(self._above):
            path = BESIDE + path.removeprefix(self._above)
        return [path, *row[1:]]


@contextmanager
def open_writer(
    cache: Path,
    codec: CodecInfo,
    shard_clips: int,
    shard_seconds: float,
    waiting: Callable[[], None] | None = None,
) -> Iterator[ShardWriter]:
    """Open the codes of one codec for writing; at the end, however it comes, what was taken up is written.

    With `waiting`, another writer is waited for; it is called meanwhile, and raises to give up.

    Raises:
        UserError: the folder cannot be made, or another `rawloop prepare` writes to it.
        RawloopError: the index is damaged, or the disk is full.
    """
    folder = codec_folder(cache, codec)
    with _locked(folder, waiting):
        for part in folder.glob("*.part"):
            part.unlink()  # left behind by a writer that was killed
        if not (folder / CODEC_FILE).exists():
            write_file(folder / CODEC_FILE, json.dumps({"format": FORMAT, **asdict(codec)}, indent=1).encode())
        elif read_codec(folder) != codec:
            raise RawloopError(f"{folder} holds codes of {read_codec(folder)}, not of {codec}: delete it")
        writer = ShardWriter(folder, codec, read_rows(folder), shard_clips, shard_seconds)
        try:
            yield writer
        finally:
            writer.flush()


@contextmanager
def _locked(folder: Path, waiting: Callable[[], None] | None) -> Iterator[None]:

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 - closed below, and by the system if the process is killed
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): set --data.codes to another folder") from error
    with lock:
        while not _lock(lock, folder):
            if waiting is None:
                raise UserError(f"another `rawloop prepare` writes to {folder}: wait until it has ended")
            waiting()
            time.sleep(0.05)
        yield


def _lock(lock: IO[str], folder: Path) -> bool:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise RawloopError(f"{folder / 'lock'} cannot be locked: {error.strerror}") from error
    return True


def missing_shards(folder: Path, rows: Iterable[Row]) -> set[int]:
    """Return the numbers of the shards that rows point at and that are not there."""
    numbers = {row.shard for row in rows if row.shard >= 0}
    return {number for number in numbers if not shard_file(folder, number).is_file()}
