"""Learning rates against their own history."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR, StepLR

from rawloop.watch.findings import Finding
from rawloop.watch.rates import LearningRates
from rawloop.watch.watch import Watch

LR = 1e-3


def train(schedule: Callable[[int, Any], None], steps: int = 30, groups: int = 1) -> list[Finding]:
    """Train with a watch; `schedule` sets the learning rate before each step."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(groups)]
    model = nn.ParameterList(parameters)
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=LR)
    with Watch(model, optimizer, detectors=[LearningRates()]) as watch:
        for step in range(steps):
            schedule(step, optimizer.param_groups)
            with watch.step():
                torch.autograd.backward([p.sum() for p in parameters])
                optimizer.step()
    return list(watch.findings)


def setting(**at: float) -> Callable[[int, Any], None]:
    """A schedule that sets the last group's rate to `value` from `step` on, for each `s<step>=value`."""

    def schedule(step: int, groups: Any) -> None:
        groups[-1]["lr"] = at.get(f"s{step}", groups[-1]["lr"])

    return schedule


@pytest.mark.parametrize(
    ("schedule", "steps", "kind", "step", "since"),
    [
        (setting(s20=LR * 100), 30, "lr_jump", 20, None),
        (setting(s20=float("nan")), 30, "lr_impossible", 20, None),
        (setting(s3=-LR), 6, "lr_impossible", 3, None),
        (setting(s10=0.0), 40, "lr_zero", 29, 10),
        (setting(s0=0.0), 40, "lr_zero", 19, 0),
    ],
)
def test_a_fault_is_named(schedule: Any, steps: int, kind: str, step: int, since: int | None) -> None:
    (found,) = [finding for finding in train(schedule, steps, groups=2) if finding.kind != "not_finite"]
    assert (found.kind, found.step, found.since) == (kind, step, since)
    assert found.cause.place.optimizer == "SGD group 1"
    assert found.cause.whose == "optimizer"


@pytest.mark.parametrize("steps", [1, 2, 4, 30])
@pytest.mark.parametrize(
    "build",
    [
        lambda o: LambdaLR(o, lambda step: step / 10 if step < 10 else 1.0),
        lambda o: LambdaLR(o, lambda step: max(1e-6, min(1.0, step / 2))),
        lambda o: CosineAnnealingLR(o, 30),
        lambda o: CosineAnnealingWarmRestarts(o, 5),
        lambda o: OneCycleLR(o, 1.0, total_steps=31),
        lambda o: StepLR(o, 7, 0.01),
    ],
)
def test_schedules_are_healthy(build: Callable[[Any], Any], steps: int) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=LR)
    scheduler = build(optimizer)
    with Watch(nn.ParameterList([parameter]), optimizer, detectors=[LearningRates()]) as watch:
        for _ in range(steps):
            with watch.step():
                torch.autograd.backward(parameter.sum())
                optimizer.step()
                scheduler.step()
    assert not list(watch.findings)


def test_a_learning_rate_that_is_no_number_is_named_before_the_first_step() -> None:
    found = train(setting(), 0)
    assert found == []
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=LR)
    optimizer.param_groups[0]["lr"] = torch.tensor(float("inf"))
    with Watch(nn.ParameterList([parameter]), optimizer, detectors=[LearningRates()]) as watch:
        pass
    assert [f.kind for f in watch.findings] == ["lr_impossible"]
