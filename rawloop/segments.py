"""A part of a recording, named by its path and its times in seconds: `talk.flac#t=1.5,3`, as in W3C media fragments.

The times are part of the path, so everything that names a clip by its path (samples, the cache of codes, messages)
distinguishes the segments of one recording. Code that opens the file removes them.
"""

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rawloop.hashing import sha256_file

MARK = "#t="
FRAGMENT = re.compile(r"#t=(\d+(?:\.\d+)?)(?:,(\d+(?:\.\d+)?))?$")


class Segment(NamedTuple):
    """A part of an audio file, in seconds; an `end` of None is the end of the file."""

    file: Path
    start: float = 0.0
    end: float | None = None

    @property
    def whole(self) -> bool:
        """Return whether this is the whole file."""
        return self.end is None and not self.start

    def path(self) -> Path:
        """Return the path that names the segment; for a whole file, the file's path."""
        if self.whole:
            return self.file
        end = "" if self.end is None else f",{_digits(self.end)}"
        return self.file.with_name(f"{self.file.name}{MARK}{_digits(self.start)}{end}")


def segment_of(path: Path | str) -> Segment:
    """Return the file and the times that a path names."""
    found = FRAGMENT.search(str(path))
    if found is None:
        return Segment(Path(path))
    return Segment(Path(str(path)[: found.start()]), float(found[1]), float(found[2]) if found[2] else None)


def content_hash(path: Path | str) -> str:
    """Return the SHA-256 of a file, or of a file and the times of a segment, as 64 hexadecimal digits."""
    if MARK not in str(path):
        return sha256_file(Path(path))
    file, start, end = segment_of(path)
    now = os.stat(file)
    whole = _hash_once(str(file), now.st_size, now.st_mtime_ns)
    return hashlib.sha256(f"{whole}{MARK}{start},{end}".encode()).hexdigest()


@lru_cache(maxsize=64)
def _hash_once(file: str, size: int, mtime_ns: int) -> str:
    """Hash a recording once for all its segments that follow each other."""
    return sha256_file(Path(file))


def _digits(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")
