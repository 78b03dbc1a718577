"""Updates that rounding loses, moments that cannot act, and updates of an absurd size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.rates import LearningRates
from rawloop.watch.updates import Updates
from rawloop.watch.watch import Watch


class Words(nn.Module):
    """An embedding, of which most rows are never seen, two layers and a head that shares the embedding."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, width)
        nn.init.normal_(self.embed.weight, std=0.05)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.gate = nn.Parameter(torch.zeros(width, width))  # starts at zero

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.layers(x) + x @ self.gate
        logits: torch.Tensor = x[:, :-1] @ self.embed(torch.arange(20)).T
        return logits


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 6,
    every: int = 2,
    schedule: Callable[[int], float] | None = None,
    loss_scale: float = 1.0,
    autocast: bool = False,
) -> list[Finding]:
    """Train on few words with a watch."""
    known = LearningRates()
    rates = [group["lr"] for group in optimizer.param_groups]
    with Watch(model, optimizer, config=WatchConfig(every=every), detectors=[known, Updates(known)]) as watch:
        for step in range(steps):
            ids = torch.randint(0, 20, (8, 12))
            for group, lr in zip(optimizer.param_groups, rates):
                group["lr"] = lr * (schedule(step) if schedule else 1.0)
            with watch.step(ids):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(ids)
                loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
                torch.autograd.backward(loss * loss_scale)
                optimizer.step()
    return list(watch.findings)


def kinds(findings: list[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-5, amsgrad=True),
        lambda p: torch.optim.AdamW(p, torch.tensor(1e-4), fused=True),
        lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-5),
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),
        lambda p: torch.optim.Adafactor(p, 1e-2),
        lambda p: torch.optim.RMSprop(p, 1e-3),
        lambda p: torch.optim.NAdam(p, 1e-3),
        lambda p: torch.optim.RAdam(p, 1e-3),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_healthy_optimizers_have_no_findings(build: Callable[[Any], torch.optim.Optimizer], autocast: bool) -> None:
    model = Words()
    assert train(model, build(model.parameters()), 7, autocast=autocast) == []


@pytest.mark.parametrize("every", [1, 2, 100])
def test_warm_up_from_zero_and_cosine_to_zero_have_no_findings(every: int) -> None:
    model = Words().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95))
    assert train(model, optimizer, 5, every, lambda step: step / 1e5) == []
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    assert train(model, optimizer, 8, every, lambda step: 10.0 ** (-2 * step)) == []


def test_lora_over_a_bfloat16_base_has_no_findings() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Words().bfloat16(), LoraConfig(r=4, target_modules=["layers.0", "layers.3"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    assert train(model, optimizer, autocast=True) == []


def test_weights_that_are_not_finite_have_no_size_of_updates() -> None:
    model = Words()
    nn.init.constant_(model.gate, torch.nan)
    assert kinds(train(model, torch.optim.AdamW(model.parameters(), 1e-3))) == {"not_finite"}


def test_updates_that_bfloat16_loses_are_named_and_masters_keep_them() -> None:
    model = Words().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, betas=(0.9, 0.95))
    (found,) = train(model, optimizer)
    assert (found.kind, found.cause.whose, found.step) == ("updates_lost", "precision", 0)
    assert found.cause.place.optimizer == "AdamW group 0"
    assert found.cause.place.parameter
    share = float(found.cause.evidence["share"])
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad and p.count_nonzero()])
    assert share > 0.5
    assert weights.dtype is torch.bfloat16


def test_the_share_of_lost_updates_is_what_happens() -> None:
    model = nn.Linear(100, 100, bias=False).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    before = model.weight.detach().clone()
    rates = LearningRates()
    with Watch(model, optimizer, detectors=[rates, Updates(rates)]) as watch, watch.step():
        model(torch.randn(8, 100).bfloat16()).float().square().mean().backward()
        optimizer.step()
    happened = (model.weight.detach() == before).float().mean().item()
    (found,) = watch.findings
    assert found.cause.evidence["share"] == pytest.approx(happened, abs=0.02)


def test_second_moments_that_cannot_shrink_are_named() -> None:
    model = Words().bfloat16()
    found = train(model, torch.optim.AdamW(model.parameters(), 1e-2))
    assert kinds(found) == {"second_moment_cannot_move"}
    assert found[0].cause.evidence["state dtype"] == "bfloat16"


def test_second_moments_that_float16_rounds_to_zero_are_named() -> None:
    model = Words().half()
    found = train(model, torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-4), 1)
    assert "second_moment_zero" in kinds(found)
    assert all(f.cause.whose == "precision" for f in found if f.kind == "second_moment_zero")


@pytest.mark.parametrize(
    ("build", "scale", "kind"),
    [
        (lambda p: torch.optim.AdamW(p, 1e-3), 1e-9, "eps_dominates"),
        (lambda p: torch.optim.AdamW(p, 1e-3, eps=0.5), 1.0, "eps_dominates"),
        (lambda p: torch.optim.AdamW(p, 1.0), 1.0, "update_too_large"),
        (lambda p: torch.optim.AdamW(p, 1e3), 1.0, "update_too_large"),
        (lambda p: torch.optim.SGD(p, 1e4), 1.0, "update_too_large"),
        (lambda p: torch.optim.AdamW(p, 1e-11), 1.0, "updates_lost"),
        (lambda p: torch.optim.SGD(p, 1e-9), 1.0, "updates_lost"),
    ],
)
def test_a_fault_is_named(build: Callable[[Any], torch.optim.Optimizer], scale: float, kind: str) -> None:
    model = Words()
    found = [f for f in train(model, build(model.parameters()), loss_scale=scale) if f.kind == kind]
    assert found
    assert found[0].cause.whose == "optimizer"
    assert found[0].cause.place.optimizer.endswith("group 0")
    assert found[0].cause.place.parameter


@pytest.mark.parametrize("build", [torch.optim.Adam, torch.optim.AdamW])
def test_an_absurd_learning_rate_is_named_at_the_first_update(build: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 1))
    optimizer = build(model.parameters(), lr=1000.0)
    with Watch(model, optimizer) as watch, watch.step(x := torch.randn(8, 4)):
        model(x).square().mean().backward()
        optimizer.step()
    first, second = watch.findings.alarms
    assert (first.kind, first.step, second.kind) == ("update_too_large", 0, "update_too_large")
    assert f"the learning rate 1000 of {build.__name__} group 0 is too high" in first.text()
    assert float(first.cause.evidence["update / weight"]) > 100


def test_second_moments_below_eps_of_half_the_weights_or_at_the_first_update_are_healthy() -> None:
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-5)
    known = LearningRates()
    with Watch(model, optimizer, config=WatchConfig(every=1), detectors=[known, Updates(known)]) as watch:
        for step in range(4):
            with watch.step():
                optimizer.zero_grad()
                small = 1e-9 if step == 0 else torch.where(torch.arange(64) < 40, 1e-9, 1.0)
                (model(torch.randn(8, 64)) * small).sum().backward()
                optimizer.step()
    assert list(watch.findings) == []
