"""Two processes take the same decision in every mode: same skips, same scale, same weights to the bit."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from rawloop.contracts import Batch, StreamLoss
from rawloop.dist import World, no_sync
from rawloop.errors import TrainingError
from rawloop.losses import LossModule
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.precision.preflight import preflight
from rawloop.settings import DDPConfig

MODES: list[dict[str, Any]] = [
    {"mode": "fp32"},
    {"mode": "bf16"},
    {"mode": "bf16", "trainable_dtype": "bf16"},
    {"mode": "amp_fp16"},
    {"mode": "native_fp16"},
]
NAMES = ["-".join(settings.values()) for settings in MODES]


def loss(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
    out = model(batch.inputs["x"].to(next(model.parameters()).dtype))
    return {"s": StreamLoss(out.float().square().mean(), 1)}


class Rank:
    """One rank's model in DDP, policy and optimizer."""

    def __init__(self, world: World, settings: dict[str, Any], **more: Any) -> None:
        torch.manual_seed(0)
        self.world = world
        self.scaler = torch.amp.GradScaler("cpu") if settings["mode"] == "amp_fp16" else None
        config = PrecisionConfig(**settings, **more)
        self.policy = PrecisionPolicy(config, world.device, world=world, grad_scaler=self.scaler)
        model = self.policy.prepare(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
        self.raw = LossModule(model, loss)
        self.module = world.wrap(self.raw, DDPConfig())
        self.optimizer = AdamW([p for _, p in self.policy.named_parameters()], lr=1e-2)
        self.applied: list[bool] = []
        self.number = 0

    def backward(self, factor: float = 1.0, synced: bool = True, forward_only: bool = False, plus: float = 0.0) -> None:
        self.number += 1
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * self.number + self.world.rank))
        with no_sync(self.module, not synced), self.policy.autocast():
            total = self.module(Batch({"x": x}, {}, {"s": 1}, []))["s"].total
        if not forward_only:
            self.policy.backward(total * factor + plus)

    def step(self) -> None:
        result = self.policy.step(self.optimizer, 1.0)
        self.applied.append(result.applied)
        if result.fell_back:  # as the loop does
            self.module = nn.Identity()
            gc.collect()
            self.module = self.world.wrap(self.raw, DDPConfig())

    def outcome(self) -> tuple[list[bool], Any, dict[str, torch.Tensor], str]:
        weights = {name: self.policy.trained.value(name).clone() for name in self.policy.trained.weights}
        return self.applied, self.policy.state_dict()["scaler"], weights, self.policy.name


def infinite_on_one_rank(world: World, settings: dict[str, Any]) -> Rank:
    """A loss that is infinite, in the middle of an accumulation window or at its end, on rank 1 alone."""
    rank = Rank(world, settings)
    for step in range(6):
        bad = float("inf") if world.rank == 1 else 1.0
        rank.backward(bad if step == 1 else 1.0, synced=False)
        rank.backward(bad if step == 3 else 1.0)
        rank.step()
    return rank


def nan_with_a_gradient_of_zero(world: World, settings: dict[str, Any]) -> Rank:
    """The first micro-batch of a window is masked on rank 1 alone: its loss is NaN, all gradients are finite."""
    rank = Rank(world, settings)
    for step in range(4):
        rank.backward(synced=False, plus=float("nan") if world.rank == 1 and step == 1 else 0.0)
        rank.backward()
        rank.step()
    return rank


def tail_window(world: World, settings: dict[str, Any]) -> Rank:
    """A window with one micro-batch after windows of three, infinite on rank 0."""
    rank = Rank(world, settings)
    for size in (3, 1, 3, 1):
        for micro_step in range(1, size + 1):
            infinite = size == 1 and world.rank == 0 and not rank.applied[1:]
            rank.backward(float("inf") if infinite else 1.0, synced=micro_step == size)
        rank.step()
    return rank


