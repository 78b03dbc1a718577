"""What is kept beside 16-bit weights: masters and residuals, bucket by bucket, and how much would be lost without."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rawloop.errors import CheckpointError
from rawloop.precision import masters
from rawloop.precision.masters import KINDS, Masters, Residuals, Trained, share_of_lost_updates, unit_in_last_place

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
    kept = Masters(named(values()), dtype, CPU)
    for i, value in enumerate(values()):
        assert torch.equal(kept.value(f"w{i}"), value)
        assert torch.equal(kept.weights[f"w{i}"].data, value.to(dtype))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 22), (torch.bfloat16, 16)])
def test_a_residual_doubles_the_digits(dtype: torch.dtype, bits: int) -> None:
    kept = Residuals(named(values()), dtype, CPU)
    for i, value in enumerate(values()):
        error = (kept.value(f"w{i}") - value).abs()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # FP16's subnormals have fewer digits
        assert (error <= value.abs() * 2.0**-bits + smallest / 2048).all()
        assert kept.rests[f"w{i}"].dtype == dtype


@pytest.mark.parametrize("kind", [Masters, Residuals])
def test_buckets_change_nothing(kind: type[Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for bucket in (10**9, 60):
        monkeypatch.setattr(masters, "BUCKET", bucket)
        kept = kind(named(values()[:4]), torch.float16, CPU)
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
    kept = Residuals(named(values()[:3]), torch.float16, CPU)
    held = [p for _, p in kept.named_parameters()]
    optimizer = AdamW(held, lr=1e-1, weight_decay=0.1)
    kept.weights["w1"].grad = torch.ones(50, dtype=torch.float16)
    before = {name: kept.value(name) for name in kept.weights}
    kept.update(held, 1.0, lambda: optimizer.step())
    moved = [name for name in before if not torch.equal(before[name], kept.value(name))]
    assert moved == ["w1"]
    assert list(optimizer.state) == [held[1]]


def test_residual_stand_ins_take_no_memory_between_updates() -> None:
    kept = Residuals(named(values()), torch.float16, CPU)
    for name, stand_in in kept.named_parameters():
        assert stand_in.shape == kept.weights[name].shape
        assert stand_in.dtype == torch.float32
        assert stand_in.untyped_storage().nbytes() == 4
    held = [p for _, p in kept.named_parameters()]
    optimizer = AdamW(held)
    for weight in kept.weights.values():
        weight.grad = torch.ones_like(weight)
    kept.update(held, 1.0, lambda: optimizer.step())
    assert {p.untyped_storage().nbytes() for p in held} == {4}


@pytest.mark.parametrize("kind", list(KINDS.values()))
def test_float32_comes_back_whole(kind: type[Trained]) -> None:
    kept = kind(named(values()), torch.bfloat16, CPU)
    wanted = {name: kept.value(name).clone() for name in kept.weights}
    kept.restore_float32()
    assert all(torch.equal(kept.weights[name].data, value) for name, value in wanted.items())
    assert {weight.dtype for weight in kept.weights.values()} == {torch.float32}


def test_float32_weights_have_no_stand_in() -> None:
    pairs = named(values())
    for kind in KINDS.values():
        kept = kind(pairs, torch.float32, CPU)
        assert [p for _, p in kept.named_parameters()] == [p for _, p in pairs]
        assert kept.state_dict()["kept"] == {}


def test_a_state_of_another_kind_is_refused_where_there_is_something_to_lose() -> None:
    first, second = Masters(named(values()), torch.float16, CPU), Residuals(named(values()), torch.float16, CPU)
    with pytest.raises(CheckpointError, match=r"checkpoint's masters do not fit this model's residuals; set precision"):
        second.load_state_dict(first.state_dict())
    lora: list[Any] = [kind(named(values()), torch.float32, CPU) for kind in (Masters, Residuals)]
    lora[1].load_state_dict(lora[0].state_dict())


@pytest.mark.parametrize("dtype", HALVES)
def test_units_in_the_last_place_are_the_distances_between_numbers(dtype: torch.dtype) -> None:
    bits = torch.arange(0, 0x7B00 if dtype == torch.float16 else 0x7F00, 37, dtype=torch.int16)
    numbers, following = bits.view(dtype), (bits + 1).view(dtype)
    assert torch.equal(unit_in_last_place(numbers), following.float() - numbers.float())
    assert torch.equal(unit_in_last_place(-numbers), unit_in_last_place(numbers))


def test_the_predicted_share_of_lost_updates_is_what_happens() -> None:
    weight = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 0.02
    for dtype, lr in [(torch.bfloat16, 1e-4), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)]:
        stored = weight.to(dtype)
        happened = ((stored.float() - lr).to(dtype) == stored).float().mean().item()
        # at a power of two the number below is nearer than the one above, and at half a unit the even one is taken
        assert share_of_lost_updates([stored], lr) == pytest.approx(happened, abs=0.02)
        assert 0.05 < happened < 0.999
    assert share_of_lost_updates([], 1e-5) == 0.0
