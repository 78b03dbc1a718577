"""The index of a data set: its samples in a mapped file, built once, from which each sample is read when it is needed.

So no process holds all samples in its memory, and a later start reads no records. Every mistake in the records is
raised when the index is built: it stores what has passed.
"""

import json
import os
import stat
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, overload

import numpy as np

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.config import CHECKED_BY, NO_MATTER, DataConfig
from rawloop.data.digests import Digests
from rawloop.data.mapped import Mapped, Say, Writer, open_or_build, told
from rawloop.data.references import References
from rawloop.data.samples import SampleReader
from rawloop.errors import UserError
from rawloop.files import sha256_file, sha256_files

JSON = json.JSONEncoder(separators=(",", ":"))


class SampleIndex(Sequence[Sample]):
    """The samples of a data set, or those of them that are used.

    Args:
        file: the records.
        kept: arrays about the samples that are used: `rows` (samples,) uint32 are their places in `file`, `digests`
            their digests, `contents` uint64 hashes of their words and clips, `sizes` int32 the frames of their clips
            and the bytes of their words; and those of `References`, if they are drawn. Without `kept`, these are all
            samples of the file.
    """

    def __init__(self, file: Mapped, kept: Mapping[str, np.ndarray] | None = None) -> None:
        self.file, self._kept = file, kept
        self._rows = None if kept is None else kept["rows"]
        self._ends, self._crcs = file.arrays["ends"], file.arrays["crcs"]

    def __len__(self) -> int:
        return len(self._ends if self._rows is None else self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Read a sample. Raises RawloopError if the file was damaged after it was opened."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        row = place if self._rows is None else int(self._rows[place])
        record = self.file.read(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
        if zlib.crc32(record) != self._crcs[row]:
            raise self.file.damaged(f"record {row} is not what was written")
        return decoded(record)

    @property
    def has_clips(self) -> bool:
        """Whether any sample of the file has a clip."""
        return bool(self.file.meta["clips"])

    @property
    def notices(self) -> list[str]:
        """Lines about what may be a mistake in the records."""
        return list(self.file.meta["notices"])

    @property
    def key(self) -> str:
        """A digest of all that the samples were made from."""
        return f"{self.file.key} {self.file.meta['state']}"

    @property
    def digests(self) -> Digests:
        """The digest of each used sample."""
        assert self._kept is not None, "only used samples have digests"
        return Digests(self._kept["digests"])

    @property
    def contents(self) -> np.ndarray:
        """A hash of the words and clips of each used sample, uint64."""
        assert self._kept is not None, "only used samples have hashes"
        return self._kept["contents"]

    def references(self, config: DataConfig, seed: int) -> References | None:
        """Return what gives each used sample its reference, if they are drawn."""
        if self._kept is None or "references" not in self._kept:
            return None
        return References(self, SampleIndex(self.file), self._kept, config, seed)

    @property
    def sizes(self) -> np.ndarray:
        """The frames of the clips and the bytes of the words of each used sample, int32."""
        assert self._kept is not None, "only used samples have sizes"
        return self._kept["sizes"]


def open_samples(path: str, config: DataConfig, check_files: bool, folder: Path, say: Say) -> SampleIndex:
    """Open the index of a data set in `folder`, or build it. Raises like `read_samples`.

    The index of another version of the data file, of rawloop's code or of the settings is never used.
    """
    reader = SampleReader(path, config, check_files)
    read_by = {name: value for name, value in asdict(config).items() if name not in CHECKED_BY | NO_MATTER}
    settings = [check_files, os.path.abspath(reader.file), read_by]
    code = sha256_files([*Path(__file__).parent.rglob("*.py"), Path(__file__).parents[1] / "contracts.py"])
    content = sha256_file(reader.file)
    key = digest([content, code, settings])
    name = f"{digest(settings)[:16]}.samples"

    def build(writer: Writer, tell: Say) -> None:
        _build(reader, key, writer, tell)
        if sha256_file(reader.file) != content:
            raise UserError(f"{reader.file} has changed while it was read: start again")

    return SampleIndex(open_or_build(folder, name, key, build, say, _is_current))


def _build(reader: SampleReader, key: str, writer: Writer, say: Say) -> None:
    ends, crcs, clips = array("q"), array("I"), False
    for sample in told(reader, f"index of {reader.file}: samples read", None, say):
        record = encoded(sample)
        ends.append(writer.add(record))
        crcs.append(zlib.crc32(record))
        clips = clips or bool(sample.audio_paths())
    paths = reader.looked_up
    arrays: dict[str, np.ndarray] = {
        "ends": np.frombuffer(ends, np.int64),
        "crcs": np.frombuffer(crcs, np.uint32),
        "looked up": np.frombuffer(b"\0".join(map(os.fsencode, paths)), np.uint8),
    }
    writer.finish(key, arrays, {"notices": reader.notices(), "clips": clips, "state": _state(paths)})


def _is_current(file: Mapped) -> bool:
    """Return whether the files beside the data file that the samples depend on are unchanged."""
    content = file.arrays["looked up"].tobytes()
    return bool(file.meta["state"] == _state(map(os.fsdecode, content.split(b"\0")) if content else ()))


def _state(paths: Iterator[str] | Sequence[str]) -> str:
    """Return a digest of the size and time of files; a missing file has none."""
    state = sha256()
    for path in paths:
        try:
            status = os.lstat(path)
            state.update(f"{status.st_mode} {status.st_size} {status.st_mtime_ns}\n".encode())
            if stat.S_ISLNK(status.st_mode):
                status = os.stat(path)
                state.update(f"-> {os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            state.update(b"gone\n")
    return state.hexdigest()


def size_of(sample: Sample, frames: Callable[[Path], int] | None) -> int:
    """Return the frames of a sample's clips, if `frames` gives them, and the bytes of its words."""
    clips = sum(map(frames, sample.audio_paths())) if frames else 0
    return clips + sum(len(turn.words.encode()) for turn in sample.turns)


def digest(facts: Any) -> str:
    """Return the SHA-256 of JSON values."""
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def encoded(sample: Sample) -> bytes:
    """Return a sample as JSON."""
    turns = [
        [
            turn.role,
            [part.text if isinstance(part, Text) else [str(part.path)] for part in turn.parts],
            turn.trained,
            dict(turn.fields),
        ]
        for turn in sample.turns
    ]
    return JSON.encode([sample.id, turns, sample.task, sample.source, dict(sample.extra), list(sample.tools)]).encode()


def decoded(record: bytes) -> Sample:
    """Return the sample that `encoded` has written."""
    identity, turns, task, source, extra, tools = json.loads(record.decode())
    made = tuple(
        Turn(
            role, tuple(Text(p) if isinstance(p, str) else Audio(Path(p[0])) for p in parts), trained=trained, fields=of
        )
        for role, parts, trained, of in turns
    )
    return Sample(identity, made, task, source, extra, tools or ())
