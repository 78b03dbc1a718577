"""Schedules against their formulas, groups, and optimizer state by name."""

import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from rawloop.errors import CheckpointError, UserError
from rawloop.optim import NamedOptimizerState, OptimConfig, build_optimizer, lr_at, set_lr
from rawloop.precision import PrecisionConfig, PrecisionPolicy


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def step(net: nn.Module, optimizer: AdamW) -> None:
    net(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule: str) -> None:
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=4)  # type: ignore[arg-type]
    assert [lr_at(k, 24, config) for k in range(4)] == [0.5, 1.0, 1.5, 2.0]
    halfway = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule]
    assert lr_at(14, 24, config) == pytest.approx(halfway)
    last = {"constant": 2.0, "linear": 0.1, "cosine": 1 + math.cos(math.pi * 19 / 20)}[schedule]
    assert lr_at(23, 24, config) == pytest.approx(last)
    assert lr_at(100, 24, config) == pytest.approx(2.0 if schedule == "constant" else 0.0)


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


def test_state_by_name_continues_bit_for_bit() -> None:
    straight = model()
    optimizer = build_optimizer(straight.named_parameters(), OptimConfig(lr=0.01))
    for _ in range(3):
        step(straight, optimizer)
    resumed = model()
    resumed.load_state_dict(straight.state_dict())
    other = build_optimizer(resumed.named_parameters(), OptimConfig(lr=0.01))
    saved = NamedOptimizerState(optimizer, straight.named_parameters).state_dict()
    NamedOptimizerState(other, resumed.named_parameters).load_state_dict(saved)
    assert set(saved) == {name for name, _ in straight.named_parameters()}
    for net, optim in ((straight, optimizer), (resumed, other)):
        step(net, optim)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_state_that_does_not_fit_is_refused_by_name() -> None:
    net = model()
    optimizer = build_optimizer(net.named_parameters(), OptimConfig())
    step(net, optimizer)
    part = NamedOptimizerState(optimizer, net.named_parameters)
    state = part.state_dict()
    lost = dict(state)
    del lost["2.weight"]
    with pytest.raises(CheckpointError, match=r"1 weights have none \['2.weight'\]"):
        part.load_state_dict(lost)
    with pytest.raises(CheckpointError, match=r"1 are not in the model.*\['other'\]"):
        part.load_state_dict({**state, "other": state["0.weight"]})
    state["0.weight"] = {**state["0.weight"], "exp_avg": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"0.weight has shape \(3, 3\), the weight has \(8, 4\)"):
        part.load_state_dict(state)


def test_an_optimizer_of_another_model_and_a_used_up_generator_are_refused() -> None:
    net, other = model(), model()
    optimizer = AdamW([*net.parameters(), nn.Parameter(torch.ones(1), requires_grad=False)])
    NamedOptimizerState(optimizer, net.named_parameters).state_dict()
    with pytest.raises(UserError, match="6 of the 6 parameters that the optimizer trains are not among those"):
        NamedOptimizerState(optimizer, other.named_parameters).state_dict()
    with pytest.raises(UserError, match=r"without parentheses: it got AdamW and generator"):
        NamedOptimizerState(optimizer, net.named_parameters())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="it got Sequential and method"):
        NamedOptimizerState(net, net.named_parameters)  # type: ignore[arg-type]


def test_an_optimizer_of_masters_is_told_what_to_hand_in() -> None:
    net = model()
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16"), torch.device("cpu"))
    policy.prepare(net)
    optimizer = AdamW(net.parameters())
    policy.adopt(optimizer)
    advice = r"under a PrecisionPolicy hand in policy.named_parameters, and call policy.adopt\(optimizer\) before"
    with pytest.raises(UserError, match=advice):
        NamedOptimizerState(optimizer, net.named_parameters).state_dict()
    assert list(NamedOptimizerState(optimizer, policy.named_parameters).state_dict()) == [
        name for name, _ in net.named_parameters()
    ]


def test_state_keeps_its_dtype() -> None:
    net = nn.Linear(4, 2).half()
    optimizer = AdamW(net.parameters())
    part = NamedOptimizerState(optimizer, net.named_parameters)
    tiny = {"step": torch.tensor(1.0), "exp_avg": torch.full((2, 4), 1e-9), "exp_avg_sq": torch.full((2, 4), 1e-9)}
    part.load_state_dict({"weight": tiny, "bias": {"step": torch.tensor(1.0)}})
    assert part.state_dict()["weight"]["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(part.state_dict()["weight"]["exp_avg_sq"], tiny["exp_avg_sq"])


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": -1.0}, {"warmup_steps": -1}, {"max_norm": -0.5}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)  # type: ignore[arg-type]
