"""Digests of tensors: whether any bit has changed, without a copy, in one read of the device.

A tensor's bytes are taken as 64-bit words w, in pieces of at most `WORDS`. A piece's digest is the sum of k_i * w_i
modulo 2^64, with a fixed random odd number k_i for each position. One changed word changes the sum by k_i * (w - w'),
which is not zero because k_i is odd: so every flipped bit is seen. Two words that change places change it by
(k_i - k_j) * (w_i - w_j), which is zero for about one in 2^32 pairs at most.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rawloop.watch.held import read

WORDS = 2**18  # 2 MB: the products stay in a cache of the CPU
BYTES = 8
Digest = tuple[int, ...]  # of a tensor's pieces


class Digests:
    """Computes digests. It keeps the random numbers, 2 MB on each device."""

    def __init__(self) -> None:
        self._keys: dict[torch.device, Tensor] = {}

    def of(self, tensors: Sequence[Tensor]) -> list[Digest]:
        """Return the digest of each tensor. It depends on the tensor's bytes alone."""
        values: dict[int, Tensor] = {}
        order: list[int] = []  # the tensor of each piece
        pieces: list[Tensor] = []
        for place, tensor in enumerate(tensors):
            for piece in _pieces(tensor.detach()):
                pieces.append(piece)
                order.append(place)
        for device in dict.fromkeys(piece.device for piece in pieces):
            mine = [index for index, piece in enumerate(pieces) if piece.device == device]
            for batch in _batches(mine, pieces):
                values.update(zip(batch, self._sums([pieces[index] for index in batch]), strict=True))
        found: list[list[int]] = [[] for _ in tensors]
        for place, value in zip(order, read([values[index] for index in range(len(pieces))]), strict=True):
            found[place].append(value)
        return [tuple(numbers) for numbers in found]

    def _sums(self, pieces: list[Tensor]) -> list[Tensor]:
        """Return the digests of pieces that together have at most `WORDS` words."""
        keys = self._keys_on(pieces[0].device)
        if len(pieces) == 1:
            return [(pieces[0] * keys[: len(pieces[0])]).sum()]
        words = torch.cat(pieces)
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0) - 1
        factors = torch.cat([keys[: len(piece)] for piece in pieces])
        totals = (words * factors).cumsum(0)[ends.to(words.device)]  # the sums wrap around: differences hold
        return list(torch.cat([totals[:1], totals.diff()]))

    def _keys_on(self, device: torch.device) -> Tensor:
        if device not in self._keys:
            generator = torch.Generator().manual_seed(0)
            self._keys[device] = torch.randint(-(2**62), 2**62, (WORDS,), generator=generator).mul(2).add(1).to(device)
        return self._keys[device]


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


def _batches(places: list[int], pieces: list[Tensor]) -> Iterator[list[int]]:
    """Yield groups of pieces that together have at most `WORDS` words."""
    batch: list[int] = []
    size = 0
    for place in places:
        if batch and size + len(pieces[place]) > WORDS:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += len(pieces[place])
    if batch:
        yield batch
