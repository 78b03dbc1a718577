"""Digests of samples, by which ranks and a resumed run compare their data."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from rawloop.contracts import Sample
from rawloop.data.mapped import hash64

WIDTH = 16  # hexadecimal digits


class Digests(Sequence[str]):
    """The digest of each sample, as one text with a line each: (bytes,) uint8, which may be mapped."""

    def __init__(self, text: np.ndarray) -> None:
        self.text = text

    @classmethod
    def of(cls, digests: Iterable[str]) -> "Digests":
        """Return digests as one text."""
        return cls(np.frombuffer("\n".join(digests).encode(), np.uint8))

    def __len__(self) -> int:
        return (len(self.text) + 1) // (WIDTH + 1)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (WIDTH + 1)
        return self.text[start : start + WIDTH].tobytes().decode()

    def together(self, start: int, stop: int) -> str:
        """Return one digest of the digests from `start` to `stop`, which must not be the same."""
        return hashlib.sha256(self.text[start * (WIDTH + 1) : stop * (WIDTH + 1) - 1].data).hexdigest()[:WIDTH]


def digests_of(samples: Iterable[Sample], clip: Callable[[Path], str]) -> list[str]:
    """Return a digest of each sample; see `digester`."""
    return list(map(digester(clip), samples))


def digester(clip: Callable[[Path], str]) -> Callable[[Sample], str]:
    """Return what digests a sample without its id and source. A clip counts with its name and `clip(path)`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return [value.name, clip(value)]
        if not dataclasses.is_dataclass(value):
            return repr(value)
        return {name: item for name, item in vars(value).items() if item and name not in ("id", "source")}

    encode = json.JSONEncoder(default=plain).encode
    return lambda sample: hashlib.sha256(encode(sample).encode()).hexdigest()[:WIDTH]


def content_hash(sample: Sample) -> int:
    """Return a hash of the roles, words and clips of a sample, 64 bits."""
    return hash64(repr([(turn.role, turn.parts) for turn in sample.turns]))


def shared(train: np.ndarray, other: np.ndarray) -> int:
    """Return how many of the `other` samples have the words and clips of a training sample; see `content_hash`."""
    return int(np.isin(other, train).sum())
