"""Schedules against their formulas, and parameter groups."""

import math

import pytest
import torch
from torch import nn

from rawloop.errors import UserError
from rawloop.optim import OptimConfig, build_optimizer, lr_at, set_lr


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule: str) -> None:
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=4)  # type: ignore[arg-type]
    assert [lr_at(k, 24, config) for k in range(4)] == [0.5, 1.0, 1.5, 2.0]
    halfway = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule]
    assert lr_at(14, 24, config) == pytest.approx(halfway)
    last = {"constant": 2.0, "linear": 0.1, "cosine": 1 + math.cos(math.pi * 19 / 20)}[schedule]
    assert lr_at(23, 24, config) == pytest.approx(last)
    assert lr_at(100, 24, config) == pytest.approx(2.0 if schedule == "constant" else 0.0)


def test_a_warm_up_by_ratio_has_as_many_steps_as_it_says() -> None:
    by_ratio, by_steps = OptimConfig(warmup_ratio=0.15), OptimConfig(warmup_steps=4)
    assert [lr_at(k, 24, by_ratio) for k in range(24)] == [lr_at(k, 24, by_steps) for k in range(24)]


def test_only_matrices_decay_and_only_trainables_are_held() -> None:
    net = model()
    net.get_submodule("2").requires_grad_(False)
    optimizer = build_optimizer(net.named_parameters(), OptimConfig(weight_decay=0.1))
    matrices, vectors = optimizer.param_groups
    assert [p.ndim for p in matrices["params"]] == [2]
    assert matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    assert vectors["weight_decay"] == 0.0
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_groups_keep_the_ratio_of_their_learning_rates() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    rates = (1e-2, 1e-3, 0.0)
    optimizer = torch.optim.SGD([{"params": [w], "lr": rate} for w, rate in zip(weights, rates, strict=True)])
    for lr in (0.0, 0.5):  # a rate of 0 must not lose the ratio
        set_lr(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr / 10, 0.0])


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": -1.0}, {"warmup_steps": -1}, {"max_norm": -0.5}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)  # type: ignore[arg-type]
