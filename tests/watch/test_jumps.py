"""Jumps and drifts: what left its history first, what recovers, and what does not."""

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.watch.findings import Findings
from rawloop.watch.jumps import Jumps
from rawloop.watch.subject import StepRecord, Subject

Numbers = Callable[[int], float]


USUAL: dict[str, Numbers] = {
    "lr": lambda step: 0.1,
    "grad_norm": lambda step: 1 + noise() / 10,
    "scale": lambda step: 1.0,
    "seconds": lambda step: 0.1,
    "data_seconds": lambda step: 0.001,
}


def follow(
    steps: int, loss: Numbers, *, optimizers: int = 1, batch: Callable[[int], Any] = lambda step: None, **more: Numbers
) -> Findings:
    """The findings about numbers that are functions of the step."""
    model = nn.Linear(2, 2)
    several = [torch.optim.SGD(model.parameters(), 0.1) for _ in range(optimizers)]
    subject = Subject(model, several, None, model.named_parameters)
    jumps, findings, numbers = Jumps(), Findings(), USUAL | more
    for step in range(steps):
        for optimizer in several:
            optimizer.param_groups[0]["lr"] = numbers["lr"](step)
        record = StepRecord(step, batch(step), (f"s{2 * step}", f"s{2 * step + 1}"), loss=loss(step), applied=True)
        for name in ("grad_norm", "scale", "seconds", "data_seconds"):
            setattr(record, name, numbers[name](step))
        findings.extend(jumps.gradients(subject, record))
        findings.extend(jumps.end(subject, record))
    findings.extend(jumps.finish(subject))
    return findings


def noise() -> float:
    return random.gauss(0, 1)


def kinds(findings: Iterable[Any]) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.ordinary) for finding in findings]


def falling(step: int) -> float:
    return 2 + 3 * math.exp(-step / 30) + 0.05 * noise()


def test_the_learning_rate_jumps_first() -> None:
    findings = follow(
        140,
        lambda step: falling(step) + 4 * (step >= 102),
        lr=lambda step: 1.0 if step >= 100 else 0.01,
        grad_norm=lambda step: (30 if step >= 101 else 1) + noise() / 10,
    )
    (found,) = findings
    assert (found.kind, found.ordinary, found.since) == ("loss_jumped", False, 100)
    assert [cause.whose for cause in found.causes] == ["optimizer", "data"]
    assert found.cause.evidence == {"before": 0.01, "after": 1.0, "at step": 100}


def test_a_spike_that_recovers_is_ordinary_and_names_its_samples() -> None:
    (found,) = follow(140, lambda step: falling(step) + 5 * (step in (80, 81)))
    assert (found.kind, found.ordinary, found.since) == ("loss_spiked", True, 80)
    assert found.cause.place.sample == "s160, s161"
    assert found.step <= 83


def test_a_bad_batch_that_the_loss_never_recovers_from() -> None:
    findings = follow(
        120,
        lambda step: falling(step) + 3 * (step >= 60),
        grad_norm=lambda step: 500 if step == 60 else 1 + noise() / 10,
    )
    (found,) = findings
    assert (found.kind, found.since, found.step) == ("loss_jumped", 60, 70)
    assert "batch of step 60" in found.cause.what


def test_a_spike_after_which_the_loss_is_higher_than_before_is_an_alarm_and_a_warm_up_its_first_cause() -> None:
    losses: Numbers = lambda step: falling(step) + 5 * (step == 60) + 0.15 * max(step - 62, 0)  # noqa: E731
    found = follow(120, losses, lr=lambda step: 0.001 * (step + 1)).alarms[0]
    assert (found.kind, found.since) == ("loss_jumped", 60)
    assert [cause.whose for cause in found.causes] == ["optimizer", "data"]
    assert found.cause.evidence == {"before": 0.041, "after": 0.06, "at step": 60}


def test_losses_that_work_against_each_other_may_swing() -> None:
    swing: Numbers = lambda step: 1.6 + 0.01 * step + 0.005 * noise() + 0.3 * (step >= 60)  # noqa: E731
    assert "loss_jumped" in {one.kind for one in follow(120, swing).alarms}
    assert follow(120, swing, optimizers=2).alarms == []


