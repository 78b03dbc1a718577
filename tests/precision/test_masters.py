"""Masters of 16-bit weights: updated bucket by bucket, and the share of updates that would be lost without them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rawloop.errors import CheckpointError
from rawloop.precision import masters
from rawloop.precision.advice import share_of_lost_updates
from rawloop.precision.masters import TrainedWeights

CPU = torch.device("cpu")
HALVES = [torch.float16, torch.bfloat16]


def values(seed: int = 0) -> list[Tensor]:
    """Numbers of all sizes: subnormal in FP16, ordinary, up to where FP16 ends."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1e-8, 1e-6, 1e-3, 1.0, 1e3, 6e4]
    return [size * (2 * torch.rand(50, generator=generator) - 1) for size in sizes]


def named(tensors: list[Tensor]) -> list[tuple[str, nn.Parameter]]:
    return [(f"w{i}", nn.Parameter(tensor.clone())) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize("dtype", HALVES)
def test_masters_hold_the_float32_value_that_was_there_before_the_rounding(dtype: torch.dtype) -> None:
    kept = TrainedWeights(named(values()), dtype, CPU)
    for i, value in enumerate(values()):
        assert torch.equal(kept.value(f"w{i}"), value)
        assert torch.equal(kept.weights[f"w{i}"].data, value.to(dtype))


def test_buckets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for bucket in (10**9, 60):
        monkeypatch.setattr(masters, "BUCKET", bucket)
        kept = TrainedWeights(named(values()[:4]), torch.float16, CPU)
        held = [p for _, p in kept.named_parameters()]
        optimizer = AdamW(held, lr=1e-3, weight_decay=0.1)
        calls = 0

        def step(optimizer: AdamW = optimizer) -> None:
            nonlocal calls
            calls += 1
            optimizer.step()

        for k in range(3):
            for weight in kept.weights.values():
                weight.grad = torch.full_like(weight, 2.0**k)
            kept.update(held, 0.5, step)
            assert all(p.grad is None for p in [*held, *kept.weights.values()])
        assert calls == (3 if bucket > 60 else 12)
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {3.0}
        results.append([kept.value(name) for name in kept.weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_without_a_gradient_are_left_alone() -> None:
    kept = TrainedWeights(named(values()[:3]), torch.float16, CPU)
    held = [p for _, p in kept.named_parameters()]
    optimizer = AdamW(held, lr=1e-1, weight_decay=0.1)
    kept.weights["w1"].grad = torch.ones(50, dtype=torch.float16)
    before = {name: kept.value(name).clone() for name in kept.weights}
    kept.update(held, 1.0, lambda: optimizer.step())
    moved = [name for name in before if not torch.equal(before[name], kept.value(name))]
    assert moved == ["w1"]
    assert list(optimizer.state) == [held[1]]


def test_shown_gradients_are_float32_on_weights_and_masters() -> None:
    kept = TrainedWeights(named(values()[:3]), torch.float16, CPU)
    held = [p for _, p in kept.named_parameters()]
    for weight in list(kept.weights.values())[:2]:
        weight.grad = torch.full_like(weight, 2.0**-10)
    kept.unscale_gradients(held, 2.0**-15)
    shown = [weight.grad for weight in kept.weights.values()]
    assert [p.grad for p in held] == shown  # the same tensors: clipped once for both
    assert shown[0] is not None
    assert shown[0].dtype == torch.float32
    assert shown[0].tolist() == [2.0**-25] * 50  # zero in FP16
    assert shown[2] is None
    shown[0].mul_(2)
    seen: list[Any] = []
    kept.update(held, 1.0, lambda: seen.append([None if p.grad is None else float(p.grad[0]) for p in held]))
    assert seen == [[2.0**-24, 2.0**-25, None]]
    assert all(p.grad is None for p in [*held, *kept.weights.values()])


@pytest.mark.parametrize("masters", [True, False])
def test_float32_comes_back_whole(masters: bool) -> None:
    kept = TrainedWeights(named(values()), torch.bfloat16, CPU, masters)
    wanted = {name: kept.value(name).clone() for name in kept.weights}
    kept.restore_float32()
    assert all(torch.equal(kept.weights[name].data, value) for name, value in wanted.items())
    assert {weight.dtype for weight in kept.weights.values()} == {torch.float32}


def test_float32_weights_have_no_masters() -> None:
    pairs = named(values())
    kept = TrainedWeights(pairs, torch.float32, CPU)
    assert [p for _, p in kept.named_parameters()] == [p for _, p in pairs]
    assert kept.state_dict()["kept"] == {}


def test_residuals_of_an_old_checkpoint_are_refused_where_there_is_something_to_lose() -> None:
    kept = TrainedWeights(named(values()), torch.float16, CPU)
    old = {"kind": "Residuals", "kept": {name: weight.detach() for name, weight in kept.weights.items()}}
    with pytest.raises(CheckpointError, match=r"has 6 residuals, and this model 6 masters: start .* --init_from CHECK"):
        kept.load_state_dict(old)
    TrainedWeights(named(values()), torch.float32, CPU).load_state_dict({"kind": "Residuals", "kept": {}})


def test_the_predicted_share_of_lost_updates_is_what_happens() -> None:
    weight = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 0.02
    for dtype, lr in [(torch.bfloat16, 1e-4), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)]:
        stored = weight.to(dtype)
        happened = ((stored.float() - lr).to(dtype) == stored).float().mean().item()  # updates of the other sign
        assert share_of_lost_updates([stored], lr) == pytest.approx(happened, abs=0.02)
        assert 0.05 < happened < 0.999
    assert share_of_lost_updates([], 1e-5) == 0.0
