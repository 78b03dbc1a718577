"""The loss explodes after a caught exception (CUDA out of memory in optimizer.step).

GradScaler state after an exception, try / except around scaler.step, out of memory, retry, loss jumps, found_inf,
training stands still.

The scaler remembers that this optimizer's gradients are unscaled. If `step` raises, that note stays; the next step is
not unscaled any more and is applied 65,536 times too large, without an error.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from rawloop import PrecisionConfig, PrecisionPolicy
from rawloop.errors import RawloopError
from rawloop.evaluate import EvaluationConfig
from rawloop.loop import Run

CPU = torch.device("cpu")
Loss = Callable[[nn.Module], Tensor]


class FailsOnce(SGD):
    """An optimizer that runs out of memory at its first step."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory")
        return super().step(closure)


def moved(model: nn.Module, before: list[Tensor]) -> float:
    return float(torch.stack([(a.detach() - b).norm() for a, b in zip(model.parameters(), before)]).norm())


def snapshot(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def test_plain_grad_scaler_applies_scaled_gradients_after_an_error(llama: Callable[..., Any], loss_of: Loss) -> None:
    plain = llama()
    before = snapshot(plain)
    torch.autograd.backward(loss_of(plain))
    SGD(plain.parameters(), lr=0.1).step()
    expected = moved(plain, before)

    model, scaler = llama(), torch.amp.GradScaler("cpu")
    optimizer = FailsOnce(model.parameters(), lr=0.1)
    torch.autograd.backward(scaler.scale(loss_of(model)))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        scaler.step(optimizer)
    optimizer.zero_grad()  # "skip this batch and go on"
    torch.autograd.backward(scaler.scale(loss_of(model)))
    scaler.step(optimizer)
    scaler.update()
    assert moved(model, before) == pytest.approx(65536 * expected, rel=1e-3)
    assert loss_of(model).item() > 1000.0


class FailsFused(AdamW):
    """A fused optimizer that raises at its first step, after the scaler has told it of an overflow."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory")
        return super().step(closure)


def test_a_fused_optimizer_stands_still_for_ever_after_an_error(llama: Callable[..., Any], loss_of: Loss) -> None:
    model, scaler = llama(), torch.amp.GradScaler("cpu")
    optimizer = FailsFused(model.parameters(), lr=1e-2, fused=True)
    torch.autograd.backward(scaler.scale(loss_of(model) * 1e38))
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        scaler.step(optimizer)
    before = snapshot(model)
    for _ in range(3):  # on without the scaler, "in plain float32"
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model))
        optimizer.step()
    assert moved(model, before) == 0.0


@pytest.mark.parametrize("mode", ["fp32", "amp_fp16", "native_fp16"])
def test_rawloop_says_that_the_weights_may_be_half_updated(llama: Callable[..., Any], loss_of: Loss, mode: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    model = policy.prepare(llama())
    optimizer = FailsOnce([p for _, p in policy.named_parameters()], lr=0.1)
    policy.backward(loss_of(model))
    with pytest.raises(RawloopError, match=r"the optimizer failed in the middle of an update .*CUDA out of memory"):
        policy.step(optimizer, 1.0)


def fail_at_step_3(run: Run) -> None:
    step = run.optimizer.step

    def failing(closure: Any = None) -> Any:
        if run.state.step == 3:
            raise RuntimeError("CUDA out of memory")
        return step(closure)

    run.optimizer.step = failing  # type: ignore[method-assign]


def test_a_rawloop_run_that_failed_in_a_step_continues_from_its_checkpoint_bit_for_bit(
    demo_run: Callable[..., Any], tmp_path: Path
) -> None:
    off = EvaluationConfig(enabled=False)
    demo_run(output=str(tmp_path / "straight"), evaluation=off)
    with pytest.raises(RawloopError, match=r"CUDA out of memory.* must not be used.*--resume .*step-00000002"):
        demo_run(fail_at_step_3, output=str(tmp_path / "failed"), evaluation=off)
    demo_run(output=str(tmp_path / "failed"), evaluation=off, resume="latest")
    adapter = "checkpoints/step-00000004/adapter/adapter_model.safetensors"
    straight, resumed = (load_file(tmp_path / name / adapter) for name in ("straight", "failed"))
    assert list(straight) == list(resumed)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
