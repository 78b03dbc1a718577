"""GPUs: their memory and their speed, and what makes a step fit into them."""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Literal, NamedTuple

from rawloop.precision.config import Name

CUDA = 0.6e9  # bytes that CUDA's context and libraries take
RESERVE = 0.05  # share of a card that the allocator may lose between blocks
SAME = re.compile(r"SXM\d?|\d+GB|HBM\w+")  # words of a device's name that change nothing of its speed
SIZES = (16, 24, 40, 48, 80, 141)  # GB


class Card(NamedTuple):
    """A GPU: memory in GB, and dense TFLOPS: of FP16 or BF16 products added in FP32, and of plain FP32.

    `pcie` says that its PCIe form is as fast.
    """

    name: str
    memory: int
    half: float
    single: float
    bf16: bool = True
    pcie: bool = False

    def tflops(self, mode: str, tf32: bool) -> float | None:
        """Return the rate of a precision mode; None if the card does not compute it natively."""
        if mode == "bf16" and not self.bf16:
            return None
        # TF32 has half the rate of the 16-bit formats on all cards that have it
        return self.half if mode != "fp32" else self.half / 2 if tf32 and self.bf16 else self.single


# From NVIDIA's data sheets and white papers (Turing, Volta, Ampere GA102, Ada, Hopper), without sparsity.
CARDS = (
    Card("RTX 3090", 24, 71, 35.6),
    Card("RTX 4090", 24, 165, 82.6),
    Card("TITAN RTX", 24, 130, 16.3, bf16=False),
    Card("V100", 32, 125, 15.7, bf16=False),
    Card("A100 40GB", 40, 312, 19.5, pcie=True),
    Card("A100 80GB", 80, 312, 19.5, pcie=True),
    Card("L40S", 48, 362, 91.6),
    Card("H100", 80, 989, 67),
    Card("H200", 141, 989, 67),
)


def card_of(device: str) -> Card | None:
    """Return the card of a device by the name that torch gives it, or None.

    Cards that differ in memory alone have one rate. A variant (Ti, Laptop GPU, NVL, a MIG part of a card) has another
    one, and is not in the list, nor are most PCIe forms.
    """
    for card in CARDS:
        _, name, variant = f" {device}".partition(f" {card.name.removesuffix(f' {card.memory}GB')}")
        words = re.findall("[^ -]+", variant)
        if name and all(SAME.fullmatch(word) or (card.pcie and word.lower() == "pcie") for word in words):
            return card
    return None


class Choice(NamedTuple):
    """Settings that decide on memory."""

    mode: Name
    adapter: Literal["lora", "full"]
    checkpointing: bool
    rounded: bool = False  # bfloat16 weights, whose updates are rounded stochastically


def room(size: float) -> float:
    """Return the bytes that a step may take on a card of so many GB."""
    return size * 1e9 * (1 - RESERVE) - CUDA


def changes_that_fit(
    size: float, chosen: Choice, least: Mapping[Choice, float], rows: int, taken: Callable[[Choice, int], float]
) -> tuple[list[str], float] | None:
    """Return the cheapest changes with which a step fits into a card, and the bytes that it then takes.

    Cheapest first: fewer samples in a micro-batch and more accumulation (the same gradient), activation checkpointing
    (a third to a half more time), another precision mode, stochastic rounding, LoRA in place of all weights.

    Args:
        size: of the card, in GB.
        chosen: the configured choice.
        least: bytes that a choice takes with any micro-batch.
        rows: the samples of the micro-batch.
        taken: the bytes at the peak of a step with a choice and a part of the micro-batch, by its divisor.

    Returns:
        no changes if it fits as it is; None if nothing makes it fit.
    """
    divisors = _divisors(rows)
    for other, divisor in sorted(product(least, divisors), key=lambda pair: _cost(chosen, *pair)):
        # the smallest micro-batch first: each question takes an estimate, and most have the same answer
        if least[other] <= room(size) and all(taken(other, part) <= room(size) for part in (divisors[-1], divisor)):
            return [*_words(chosen, other, divisor)], taken(other, divisor)
    return None


def _divisors(rows: int) -> list[int]:
    return [2**power for power in range(rows.bit_length()) if 2**power <= rows]


def _cost(chosen: Choice, other: Choice, divisor: int) -> tuple[bool, bool, bool, bool, bool, int]:
    """Return what a change costs, the dearest first: LoRA learns something else, checkpointing takes time."""
    to_full, switched = other.adapter != chosen.adapter and other.adapter == "full", other.adapter != chosen.adapter
    modes, rounds = other.mode != chosen.mode, other.rounded != chosen.rounded
    return to_full, switched, rounds, modes, other.checkpointing != chosen.checkpointing, divisor


def _words(chosen: Choice, other: Choice, divisor: int) -> Iterator[str]:
    if divisor > 1:
        yield f"1/{divisor} of the micro-batch, {divisor} x train.accumulation"
    if other.checkpointing != chosen.checkpointing:
        yield f"model.activation_checkpointing {str(other.checkpointing).lower()}"
    if other.mode != chosen.mode:
        yield f"precision.mode {other.mode}"
    if other.rounded != chosen.rounded:
        dtype, masters = ("bf16", "stochastic") if other.rounded else ("auto", "fp32")
        yield f"precision.trainable_dtype {dtype}, precision.masters {masters}"
    if other.adapter != chosen.adapter:
        yield f"adapter.mode {other.adapter}"
