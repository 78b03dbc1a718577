"""Weights that change outside updates, or differ between ranks."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.dist import World
from rawloop.watch.changed import ChangedWeights
from rawloop.watch.config import WatchConfig
from rawloop.watch.differing import RankWeights
from rawloop.watch.digests import WORDS, Digests
from rawloop.watch.findings import Finding, Findings
from rawloop.watch.watch import Watch


def small(norm: bool = False) -> Any:
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int = 6,
    every: int = 1,
    meddle: dict[str, Any] | None = None,
    forward: nn.Module | None = None,
) -> Findings:
    """Train with a watch. `meddle` names what happens `before`, `within` or `after` the update of step 3."""
    meddle = meddle or {}
    config = WatchConfig(every=every)
    with Watch(model, optimizer, config=config, detectors=[ChangedWeights()]) as watch:
        for step in range(steps):
            if step == 3 and "before" in meddle:
                meddle["before"]()
            x = torch.randn(16, 6)
            with watch.step(x):
                optimizer.zero_grad()
                (forward or model)(x).float().square().mean().backward()
                if step == 3 and "within" in meddle:
                    meddle["within"]()
                if not (step == 3 and meddle.get("skip")):
                    optimizer.step()
                if "each" in meddle:
                    meddle["each"]()
                if step == 3 and "after" in meddle:
                    meddle["after"]()
    return watch.findings


def the(findings: Findings) -> Finding:
    (found,) = findings
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_digest_sees_one_bit_and_two_numbers_that_change_places(dtype: torch.dtype) -> None:
    tensors = [torch.randn(s).to(dtype) for s in [(3,), (40, 50), (7, 11), (2 * WORDS + 13,), (1,)]]
    tensors.append(torch.randn(30).to(dtype)[3:10])  # not aligned to 8 bytes
    digests = Digests()

    def of(tensors: list[torch.Tensor]) -> list[Any]:
        return [*digests.of(dict(enumerate(tensors))).values()]

    before = of(tensors)
    assert of(tensors) == before
    assert [of([tensor])[0] for tensor in tensors] == before, "a digest depends on its tensor alone"
    for place in range(len(tensors)):
        changed = [tensor.clone() for tensor in tensors]
        changed[place].reshape(-1).view(torch.uint8)[-1] ^= 1
        assert [k for k, (a, b) in enumerate(zip(before, of(changed))) if a != b] == [place]
    changed = [tensor.clone() for tensor in tensors]
    changed[3][[5, -5]] = changed[3][[-5, 5]]
    changed[1][[0, 1]] = changed[1][[1, 0]]
    assert [a == b for a, b in zip(before, of(changed))] == [True, False, True, False, True, True]


def test_a_frozen_weight_that_changes_is_named_with_the_steps_between() -> None:
    model = small()
    model[2].requires_grad_(False)

    def flip() -> None:
        model[2].weight.data.view(torch.int32)[1, 2] ^= 1 << 20

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    found = the(train(model, optimizer, 9, 2, {"within": flip}))
    assert (found.kind, found.cause.place.parameter) == ("frozen_weights_changed", "2.weight")
    assert found.since in (2, 3)
    assert found.step == 4
    assert not found.ordinary
    assert [cause.whose for cause in found.causes] == ["model", "hardware"]


def test_a_frozen_weight_that_changes_after_the_last_probe_is_seen_at_the_end() -> None:
    model = small()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = the(train(model, optimizer, 5, 50, {"within": lambda: model[2].bias.data.add_(1)}))
    assert found.cause.place.parameter == "2.bias"


@pytest.mark.parametrize("single", [False, True])
def test_a_moving_average_of_the_trained_weights_is_ordinary(single: bool) -> None:
    student = nn.Linear(6, 6) if single else small()
    model: Any = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)})

    def follow() -> None:
        with torch.no_grad():
            for slow, fast in zip(model["teacher"].parameters(), model["student"].parameters()):
                slow.lerp_(fast, 0.1)

    optimizer = torch.optim.AdamW(model["student"].parameters())
    findings = train(model, optimizer, meddle={"each": follow}, forward=model["student"])
    assert [(f.kind, f.ordinary) for f in findings] == [("frozen_weights_changed", True)]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_trained_weight_that_something_else_changes_is_named(where: str) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    found = the(train(model, optimizer, meddle={where: lambda: model[3].weight.data.mul_(0.9)}))
    assert (found.kind, found.step) == ("weights_changed_outside_optimizer", 3)
    assert found.cause.place.parameter == "3.weight"
    assert not found.ordinary


def test_a_step_without_update_must_not_change_trained_weights() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    meddle = {"within": lambda: model[3].weight.data.mul_(0.9), "skip": True}
    assert the(train(model, optimizer, meddle=meddle)).kind == "weights_changed_outside_optimizer"


def average_of(model: nn.Module) -> dict[str, Any]:
    return {name: 0.9 * weight.clone() for name, weight in model.state_dict().items()}


def test_writes_of_the_same_values_are_no_finding() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())

    def evaluate() -> None:
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(average_of(model))
        model.load_state_dict(kept)

    assert not list(train(model, optimizer, every=50, meddle={"before": evaluate}))


@pytest.mark.parametrize("where", ["before", "after"])
def test_other_values_that_stay_in_trained_weights_are_an_alarm_without_a_probe(where: str) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    meddle = {where: lambda: model.load_state_dict(average_of(model))}
    found = the(train(model, optimizer, every=50, meddle=meddle))
    assert (found.kind, found.ordinary) == ("weights_changed_outside_optimizer", False)
    assert (found.step, found.times) == (3 if where == "before" else 4, 1)
    assert found.cause.evidence == {"seen to change": 6}


@pytest.mark.parametrize("meddles", [False, True])
def test_weights_with_an_optimizer_each_are_followed_between_looks(meddles: bool) -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(10)])
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in model.parameters()]
    with Watch(model, optimizers, config=WatchConfig(every=50), detectors=[ChangedWeights()]) as watch:
        for step in range(5):
            with watch.step():
                model(torch.randn(4, 6)).square().mean().backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            if meddles and step == 3:
                model.load_state_dict(average_of(model))
    assert [(f.kind, f.step) for f in watch.findings] == [("weights_changed_outside_optimizer", 4)] * meddles


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_healthy_training_has_no_findings(fused: bool, every: int) -> None:
    model = small(norm=True)
    model[2].weight = model[2].weight  # tied to itself
    model[3].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    assert not list(train(model, optimizer, 7, every))


def test_sgd_with_biases_before_a_norm_has_no_findings() -> None:
    model = small(norm=True)
    assert not list(train(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), 7))


def train_ranks(world: World, fault: str) -> list[tuple[str, int | None, int | None, str, int | None]]:
    torch.manual_seed(world.rank if fault == "init" else 0)
    model = small(norm=True)
    torch.manual_seed(world.rank)
    wrapped = world.wrap(model) if fault not in ("init", "unwrapped") else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    detectors = [ChangedWeights(), RankWeights()]
    with Watch(wrapped, optimizer, config=WatchConfig(every=2), detectors=detectors) as watch:
        for step in range(6):
            with watch.step():
                optimizer.zero_grad()
                wrapped(torch.randn(16, 6)).square().mean().backward()
                if not (fault == "skip" and step == 3 and world.rank == 1):
                    optimizer.step()
    places = [(f, f.cause.place) for f in watch.findings]
    # after a skip the ranks count different steps
    return [(f.kind, None if fault == "skip" else f.step, f.since, p.parameter, p.rank) for f, p in places]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("", []),
        ("init", [("weights_differ_across_ranks", 0, None, "0.weight", 1)]),
        ("unwrapped", [("weights_differ_across_ranks", 1, 0, "0.weight", 1)]),
        ("skip", [("weights_differ_across_ranks", None, 2, "0.weight", 1)]),
    ],
)
def test_ranks_whose_weights_differ_are_named(run_ranks: Any, fault: str, expected: list[Any]) -> None:
    assert run_ranks(train_ranks, fault) == [expected] * 2


class Failing(Digests):
    """Fails on rank 1, at the third call."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls = rank, 0

    def of(self, tensors: Any) -> Any:
        self.calls += 1
        if self.rank == 1 and self.calls == 3:
            raise KeyError("a mistake of ours")
        return super().of(tensors)


