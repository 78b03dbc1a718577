"""Digests of tensors: whether any bit has changed, without a copy, in one read of the device.

A tensor's bytes are taken as 64-bit words w, in pieces of at most `WORDS`. A piece's digest is the sum of k_i * w_i
modulo 2^64, with a fixed random odd number k_i for each position. One changed word changes the sum by k_i * (w - w'),
which is not zero because k_i is odd: so every flipped bit is seen. Two words that change places change it by
(k_i - k_j) * (w_i - w_j), which is zero for about one in 2^32 pairs at most.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rawloop.watch.held import read

WORDS = 2**18  # 2 MB: the products stay in a cache of the CPU
BYTES = 8
Key = TypeVar("Key")


class Digest(NamedTuple):
    """The digests of a tensor's pieces, and its dtype."""

    dtype: torch.dtype
    pieces: tuple[int, ...]


class Digests:
    """Computes digests. It keeps the random numbers, 2 MB on each device."""

    def __init__(self) -> None:
        self._keys: dict[torch.device, Tensor] = {}

    def of(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Digest]:
        """Return the digest of each tensor. It depends on the tensor's bytes and dtype alone."""
        sums = [[(p * self._keys_for(p)).sum() for p in _pieces(tensor.detach())] for tensor in tensors.values()]
        numbers = iter(read([each for pieces in sums for each in pieces]))
        made = [tuple(next(numbers) for _ in pieces) for pieces in sums]
        return {name: Digest(t.dtype, one) for (name, t), one in zip(tensors.items(), made, strict=True)}

    def _keys_for(self, piece: Tensor) -> Tensor:
        if piece.device not in self._keys:
            made = torch.randint(-(2**62), 2**62, (WORDS,), generator=torch.Generator().manual_seed(0))
            self._keys[piece.device] = made.mul(2).add(1).to(piece.device)
        return self._keys[piece.device][: len(piece)]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's bytes as 64-bit words, in pieces of at most `WORDS`; zeros fill the last word."""
    raw = tensor.reshape(-1).view(torch.uint8)
    if raw.storage_offset() % BYTES:
        raw = raw.clone()
    whole = len(raw) // BYTES * BYTES
    if whole:
        yield from torch.split(raw[:whole].view(torch.int64), WORDS)
    if whole < len(raw):
        yield pad(raw[whole:], (0, BYTES - len(raw) + whole)).view(torch.int64)
