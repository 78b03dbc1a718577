"""How cached codes lie on disk: immutable shards of codes, and beside each the index rows it brought.

    <cache>/<codec hash>-<sample rate>/codec.json
                                       shard-00000.safetensors   one tensor per clip, (frames, codebooks) uint16
                                       files-00000.jsonl         one row per audio file: path, size, mtime, hash, shard

A clip's tensor is named by the SHA-256 of the audio file. Both files are written whole, then renamed: first the codes,
then the rows that point at them, so that a kill at any moment loses only what was not yet written. Later rows replace
earlier ones of the same path. Paths in the folder of the cache are stored relative to it, so that both move together.
"""

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from rawloop.contracts import CodecInfo
from rawloop.errors import RawloopError, UserError

FORMAT = 1
CODEC_FILE = "codec.json"


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


def codec_folder(cache: Path, codec: CodecInfo) -> Path:
    """Return the folder that holds the codes of one codec."""
    return cache / f"{codec.hash[:16]}-{codec.sample_rate}"


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
        return CodecInfo(**values)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise RawloopError(f"{file} is damaged ({error}): delete {folder} and run `rawloop prepare` again") from error


def read_rows(folder: Path) -> dict[str, Row]:
    """Return the index: the newest row of every audio file, by absolute path.

    Raises:
        RawloopError: an index file is damaged.
    """
    base = os.path.realpath(folder.parent.parent)
    rows: dict[str, Row] = {}
    for file in sorted(folder.glob("files-*.jsonl")):
        try:
            # One call of the parser for the whole file: 600,000 rows in about two seconds.
            lines = file.read_text(encoding="utf-8").splitlines()
            for path, *rest in json.loads(f"[{','.join(lines)}]"):
                path = os.path.join(base, path)
                rows[path] = Row(path, *rest)
        except (json.JSONDecodeError, ValueError, TypeError) as error:
            raise RawloopError(f"{file} is damaged ({error}): delete it and run `rawloop prepare` again") from error
    return rows


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
        written = [*self.folder.glob("shard-*.safetensors"), *self.folder.glob("files-*.jsonl")]
        self._number = 1 + max((int(file.stem.partition("-")[2]) for file in written), default=-1)
        lost = missing_shards(self.folder, self.rows.values())
        self._contents = {row.sha256: row for row in self.rows.values() if row.shard >= 0 and row.shard not in lost}

    def find(self, sha256: str) -> Row | None:
        """Return a row whose codes are those of this content, or None. Safe to call from other threads."""
        return self._contents.get(sha256)

    def add(self, row: Row, codes: Tensor | None = None) -> None:
        """Take up an audio file's row, with its codes (frames, codebooks) int64 unless they are cached already."""
        if codes is not None:
            self._codes[row.sha256] = codes = codes.to(torch.uint16).contiguous()
            row = row._replace(shard=self._number, frames=len(codes), crc=checksum(codes))
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
        return [row.path.removeprefix(self._base), *row[1:]]


@contextmanager
def open_writer(cache: Path, codec: CodecInfo, shard_clips: int, shard_seconds: float) -> Iterator[ShardWriter]:
    """Open the codes of one codec for writing; at the end, however it comes, what was taken up is written.

    Raises:
        UserError: the folder cannot be made, or another `rawloop prepare` writes to it.
        RawloopError: the index is damaged, or the disk is full.
    """
    folder = codec_folder(cache, codec)
    with _locked(folder):
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
def _locked(folder: Path) -> Iterator[None]:
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 - closed below, and by the system if the process is killed
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): set --data.codes to another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another `rawloop prepare` writes to {folder}: wait until it has ended") from error
        except OSError as error:
            raise RawloopError(f"{folder / 'lock'} cannot be locked: {error.strerror}") from error
        yield


def missing_shards(folder: Path, rows: Iterable[Row]) -> set[int]:
    """Return the numbers of the shards that rows point at and that are not there."""
    numbers = {row.shard for row in rows if row.shard >= 0}
    return {number for number in numbers if not shard_file(folder, number).is_file()}
