"""The codes of all clips, read side: training asks for a clip by its path and never opens or decodes its audio.

`check` looks at all clips of a data set once, at start-up: whether each has codes, and whether its audio file is still
the one that was encoded. After that a look-up is a dictionary access and a slice of a memory-mapped shard.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rawloop.contracts import CodecInfo, Sample
from rawloop.data.shards import CODEC_FILE, Row, checksum, missing_shards, read_codec, read_rows, shard_file
from rawloop.errors import RawloopError, UserError
from rawloop.segments import content_hash, segment_of

PREPARE = "run `rawloop prepare`"
NO_CODES, CHANGED, BAD = range(3)  # what can be wrong with a clip
WRONG = {
    NO_CODES: ("without codes", PREPARE),
    CHANGED: ("changed since they were encoded", f"{PREPARE} again"),
    BAD: ("that cannot be used", f"mend them and {PREPARE} again, with --data.on_bad_sample skip to leave them out"),
}


class CodeCache:
    """Codes of clips, by path: `cache(path)` gives (frames, codebooks) int64.

    Works in forked and in spawned DataLoader workers: each process maps the shards it needs.

    Args:
        folder: the cache that `rawloop prepare` wrote (`codes_folder(config)`).
        codec: hash of the codec; needed when the cache holds codes of several. A prefix of the hash will do.

    Raises:
        UserError: no codes there, none of this codec, or codes of several codecs and no choice made.
        RawloopError: the index is damaged.
    """

    def __init__(self, folder: Path | str, codec: str | None = None) -> None:
        self.folder, self.codec = _choose(Path(folder).expanduser(), codec)
        self._rows = read_rows(self.folder)
        self._current: set[str] = set()  # paths whose audio file was found to be the one that was encoded
        self._shards: dict[int, Any] = {}
        self._contents: dict[str, Row] | None = None

    def __call__(self, path: Path) -> Tensor:
        """Return the codes of a clip, (frames, codebooks) int64.

        Raises:
            UserError: the clip has no codes, or its file has changed since it was encoded.
            RawloopError: the cache is damaged.
        """
        row = self._row(str(path))
        codes = self._read(row)
        if codes.shape != (row.frames, self.codec.codebooks) or checksum(codes) != row.crc:
            raise self._damaged(row.shard, f"the codes of {path} are not what was written")
        return codes.to(torch.int64)

    def frames(self, path: Path) -> int:
        """Return how many frames a clip has, without reading its codes. Raises as calling does."""
        return self._row(str(path)).frames

    def usable(self, samples: Iterable[Sample]) -> tuple[list[Sample], dict[str, str]]:
        """Split samples into those to train on, and those that `rawloop prepare` was asked to skip.

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
        """Verify that every clip of `samples` has codes, made from the audio that is on disk now.

        Costs one stat per clip; a file is only hashed if it was moved or touched since.

        Raises:
            UserError: one message with the number of clips without codes and the first five by name.
            RawloopError: a shard is gone.
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
        lost = missing_shards(self.folder, rows)
        if lost:
            raise self._damaged(min(lost), "the file is gone")

    def _skipped(self, path: Path) -> str | None:
        row = self._known(str(path))
        return f"{path}: {row.bad}" if row and row.bad and row.skip and _unchanged(row) else None

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
                return NO_CODES, path
        elif not _unchanged(row):
            row = self._by_content(path)
            if row is None:
                return CHANGED, path
        if row.bad:
            return BAD, f"{path} ({row.bad})"
        self._rows[path] = row
        self._current.add(path)
        return row

    def _by_content(self, path: str) -> Row | None:
        """Return the codes of a file that was moved or touched, found by its hash."""
        if self._contents is None:
            self._contents = {row.sha256: row for row in self._rows.values() if row.shard >= 0}
        try:
            return self._contents.get(content_hash(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def _read(self, row: Row) -> Tensor:
        try:
            codes: Tensor = self._shard(row.shard).get_tensor(row.sha256)
            return codes
        except (SafetensorError, FileNotFoundError) as error:
            raise self._damaged(row.shard, str(error)) from error

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            self._shards[number] = safe_open(shard_file(self.folder, number), "pt")
        return self._shards[number]

    def _damaged(self, number: int, why: str) -> RawloopError:
        file = shard_file(self.folder, number)
        return RawloopError(f"{file} is damaged ({why}): delete it and {PREPARE} again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a mapped file cannot be sent to a spawned worker


def _choose(folder: Path, codec: str | None) -> tuple[Path, CodecInfo]:
    found = {file.parent: read_codec(file.parent) for file in sorted(folder.glob(f"*/{CODEC_FILE}"))}
    if not found:
        raise UserError(f"{folder} holds no codes: {PREPARE} first, or set --data.codes to the folder it wrote")
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


def _problem(kind: int, clips: list[str]) -> str:
    what, fix = WRONG[kind]
    named = ", ".join(clips[:5]) + (f" and {len(clips) - 5} more" if len(clips) > 5 else "")
    return f"{len(clips)} clip(s) {what}: {named}: {fix}"
