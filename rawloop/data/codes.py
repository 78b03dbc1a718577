"""The codes of all clips, read side: training asks for a clip by its path and never opens or decodes its audio.

`check` looks at all clips of a data set once, at start-up: whether each has codes, and whether its audio file is still
the one that was encoded. After that a look-up is a dictionary access and one read. Audio files that are gone are not
missed: only their codes are needed.
"""

import os
from collections.abc import Iterable
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.contracts import CodecInfo, Sample
from rawloop.data.config import DataConfig
from rawloop.data.shards import CODEC_FILE, HEARD, Row, Shard, checksum, read_codec, read_rows, shard_file
from rawloop.errors import RawloopError, UserError
from rawloop.segments import content_hash, segment_of

PREPARE = "run `rawloop prepare`"
LASTS = "lasts "  # so begins what `load_audio` says of a clip that is too long or too short
NO_FILE, NO_CODES, CHANGED, BAD = range(4)  # what can be wrong with a clip
WRONG = {
    NO_FILE: ("without codes, and without files", f"restore them and {PREPARE}, or remove their samples"),
    NO_CODES: ("without codes", PREPARE),
    CHANGED: ("changed since they were encoded", f"{PREPARE} again"),
    BAD: ("that cannot be used", f"mend them and {PREPARE} again, with --data.on_bad_sample skip to leave them out"),
}