def no_gradient_on_one_rank(world: World, settings: dict[str, Any]) -> Rank:
    """Rank 1 has not called backward; both raise, and go on as if nothing had been."""
    rank = Rank(world, settings)
    for step in range(3):
        if step == 1:
            rank.backward(synced=False, forward_only=world.rank == 1)
            with pytest.raises(TrainingError, match="on at least one rank, no weight of the optimizer got a gradient"):
                rank.step()
            continue
        rank.backward()
        rank.step()
    return rank


def error_on_one_rank(world: World, settings: dict[str, Any]) -> Rank:
    """Torch's scaler refuses on rank 1 alone; there is another mode to go to, for both."""
    rank = Rank(world, settings, fallback=["fp32"])
    for step in range(4):
        rank.backward()
        if step == 1 and world.rank == 1:
            assert rank.scaler is not None
            rank.scaler.unscale_(rank.optimizer)
        rank.step()
    return rank


def falls_back(world: World, settings: dict[str, Any]) -> Rank:
    """Rank 1 overflows until the mode is given up: DDP is built anew over weights of another dtype."""
    rank = Rank(world, settings, fallback=["amp_fp16" if settings["mode"] == "native_fp16" else "fp32"], max_skips=2)
    for step in range(6):
        rank.backward(float("inf") if world.rank == 1 and step in (2, 3) else 1.0)
        rank.step()
    return rank


CASES: dict[str, tuple[Callable[..., Rank], list[bool], list[str]]] = {
    "inf": (infinite_on_one_rank, [True, False, True, False, True, True], NAMES),
    "nan": (nan_with_a_gradient_of_zero, [True, False, True, True], NAMES),
    "tail": (tail_window, [True, False, True, True], NAMES),
    "no gradient": (no_gradient_on_one_rank, [True, True], NAMES),
    "error": (error_on_one_rank, [True, False, True, True], ["amp_fp16"]),
    "fallback": (falls_back, [True, True, False, False, True, True], NAMES[1:]),
}


def play_all(world: World, cases: Sequence[str]) -> dict[tuple[str, str], Any]:
    results = {}
    for case in cases:
        play, _, names = CASES[case]
        for name in names:
            results[case, name] = play(world, MODES[NAMES.index(name)]).outcome()
    return results


@pytest.mark.parametrize(
    "cases",
    [("inf", "nan"), pytest.param(("tail", "no gradient", "error", "fallback"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_two_ranks_decide_alike_in_every_mode(cases: Sequence[str], run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(play_all, cases, timeout=280)
    assert {case for case, _ in first} == {*cases}
    for (case, name), (applied, scaler, weights, mode) in first.items():
        where = f"{case}, {name}"
        assert applied == second[case, name][0] == CASES[case][1], where
        assert scaler == second[case, name][1], where
        assert mode == second[case, name][3], where
        assert all(torch.equal(value, second[case, name][2][key]) for key, value in weights.items()), where
        assert all(torch.isfinite(value).all() for value in weights.values()), where
    if "inf" in cases:
        assert first["inf", "native_fp16"][1]["scale"] == 2.0**13
        assert first["inf", "amp_fp16"][1]["scale"] == 2.0**14  # the user's scaler begins at 2^16
    else:
        assert first["fallback", "native_fp16"][3] == "amp_fp16"
        assert first["error", "amp_fp16"][3] == "fp32"


def lacking_on_one_rank(world: World) -> tuple[str, str]:
    policy = PrecisionPolicy(PrecisionConfig(mode="bf16", fallback=["fp32"]), world.device, world=world)
    model = policy.prepare(nn.Linear(2, 1))

    def score() -> torch.Tensor:
        out: torch.Tensor = model(torch.ones(2, 2))
        return (torch.special.erfcx(out) if world.rank == 1 else out).mean()

    preflight(policy, score)
    return policy.name, policy.reason


def test_what_one_ranks_device_lacks_both_leave(run_ranks: Callable[..., list[Any]]) -> None:
    (first, why), (second, own) = run_ranks(lacking_on_one_rank)
    assert first == second == "fp32"
    assert why.endswith("on another rank")
    assert "not implemented for 'BFloat16'" in own
