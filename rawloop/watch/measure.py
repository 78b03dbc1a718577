"""Magnitudes of activations and gradients: measured on the device, read from it once.

FP16 holds magnitudes from 2^-24 to 65504. A product that rounds to at most 2^-25 becomes zero; below 2^-14 a number is
subnormal and loses digits. All of this follows from how many values have which exponent, for every loss scale at once:
a power of two moves the exponents and changes nothing else.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST, HIGHEST = -149, 128  # exponents of float32: a magnitude in [2^(e-1), 2^e) has the exponent e
SAMPLE = 2**14  # histograms of larger tensors take an even sample of at most this many values
FLUSHED, SUBNORMAL, LARGEST = -25, -14, 15  # exponents of FP16: 2^15 is the largest power of two
MOST_FLUSHED = 1e-3  # share of gradients that a good loss scale may flush to zero
# Magnitudes below 2^e are subnormal in the dtype.
SMALLEST_NORMAL = {torch.float16: -14, torch.bfloat16: -126, torch.float32: -126, torch.float64: -1022}


class Exponents(NamedTuple):
    """How many values have which exponent. `counts` starts with that of `LOWEST`; zeros have none."""

    counts: Sequence[float]
    zeros: float

    @property
    def nonzero(self) -> float:
        """The number of values that are not zero."""
        return sum(self.counts)

    def below(self, exponent: float) -> float:
        """Return the share of non-zero magnitudes below 2^exponent; 0.0 if there are none."""
        end = min(max(math.floor(exponent) - LOWEST + 1, 0), len(self.counts))
        return sum(self.counts[:end]) / self.nonzero if self.nonzero else 0.0

    def flushed(self, scale: float) -> float:
        """Return the share of non-zero values that FP16 rounds to zero under a loss scale."""
        return self.below(FLUSHED - math.log2(scale))

    def subnormal(self, scale: float) -> float:
        """Return the share of non-zero values that are subnormal in FP16 under a loss scale."""
        return self.below(SUBNORMAL - math.log2(scale)) - self.flushed(scale)

    @property
    def top(self) -> int | None:
        """The exponent of the largest magnitude; None if all are zero."""
        return max((LOWEST + place for place, count in enumerate(self.counts) if count), default=None)

    def window(self) -> "Window | None":
        """Return the loss scales that fit; None if all values are zero."""
        if self.top is None:
            return None
        scales = range(-40, 80)
        low = next((k for k in scales if self.flushed(2.0**k) < MOST_FLUSHED), scales[-1])
        return Window(low, LARGEST - self.top)

    def shifted(self, bits: int) -> "Exponents":
        """Return the histogram of the same values times 2^bits, as far as float32 holds them."""
        empty = [0.0] * min(abs(bits), len(self.counts))
        kept = [*empty, *self.counts][: len(self.counts)] if bits > 0 else [*self.counts, *empty][-len(self.counts) :]
        return Exponents(kept, self.zeros)

    def joined(self, other: "Exponents") -> "Exponents":
        """Return the histogram of both sets of values."""
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Exponents(counts, self.zeros + other.zeros)


USUAL_CEILING = 24  # bits: the default of precision.loss_scale.ceiling
NOTHING = Exponents([0.0] * (HIGHEST - LOWEST + 1), 0.0)


class Window(NamedTuple):
    """The loss scales 2^low to 2^high: under 0.1% of the gradients are flushed, and the largest is below 2^15.

    No scale fits if low is above high.
    """

    low: int
    high: int

    def recommended(self) -> float:
        """Return a scale to start with: two bits below the top, and at most USUAL_CEILING if that is inside."""
        return 2.0 ** min(max(self.low, min(self.high - 2, USUAL_CEILING)), self.high)

    def __str__(self) -> str:
        return f"2^{self.low} to 2^{self.high}" if self.low <= self.high else f"none (2^{self.low} > 2^{self.high})"


@dataclass(frozen=True)
class Amounts:
    """The magnitudes of a tensor, or of several of one dtype.

    `lowest` and `highest` are over all values, `exponents` may be of a sample.
    """

    dtype: torch.dtype
    lowest: float
    highest: float
    exponents: Exponents

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or +inf, and -inf is the mask of something else."""
        return not math.isnan(self.highest) and self.highest != math.inf

    @property
    def largest(self) -> float:
        """The largest magnitude. The dtype's lowest value and -inf, as in additive masks, do not count."""
        masked = self.lowest <= torch.finfo(self.dtype).min
        return abs(self.highest) if masked else max(abs(self.lowest), abs(self.highest))

    @property
    def headroom(self) -> float:
        """The bits between the largest magnitude and the dtype's limit; inf if all values are zero."""
        return math.log2(torch.finfo(self.dtype).max / self.largest) if self.largest > 0 else math.inf

    @property
    def zeros(self) -> float:
        """The share of zeros."""
        total = self.exponents.zeros + self.exponents.nonzero
        return self.exponents.zeros / total if total else 0.0

    @property
    def subnormal(self) -> float:
        """The share of non-zero values that are subnormal in the dtype."""
        return self.exponents.below(SMALLEST_NORMAL[self.dtype])

    def __add__(self, other: "Amounts") -> "Amounts":
        low, high = min(self.lowest, other.lowest), max(self.highest, other.highest)
        if math.isnan(self.highest + other.highest):
            low = high = math.nan
        return Amounts(self.dtype, low, high, self.exponents.joined(other.exponents))