class CodeCache:
    """Codes of clips, by path: `cache(path)` gives (frames, codebooks) int64.

    Works in forked and in spawned DataLoader workers: each process reads the headers of the shards that it needs.

    Args:
        folder: the cache that `rawloop prepare` wrote (`codes_folder(config)`).
        codec: hash of the codec; needed when the cache holds codes of several. A prefix of the hash will do.
        config: clips outside its `min_seconds` and `max_seconds` are bad, also if they were good when encoded; with its
            `on_bad_sample` at skip `usable` leaves out all samples with bad clips. Default: no limits.

    Raises:
        UserError: no codes there, none of this codec, or codes of several codecs and no choice made.
        RawloopError: the index is damaged.
    """

    def __init__(self, folder: Path | str, codec: str | None = None, config: DataConfig | None = None) -> None:
        self.config = config
        self.folder, self.codec = _choose(Path(expanduser(folder)), codec)
        self._rows = read_rows(self.folder)
        self._current: set[str] = set()  # paths whose audio file was found to be the one that was encoded
        self._shards: dict[int, Shard] = {}
        self._contents: dict[str, Row] | None = None

    def __call__(self, path: Path) -> Tensor:
        """Return the codes of a clip, (frames, codebooks) int64.

        Raises:
            UserError: the clip has no codes, or its file has changed since it was encoded.
            RawloopError: the cache is damaged.
        """
        row = self._row(str(path))
        codes = self._read(row)
        if codes.shape != (row.frames, self.codec.codebooks) or not row.frames or checksum(codes) != row.crc:
            raise self._damaged(row.shard, f"the codes of {path} are not what was written")
        return codes.to(torch.int64)

    def frames(self, path: Path) -> int:
        """Return how many frames a clip has, without reading its codes. Raises as calling does."""
        return self._row(str(path)).frames

    def identity(self, path: Path) -> str:
        """Return what tells a clip's codes from others, without reading them. Raises as calling does."""
        row = self._row(str(path))
        return f"{self.codec.hash[:16]} {row.frames} {row.crc:08x}"

    def knows(self, sample: Sample) -> bool:
        """Whether every clip of a sample was looked at as it is now, be it good or bad, but for limits of length."""
        rows = (self._known(str(path)) for path in sample.audio_paths())
        return all(row is not None and not (row.bad or "").startswith(LASTS) and _unchanged(row) for row in rows)

    def usable(self, samples: Iterable[Sample]) -> tuple[list[Sample], dict[str, str]]:
        """Split samples into those to train on, and those to leave out, as `rawloop prepare` or the config asks for.

        Returns:
            The kept samples, in order, and the reason for each one left out, by sample id.
        """
        kept: list[Sample] = []
        left_out: dict[str, str] = {}
        for sample in samples:
            reasons = [reason for path in sample.audio_paths() if (reason := self._skipped(path))]
            if reasons:
                left_out[sample.id] = reasons[0]
            else:
                kept.append(sample)
        return kept, left_out

    def check(self, samples: Iterable[Sample]) -> None:
        """Verify that every clip of `samples` has codes, made from the audio that is on disk now, if there is any.

        Costs one stat per clip; a file is only hashed if it was moved or touched since.

        Raises:
            UserError: one message with the number of clips without codes and the first five by name.
            RawloopError: a shard is gone or has lost its end.
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
        for number in sorted({row.shard for row in rows if row.shard >= 0}):  # clips that are decoded only have none
            self._shard(number)

    def _skipped(self, path: Path) -> str | None:
        row = self._known(str(path))
        if row is None:
            return None
        skip = row.skip or (self.config is not None and self.config.on_bad_sample == "skip")
        fault = self._fault(row)
        return f"{path}: {fault}" if fault and skip and _unchanged(row) else None

    def _fault(self, row: Row) -> str | None:
        """Say why a clip cannot be used, or None."""
        if row.bad or self.config is None:
            return row.bad
        return self.config.fault_of_length(row.frames, self.codec.frame_rate)

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
        """Return the row with the codes of the file at `path` as it is now, or what is wrong and with which clip."""
        row = self._known(path)
        if row is None:
            row = self._by_content(path)
            if row is None:
                return NO_CODES if segment_of(path).file.exists() else NO_FILE, path
        elif not _unchanged(row):
            row = self._by_content(path)
            if row is None:
                return CHANGED, path
        fault = self._fault(row)
        if fault:
            return BAD, f"{path} ({fault})"
        self._rows[path] = row
        self._current.add(path)
        return row

    def _by_content(self, path: str) -> Row | None:
        """Return the codes of a file that was moved or touched, found by its hash."""
        if self._contents is None:
            self._contents = {row.sha256: row for row in self._rows.values() if row.frames}
        try:
            return self._contents.get(content_hash(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def _read(self, row: Row) -> Tensor:
        try:
            return self._shard(row.shard).codes(row.sha256)
        except (ValueError, FileNotFoundError) as error:
            raise self._damaged(row.shard, _reason(error)) from error

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            try:
                self._shards[number] = Shard(shard_file(self.folder, number))
            except (ValueError, FileNotFoundError) as error:
                raise self._damaged(number, _reason(error)) from error
            except OSError as error:
                raise RawloopError(f"{shard_file(self.folder, number)} cannot be read: {error.strerror}") from error
        return self._shards[number]

    def _damaged(self, number: int, why: str) -> RawloopError:
        file = shard_file(self.folder, number)
        return RawloopError(f"{file} is damaged ({why}): delete it and {PREPARE} again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a spawned worker reads the headers that it needs


def _choose(folder: Path, codec: str | None) -> tuple[Path, CodecInfo]:
    found = {file.parent: read_codec(file.parent) for file in sorted(folder.glob(f"*/{CODEC_FILE}"))}
    if not found:
        raise UserError(f"{folder} holds no codes: {PREPARE} first, or set --data.codes to the folder it wrote")
    if codec is None:  # whoever wants codes means none that were only heard
        found = {place: info for place, info in found.items() if not info.hash.startswith(HEARD)} or found
    fitting = {place: info for place, info in found.items() if codec is None or info.hash.startswith(codec)}
    known = ", ".join(f"{info.hash[:16]} at {info.sample_rate} Hz" for info in found.values())
    if not fitting:
        raise UserError(f"{folder} has no codes of codec {codec} (it has {known}): {PREPARE} with this model")
    if len(fitting) > 1:
        raise UserError(
            f"{folder} holds codes of several codecs ({known}): name one by its hash, or set "
            "--data.codes to a folder for this codec alone"
        )
    return next(iter(fitting.items()))


def _unchanged(row: Row) -> bool:
    """Whether the file is as it was when it was encoded. A file that is gone cannot have changed."""
    try:
        now = os.stat(segment_of(row.path).file)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(f"{row.path} cannot be looked up: {error.strerror}") from error
    return (now.st_size, now.st_mtime_ns) == (row.size, row.mtime_ns)


def _reason(error: Exception) -> str:
    return "the file is gone" if isinstance(error, FileNotFoundError) else str(error)


def _problem(kind: int, clips: list[str]) -> str:
    what, fix = WRONG[kind]
    named = ", ".join(clips[:5]) + (f" and {len(clips) - 5} more" if len(clips) > 5 else "")
    return f"{len(clips)} clip(s) {what}: {named}: {fix}"
