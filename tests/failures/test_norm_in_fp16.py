"""grad_norm = inf although every gradient is finite, and the loss does not move.

clip_grad_norm_, FP16 gradients, grad_norm inf, gradients all zero after clipping, grad_norm far too large.

The norm of FP16 gradients is computed and returned in FP16, which ends at 65504. Clipping divides by it: everything
becomes zero. And a norm that is taken before `unscale_` is that of the scaled gradients.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from rawloop import PrecisionConfig, PrecisionPolicy
from rawloop.precision.config import LossScaleConfig

Loss = Callable[[nn.Module], Tensor]
SCALE = 2.0**16


def true_norm(model: nn.Module, loss_of: Loss) -> float:
    torch.autograd.backward(loss_of(model))
    return float(torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm())


def test_plain_clipping_of_finite_fp16_gradients_sets_them_to_zero(llama: Callable[..., Any], loss_of: Loss) -> None:
    model = llama(torch.float16)
    torch.autograd.backward(loss_of(model) * SCALE)
    gradients = [p.grad for p in model.parameters()]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert math.isinf(nn.utils.clip_grad_norm_(model.parameters(), SCALE))
    assert not any(gradient.any() for gradient in gradients)


def test_plain_clipping_before_unscaling_clips_by_the_scaled_norm(llama: Callable[..., Any], loss_of: Loss) -> None:
    model, scaler = llama(), torch.amp.GradScaler("cpu")
    optimizer = SGD(model.parameters(), lr=0.1)
    torch.autograd.backward(scaler.scale(loss_of(model)))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(SCALE * true_norm(llama(), loss_of), rel=1e-3)
    before = model.lm_head.weight.detach().clone()
    scaler.step(optimizer)
    assert (model.lm_head.weight - before).abs().max() < 1e-6  # a step of norm 0.1 / 65536


def test_rawloop_clips_by_the_true_norm(llama: Callable[..., Any], loss_of: Loss) -> None:
    expected, plain = true_norm(llama(), loss_of), llama()
    optimizer = SGD(plain.parameters(), lr=0.1)
    torch.autograd.backward(loss_of(plain))
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    for mode in ("amp_fp16", "native_fp16"):
        config: Any = {"mode": mode, "loss_scale": LossScaleConfig(init=SCALE)}
        policy = PrecisionPolicy(PrecisionConfig(**config), torch.device("cpu"))
        model = policy.prepare(llama(torch.float16))
        with policy.autocast():
            loss = loss_of(model)
        policy.backward(loss)
        result = policy.step(SGD([p for _, p in policy.named_parameters()], lr=0.1), 0.5)
        assert result.applied
        assert result.grad_norm == pytest.approx(expected, rel=0.01)
        for (_, ours), theirs in zip(policy.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-3)
