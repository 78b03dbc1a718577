"""Options that cannot act, and optimizer state that is in 16 bits, was cast, or counts wrongly."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.optimizer import OptimizerState
from rawloop.watch.watch import Watch


def small(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)


def updates(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 3) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(number):
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.randn(16, 12, dtype=dtype)).float().square().mean())
        optimizer.step()


def watched(
    model: nn.Module, optimizer: Any, steps: int = 6, each: Callable[[], Any] | None = None, every: int = 2
) -> list[Finding]:
    with Watch(model, optimizer, config=WatchConfig(every=every), detectors=[OptimizerState()]) as watch:
        for _ in range(steps):
            with watch.step():
                if each:
                    each()
                updates(model, optimizer, 1)
    return list(watch.findings)


def alarms(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings if not finding.ordinary]


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.AdamW(p, 1e-3),
    lambda p: torch.optim.AdamW(p, 1e-3, fused=True, amsgrad=True),
    lambda p: torch.optim.Adam(p, 1e-2, (0.0, 0.9), weight_decay=0.1),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),
    lambda p: torch.optim.Adafactor(p, 1e-2),
    lambda p: torch.optim.RMSprop(p, 1e-3),
    lambda p: torch.optim.Adagrad(p, 1e-2),
    lambda p: torch.optim.Adamax(p, 1e-3),
    lambda p: torch.optim.LBFGS(p, 1e-3),
]


@pytest.mark.parametrize("build", OPTIMIZERS[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healthy_optimizers_have_no_alarms(build: Callable[[Any], Any], dtype: torch.dtype) -> None:
    model = small(dtype)
    found = watched(model, build(model.parameters()))
    assert alarms(found) == []
    assert dtype is torch.bfloat16 or found == []


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_a_state_that_was_loaded_has_no_findings(build: Callable[[Any], Any]) -> None:
    model = small()
    optimizer = build(model.parameters())
    if not isinstance(optimizer, torch.optim.LBFGS):
        updates(model, optimizer)
    resumed = build(model.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert watched(model, resumed, 0 if isinstance(resumed, torch.optim.LBFGS) else 6) == []


def test_groups_without_state_and_parts_without_gradient_have_no_findings() -> None:
    model = nn.ModuleDict({"used": small(), "unused": small(), "frozen": small().requires_grad_(False)})
    groups: list[dict[str, Any]] = [{"params": model["used"].parameters(), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW([*groups, {"params": model["unused"].parameters()}])
    optimizer.add_param_group({"params": model["frozen"].parameters()})
    used: Any = model["used"]
    model.forward = used.forward
    assert watched(model, optimizer) == []


@pytest.mark.parametrize(
    ("dtype", "options", "kind", "whose"),
    [
        (torch.float16, {}, "eps_rounds_to_zero", "precision"),
        (torch.float32, {"eps": 0.0}, "eps_rounds_to_zero", "optimizer"),
        (torch.float32, {"betas": (0.999, 0.9)}, "betas_wrong", "optimizer"),
    ],
)
def test_options_that_cannot_act_are_named_before_the_first_step(
    dtype: torch.dtype, options: dict[str, Any], kind: str, whose: str
) -> None:
    model = small(dtype)
    (found,) = watched(model, torch.optim.AdamW(model.parameters(), **options), 0)
    assert (found.kind, found.step, found.cause.whose) == (kind, 0, whose)
    assert found.cause.place.optimizer == "AdamW group 0"


def test_a_beta_of_one_is_named() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    assert alarms(watched(model, optimizer, 0)) == ["betas_wrong"]


def test_an_optimizer_with_float32_state_for_float16_weights_is_judged_by_its_state() -> None:
    class Wide(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("exp_avg", torch.zeros_like(p, dtype=torch.float32)).add_(p.grad.float())

    model = small(torch.float16)
    assert watched(model, Wide(model.parameters())) == []


def test_float16_moments_are_an_alarm_and_bfloat16_ones_ordinary() -> None:
    model = small(torch.float16)
    found = watched(model, torch.optim.AdamW(model.parameters(), eps=1e-4), 2)
    assert alarms(found) == ["optimizer_state_16bit"]
    model = small(torch.bfloat16)
    found = watched(model, torch.optim.AdamW(model.parameters()), 2)
    assert [(f.kind, f.ordinary) for f in found] == [("optimizer_state_16bit", True)]


@pytest.mark.parametrize("through", ["weights", "file"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_that_was_cast_is_named(dtype: torch.dtype, through: str) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    updates(model, optimizer)
    resumed = torch.optim.AdamW(model.parameters())
    kept = copy.deepcopy(optimizer.state_dict())
    if through == "weights":  # the state is loaded while the weights are in 16 bits, and these become float32 again
        model.to(dtype)
        resumed.load_state_dict(kept)
        model.float()
    else:
        for state in kept["state"].values():
            state.update({name: state[name].to(dtype) for name in ("exp_avg", "exp_avg_sq")})
        resumed.load_state_dict(kept)
    found = watched(model, resumed, 0)
    (cast,) = [f for f in found if f.kind == "optimizer_state_cast"]
    assert cast.cause.place.parameter == "0.weight"
    assert str(dtype).removeprefix("torch.") in cast.what


def test_a_state_that_is_cleared_in_every_step_is_named() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    (found,) = watched(model, optimizer, 8, optimizer.state.clear)
    assert found.kind == "optimizer_state_lost"
    assert found.cause.evidence["updates seen"] == 5
