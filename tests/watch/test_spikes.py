"""The spike guard: what stands out of its own history, and what does not."""

import math

import pytest

from rawloop.watch.spikes import SpikeGuard


def guard(steps: int = 40, slope: float = 0.0) -> SpikeGuard:
    """A guard that has seen losses around 2 (with a slope) and norms around 1, with the noise of small batches."""
    found = SpikeGuard()
    for step in range(steps):
        noise = math.sin(7.0 * step)
        found.keep(2.0 + slope * step + 0.2 * noise, 1.0 + 0.3 * noise)
    return found


@pytest.mark.parametrize("slope", [0.0, -0.02])
def test_a_loss_or_a_norm_far_out_is_a_spike(slope: float) -> None:
    text = guard(slope=slope).objection(6.0, 1.0)
    assert text is not None
    assert "the loss 6 is a spike: the last 40 were" in text
    text = guard(slope=slope).objection(1.9, 30.0)
    assert text is not None
    assert "the gradient norm 30 is a spike" in text


@pytest.mark.parametrize(("loss", "norm"), [(2.3, 1.4), (1.0, 0.1), (2.5, 1.8), (0.0, 0.0)])
def test_noise_and_small_numbers_are_none(loss: float, norm: float) -> None:
    assert guard().objection(loss, norm) is None


def test_without_a_history_nothing_is_a_spike() -> None:
    assert guard(steps=19).objection(1e6, 1e6) is None
    assert guard(steps=20).objection(1e6, 1e6) is not None
