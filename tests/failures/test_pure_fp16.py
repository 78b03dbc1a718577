"""loss = nan at step 2: FP16 weights, no autocast, no GradScaler, stock AdamW.

model.half(), torch_dtype=torch.float16, TITAN RTX, V100, "native FP16", AdamW eps 1e-8, gradient underflow.

Adam's eps of 1e-8 is zero in FP16, and so is the second moment of every gradient below 0.0055: the update divides by
zero.
A larger eps, or the fused kernel, hides that behind a step length that nobody asked for.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

Loss = Callable[[nn.Module], Tensor]


class Pure:
    """The loop that is recommended where a GradScaler raised: FP16 all through, and nothing else."""

    def __init__(self, model: nn.Module, loss_of: Loss, steps: int, lr: float = 1e-3, **adam: Any) -> None:
        start = [weight.detach().float().clone() for weight in model.parameters()]
        optimizer = AdamW(model.parameters(), lr=lr, **adam)
        self.losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model)
            self.losses.append(loss.item())
            torch.autograd.backward(loss)
            optimizer.step()
        self.moved = distance(start, model)


def distance(start: list[Tensor], model: nn.Module) -> float:
    """L2 norm of how far the weights have moved."""
    moves = [(weight.detach().float() - before).norm() for weight, before in zip(model.parameters(), start)]
    return float(torch.stack(moves).norm())


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
def test_plain_adamw_on_fp16_weights_is_nan_at_the_second_step(
    llama: Callable[..., Any], loss_of: Loss, lr: float
) -> None:
    model = llama(torch.float16)
    run = Pure(model, loss_of, steps=2, lr=lr)
    assert run.losses[0] == pytest.approx(math.log(32), abs=0.1)
    assert math.isnan(run.losses[1])


@pytest.mark.parametrize(("gradient", "second_moment"), [(0.0054, 0.0), (0.0055, 2.0**-24)])
def test_the_second_moment_of_a_small_gradient_is_zero(gradient: float, second_moment: float) -> None:
    weight = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    weight.grad = torch.full_like(weight, gradient)
    optimizer = AdamW([weight], lr=1e-3)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].tolist() == [second_moment] * 8
    assert bool(torch.isfinite(weight).all()) == (second_moment > 0)


@pytest.mark.parametrize(("size", "ruined"), [(1e-3, 1000), (1e-2, 441)])
def test_how_many_of_a_thousand_weights_one_step_ruins(size: float, ruined: int) -> None:
    broken = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        weight = nn.Parameter((torch.randn(1000) * 0.02).to(dtype))
        weight.grad = (torch.randn(1000) * size).to(dtype)
        AdamW([weight], lr=1e-3).step()
        broken[dtype] = int((~torch.isfinite(weight)).sum())
    assert broken[torch.float16] == pytest.approx(ruined, abs=30)
    assert (broken[torch.bfloat16], broken[torch.float32]) == (0, 0)


@pytest.mark.parametrize(("adam", "times"), [({"eps": 1e-6}, 40), ({"fused": True}, 12)])
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_what_hides_the_nan_is_another_learning_rate(
    llama: Callable[..., Any], loss_of: Loss, adam: dict[str, Any], times: float
) -> None:
    with torch.backends.mkldnn.flags(enabled=False):  # it sums in FP16 where the CPU can, which is another experiment
        exact = Pure(llama(), loss_of, steps=120)
        hidden = Pure(llama(torch.float16), loss_of, steps=120, **adam)
    assert hidden.moved > times * exact.moved
    assert hidden.losses[-1] > exact.losses[-1] + 0.1  # and it has learnt less


def test_without_a_loss_scale_small_gradients_are_zero(llama: Callable[..., Any], loss_of: Loss) -> None:
    """A loss divided by the number of targets or micro-batches has gradients that FP16 cannot hold."""
    zeros = {}
    for dtype in (torch.float16, torch.float32):
        model = llama(dtype)
        torch.autograd.backward(loss_of(model) / 16384)
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        zeros[dtype] = (grads == 0).float().mean().item()
    assert zeros[torch.float16] > 0.4
    assert zeros[torch.float32] < 0.01


def test_rawloops_native_fp16_learns_and_moves_as_float32_does(
    llama: Callable[..., Any], loss_of: Loss, reference: Callable[..., list[float]], by_rawloop: Callable[..., Any]
) -> None:
    model, half = llama(), llama(torch.float16)
    starts = [[p.detach().float().clone() for p in each.parameters()] for each in (model, half)]
    expected = reference(model, lr=1e-3)
    done = by_rawloop(half, "native_fp16", lr=1e-3)  # AdamW with its own eps of 1e-8
    assert {p.dtype for p in done.model.parameters()} == {torch.float16}
    assert expected[-1] < expected[0] - 0.5
    assert done.losses[-1] == pytest.approx(expected[-1], abs=0.002)
    assert distance(starts[1], done.model) == pytest.approx(distance(starts[0], model), rel=0.01)


def test_rawloops_loss_scale_keeps_small_gradients(
    llama: Callable[..., Any], loss_of: Loss, reference: Callable[..., list[float]], by_rawloop: Callable[..., Any]
) -> None:
    done = by_rawloop(llama(torch.float16), "native_fp16", steps=0)
    optimizer = AdamW([p for _, p in done.policy.named_parameters()], lr=1e-3, eps=1e-12)
    for _ in range(30):
        done.policy.backward(loss_of(done.model) / 16384)
        assert done.policy.step(optimizer).applied
    assert loss_of(done.model).item() == pytest.approx(reference(llama(), lr=1e-3)[-1], abs=0.005)
