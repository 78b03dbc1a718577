"""ValueError: Attempting to unscale FP16 gradients.

GradScaler, clip_grad_norm_, FP16 weights, gradient checkpointing, LoRA modules_to_save, model.half().

The cause is the dtype of what is trained, nothing else: GradScaler refuses to unscale gradients that are FP16
themselves. Gradient checkpointing is blamed for it and has no part in it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

MESSAGE = "Attempting to unscale FP16 gradients."
Loss = Callable[[nn.Module], Tensor]


def one_step(model: nn.Module, loss_of: Loss, scaler: Any, optimizer: Any) -> None:
    """The step of every AMP tutorial: scale, unscale, clip, step, update."""
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = loss_of(model)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plain_torch_raises_on_fp16_weights_with_and_without_checkpointing(
    llama: Callable[..., Any], loss_of: Loss, checkpointing: bool
) -> None:
    model = llama(torch.float16)
    if checkpointing:
        recompute(model)
    optimizer, scaler = AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    for _ in range(3):  # catching it and going on does not help: every step raises it again
        with pytest.raises(ValueError, match=MESSAGE):
            one_step(model, loss_of, scaler, optimizer)
    assert not optimizer.state  # nothing has been trained


def test_checkpointing_under_a_grad_scaler_trains_where_weights_are_float32(
    llama: Callable[..., Any], loss_of: Loss, reference: Callable[..., list[float]]
) -> None:
    model = llama()
    recompute(model)
    optimizer, scaler = AdamW(model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu")
    for _ in range(30):
        one_step(model, loss_of, scaler, optimizer)
    losses = reference(llama())
    assert losses[-1] < losses[0] - 0.5
    assert loss_of(model).item() == pytest.approx(losses[-1], abs=0.01)


def recompute(model: Any) -> None:
    """Switch activation checkpointing on, by its name in this version of transformers."""
    model.config.use_cache = False
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable()
    model.train()


@pytest.mark.parametrize(
    ("config", "options", "left_in_fp16"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, ["lm_head.modules_to_save"]),
        ({}, {"autocast_adapter_dtype": False}, ["lora_A", "lora_B"]),
    ],
)
def test_peft_leaves_trained_weights_in_fp16(
    llama: Callable[..., Any],
    with_lora: Callable[..., Any],
    loss_of: Loss,
    config: dict[str, Any],
    options: dict[str, Any],
    left_in_fp16: list[str],
) -> None:
    model = with_lora(llama(torch.float16), options, **config)
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    assert half
    assert all(any(part in name for part in left_in_fp16) for name in half)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=MESSAGE):
        one_step(model, loss_of, torch.amp.GradScaler("cpu"), optimizer)


def test_fused_adamw_without_clipping_passes_the_guard_and_loses_its_second_moment(
    llama: Callable[..., Any], loss_of: Loss
) -> None:
    model = llama(torch.float16)
    optimizer, scaler = AdamW(model.parameters(), lr=1e-3, fused=True), torch.amp.GradScaler("cpu")
    torch.autograd.backward(scaler.scale(loss_of(model)))
    scaler.step(optimizer)  # no error
    moments = torch.cat([state["exp_avg_sq"].flatten() for state in optimizer.state.values()])
    moved = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()]) != 0
    assert moments.dtype == torch.float16
    assert (moments[moved] == 0).float().mean() > 0.5  # squares below 6e-8 are stored as zero


@pytest.mark.parametrize("mode", ["amp_fp16", "native_fp16"])
def test_rawloop_trains_an_fp16_model_as_float32_does(
    llama: Callable[..., Any], reference: Callable[..., list[float]], by_rawloop: Callable[..., Any], mode: str
) -> None:
    expected = reference(llama(torch.float16))
    done = by_rawloop(llama(torch.float16), mode)
    assert all(result.applied for result in done.results)
    assert {p.dtype for _, p in done.policy.named_parameters()} == {torch.float32}
    assert expected[-1] < expected[0] - 0.5
    assert done.losses[-1] == pytest.approx(expected[-1], abs=0.002)


@pytest.mark.parametrize("mode", ["amp_fp16", "native_fp16"])
@pytest.mark.parametrize("options", [{}, {"autocast_adapter_dtype": False}])
def test_rawloop_trains_what_peft_left_in_fp16(
    llama: Callable[..., Any],
    with_lora: Callable[..., Any],
    reference: Callable[..., list[float]],
    by_rawloop: Callable[..., Any],
    mode: str,
    options: dict[str, Any],
) -> None:
    saved = ["lm_head"] if mode == "amp_fp16" else []  # a float32 head needs autocast over an FP16 base

    def adapted() -> Any:
        return with_lora(llama(torch.float16), options, modules_to_save=saved)

    expected = reference(adapted(), lr=1e-2)
    done = by_rawloop(adapted(), mode, lr=1e-2)
    assert {p.dtype for p in done.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in done.model.parameters() if not p.requires_grad} == {torch.float16}
    assert expected[-1] < expected[0] - 0.1
    assert done.losses[-1] == pytest.approx(expected[-1], abs=0.002)
