"""What optimizers hold under a precision policy: masters have the names of the model's weights."""

from typing import Any

import pytest
import torch

from rawloop.watch.changed import ChangedWeights
from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.held import held_by_optimizers
from rawloop.watch.optimizer import OptimizerState
from rawloop.watch.rates import LearningRates
from rawloop.watch.updates import Updates
from rawloop.watch.watch import Watch
from rawloop.watch.weights import UnsoundWeights
from tests.precision.conftest import Training


def watched(training: Training, steps: int = 7, damage: Any = None, at: int = 3) -> tuple[list[Finding], Watch]:
    rates = LearningRates()
    detectors = [UnsoundWeights(), ChangedWeights(), rates, Updates(rates), OptimizerState()]
    policy, config = training.policy, WatchConfig(every=2)
    watch = Watch(training.model, training.optimizer, named=policy.named_parameters, config=config, detectors=detectors)
    with watch:
        for step in range(steps):
            if damage and step == at:
                damage()
            with watch.step():
                training.step()
    return list(watch.findings), watch


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("bf16", {"trainable_dtype": "bf16"}),
        ("bf16", {"trainable_dtype": "bf16", "masters": "stochastic"}),
        ("amp_fp16", {}),
        ("native_fp16", {"trainable_dtype": "fp16"}),
    ],
)
def test_training_under_a_policy_has_no_findings(mode: str, settings: dict[str, Any]) -> None:
    training = Training(mode, lr=1e-5, **settings)
    found, watch = watched(training)
    assert found == []
    held = held_by_optimizers(watch.subject)
    assert [one.name for one in held] == [name for name, _ in training.model.named_parameters()]
    assert all(one.parameter.dtype is torch.float32 for one in held)
    assert all((one.weight is one.parameter) == (one.weight.dtype is torch.float32) for one in held)
    stands_in = settings.get("masters") == "stochastic"
    assert all((one.numbers is one.weight) == (stands_in or one.parameter is one.weight) for one in held)


def test_updates_of_stand_ins_are_measured() -> None:
    settings: Any = {"trainable_dtype": "bf16", "masters": "stochastic"}
    found, _ = watched(Training("bf16", lr=1.0, **settings))
    assert "update_too_large" in {f.kind for f in found}
    found, _ = watched(Training("bf16", lr=1e-12, **settings))  # float32 loses these before they are rounded
    assert {f.kind for f in found} == {"updates_lost"}
    training = Training("bf16", lr=1e-5, **settings)
    weight = training.policy.trained.weights["lm_head.weight"]
    found, _ = watched(training, damage=lambda: weight.data.mul_(1.5))
    assert [(f.kind, f.step) for f in found] == [("weights_changed_outside_optimizer", 3)]
    training = Training("bf16", lr=1e-3, **settings)
    same = dict(training.model.named_parameters())

    def write_the_same() -> None:
        for weight in same.values():
            weight.detach().copy_(weight.detach().clone())  # as after an evaluation of averaged weights

    assert watched(training, damage=write_the_same, at=4)[0] == []


def test_a_master_that_something_else_changes_is_named() -> None:
    training = Training("bf16", trainable_dtype="bf16")
    master = training.policy.trained.masters["lm_head.weight"]
    found, _ = watched(training, damage=lambda: master.data.mul_(1.5))
    assert [f.kind for f in found] == ["weights_changed_outside_optimizer"]
    assert found[0].step == 3
    assert found[0].cause.place.parameter == "lm_head.weight"
