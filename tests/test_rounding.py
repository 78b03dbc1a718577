"""Stochastic rounding to bfloat16: unbiased for all kinds of numbers, repeatable, and never from finite to infinite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop import rounding
from rawloop.errors import UserError
from rawloop.rounding import StochasticRounding, expected_change, round_stochastically, weight_behind

CPU = torch.device("cpu")
DRAWS = 200_000
LARGEST = torch.finfo(torch.bfloat16).max
# Between two neighbours: ordinary, below and above a power of two, subnormal in float32, where subnormals end, large.
BETWEEN = [1.003, 0.0123, 0.998, 1 - 2**-12, 1 + 2**-12, 2.0**-126 * (1 - 2**-10), 1e-40, 3.3e38, 1e-45]


def rounded(number: float, draws: int = DRAWS) -> tuple[float, Tensor]:
    """A number as float32 has it, and what many draws make of it."""
    numbers = torch.full((draws,), number)
    exact = float(numbers[0])
    round_stochastically(numbers, torch.Generator(), [0])
    return exact, numbers


@pytest.mark.parametrize("number", [sign * size for size in BETWEEN for sign in (1, -1)])
def test_the_mean_of_many_draws_is_the_number(number: float) -> None:
    exact, numbers = rounded(number)
    assert torch.equal(numbers.bfloat16().float(), numbers)
    low, high = sorted(set(numbers.tolist()))
    assert low < exact < high
    bits = torch.tensor([low, high]).view(torch.int32) & 0x7FFFFFFF
    assert abs(int(bits[0] - bits[1])) == 2**16 or (low, high) in ((0.0, 2.0**-133), (-(2.0**-133), 0.0))  # neighbours
    share = (exact - low) / (high - low)
    off = float((numbers == high).double().mean()) - share
    assert abs(off) < 4.5 * math.sqrt(share * (1 - share) / DRAWS)


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -1.5, 2.0**-126, 2.0**-133, -LARGEST, LARGEST, math.inf, -math.inf])
def test_numbers_that_bfloat16_has_stay(number: float) -> None:
    _, numbers = rounded(number)
    assert torch.equal(numbers.view(torch.int32), torch.full((DRAWS,), number).view(torch.int32))


def test_finite_numbers_beyond_the_largest_do_not_become_infinite() -> None:
    beyond = torch.finfo(torch.float32).max
    for sign in (1, -1):
        assert set(rounded(sign * beyond)[1].tolist()) == {sign * LARGEST}
        assert set(rounded(sign * 3.3896e38)[1].tolist()) == {sign * LARGEST}


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, -0x400000])  # all quiet NaNs; CUDA's has all bits set
def test_not_a_number_stays_so(bits: int) -> None:
    numbers = torch.full((DRAWS,), bits, dtype=torch.int32).view(torch.float32)
    round_stochastically(numbers, torch.Generator(), [0])
    assert numbers.isnan().all()


@pytest.mark.parametrize("size", [2**16, 64])
def test_a_number_is_rounded_alike_in_a_part_and_in_the_whole(size: int) -> None:
    whole = torch.full((1001,), 1 + 2**-8)  # half way
    parts = [part.clone() for part in torch.split(whole, [0, 63, 300, 1, 637])]
    round_stochastically(whole, torch.Generator(), [3, "w"], 0, size)
    place = 0
    for part in parts:
        round_stochastically(part, torch.Generator(), [3, "w"], place, size)
        place += len(part)
    assert torch.equal(torch.cat(parts), whole)
    assert 400 < int((whole > 1).sum()) < 600


@pytest.mark.parametrize("start", [0, 1, 100, 163])
def test_a_part_draws_as_many_numbers_as_the_whole_for_each_chunk(start: int) -> None:
    """On a GPU the same place gets another number if another number of them is drawn."""
    part, whole = torch.Generator(), torch.Generator()
    for size, end in ((64, 164), (256, 1000)):
        last = start // size  # the chunk of the part, which is the one of whose state is compared
        round_stochastically(torch.ones(1), part, ["w"], start, size, end)
        round_stochastically(torch.ones(min(size, end - last * size)), whole, ["w"], last * size, size, end)
        assert torch.equal(part.get_state(), whole.get_state())


def test_neighbours_and_chunks_are_independent() -> None:
    numbers = torch.full((DRAWS,), 1 + 2**-8)
    round_stochastically(numbers, torch.Generator(), [0], 0, 100)
    up = (numbers > 1).double() - 0.5
    for lag in (1, 2, 3, 4, 100):
        assert abs(float((up[:-lag] * up[lag:]).mean()) / 0.25) < 4.5 / math.sqrt(DRAWS)


def test_the_expected_share_of_changes_is_what_happens() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(DRAWS) * 0.02).bfloat16()
    for size in (1e-5, -1e-5, 1e-4, 1e-2):
        numbers = weight.float() + size
        round_stochastically(numbers, torch.Generator(), [0])
        happened = float((numbers != weight).double().mean())
        assert float(expected_change(weight, size).mean()) == pytest.approx(happened, abs=0.005)
        assert 0.02 < happened <= 1


def through(lent: StochasticRounding, named: list[tuple[str, nn.Parameter]], add: float) -> None:
    """An update of weights by stand-ins, which adds a number."""
    held = [(name, lent.stand_in(weight)) for name, weight in named]
    lent.fill([each for _, each in held])
    for _, each in held:
        each.data.add_(add)
    lent.write(held)


def test_a_stand_in_has_the_weights_numbers_during_an_update_only() -> None:
    weight = nn.Parameter(torch.arange(12.0).view(3, 4).bfloat16().t())  # of other strides
    lent = StochasticRounding(CPU)
    each = lent.stand_in(weight)
    assert weight_behind(each) is weight
    assert weight_behind(weight) is weight
    for _ in range(2):
        assert (each.shape, each.dtype, each.untyped_storage().nbytes()) == (weight.shape, torch.float32, 4)
        assert each.isnan().all()
        with pytest.raises(RuntimeError, match="single memory location"):
            each.data.add_(1)
        before = weight.detach().clone()
        lent.fill([each])
        assert torch.equal(each.data, before.float())
        each.data.add_(1)  # bfloat16 has these numbers
        lent.write([("w", each)])
        assert torch.equal(weight.data, before + 1)


def test_random_numbers_are_those_of_seed_update_and_name() -> None:
    def changed(seed: int, updates: int, name: str, others: int = 0) -> Tensor:
        lent = StochasticRounding(CPU, seed)
        lent.updates = updates
        weight = nn.Parameter(torch.ones(1000).bfloat16())
        more = [(f"other{k}", nn.Parameter(torch.ones(k + 1).bfloat16())) for k in range(others)]
        through(lent, [*more, (name, weight)], 2**-8)
        return weight.detach()

    state = torch.get_rng_state()
    first = changed(1, 7, "w")
    assert 400 < int((first > 1).sum()) < 600
    assert torch.equal(first, changed(1, 7, "w", others=3))
    for other in (changed(2, 7, "w"), changed(1, 8, "w"), changed(1, 7, "v")):
        assert 300 < int((first != other).sum()) < 700
    assert torch.equal(torch.get_rng_state(), state)  # no stream of the run has moved


def test_a_device_that_does_not_round_so_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = StochasticRounding(CPU)
    lent.check()
    monkeypatch.setattr(rounding, "round_stochastically", lambda *arguments: None)
    with pytest.raises(
        UserError, match=r"'stochastic', and this cpu does not round so \(it gives other numbers\): set"
    ):
        lent.check()

    def fails(*arguments: Any) -> None:
        raise RuntimeError("no kernel for random_\nmore")

    monkeypatch.setattr(rounding, "round_stochastically", fails)
    with pytest.raises(UserError, match=r"does not round so \(no kernel for random_\): set it to fp32"):
        lent.check()