def train_with_errors(world: World, where: str) -> tuple[int, list[tuple[str, str]]]:
    changed, ranks = ChangedWeights(), RankWeights()
    (changed if where == "changed" else ranks)._digests = Failing(world.rank)
    torch.manual_seed(0)
    model = small()
    wrapped = world.wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with Watch(wrapped, optimizer, config=WatchConfig(every=2), detectors=[changed, ranks], world=world) as watch:
        for step in range(10):
            with watch.step():
                optimizer.zero_grad()
                wrapped(torch.randn(16, 6)).square().mean().backward()
                optimizer.step()
            if where == "changed" and step == 6 and world.rank == 1:
                model[3].weight.data.mul_(0.9)
    return step, [(f.kind, f"{f.what} {f.cause.what}") for f in watch.findings]


@pytest.mark.parametrize("where", ["ranks", "changed"])
def test_a_detector_that_fails_on_one_rank_lets_no_other_wait(run_ranks: Any, where: str) -> None:
    (last, first_findings), (other_last, second_findings) = run_ranks(train_with_errors, where)
    assert last == other_last == 9
    kind, words = second_findings[0]
    assert kind == "watch_failed"
    assert "a mistake of ours" in words
    if where == "ranks":  # they stop together, and each says why
        (kind, words), *_ = first_findings
        assert (kind, len(first_findings), len(second_findings)) == ("watch_failed", 1, 1)
        assert "rank 1 failed: KeyError: 'a mistake of ours'" in words
    else:  # the other detector goes on, on both ranks
        assert [kind for kind, _ in first_findings] == ["weights_differ_across_ranks"]
        assert [kind for kind, _ in second_findings[1:]] == ["weights_differ_across_ranks"]
