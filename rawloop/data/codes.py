"""Reads the cached codes of clips by path. Training never opens or decodes audio.

`check` verifies once, at the start, that each clip of a data set has codes of its current audio file. After that,
getting codes is a look-up in a mapped index and one read. The audio files may be deleted.

Shards are read, not memory-mapped: truncating a mapped file kills the process that reads it (SIGBUS).
"""

import os
import zlib
from collections.abc import Iterable
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rawloop.audio import content_hash, segment_of
from rawloop.contracts import Sample
from rawloop.data.config import DataConfig
from rawloop.data.mapped import Say
from rawloop.data.rows import NOT_WRITTEN, Rows
from rawloop.data.samples import usable
from rawloop.data.shards import CODEC_FILE, HEARD, Row, read_codec, shard_file
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


class CodeCache:
    """Codes of clips by path: `cache(path)` returns (frames, codebooks) int64.

    The audio file of a clip is looked up at its first use, unless `trust` was called.

    Args:
        folder: the cache that `rawloop prepare` wrote (`codes_folder(config)`).
        codec: hash of the codec, or a prefix; needed if the cache has codes of several codecs.
        config: clips outside its `min_seconds` and `max_seconds` are bad, even if they are encoded. If its
            `on_bad_sample` is skip, `usable` leaves out all samples with bad clips. Default: no limits.
        say: prints a line about building the index of the clips, if it takes long.
    """

    def __init__(
        self,
        folder: Path | str,
        codec: str | None = None,
        config: DataConfig | None = None,
        say: Say = lambda line: None,
    ) -> None:
        self.config = config or DataConfig(max_seconds=1e9)
        self.folder, self.codec = _choose(Path(expanduser(folder)), codec)
        self._rows = Rows(self.folder, self.codec.codebooks, say)
        self._current = np.zeros(len(self._rows), bool)  # the rows with an unchanged audio file
        self._moved: dict[str, int] = {}  # the rows of files that were moved or touched
        self._trusted = False

    @property
    def key(self) -> str:
        """A digest of all clips and codes in the cache."""
        return f"{self.codec.hash} {self._rows.key}"

    def trust(self) -> None:
        """Look up no audio files from now on, except in `check`: they were checked, and the result was kept."""
        self._trusted = True

    def __call__(self, path: Path) -> Tensor:
        """Return the codes of a clip, (frames, codebooks) int64. Raises UserError if it has no codes or has changed."""
        number, row = self._row(str(path))
        place = self._rows.place(number)
        wrong = f"the codes of {path} are not what was written"
        if place == NOT_WRITTEN:
            raise self._damaged(row.shard, self._rows.faults.get(row.shard, wrong))
        try:
            content = _read(shard_file(self.folder, row.shard), place, 2 * row.frames * self.codec.codebooks)
        except FileNotFoundError as error:
            raise self._damaged(row.shard, "the file is gone") from error
        if not content or zlib.crc32(content) != row.crc:
            raise self._damaged(row.shard, wrong)
        return torch.frombuffer(content, dtype=torch.uint16).view(row.frames, -1).to(torch.int64)

    def frames(self, path: Path) -> int:
        """Return how many frames a clip has, without reading its codes. Raises like a call."""
        return self._row(str(path))[1].frames

    def identity(self, path: Path) -> str:
        """Return a text that identifies the codes, without reading them. Raises like a call."""
        row = self._row(str(path))[1]
        return f"{self.codec.hash[:16]} {row.frames} {row.crc:08x}"

    def knows(self, sample: Sample) -> bool:
        """Return whether all clips of a sample are in the index, unchanged. Clips of bad length are looked at again."""
        rows = (self.row(str(path)) for path in sample.audio_paths())
        return all(row is not None and not (row.bad or "").startswith(LASTS) and _unchanged(row) for row in rows)

    def usable(self, samples: Iterable[Sample]) -> tuple[list[Sample], dict[str, str]]:
        """Return the samples to train on, and the reason for each sample to leave out, by its id.

        A sample is left out if it needs a bad clip and `rawloop prepare` or the config says skip.
        """
        return usable(list(samples), self.refuse_left_out, skip=True)

    def check(self, samples: Iterable[Sample]) -> None:
        """Verify that every clip of `samples` has codes of its current audio file, if the file exists.

        Costs one stat per clip; only a file that was moved or touched is hashed. Raises UserError for clips without
        codes, and RawloopError for a damaged shard.
        """
        check = ClipCheck(self)
        for sample in samples:
            check.add(sample)
        check.finish()

    def open_ends(self, samples: Iterable[Sample]) -> str | None:
        """Return a line about the clips with an open end, or None if there are none."""
        check = ClipCheck(self)
        for sample in samples:
            check.note_open_ends(sample)
        return check.open_ends()

    def refuse_left_out(self, sample: Sample) -> None:
        """Raise BadSample for a sample that is to be left out; see `usable`."""
        skip = self.config.on_bad_sample == "skip"
        for path in sample.audio_paths():
            row = self.row(str(path))
            if row and (row.skip or skip) and (fault := self._fault(row)) and _unchanged(row):
                raise BadSample(f"{path}: {fault}")

    def find(self, path: str, trusted: bool = False) -> tuple[int, Row] | tuple[int, str]:
        """Return the number and row of the codes of the file at `path`, or its fault and the name of the clip.

        Without `trusted`, these are the codes of the current file, if it exists.
        """
        number = self._number(path)
        row = known = None if number is None else self._rows.row(number)
        if number is None or row is None or not (trusted or self._current[number] or _unchanged(row)):
            number = self._by_content(path)
            row = None if number is None else self._rows.row(number)
        if number is None or row is None:
            if known is not None:
                return CHANGED, path
            return NO_CODES if segment_of(path).file.exists() else NO_FILE, path
        fault = self._fault(row)
        if fault:
            return BAD, f"{path} ({fault})"
        if row.path == path:
            self._current[number] = not trusted or self._current[number]
        else:
            self._moved[path] = number
        return number, row

    def _fault(self, row: Row) -> str | None:
        return row.bad or self.config.fault_of_length(row.frames, self.codec.frame_rate)

    def _number(self, path: str) -> int | None:
        """Return the number of the newest row of a path, or of the file that the path links to."""
        number = self._moved.get(path)
        number = self._rows.number(path) if number is None else number
        return self._rows.number(os.path.realpath(path)) if number is None else number

    def row(self, path: str) -> Row | None:
        """Return the newest row of a path, whatever its file has become; None without one."""
        number = self._number(path)
        return None if number is None else self._rows.row(number)

    def _row(self, path: str) -> tuple[int, Row]:
        if path in self._moved:
            return self._moved[path], self._rows.row(self._moved[path])
        number, found = self.find(path, self._trusted)
        if isinstance(found, Row):
            return number, found
        raise UserError(_problem(number, [found]))

    def _by_content(self, path: str) -> int | None:
        """Return the number of the row of a file that was moved or touched, by its hash."""
        try:
            return self._rows.with_content(content_hash(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def check_shard(self, number: int) -> None:
        """Raise RawloopError if a shard is damaged or gone."""
        if why := self._rows.faults.get(number):
            raise self._damaged(number, why)

    def _damaged(self, number: int, why: object) -> RawloopError:
        return RawloopError(f"{shard_file(self.folder, number)} is damaged ({why}): delete it and {PREPARE} again")


class ClipCheck:
    """Checks the clips of samples one after another; `finish` raises what was found. See `CodeCache.check`."""

    def __init__(self, cache: CodeCache) -> None:
        self.cache = cache
        self._problems: dict[int, dict[str, None]] = {}
        self._shards: set[int] = set()
        self._open: dict[str, None] = {}

    def add(self, sample: Sample) -> bool:
        """Check the clips of a sample, and return whether all of them have codes of the current audio."""
        fine = True
        for path in map(str, sample.audio_paths()):
            fault, found = self.cache.find(path)
            if isinstance(found, Row):
                self._shards.add(found.shard)
            else:
                self._problems.setdefault(fault, {})[found] = None
                fine = False
        return fine

    def accepts(self, sample: Sample) -> bool:
        """Check a sample, note its open ends, and return like `add`. Raises BadSample for one that is left out."""
        self.cache.refuse_left_out(sample)
        self.note_open_ends(sample)
        return self.add(sample)

    def note_open_ends(self, sample: Sample) -> None:
        """Remember the clips of a sample that do not say where they end."""
        for path in map(str, sample.audio_paths()):
            row = self.cache.row(path)
            if row and row.open_end and not row.bad:
                self._open[path] = None

    def finish(self) -> None:
        """Raise UserError for clips without codes, and RawloopError for a damaged shard."""
        if self._problems:
            raise UserError("; ".join(_problem(kind, list(clips)) for kind, clips in sorted(self._problems.items())))
        for number in sorted(number for number in self._shards if number >= 0):  # decoded clips have no shard
            self.cache.check_shard(number)

    def open_ends(self) -> str | None:
        """Return a line about the clips with an open end, or None if there are none."""
        if not self._open:
            return None
        return (
            f"{len(self._open)} clip(s) do not say where they end (an ogg without an end mark, a wav without a "
            f"length), as if streamed or cut short: {first_few(self._open)}: listen to their ends, or encode them anew"
        )


def _read(file: Path, place: int, size: int) -> bytearray:
    """Return `size` bytes of a file, or fewer if it ends before."""
    with open(file, "rb") as stream:
        stream.seek(place)
        return bytearray(stream.read(size))


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
