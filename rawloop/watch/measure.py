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
BINS = HIGHEST - LOWEST + 2  # one of each exponent, after that of zeros
SAMPLE = 2**14  # histograms of larger tensors take an even sample of at most this many values
FLUSHED, SUBNORMAL, LARGEST = -25, -14, 15  # exponents of FP16: 2^15 is the largest power of two
MOST_FLUSHED = 1e-3  # share of gradients that a good loss scale may flush to zero
USUAL_CEILING = 24  # bits: the default of precision.loss_scale.ceiling


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

    def window(self) -> Window | None:
        """Return the loss scales that fit; None if all values are zero."""
        top = max((LOWEST + place for place, count in enumerate(self.counts) if count), default=None)
        if top is None:
            return None
        scales = range(-40, 80)
        return Window(next((k for k in scales if self.flushed(2.0**k) < MOST_FLUSHED), scales[-1]), LARGEST - top)

    def shifted(self, bits: int) -> "Exponents":
        """Return the histogram of the same values times 2^bits, as far as float32 holds them."""
        empty = [0.0] * min(abs(bits), len(self.counts))
        kept = [*empty, *self.counts][: len(self.counts)] if bits > 0 else [*self.counts, *empty][-len(self.counts) :]
        return Exponents(kept, self.zeros)


NOTHING = Exponents([0.0] * (BINS - 1), 0.0)


@dataclass(frozen=True)
class Amounts:
    """The magnitudes of a tensor, or of several of one dtype. `exponents` may be of a sample, or empty."""

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

    def __add__(self, other: "Amounts") -> "Amounts":
        low, high = min(self.lowest, other.lowest), max(self.highest, other.highest)
        if math.isnan(self.highest + other.highest):
            low = high = math.nan
        return Amounts(self.dtype, low, high, joined([self, other]))


@dataclass(frozen=True)
class GradientAmounts(Amounts):
    """The magnitudes of a parameter's gradient. Its rows are the slices of the first dimension.

    `lost` is the share of zeros among rows and columns that have other values: in a dense layer these were flushed. It
    is 0.0 without `exponents`.
    """

    alive: Tensor  # bool (rows,), on the host: which have a value that is not zero
    rows: int  # how many these are
    lost: float


class _Entry(NamedTuple):
    """What is known of a tensor on its device: its lowest and highest values, of a gradient those of each row."""

    kind: str
    name: str
    dtype: torch.dtype
    numbers: tuple[Tensor, ...]  # lowest and highest, and of a gradient how many are not zero, of how many may be
    sample: Tensor | None


class Readings:
    """Statistics of tensors, which `read` fetches in one transfer. Without `exponents` they cost one kernel each."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(self, kind: str, name: str, tensor: Tensor, exponents: bool = True) -> None:
        """Measure a tensor of floats that is not empty: its range, and its exponents. Nothing is read."""
        tensor = tensor.detach()
        low, high = torch.aminmax(tensor)
        sample = _sampled(tensor) if exponents else None
        self._entries.append(_Entry(kind, name, tensor.dtype, (low[None], high[None]), sample))

    def add_gradient(self, name: str, gradient: Tensor, exponents: bool = True) -> None:
        """Measure a parameter's gradient: the range of each row, and its exponents and lost share. Nothing is read."""
        gradient = gradient.detach()
        table = gradient.reshape(gradient.shape[0] if gradient.dim() else 1, -1)
        numbers, sample = tuple(torch.aminmax(table, dim=1)), None
        if exponents:
            present, sample = table != 0, _sampled(gradient)
            numbers += (torch.stack([present.sum(), present.any(1).sum() * present.any(0).sum()]).float(),)
        self._entries.append(_Entry("gradient", name, gradient.dtype, numbers, sample))

    def forget(self, *kinds: str) -> None:
        """Forget what was measured of these kinds."""
        self._entries = [entry for entry in self._entries if entry.kind not in kinds]

    def read(self) -> dict[tuple[str, str], Amounts]:
        """Return the amounts by (kind, name), and forget them. Several tensors of one name are joined."""
        entries, self._entries = self._entries, []
        if not entries:
            return {}
        device = entries[0].numbers[0].device
        tables = _histograms([entry.sample.to(device) for entry in entries if entry.sample is not None])
        parts = [tables, *(part for entry in entries for part in entry.numbers)]
        numbers = torch.cat([part.to(device) for part in parts]).cpu()  # the one wait for the device
        chunks = iter(torch.split(numbers, [len(part) for part in parts]))
        counts = iter(next(chunks).view(-1, BINS).tolist())
        read: dict[tuple[str, str], Amounts] = {}
        for entry in entries:
            zeros, *others = next(counts) if entry.sample is not None else [0.0]
            exponents = Exponents(others, zeros) if others else NOTHING
            made = _amounts(entry, exponents, [next(chunks) for _ in entry.numbers])
            known = read.get((entry.kind, entry.name))
            read[entry.kind, entry.name] = made if known is None or known.dtype != entry.dtype else known + made
        return read


def joined(amounts: Iterable[Amounts]) -> Exponents:
    """Return the histogram of all amounts."""
    counts, zeros = zip(NOTHING, *(each.exponents for each in amounts), strict=True)
    return Exponents([sum(column) for column in zip(*counts, strict=True)], sum(zeros))


def _amounts(entry: _Entry, exponents: Exponents, numbers: Sequence[Tensor]) -> Amounts:
    lows, highs, *counts = numbers
    made = Amounts(entry.dtype, float(lows.min()), float(highs.max()), exponents)
    if entry.kind != "gradient":
        return made
    alive = (lows != 0) | (highs != 0)
    lost = 1 - float(counts[0][0] / counts[0][1].clamp(min=1)) if counts else 0.0
    return GradientAmounts(**vars(made), alive=alive, rows=int(alive.sum()), lost=lost)


def _histograms(samples: Sequence[Tensor]) -> Tensor:
    """Return for each sample the number of zeros and of values with each exponent: float, (samples * BINS,)."""
    if not samples:
        return torch.empty(0)
    values, sizes = torch.cat(list(samples)), torch.tensor([len(sample) for sample in samples])
    exponents = torch.where(values == 0, 0, torch.frexp(values).exponent.clamp(LOWEST, HIGHEST) - LOWEST + 1)
    firsts = torch.arange(0, len(samples) * BINS, BINS).repeat_interleave(sizes)
    return torch.bincount(exponents + firsts.to(values.device), minlength=len(samples) * BINS).float()


def _sampled(tensor: Tensor) -> Tensor:
    """Return a copy in float32 of at most about `SAMPLE` values, spread evenly: (values,)."""
    while tensor.numel() > SAMPLE:
        longest = max(range(tensor.dim()), key=lambda place: tensor.shape[place])
        step = min(-(-tensor.numel() // SAMPLE), tensor.shape[longest])
        tensor = tensor[(slice(None),) * longest + (slice(None, None, max(step, 2)),)]
    return tensor.to(torch.float32, copy=True).flatten()
