"""Reads the cached codes of clips by path. Training never opens or decodes audio.

`check` verifies once, at the start, that each clip of a data set has codes of its current audio file. After that,
getting codes is a dictionary access and one read. The audio files may be deleted.

Shards are read, not memory-mapped: truncating a mapped file kills the process that reads it (SIGBUS).
"""

import json
import os
import zlib
from collections.abc import Iterable
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.audio import content_hash, segment_of
from rawloop.contracts import Sample
from rawloop.data.config import DataConfig
from rawloop.data.samples import usable
from rawloop.data.shards import CODEC_FILE, HEARD, Row, read_codec, read_rows, shard_file
from rawloop.errors import BadSample, RawloopError, UserError, first_few
from rawloop.family_protocols import CodecInfo

PREPARE = "run `rawloop prepare`"
LASTS = "lasts "  # the first word of every message about a clip's length
NO_FILE, NO_CODES, CHANGED, BAD = range(4)  # the faults of a clip
WRONG = {
    NO_FILE: ("without codes and without files", f"restore them and {PREPARE}, or remove their samples"),
    NO_CODES: ("without codes", PREPARE),
    CHANGED: ("changed since they were encoded", f"{PREPARE} again"),
    BAD: ("that cannot be used", f"mend them and {PREPARE} again, with --data.on_bad_sample skip to leave them out"),
}


class Shard:
    """The codes in one file, which is open only during a read. Raises ValueError if it is damaged."""

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

    def codes(self, sha256: str) -> tuple[Tensor, int]:
        """Return the codes of a content, (frames, codebooks) uint16, and their CRC-32."""
        if sha256 not in self.places:
            raise ValueError(f"it has no codes of {sha256}")
        place, frames, books = self.places[sha256]
        with open(self.file, "rb") as stream:
            stream.seek(place)
            content = bytearray(stream.read(2 * frames * books))
        if len(content) < 2 * frames * books:
            raise ValueError(f"it ends before byte {place + 2 * frames * books}")
        if not content:
            return torch.empty(frames, books, dtype=torch.uint16), 0
        return torch.frombuffer(content, dtype=torch.uint16).view(frames, books), zlib.crc32(content)


def _place(start: int, entry: Any) -> tuple[int, int, int]:
    """Return the place of an entry's codes in the file, and their shape."""
    (frames, books), (first, last) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != "U16" or min(frames, books, first) < 0 or last - first != 2 * frames * books:
        raise ValueError(f"it has a tensor other than codes: {entry}")
    return start + first, frames, books