def test_a_jump_shortly_before_the_end() -> None:
    losses: Numbers = lambda step: falling(step) + 3 * (step >= 60)  # noqa: E731
    assert kinds(follow(66, losses)) == [("loss_jumped", False)]
    assert kinds(follow(63, losses)) == []


def test_a_fallen_scale_before_a_jump() -> None:
    findings = follow(
        120, lambda step: falling(step) + 3 * (step >= 60), scale=lambda step: 2.0**16 if step < 58 else 1.0
    )
    (found,) = findings
    assert (found.cause.whose, found.since) == ("precision", 58)


def test_a_loss_that_is_not_finite_after_a_jump() -> None:
    (found,) = follow(
        60, lambda step: falling(step) if step < 50 else math.nan, lr=lambda step: 10.0 if step >= 48 else 0.1
    )
    assert (found.kind, found.cause.whose, found.step) == ("loss_jumped", "optimizer", 50)


def test_a_loss_and_a_norm_that_are_not_finite_are_no_jump() -> None:
    """The origin tracer tells them."""
    assert not follow(60, lambda s: math.nan if s >= 50 else falling(s), grad_norm=lambda s: math.nan if s >= 50 else 1)


def test_a_slow_divergence() -> None:
    losses: Numbers = lambda step: falling(step) + max(0, step - 200) * 0.01  # noqa: E731
    (found,) = follow(400, losses)
    assert (found.kind, found.ordinary) == ("loss_diverges", False)
    assert found.since is not None
    assert 150 <= found.since <= 225
    assert kinds(follow(400, losses, optimizers=2)) == [("loss_diverges", True)]


def test_a_divergence_from_the_start() -> None:
    (found,) = follow(100, lambda step: 2 * 1.03**step)
    assert (found.kind, found.since, found.cause.whose) == ("loss_diverges", 0, "optimizer")


def test_durations() -> None:
    (found,) = follow(260, falling, seconds=lambda step: 0.1 + 0.001 * step)
    assert (found.kind, found.ordinary, found.since) == ("steps_slower", False, 0)
    longer = follow(260, falling, seconds=lambda step: 0.1 + 0.001 * step, batch=lambda step: torch.zeros(step + 1))
    assert kinds(longer) == []
    assert kinds(follow(120, falling, data_seconds=lambda step: 0.3)) == [("data_slow", True)]
    assert kinds(follow(120, falling, seconds=lambda step: 1.0 if step > 60 else 0.1)) == [("steps_slower", True)]


HEALTHY: dict[str, dict[str, Numbers]] = {
    "falls fast": {"loss": lambda step: 100 * 0.8**step + 1 + 0.1 * noise()},
    "heavy tails": {"loss": lambda step: 2 + 0.3 * abs(noise()) ** 2},
    "alternating sources": {"loss": lambda step: (3 if step % 5 else 6) + 0.2 * noise()},
    "negative": {"loss": lambda step: -step / 10 + noise()},
    "zero": {"loss": lambda step: max(0.0, 1 - step / 10)},
    "warm-up": {"loss": falling, "lr": lambda step: min(1, (step + 1) / 100)},
    "restarts": {"loss": falling, "lr": lambda step: 0.01 + math.cos(math.pi * (step % 100) / 200)},
    "scale": {"loss": falling, "scale": lambda step: 2.0 ** (16 - step) if step < 6 else 2.0**10 * (1 + (step > 150))},
    "noisy norm": {"loss": falling, "grad_norm": lambda step: math.exp(noise())},
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("seeds", range(5))
def test_healthy_numbers_raise_no_alarm(name: str, seeds: int) -> None:
    random.seed(seeds)
    numbers = HEALTHY[name]
    loss, more = numbers["loss"], {key: number for key, number in numbers.items() if key != "loss"}
    findings = follow(300, loss, **more)  # type: ignore[arg-type]
    assert findings.alarms == []
