"""AssertionError: No inf checks were recorded for this optimizer.

GradScaler.step, dummy loss, torch.tensor(0.0, requires_grad=True), frozen model, optimizer built too early.

The scaler found no gradient in anything that the optimizer holds. It is an AssertionError, so `except RuntimeError`
never catches it; and caught or not, it leaves the scaler half-way, so that the next, healthy step fails as well.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rawloop import PrecisionConfig, PrecisionPolicy
from rawloop.errors import TrainingError, UserError

MESSAGE = "No inf checks were recorded for this optimizer."
CPU = torch.device("cpu")
Loss = Callable[[nn.Module], Tensor]


def dummy_loss() -> Tensor:
    """The patch that is passed around for devices that differ: a fresh leaf, which no weight has a part in."""
    return torch.tensor(0.0, requires_grad=True)


def amp_step(loss: Tensor, scaler: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def test_plain_torch_raises_on_a_dummy_loss_and_does_not_recover(llama: Callable[..., Any], loss_of: Loss) -> None:
    model = llama()
    optimizer, scaler = AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    with pytest.raises(AssertionError, match=MESSAGE) as raised:
        amp_step(dummy_loss(), scaler, optimizer)
    assert not isinstance(raised.value, RuntimeError)  # the advice to catch a RuntimeError catches nothing
    before = model.lm_head.weight.detach().clone()
    for _ in range(3):  # losses are fine from here on
        with pytest.raises(AssertionError, match=MESSAGE):
            amp_step(loss_of(model), scaler, optimizer)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called on this optimizer since the"):
            scaler.unscale_(optimizer)
    assert torch.equal(model.lm_head.weight, before)


def test_plain_torch_raises_where_the_optimizer_holds_other_weights(llama: Callable[..., Any], loss_of: Loss) -> None:
    model = llama()
    optimizer = AdamW(model.parameters())
    for module in model.modules():  # as code does that casts or moves by making weights anew
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    with pytest.raises(AssertionError, match=MESSAGE):
        amp_step(loss_of(model), torch.amp.GradScaler("cpu"), optimizer)


def test_plain_torch_raises_where_everything_the_optimizer_holds_is_frozen(
    llama: Callable[..., Any], with_lora: Callable[..., Any], loss_of: Loss
) -> None:
    base = llama()
    optimizer = AdamW(base.parameters())  # built before PEFT froze all of it
    model = with_lora(base)
    with pytest.raises(AssertionError, match=MESSAGE):
        amp_step(loss_of(model), torch.amp.GradScaler("cpu"), optimizer)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16"])
def test_rawloop_refuses_a_dummy_loss_and_goes_on_as_if_nothing_had_happened(
    llama: Callable[..., Any], loss_of: Loss, reference: Callable[..., list[float]], mode: Any
) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    model = policy.prepare(llama())
    optimizer = AdamW([p for _, p in policy.named_parameters()], lr=3e-3)
    for step in range(30):
        if step % 10 == 5:
            with pytest.raises(TrainingError, match="the loss is not connected to any trainable weight"):
                policy.backward(dummy_loss())
        with policy.autocast():
            loss = loss_of(model)
        policy.backward(loss)
        assert policy.step(optimizer, 1.0).applied
    assert loss_of(model).item() == pytest.approx(reference(llama())[-1], abs=0.002)


def test_rawloop_takes_over_a_scaler_that_an_earlier_error_left_half_way(
    llama: Callable[..., Any], loss_of: Loss, reference: Callable[..., list[float]], by_rawloop: Callable[..., Any]
) -> None:
    scaler, model = torch.amp.GradScaler("cpu"), llama()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    with pytest.raises(AssertionError, match=MESSAGE):
        amp_step(dummy_loss(), scaler, optimizer)
    done = by_rawloop(model, "amp_fp16", grad_scaler=scaler)
    assert all(result.applied for result in done.results)
    assert done.losses[-1] == pytest.approx(reference(llama())[-1], abs=0.002)
    amp_step(loss_of(model), scaler, optimizer)  # and the scaler's own protocol works again


@pytest.mark.parametrize("mode", ["fp32", "amp_fp16"])
def test_rawloop_names_an_optimizer_that_holds_other_weights(
    llama: Callable[..., Any], loss_of: Loss, mode: Any
) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    model = policy.prepare(llama())
    policy.backward(loss_of(model))
    with pytest.raises(UserError, match=r"12 of which .* are not among the 12 that the prepared model trains"):
        policy.step(AdamW(llama().parameters()), 1.0)


def test_rawloop_names_an_optimizer_whose_weights_have_no_part_in_the_loss(llama: Callable[..., Any]) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="amp_fp16"), CPU)
    model: Any = policy.prepare(llama())
    policy.backward(model.model(torch.arange(4)[None]).last_hidden_state.square().mean())
    with pytest.raises(TrainingError, match="no weight of the optimizer got a gradient"):
        policy.step(AdamW(model.lm_head.parameters()), 1.0)


def test_rawloop_refuses_a_frozen_model_before_anything_is_trained(llama: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no weight of the model is trainable"):
        PrecisionPolicy(PrecisionConfig(mode="amp_fp16"), CPU).prepare(llama().requires_grad_(False))