class CodeCache:
    """Codes of clips by path: `cache(path)` returns (frames, codebooks) int64.

    Args:
        folder: the cache that `rawloop prepare` wrote (`codes_folder(config)`).
        codec: hash of the codec, or a prefix; needed if the cache has codes of several codecs.
        config: clips outside its `min_seconds` and `max_seconds` are bad, even if they are encoded. If its
            `on_bad_sample` is skip, `usable` leaves out all samples with bad clips. Default: no limits.
    """

    def __init__(self, folder: Path | str, codec: str | None = None, config: DataConfig | None = None) -> None:
        self.config = config or DataConfig(max_seconds=1e9)
        self.folder, self.codec = _choose(Path(expanduser(folder)), codec)
        self._rows = read_rows(self.folder)
        self._current: set[str] = set()  # paths with an unchanged audio file
        self._shards: dict[int, Shard] = {}
        self._contents: dict[str, Row] | None = None

    def __call__(self, path: Path) -> Tensor:
        """Return the codes of a clip, (frames, codebooks) int64. Raises UserError if it has no codes or has changed."""
        row = self._row(str(path))
        try:
            codes, crc = self._shard(row.shard).codes(row.sha256)
        except (ValueError, FileNotFoundError) as error:
            raise self._damaged(row.shard, error) from error
        if codes.shape != (row.frames, self.codec.codebooks) or not row.frames or crc != row.crc:
            raise self._damaged(row.shard, f"the codes of {path} are not what was written")
        return codes.to(torch.int64)

    def frames(self, path: Path) -> int:
        """Return how many frames a clip has, without reading its codes. Raises like a call."""
        return self._row(str(path)).frames

    def identity(self, path: Path) -> str:
        """Return a text that identifies the codes, without reading them. Raises like a call."""
        row = self._row(str(path))
        return f"{self.codec.hash[:16]} {row.frames} {row.crc:08x}"

    def knows(self, sample: Sample) -> bool:
        """Return whether all clips of a sample are in the index, unchanged. Clips of bad length are looked at again."""
        rows = (self._known(str(path)) for path in sample.audio_paths())
        return all(row is not None and not (row.bad or "").startswith(LASTS) and _unchanged(row) for row in rows)

    def usable(self, samples: Iterable[Sample]) -> tuple[list[Sample], dict[str, str]]:
        """Return the samples to train on, and the reason for each sample to leave out, by its id.

        A sample is left out if it needs a bad clip and `rawloop prepare` or the config says skip.
        """
        return usable(list(samples), self._refuse_left_out, skip=True)

    def check(self, samples: Iterable[Sample]) -> None:
        """Verify that every clip of `samples` has codes of its current audio file, if the file exists.

        Costs one stat per clip; only a file that was moved or touched is hashed. Raises UserError for clips without
        codes, and RawloopError for a damaged shard.
        """
        problems: dict[int, list[str]] = {}
        rows: list[Row] = []
        for path in dict.fromkeys(str(path) for sample in samples for path in sample.audio_paths()):
            found = self._find(path)
            if isinstance(found, Row):
                rows.append(found)
            else:
                problems.setdefault(found[0], []).append(found[1])
        if problems:
            raise UserError("; ".join(_problem(*pair) for pair in sorted(problems.items())))
        for number in sorted({row.shard for row in rows if row.shard >= 0}):  # clips without a codec have no shard
            self._shard(number)

    def open_ends(self, samples: Iterable[Sample]) -> str | None:
        """Return a line about the clips with an open end, or None if there are none."""
        paths = dict.fromkeys(str(path) for sample in samples for path in sample.audio_paths())
        found = [path for path in paths if (row := self._known(path)) and row.open_end and not row.bad]
        if not found:
            return None
        return (
            f"{len(found)} clip(s) do not say where they end (an ogg without an end mark, a wav without a length), as "
            f"if streamed or cut short: {first_few(found)}: listen to their ends, or encode them anew"
        )

    def _refuse_left_out(self, sample: Sample) -> None:
        skip = self.config.on_bad_sample == "skip"
        for path in sample.audio_paths():
            row = self._known(str(path))
            if row and (row.skip or skip) and (fault := self._fault(row)) and _unchanged(row):
                raise BadSample(f"{path}: {fault}")

    def _fault(self, row: Row) -> str | None:
        return row.bad or self.config.fault_of_length(row.frames, self.codec.frame_rate)

    def _known(self, path: str) -> Row | None:
        return self._rows.get(path) or self._rows.get(os.path.realpath(path))

    def _row(self, path: str) -> Row:
        if path in self._current:
            return self._rows[path]
        found = self._find(path)
        if isinstance(found, Row):
            return found
        raise UserError(_problem(found[0], [found[1]]))

    def _find(self, path: str) -> Row | tuple[int, str]:
        """Return the row with the codes of the current file at `path`, or its fault and the name of the clip."""
        row = known = self._known(path)
        if row is None or not _unchanged(row):
            row = self._by_content(path)
        if row is None and known is not None:
            return CHANGED, path
        if row is None:
            return NO_CODES if segment_of(path).file.exists() else NO_FILE, path
        fault = self._fault(row)
        if fault:
            return BAD, f"{path} ({fault})"
        self._rows[path] = row
        self._current.add(path)
        return row

    def _by_content(self, path: str) -> Row | None:
        """Return the row of a file that was moved or touched, by its hash."""
        if self._contents is None:
            self._contents = {row.sha256: row for row in self._rows.values() if row.frames}
        try:
            return self._contents.get(content_hash(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            try:
                self._shards[number] = Shard(shard_file(self.folder, number))
            except (ValueError, FileNotFoundError) as error:
                raise self._damaged(number, error) from error
            except OSError as error:
                raise RawloopError(f"{shard_file(self.folder, number)} cannot be read: {error.strerror}") from error
        return self._shards[number]

    def _damaged(self, number: int, why: object) -> RawloopError:
        reason = "the file is gone" if isinstance(why, FileNotFoundError) else why
        return RawloopError(f"{shard_file(self.folder, number)} is damaged ({reason}): delete it and {PREPARE} again")


def _choose(folder: Path, codec: str | None) -> tuple[Path, CodecInfo]:
    """Return the folder and the description of the requested codec."""
    found = {file.parent: read_codec(file.parent) for file in sorted(folder.glob(f"*/{CODEC_FILE}"))}
    if not found:
        raise UserError(f"{folder} has no codes: {PREPARE} first, or set --data.codes to the folder it wrote")
    if codec is None:  # a folder of clips that were only decoded has no codes
        found = {place: info for place, info in found.items() if not info.hash.startswith(HEARD)} or found
    fitting = {place: info for place, info in found.items() if codec is None or info.hash.startswith(codec)}
    known = ", ".join(f"{info.hash[:16]} at {info.sample_rate} Hz" for info in found.values())
    if not fitting:
        raise UserError(f"{folder} has no codes of codec {codec} (it has {known}): {PREPARE} with this model")
    if len(fitting) > 1:
        raise UserError(
            f"{folder} has codes of several codecs ({known}): name one by its hash, or set --data.codes to a folder "
            "for this codec alone"
        )
    return next(iter(fitting.items()))


def _unchanged(row: Row) -> bool:
    """Return whether the file has the size and time of its row. A deleted file counts as unchanged."""
    try:
        now = os.stat(segment_of(row.path).file)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(f"{row.path} cannot be looked up: {error.strerror}") from error
    return (now.st_size, now.st_mtime_ns) == (row.size, row.mtime_ns)


def _problem(kind: int, clips: list[str]) -> str:
    what, fix = WRONG[kind]
    return f"{len(clips)} clip(s) {what}: {first_few(clips)}: {fix}"
