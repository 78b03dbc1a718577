"""Magnitudes: histograms of exponents predict what FP16 does, for every loss scale."""

import math

import pytest
import torch
from torch import Tensor

from rawloop.watch.measure import SAMPLE, Amounts, GradientAmounts, Readings, joined


def amounts(tensor: Tensor) -> Amounts:
    readings = Readings()
    readings.add("forward", "x", tensor)
    return readings.read()["forward", "x"]


def gradient(tensor: Tensor) -> GradientAmounts:
    readings = Readings()
    readings.add_gradient("w", tensor)
    (read,) = readings.read().values()
    assert isinstance(read, GradientAmounts)
    return read


@pytest.mark.parametrize("bits", [-20, -6, 0, 7, 24])
def test_flushed_and_subnormal_shares_are_those_of_a_cast(bits: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(4096) * torch.exp2(torch.randint(-30, 3, (4096,)).float())
    scaled = (values.double() * 2.0**bits).half()
    exponents = amounts(values).exponents
    assert exponents.flushed(2.0**bits) == pytest.approx(float((scaled == 0).float().mean()), abs=1e-6)
    small = (scaled != 0) & (scaled.abs() < 2.0**-14)
    assert exponents.subnormal(2.0**bits) == pytest.approx(float(small.float().mean()), abs=1e-3)
    shifted = exponents.shifted(bits)
    assert shifted.flushed(1.0) == pytest.approx(exponents.flushed(2.0**bits))


def test_the_window_holds_the_scales_that_neither_flush_nor_overflow() -> None:
    values = torch.tensor([1.5 * 2.0**-30, -3e-3, 0.0, 0.75])
    window = amounts(values).exponents.window()
    assert window is not None
    for scale in (2.0**window.low, 2.0**window.high, window.recommended()):
        cast = (values * scale).half()
        assert bool(cast.isfinite().all())
        assert int((cast == 0).sum()) == 1  # the zero itself
    assert (window.low, window.high) == (5, 15)
    assert bool(((values * 2.0 ** (window.low - 1)).half() == 0).sum() == 2)
    assert str(window) == "2^5 to 2^15"
    assert amounts(torch.zeros(3)).exponents.window() is None


def test_head_room_is_measured_in_the_tensors_own_dtype_and_masks_do_not_count() -> None:
    half = torch.tensor([1.0, -8192.0, 3.0], dtype=torch.float16)
    assert amounts(half).headroom == pytest.approx(3.0, abs=1e-2)
    mask = torch.tensor([0.0, torch.finfo(torch.float16).min, 2.0], dtype=torch.float16)
    assert amounts(mask).largest == 2.0
    assert amounts(torch.tensor([0.0, -math.inf])).headroom == math.inf
    assert not amounts(torch.tensor([1.0, math.nan])).finite
    assert amounts(half).finite


def test_subnormal_numbers_and_zeros_are_counted() -> None:
    found = amounts(torch.tensor([2.0**-15, 2.0**-14, 1.0, 0.0], dtype=torch.float16))
    assert found.zeros == 0.25
    assert found.exponents.subnormal(1.0) == pytest.approx(1 / 3)


def test_exponents_are_left_out_if_nobody_asks_for_them() -> None:
    readings = Readings()
    readings.add("forward", "x", torch.tensor([-4.0, 1.0]), exponents=False)
    readings.add_gradient("w", torch.tensor([[0.0, 0.0], [0.0, 3.0]]), exponents=False)
    x, w = readings.read().values()
    assert (x.lowest, x.highest, x.exponents.nonzero) == (-4.0, 1.0, 0)
    assert isinstance(w, GradientAmounts)
    assert (w.alive.tolist(), w.rows, w.lost, w.largest) == ([False, True], 1, 0.0, 3.0)


def test_large_tensors_are_sampled_and_their_range_is_not() -> None:
    values = torch.ones(3, SAMPLE // 2)
    values[1, 7] = -9.0
    found = amounts(values.T)
    assert found.lowest == -9.0
    assert SAMPLE / 4 <= found.exponents.nonzero <= SAMPLE


def test_several_tensors_of_one_name_are_joined_in_one_reading() -> None:
    readings = Readings()
    readings.add("forward", "x", torch.tensor([1.0, 0.0]))
    readings.add("forward", "x", torch.tensor([-4.0]))
    readings.add("forward", "y", torch.tensor([0.5], dtype=torch.bfloat16))
    read = readings.read()
    assert (read["forward", "x"].lowest, read["forward", "x"].highest) == (-4.0, 1.0)
    assert read["forward", "x"].exponents.zeros == 1
    assert joined(read.values()).nonzero == 3
    assert readings.read() == {}


def test_the_lost_share_leaves_out_rows_and_columns_that_are_zero() -> None:
    grad = torch.ones(4, 4)
    grad[1] = 0  # a dead unit
    grad[:, 2] = 0  # an input that is always zero
    assert (gradient(grad).lost, gradient(grad).rows) == (0.0, 3)
    grad[0, 0] = 0
    assert gradient(grad).lost == pytest.approx(1 / 9)
    assert gradient(grad).alive.tolist() == [True, False, True, True]
    assert gradient(torch.tensor(2.0)).rows == 1
