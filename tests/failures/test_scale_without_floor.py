"""The loss scale falls to 0 and the first good step turns the weights into NaN.

GradScaler, loss scale 0, scale underflow, minimum loss scale, skipped steps, get_scale, NaN after many overflows.

GradScaler halves its scale at every skipped step and has no lowest value. After 144 skips in a row one divided by the
scale is infinite, and the check for it runs before the division: the next good step is applied, times infinity.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rawloop import PrecisionConfig, PrecisionPolicy
from rawloop.errors import TrainingError

Loss = Callable[[nn.Module], Tensor]


def after_bad_steps(model: nn.Module, loss_of: Loss, bad: int) -> tuple[float, bool]:
    """Take `bad` steps with a NaN loss and a good one. Returns the scale, and whether the weights are finite."""
    optimizer, scaler = AdamW(model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu")
    for step in range(bad + 1):
        optimizer.zero_grad()
        loss = loss_of(model) * (math.nan if step < bad else 1.0)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale(), all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


@pytest.mark.parametrize(("bad", "survives"), [(143, True), (144, False)])
def test_plain_grad_scaler_poisons_the_weights_with_its_first_good_step(
    llama: Callable[..., Any], loss_of: Loss, bad: int, survives: bool
) -> None:
    scale, finite = after_bad_steps(llama(), loss_of, bad)
    assert scale == 2.0 ** (16 - bad)
    assert finite == survives


@pytest.mark.parametrize("mode", ["amp_fp16", "native_fp16"])
def test_rawloops_scale_has_a_floor_and_training_goes_on(
    llama: Callable[..., Any], loss_of: Loss, reference: Callable[..., list[float]], mode: Any
) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode, max_skips=1000), torch.device("cpu"))
    model = policy.prepare(llama())
    optimizer = AdamW([p for _, p in policy.named_parameters()], lr=3e-3)
    for step in range(144 + 30):
        with policy.autocast():
            loss = loss_of(model)
        policy.backward(loss * (math.nan if step < 144 else 1.0))
        assert policy.step(optimizer, 1.0).applied == (step >= 144)
    assert policy.state_dict()["scaler"]["scale"] == 1.0
    assert loss_of(model).item() == pytest.approx(reference(llama())[-1], abs=0.02)


@pytest.mark.parametrize("mode", ["fp32", "amp_fp16", "native_fp16"])
def test_rawloop_ends_a_run_that_has_nothing_but_bad_steps(llama: Callable[..., Any], loss_of: Loss, mode: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), torch.device("cpu"))
    model = policy.prepare(llama())
    optimizer = AdamW([p for _, p in policy.named_parameters()])

    def bad_step() -> None:
        policy.backward(loss_of(model) * math.nan)
        assert not policy.step(optimizer, 1.0).applied

    for _ in range(24):
        bad_step()
    with pytest.raises(TrainingError, match="25 steps in a row had losses that are not finite"):
        bad_step()