@dataclass(frozen=True)
class GradientAmounts(Amounts):
    """The magnitudes of a parameter's gradient.

    Args:
        norm: its L2 norm.
        rows: how many of its rows (slices of the first dimension) have a value that is not zero.
        lost: the share of zeros among its rows and columns that have other values: in a dense layer these were flushed.
    """

    norm: float = 0.0
    rows: int = 0
    lost: float = 0.0


class Readings:
    """Statistics as vectors on the device, which `read` fetches in one transfer."""

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []
        self._keys: list[tuple[str, str, torch.dtype]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, kind: str, name: str, tensor: Tensor) -> None:
        """Measure a tensor of floats that is not empty. Nothing is read from the device."""
        tensor = tensor.detach()
        self._keys.append((kind, name, tensor.dtype))
        self._vectors.append(torch.cat([_range(tensor), _histogram(tensor)]))

    def add_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Measure a gradient: as `add`, and its norm, its rows and its lost share.

        Returns:
            Whether each row has a value that is not zero: bool, (rows,), on the device.
        """
        gradient = gradient.detach()
        self.add("gradient", name, gradient)
        table = gradient.reshape(gradient.shape[0], -1) if gradient.dim() else gradient.reshape(1, 1)
        present = table != 0
        alive = present.any(1)
        rows, columns = alive.sum(), present.any(0).sum()
        norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        lost = 1 - present.sum() / (rows * columns).clamp(min=1)
        self._vectors[-1] = torch.cat([self._vectors[-1], torch.stack([norm, rows, lost]).float()])
        return alive

    def read(self) -> dict[tuple[str, str], Amounts]:
        """Return the amounts by (kind, name), and forget them. Several tensors of one name are joined."""
        if not self._keys:
            return {}
        sizes = [len(vector) for vector in self._vectors]
        device = self._vectors[0].device
        numbers, start = torch.cat([vector.to(device) for vector in self._vectors]).tolist(), 0
        read: dict[tuple[str, str], Amounts] = {}
        for (kind, name, dtype), size in zip(self._keys, sizes, strict=True):
            low, high, zeros, *counts = numbers[start : start + size]
            start += size
            bins = HIGHEST - LOWEST + 1
            exponents, more = Exponents(counts[:bins], zeros), counts[bins:]
            if more:
                made: Amounts = GradientAmounts(dtype, low, high, exponents, more[0], int(more[1]), more[2])
            else:
                made = Amounts(dtype, low, high, exponents)
            known = read.get((kind, name))
            read[kind, name] = made if known is None or known.dtype != dtype else known + made
        self._keys, self._vectors = [], []
        return read


def _range(tensor: Tensor) -> Tensor:
    return torch.stack(torch.aminmax(tensor)).float()


def _histogram(tensor: Tensor) -> Tensor:
    """Return the number of zeros, and of values with each exponent, in an even sample."""
    values = _sampled(tensor).float().flatten()
    exponents = torch.frexp(values).exponent.clamp(LOWEST, HIGHEST) - LOWEST + 1
    exponents = torch.where(values == 0, 0, exponents)
    return torch.bincount(exponents, minlength=HIGHEST - LOWEST + 2).float()


def _sampled(tensor: Tensor) -> Tensor:
    """Return a view with at most about `SAMPLE` values, spread evenly."""
    while tensor.numel() > SAMPLE:
        longest = max(range(tensor.dim()), key=lambda place: tensor.shape[place])
        step = min(-(-tensor.numel() // SAMPLE), tensor.shape[longest])
        tensor = tensor[(slice(None),) * longest + (slice(None, None, max(step, 2)),)]
    return tensor


def joined(amounts: Iterable[Amounts]) -> Exponents:
    """Return the histogram of all amounts."""
    total = NOTHING
    for each in amounts:
        total = total.joined(each.exponents)
    return total
