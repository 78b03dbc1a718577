"""The files of cached codes: immutable shards of codes, and for each shard the rows of its clips in the index.

    <cache>/<codec hash>-<sample rate>/codec.json
                                       shard-00000.safetensors   one tensor per clip, (frames, codebooks) uint16
                                       files-00000.jsonl         one row per audio file: path, size, mtime, hash, shard

For models without codes, clips are only decoded and have rows without shards; see `heard_at`.

While clips are encoded, the folder also has plan.json (see `shard_plan`) and part-00000.safetensors, the beginning of a
shard. The name of a clip's tensor is the SHA-256 of its audio file.

Files are written under a temporary name and renamed, the codes before the rows that refer to them, so a kill loses only
what is not yet written. Later rows replace earlier rows of the same path. Paths in the parent folder of the cache, or
in that folder's parent, are stored relative, so data and cache can be moved together.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rawloop.data.locking import locked
from rawloop.errors import RawloopError
from rawloop.family_protocols import CodecInfo
from rawloop.files import replace_file

FORMAT = 1
CODEC_FILE = "codec.json"
HEARD = "heard-"
PART = "part-"  # the beginning of an unfinished shard
BESIDE = ".." + os.sep
MOST = 2**31  # frames and shards are fewer
NUMBERED = re.compile(r"(?:shard|files)-(\d+)\.")


class Row(NamedTuple):
    """An audio file in the index, with its size and time when it was encoded.

    `sha256` names its codes in `shard`; they have `frames` frames and the CRC-32 `crc`. `bad` is the reason why the
    clip cannot be used, or None; with `skip`, samples that need the clip are left out. A file with an `open_end` does
    not say where it ends.
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
    open_end: bool = False

    def like(self, twin: "Row") -> "Row":
        """Return this row with the codes of `twin`, which has the same content."""
        return self._replace(shard=twin.shard, frames=twin.frames, crc=twin.crc, open_end=twin.open_end)


# The types of the columns of the index; a bool is no int here.
COLUMNS = {name: set(get_args(kind) or (kind,)) for name, kind in get_type_hints(Row).items()}


def codec_folder(cache: Path, codec: CodecInfo) -> Path:
    """Return the folder with the codes of a codec."""
    return cache / f"{codec.hash[:16]}-{codec.sample_rate}"


def heard_at(sample_rate: int) -> CodecInfo:
    """Return a codec's description for clips that are only decoded: a frame is a sample, and there are no codes."""
    return CodecInfo(f"{HEARD}{sample_rate:06d}", sample_rate, 1, 1, float(sample_rate))


