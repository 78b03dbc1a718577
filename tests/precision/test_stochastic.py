"""bfloat16 weights whose updates are rounded stochastically, under the policy: what they learn, and what they keep."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError
from rawloop.precision import masters
from rawloop.precision.advice import rounded_updates
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from tests.precision.conftest import Training

STOCHASTIC: dict[str, Any] = {"trainable_dtype": "bf16", "masters": "stochastic"}


def weights(training: Training) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in training.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_what_float32_learns_where_rounding_to_nearest_learns_nothing() -> None:
    fallen = {}
    rows: dict[str, dict[str, Any]] = {
        "fp32": {},
        "nearest": {**STOCHASTIC, "masters": "none"},
        "stochastic": STOCHASTIC,
    }
    for name, settings in rows.items():
        training = Training("fp32" if name == "fp32" else "bf16", lr=2e-5, say=lambda line: None, **settings)
        before = training.loss()
        for _ in range(100):
            assert training.step().applied
        fallen[name] = before - training.loss()
    assert fallen["stochastic"] == pytest.approx(fallen["fp32"], rel=0.1)
    assert fallen["nearest"] < 0.5 * fallen["fp32"]


def test_the_mean_of_an_update_is_that_of_masters() -> None:
    def start() -> nn.Module:
        return Training.tiny_llama().bfloat16().float()

    exact, draws = Training("bf16", trainable_dtype="bf16", model=start()), 100
    exact.step()
    sums: dict[str, Tensor] = {}
    for seed in range(draws):
        training = Training("bf16", **STOCHASTIC, model=start())
        assert training.policy.trained.rounding is not None
        training.policy.trained.rounding.seed = seed
        training.step()
        for name, weight in weights(training).items():
            sums[name] = sums.get(name, torch.zeros(())) + weight.double()
    for name, wanted in exact.values().items():
        gap = 2.0 ** (wanted.abs().log2().floor() - 7)  # between its neighbours
        off = (sums[name] / draws - wanted) / gap
        assert float(off.abs().max()) < 0.5 * 5.5 / math.sqrt(draws)
        assert abs(float(off.mean())) < 0.5 * 5 / math.sqrt(draws * off.numel())


def test_a_weight_of_another_order_in_memory_is_updated_alike() -> None:
    """Fused AdamW takes weight, gradient and state to be in one order."""
    found, direction = [], torch.randn(16, 8)
    for transposed in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(8, 16, bias=False)
        layer.weight.data = layer.weight.data.t().contiguous().t() if transposed else layer.weight.data
        policy = PrecisionPolicy(PrecisionConfig("bf16", **STOCHASTIC), torch.device("cpu"))
        policy.prepare(layer)
        optimizer = AdamW([p for _, p in policy.named_parameters()], lr=1e-3, fused=True)
        for _ in range(3):
            policy.backward((layer.weight.float() * direction).sum())
            assert policy.step(optimizer).applied
        assert layer.weight.is_contiguous() != transposed
        found.append(layer.weight.detach())
    assert torch.equal(*found)


def test_buckets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for bucket in (2**25, 700):
        monkeypatch.setattr(masters, "BUCKET", bucket)
        training = Training("bf16", **STOCHASTIC)
        for _ in range(3):
            training.step()
        found.append(weights(training))
    assert same(*found)


def test_a_resumed_run_continues_bit_for_bit_and_a_skip_draws_nothing() -> None:
    straight = Training("bf16", **STOCHASTIC)
    for _ in range(3):
        straight.step()
    saved = straight.save()
    for _ in range(3):
        straight.step()
    resumed = Training("bf16", **STOCHASTIC)
    assert resumed.policy.trained.rounding is not None
    resumed.policy.trained.rounding.seed = 9  # that of the run's start goes on
    resumed.load(saved)
    for factor in (1.0, math.inf, 1.0, 1.0):
        assert resumed.step(factor).applied == (factor == 1.0)
    assert same(weights(resumed), weights(straight))
    assert resumed.moments()["state"].keys() == straight.moments()["state"].keys()
    assert resumed.policy.state_dict()["masters"] == {
        "kind": "StochasticRounding", "kept": {}, "seed": 0, "updates": 6,
    }  # fmt: skip
    resumed.load(saved)
    resumed.policy.trained.rounding.updates += 1  # what would happen without the count
    for _ in range(3):
        resumed.step()
    assert not same(weights(resumed), weights(straight))


def test_only_the_weights_the_gradients_and_the_state_stay_between_updates() -> None:
    training = Training("bf16", **STOCHASTIC)
    training.step()
    held = [p for _, p in training.policy.named_parameters()]
    assert {p.untyped_storage().nbytes() for p in held} == {4}
    assert all(p.grad is None for p in held)
    assert {weight.dtype for weight in training.policy.trained.weights.values()} == {torch.bfloat16}
    for state in training.optimizer.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}
    assert training.policy.remedies == [
        "12 trained weights in torch.bfloat16 are updated in float32 and rounded stochastically, so that small updates "
        "act in the mean"
    ]


def test_the_start_says_how_many_numbers_an_update_changes() -> None:
    training = Training("bf16", lr=1e-5, **STOCHASTIC)  # a warning would be an error
    said = rounded_updates(training.policy.trained, training.optimizer)
    predicted = float(said.partition("about ")[2].partition("%")[0]) / 100
    before = weights(training)
    training.step()  # Adam's first update has the size of the learning rate where there is a gradient
    moments = {name: state["exp_avg"] != 0 for name, state in training.moments()["state"].items()}
    changed = torch.cat([(now != before[n])[moments[n]].flatten() for n, now in weights(training).items()])
    assert predicted == pytest.approx(float(changed.float().mean()), abs=0.02)
    assert 0.01 < predicted < 0.5
    assert rounded_updates(Training("bf16").policy.trained, training.optimizer) == ""


def test_after_a_fallback_the_weights_are_float32_and_the_state_goes_on() -> None:
    training = Training("bf16", fallback=["fp32"], max_skips=1, **STOCHASTIC)
    training.step()
    before, state = weights(training), training.moments()["state"]
    assert training.step(math.inf).fell_back == "bf16 -> fp32"
    assert training.policy.trained.rounding is None
    assert all(torch.equal(before[name].float(), weight) for name, weight in weights(training).items())
    held = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert held == list(training.model.parameters())
    assert training.moments()["state"].keys() == state.keys()
    training.step()
    assert not same(before, {name: weight.bfloat16() for name, weight in weights(training).items()})


def test_gradients_that_the_user_clips_are_float32() -> None:
    training = Training("bf16", **STOCHASTIC)
    training.optimizer.param_groups[0]["weight_decay"] = 0.0
    training.backward()
    training.policy.unscale(training.optimizer)
    held = [p for _, p in training.policy.named_parameters()]
    assert {p.grad.dtype for p in held if p.grad is not None} == {torch.float32}
    for weight in training.model.parameters():
        assert weight.grad is not None
        weight.grad.zero_()
    before = weights(training)
    assert training.policy.step(training.optimizer).applied
    assert same(weights(training), before)
    training.backward()
    with pytest.raises(UserError, match=r"optimizer\.step\(\) was called after policy\.backward"):
        training.optimizer.step()


def test_two_optimizers_are_stepped_together_or_one_by_one() -> None:
    policy = PrecisionPolicy(PrecisionConfig("bf16", **STOCHASTIC), torch.device("cpu"))
    parts = [nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)]
    policy.prepare(nn.ModuleList(parts))
    pair = [AdamW([part.weight], lr=1e-4) for part in parts]
    for one in ([pair[0]], [pair[1]], pair):
        before = [part.weight.detach().clone() for part in parts]
        with policy.autocast():
            losses = [part(torch.ones(2, 64)).float().square().mean() for part in parts]
        policy.backward(losses[0] + losses[1])
        assert policy.step(one).applied
        moved = [not torch.equal(part.weight, old) for part, old in zip(parts, before, strict=True)]
        assert moved == [optimizer in one for optimizer in pair]


def test_a_state_of_another_rounding_is_refused() -> None:
    saved = {name: Training("bf16", say=lambda line: None, **settings).policy.state_dict() for name, settings in {
        "stochastic": STOCHASTIC, "none": {**STOCHASTIC, "masters": "none"}, "fp32": {**STOCHASTIC, "masters": "fp32"},
    }.items()}  # fmt: skip
    stochastic = Training("bf16", **STOCHASTIC).policy
    with pytest.raises(
        CheckpointError, match=r"were not rounded stochastically, and its optimizer state .* --init_from"
    ):
        stochastic.load_state_dict(copy.deepcopy(saved["none"]))
    with pytest.raises(CheckpointError, match="has 12 masters, and this model 0 masters"):
        stochastic.load_state_dict(copy.deepcopy(saved["fp32"]))
    nearest = Training("bf16", say=lambda line: None, **{**STOCHASTIC, "masters": "none"}).policy
    with pytest.raises(CheckpointError, match=r"were rounded stochastically, .*: set precision\.masters and"):
        nearest.load_state_dict(copy.deepcopy(saved["stochastic"]))
    with pytest.raises(CheckpointError, match="has 0 stochasticrounding, and this model 12 masters"):
        Training("bf16", trainable_dtype="bf16").policy.load_state_dict(copy.deepcopy(saved["stochastic"]))


def train_on_own_data(world: World, seeds: list[tuple[int, int]]) -> list[list[float]]:
    """The numbers of a weight after some steps of DDP with each rank's own data, for pairs of the ranks' seeds."""
    return [numbers_after(world, pair[world.rank]) for pair in seeds]


def numbers_after(world: World, seed: int) -> list[float]:
    policy = PrecisionPolicy(PrecisionConfig("bf16", **STOCHASTIC), world=world, seed=seed)
    torch.manual_seed(0)
    model = policy.prepare(nn.Linear(32, 32))
    ddp = DistributedDataParallel(model)
    optimizer = SGD([p for _, p in policy.named_parameters()], lr=1e-3, momentum=0.9)
    for step in range(4):
        torch.manual_seed(100 * world.rank + step)
        with policy.autocast():
            loss = ddp(torch.randn(4, 32)).float().square().mean()
        policy.backward(loss)
        assert policy.step(optimizer, 1.0).applied
    return next(model.parameters()).detach().flatten().tolist()


def test_ranks_keep_equal_weights(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(train_on_own_data, [(5, 5), (5, 6)])
    assert first[0] == second[0]
    assert first[1] != second[1]  # which is why all ranks must have one seed
