"""Pure bfloat16 does not learn: the loss stays where it is at a small learning rate.

model.to(torch.bfloat16), torch_dtype=torch.bfloat16, full fine-tuning, learning rate 1e-5, AdamW, weights unchanged.

A bfloat16 number has 8 bits of mantissa: a weight of 0.02 cannot move by less than 0.0001, and what is below half of
that is rounded away. No error, no NaN: the step is lost.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

Loss = Callable[[nn.Module], Tensor]
STEPS, LR = 60, 1e-5


def pure_bf16(model: nn.Module, loss_of: Loss) -> tuple[list[float], float]:
    """Train bfloat16 weights with plain AdamW. Returns losses, and the share of updates that changed no weight."""
    optimizer = AdamW(model.parameters(), lr=LR)
    losses, lost, asked = [loss_of(model).item()], 0, 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [weight.detach().clone() for weight in model.parameters()]
        optimizer.step()
        for old, weight in zip(before, model.parameters()):
            assert weight.grad is not None
            wanted = weight.grad.ne(0)
            asked += int(wanted.sum())
            lost += int((wanted & torch.eq(old, weight)).sum())
    return [*losses, loss_of(model).item()], lost / asked


def test_plain_bf16_loses_most_updates_and_learns_a_fraction(
    llama: Callable[..., Any], loss_of: Loss, reference: Callable[..., list[float]]
) -> None:
    losses, lost = pure_bf16(llama(torch.bfloat16), loss_of)
    expected = reference(llama(), STEPS, LR)
    assert lost > 0.8
    assert losses[0] - losses[-1] < 0.3 * (expected[0] - expected[-1])


def test_one_adam_step_at_1e_5_leaves_five_of_six_bf16_weights_as_they_were() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randn(10_000) * 0.02).bfloat16())
    before, weight.grad = weight.detach().clone(), torch.randn(10_000).bfloat16()
    AdamW([weight], lr=1e-5).step()
    assert (weight == before).float().mean().item() == pytest.approx(0.84, abs=0.02)


@pytest.mark.parametrize("mode", ["bf16", "native_fp16"])
def test_rawloop_learns_as_float32_does_from_a_bf16_checkpoint(
    llama: Callable[..., Any], reference: Callable[..., list[float]], by_rawloop: Callable[..., Any], mode: str
) -> None:
    expected = reference(llama(torch.bfloat16), STEPS, LR)
    done = by_rawloop(llama(torch.bfloat16), mode, STEPS, LR)
    assert {p.dtype for _, p in done.policy.named_parameters()} == {torch.float32}
    fallen = done.losses[0] - done.losses[-1]
    assert fallen == pytest.approx(expected[0] - expected[-1], rel=0.05)
    assert fallen > 0.015


def test_rawloop_changes_every_weight_that_has_a_gradient(
    llama: Callable[..., Any], loss_of: Loss, by_rawloop: Callable[..., Any]
) -> None:
    model = llama(torch.bfloat16)
    torch.autograd.backward(loss_of(model))
    wanted = torch.cat([(weight.grad != 0).flatten() for weight in model.parameters()])
    before = torch.cat([weight.detach().float().flatten() for weight in model.parameters()])
    model.zero_grad()
    done = by_rawloop(model, "bf16", steps=1, lr=LR)
    changed = torch.cat([weight.detach().flatten() for weight in done.model.parameters()]) != before
    assert (changed & wanted).sum() / wanted.sum() > 0.99