def shard_file(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def rows_file(folder: Path, number: int) -> Path:
    """Return the path of the rows of a shard's clips."""
    return folder / f"files-{number:05d}.jsonl"


def read_codec(folder: Path) -> CodecInfo:
    """Return the codec of the codes in `folder`. Raises RawloopError if codec.json is damaged."""
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


def row_files(folder: Path) -> list[Path]:
    """Return the files of the index, the oldest first."""
    return sorted(folder.glob("files-*.jsonl"))


def read_rows(folder: Path, before: int | None = None) -> dict[str, Row]:
    """Return the newest row of every audio file, by absolute path; only rows of shards `before` a number, if given.

    Raises RawloopError if the index is damaged.
    """
    files = row_files(folder)
    if before is not None:
        files = [file for file in files if file.name < rows_file(folder, before).name]
    return {row.path: row for file in files for row in read_index_file(file, folder)}


def read_index_file(file: Path, folder: Path) -> list[Row]:
    """Return the rows of one file of the index, with absolute paths. Raises RawloopError if it is damaged."""
    base = os.path.realpath(folder.parent.parent)
    above = os.path.dirname(base)

    def absolute(path: str) -> str:
        return os.path.join(above, path[len(BESIDE) :]) if path.startswith(BESIDE) else os.path.join(base, path)

    try:
        # Parsed in one call, 600,000 rows take about two seconds.
        read = json.loads(f"[{','.join(file.read_text(encoding='utf-8').splitlines())}]")
        rows = [Row(absolute(path), *rest) for path, *rest in read]
        _check_types(rows)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RawloopError(f"{file} is damaged ({error}): delete it and run `rawloop prepare` again") from error
    except OSError as error:
        raise RawloopError(f"{file} cannot be read: {error.strerror}") from error
    return rows


def _check_types(rows: list[Row]) -> None:
    """Refuse rows with wrong types, and impossible paths."""
    for name, column in zip(Row._fields, zip(*rows, strict=True), strict=False):
        other = set(map(type, column)) - COLUMNS[name]
        if other:
            raise TypeError(f"{name} is a {' or a '.join(sorted(kind.__name__ for kind in other))}")
    for row in rows:
        if "\0" in row.path or not (row.path.isascii() or os.fsencode(row.path)):
            raise ValueError(f"{row.path!r} is no path")
        if not (-1 <= row.shard < MOST and 0 <= row.frames < MOST):
            raise ValueError(f"{row.path!r} has {row.frames} frames in shard {row.shard}")


def write_file(file: Path, content: bytes) -> None:
    """Write a file atomically. Raises RawloopError if the disk is full or refuses it."""
    try:
        replace_file(file, content)
    except OSError as error:
        raise RawloopError(f"{file} cannot be written: {error.strerror}") from error


class Index:
    """The rows that a cache had before the shards that are written now. Threads may read it.

    Args:
        folder: of the codec.
        before: number of the first shard that is written now.
    """

    def __init__(self, folder: Path, before: int) -> None:
        self.rows = read_rows(folder, before)
        shards = {row.shard for row in self.rows.values() if row.shard >= 0}
        lost = {number for number in shards if not shard_file(folder, number).is_file()}
        self.contents = {row.sha256: row for row in self.rows.values() if row.frames and row.shard not in lost}


class ShardWriter:
    """Collects the codes and rows of one shard and writes them at its end, so that the shard has all of its clips.

    What is there before the end can be kept in a part. `kept` is what an earlier process has kept, by content.
    """

    def __init__(self, folder: Path, codec: CodecInfo, number: int, index: Index) -> None:
        self.folder, self.codec, self.number, self.index = folder, codec, number, index
        self._base = os.path.realpath(folder.parent.parent) + os.sep
        self._above = os.path.dirname(self._base[:-1]) + os.sep
        self._codes: dict[str, Tensor] = {}
        self._fresh: list[Row] = []
        self._own: dict[str, Row] = {}  # by content
        self._part = folder / f"{PART}{number:05d}.safetensors"
        self.kept: Mapping[str, tuple[Row, Tensor | None]] = _read_part(self._part)

    def find(self, sha256: str) -> Row | None:
        """Return a row with the codes of this content, or None. Other threads may call this."""
        return self._own.get(sha256) or self.index.contents.get(sha256)

    def add(self, row: Row, codes: Tensor | None = None) -> None:
        """Add the row of an audio file, with its codes (frames, codebooks) int64 if they are not in the cache."""
        if codes is not None:
            self._codes[row.sha256] = codes = codes.to(torch.uint16).contiguous()
            row = row._replace(shard=self.number, frames=len(codes), crc=zlib.crc32(codes.numpy().data))
        if row.frames:
            self._own[row.sha256] = row
        self._fresh.append(row)

    def keep(self) -> None:
        """Write the codes and rows so far into a part, for the next process that makes this shard."""
        if self._own:
            rows = {"rows": json.dumps(list(self._own.values()))}
            write_file(self._part, save(self._codes, metadata=rows))

    def write(self) -> None:
        """Write the shard: first the codes, then the rows."""
        if self._codes:
            write_file(shard_file(self.folder, self.number), save(self._codes))
        if self._fresh:
            lines = [json.dumps(self._stored(row), separators=(",", ":")) for row in self._fresh]
            write_file(rows_file(self.folder, self.number), "\n".join(lines).encode())
        self._part.unlink(missing_ok=True)

    def _stored(self, row: Row) -> list[Any]:
        path = row.path.removeprefix(self._base)
        if self._above != os.sep and path.startswith(self._above):
            path = BESIDE + path.removeprefix(self._above)
        return [path, *row[1:]]


def _read_part(file: Path) -> dict[str, tuple[Row, Tensor | None]]:
    """Return row and codes of each content in a part. A part that is damaged has nothing: it only saves time."""
    try:
        with safe_open(file, "pt") as part:
            names, rows = set(part.keys()), [Row(*row) for row in json.loads(part.metadata()["rows"])]
            kept = {row.sha256: (row, part.get_tensor(row.sha256) if row.sha256 in names else None) for row in rows}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return {}
    return {name: (row, codes) for name, (row, codes) in kept.items() if codes is None or _crc(codes) == row.crc}


def _crc(codes: Tensor) -> int:
    return zlib.crc32(codes.numpy().data)


def next_number(folder: Path) -> int:
    """Return the number of the next shard."""
    written = (NUMBERED.match(file.name) for file in folder.iterdir())
    return 1 + max((int(found[1]) for found in written if found), default=-1)


@contextmanager
def open_cache(cache: Path, codec: CodecInfo, waiting: Callable[[], None] | None = None) -> Iterator[Path]:
    """Lock the folder of a codec for writing, and yield it.

    While another process writes to the folder, `waiting` is called repeatedly; it raises to give up. Without `waiting`,
    another process is a UserError.
    """
    folder = codec_folder(cache, codec)
    with locked(folder / "lock", waiting):
        for part in (*folder.glob(".tmp-*"), *folder.glob("*.part")):  # of a killed writer; *.part of older versions
            part.unlink()
        if not (folder / CODEC_FILE).exists():
            write_file(folder / CODEC_FILE, json.dumps({"format": FORMAT, **asdict(codec)}, indent=1).encode())
        elif read_codec(folder) != codec:
            raise RawloopError(f"{folder} has codes of {read_codec(folder)}, not of {codec}: delete it")
        yield folder
