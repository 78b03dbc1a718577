"""The policy in somebody else's training script: the set-up line of the scaler and three places of the loop change."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from rawloop import PrecisionConfig, PrecisionPolicy
from rawloop.errors import UserError

CPU = torch.device("cpu")
PLAIN = Path(__file__).with_name("plain_loop.py")
SET_UP = {
    '    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)\n': (
        "    policy = PrecisionPolicy(PrecisionConfig(**SETTINGS), torch.device('cpu'), **EXTRA)\n"
        "    policy.prepare(model)\n"
    ),
}
LOOP = {
    '        with torch.autocast("cpu", dtype=torch.float16):\n': "        with policy.autocast():\n",
    "        scaler.scale(loss).backward()\n": "        policy.backward(loss)\n",
    (
        "        scaler.unscale_(optimizer)\n"
        "        nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
        "        scaler.step(optimizer)\n"
        "        scaler.update()\n"
        "        optimizer.zero_grad()\n"
    ): "        policy.step(optimizer, max_norm=1.0)\n",
}


def plain() -> Any:
    spec = importlib.util.spec_from_file_location("plain_loop", PLAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def embedded(settings: dict[str, Any], **extra: Any) -> Callable[[int], float]:
    """The script's `main` with the policy in it, all else untouched."""
    text = PLAIN.read_text(encoding="utf-8")
    for old, replacement in {**SET_UP, **LOOP}.items():
        assert text.count(old) == 1
        text = text.replace(old, replacement)
    names = {
        "PrecisionPolicy": PrecisionPolicy,
        "PrecisionConfig": PrecisionConfig,
        "SETTINGS": settings,
        "EXTRA": extra,
    }
    space: dict[str, Any] = {"__name__": "embedded", **names}
    exec(compile(text, "embedded", "exec"), space)
    main: Callable[[int], float] = space["main"]
    return main


def test_the_script_is_as_plain_as_it_says() -> None:
    text = PLAIN.read_text(encoding="utf-8")
    assert 55 <= len(text.splitlines()) <= 65
    assert "rawloop" not in text.partition('"""\n\n')[2]
    assert len(LOOP) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "fp32"},
        {"mode": "bf16"},
        {"mode": "amp_fp16"},
        {"mode": "native_fp16"},
        {"mode": "bf16", "trainable_dtype": "bf16"},
        {"mode": "auto"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_every_mode_learns_in_it_what_the_plain_script_learns(settings: dict[str, Any]) -> None:
    reference = plain().main(120)
    assert reference < 1.5  # of ln 29 = 3.37
    assert embedded(settings)(120) == pytest.approx(reference, abs=0.01)


def test_a_grad_scaler_of_ones_own_is_driven() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=50)
    embedded({"mode": "amp_fp16"}, grad_scaler=scaler)(120)
    assert scaler.get_scale() == 2.0**10
    assert scaler.state_dict()["_growth_tracker"] == 20  # as if torch had counted


LIGHT = (
    "buffers",
    "ddp",
    "dist",
    "errors",
    "facts",
    "launcher",
    "layers",
    "meeting",
    "rounding",
    "seed",
    "settings",
    "sharding",
    "waiting",
)


def test_it_brings_nothing_else_of_rawloop_along(tmp_path: Path) -> None:
    code = (
        "import json, sys; from rawloop import PrecisionConfig, PrecisionPolicy; "
        "print(json.dumps([name for name in sys.modules if name.startswith(('rawloop.', 'transformers'))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    others = [name for name in json.loads(done.stdout) if not name.startswith("rawloop.precision")]
    assert set(others) <= {f"rawloop.{name}" for name in LIGHT}


def model_and_policy(mode: Any, **settings: Any) -> tuple[nn.Module, PrecisionPolicy]:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode, **settings), CPU)
    return policy.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))), policy


def loss_of(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(torch.ones(2, 4, dtype=next(model.parameters()).dtype)).float().square().mean()
    return out


@pytest.mark.parametrize("mode", ["fp32", "amp_fp16", "native_fp16"])
def test_an_optimizer_built_on_replaced_weights_is_refused_with_both_counts(mode: Any) -> None:
    model, _ = model_and_policy(mode)
    optimizer = AdamW(model.parameters())
    layer = model.get_submodule("1")
    layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone())
    other = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    other.prepare(model)
    with other.autocast():
        other.backward(loss_of(model))
    message = (
        r"holds 4 weights, 1 of which \(first of shape \(1, 4\)\) are not among the 4 that the prepared model trains"
    )
    with pytest.raises(UserError, match=message):
        other.step(optimizer)


def test_an_optimizer_built_before_prepare_works_where_the_weights_are_the_same() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16"), CPU)
    model = nn.Linear(4, 1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    policy.prepare(model)
    policy.backward(loss_of(model))
    assert policy.step(optimizer).applied
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [p.dtype for p in held] == [torch.float32] * 2
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_a_state_that_torch_has_cast_to_16_bits_is_refused() -> None:
    model, policy = model_and_policy("native_fp16")
    optimizer = AdamW([p for _, p in policy.named_parameters()])
    policy.backward(loss_of(model))
    policy.step(optimizer)
    late, early = AdamW(model.parameters()), AdamW(model.parameters())
    late.load_state_dict(optimizer.state_dict())
    policy.backward(loss_of(model))
    with pytest.raises(UserError, match=r"state is in 16 bits.*Call policy\.adopt\(optimizer\) before optimizer\.load"):
        policy.step(late)
    with pytest.raises(UserError, match="state is in 16 bits"):  # and at every try, with nothing lost
        policy.step(late)
    assert len(late.state) == 4
    policy.adopt(early)
    early.load_state_dict(optimizer.state_dict())
    policy.backward(loss_of(model))
    assert policy.step(early).applied


def test_weights_cast_after_prepare_are_found() -> None:
    model, policy = model_and_policy("amp_fp16")
    model.half()
    with policy.autocast():
        policy.backward(loss_of(model))
    with pytest.raises(UserError, match=r"^0\.weight was cast after policy\.prepare\(model\)"):
        policy.step(AdamW(model.parameters()))


@pytest.mark.parametrize("mode", ["amp_fp16", "native_fp16"])
def test_gradients_of_a_backward_pass_that_nobody_scaled_are_refused(mode: Any) -> None:
    model, policy = model_and_policy(mode)
    with policy.autocast():
        loss = loss_of(model)
    torch.autograd.backward(loss)
    with pytest.raises(UserError, match=r"do not come from policy\.backward\(loss\), so their scale is unknown"):
        policy.step(AdamW(model.parameters()))


def test_verbs_before_prepare_and_a_second_prepare_are_refused() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="auto"), CPU)
    with pytest.raises(UserError, match=r"has no model yet: call policy\.prepare\(model\) first"):
        policy.autocast()
    with pytest.raises(UserError, match=r"has no model yet"):
        policy.step(AdamW(nn.Linear(2, 2).parameters()))
    policy.prepare(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"prepare was called twice: put several models into one torch\.nn\.ModuleList"):
        policy.prepare(nn.Linear(2, 2))


def test_a_disabled_scaler_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    policy = PrecisionPolicy(PrecisionConfig(mode="amp_fp16"), CPU, grad_scaler=scaler)
    with pytest.raises(UserError, match="is disabled and would scale nothing"):
        policy.prepare(nn.Linear(2, 2))


def test_bf16_trainables_without_masters_are_warned_of_with_a_share() -> None:
    said: list[str] = []
    config = PrecisionConfig(mode="bf16", trainable_dtype="bf16", masters="none")
    for lr, share in ((1e-5, "9"), (1e-3, "0%")):
        policy = PrecisionPolicy(config, CPU, say=said.append)
        torch.manual_seed(0)
        policy.prepare(model := nn.Linear(64, 64, bias=False))
        with policy.autocast():
            policy.backward(model(torch.ones(2, 64)).square().mean())
        policy.step(AdamW(model.parameters(), lr=lr))
        assert f"at a learning rate of {lr:g} about {share}" in said[-1]
    assert len(said) == 2
    policy = PrecisionPolicy(config, CPU)
    policy.prepare(model)
    with policy.autocast():
        policy.backward(model(torch.ones(2, 64)).square().mean())
    with pytest.warns(UserWarning, match="bfloat16 weights are trained without masters"):
        policy.step(AdamW(model.parameters(), lr=1e-5))


@pytest.mark.parametrize("mode", ["fp32", "amp_fp16", "native_fp16"])
def test_a_state_loaded_after_prepare_is_what_is_trained(mode: Any) -> None:
    model, policy = model_and_policy(mode)
    masters = {name: held.detach().clone() for name, held in policy.named_parameters()}
    state = model.state_dict()
    state["0.weight"] = torch.full_like(state["0.weight"], 0.25)
    model.load_state_dict(state)
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    with policy.autocast():
        policy.backward(loss_of(model) * 1e-3)
    assert policy.step(optimizer).applied
    assert torch.equal(model.get_parameter("0.weight"), state["0.weight"])
    held = dict(policy.named_parameters())
    assert torch.equal(held["1.weight"], masters["1.weight"])  # the digits of what nobody wrote are still there


def test_a_state_loaded_in_the_middle_of_training_is_what_is_trained_on() -> None:
    model, policy = model_and_policy("native_fp16")
    optimizer = AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        policy.backward(loss_of(model) * 1e-3)
        assert policy.step(optimizer).applied

    step()
    best = {name: value.clone() for name, value in model.state_dict().items()}
    values = {name: policy.trained.value(name).clone() for name in policy.trained.weights}
    model.load_state_dict(best)  # what is there already: no digit is lost
    policy.backward(loss_of(model))
    policy.adopt(optimizer)
    assert all(torch.equal(policy.trained.value(name), value) for name, value in values.items())
    policy.zero_grad(optimizer)
    best["0.weight"] = torch.full_like(best["0.weight"], 0.25)
    model.load_state_dict(best)
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    step()
    assert torch.equal(model.get_parameter("0.weight"), best["0.weight"])
    assert torch.equal(policy.trained.value("0.weight").half(), best["0.weight"])
    assert torch.equal(policy.trained.value("1.weight"), values["1.weight"])


def test_masters_are_no_views_of_what_was_there_before() -> None:
    model = nn.Linear(4, 1)
    mine = model.weight.detach()
    before = mine.clone()
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16", trainable_dtype="fp16"), CPU)
    policy.prepare(model)
    policy.backward(loss_of(model))
    policy.step(AdamW(model.parameters(), lr=0.1))
    assert torch.equal(mine, before)


def test_frozen_weights_in_the_optimizer_do_no_harm() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model.get_submodule("0").requires_grad_(False)
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    policy.prepare(model)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    before = [p.clone() for p in model.parameters()]
    policy.backward(loss_of(model))
    assert policy.step(optimizer).applied
    assert [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    model.get_submodule("0").requires_grad_(True)
    policy.backward(loss_of(model))
    with pytest.raises(UserError, match=r"^2 weights of the optimizer \(first of shape \(4, 4\)\) were unfrozen after"):
        policy.step(optimizer)


class Wrapping(SGD):
    """An optimizer that steps another one with groups of its own, as ZeroRedundancyOptimizer does."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__(weights, lr=0.1)
        self.optim = SGD(weights, lr=0.1)

    def step(self, closure: Any = None) -> Any:
        return self.optim.step(closure)


def test_optimizers_that_do_not_fit_are_refused() -> None:
    model, policy = model_and_policy("native_fp16")
    policy.backward(loss_of(model))
    with pytest.raises(UserError, match=r"^Wrapping holds its parameters in another optimizer \(\.optim\)"):
        policy.step(Wrapping(list(model.parameters())))
    model, policy = model_and_policy("fp32")
    before = model.get_parameter("0.weight").clone()
    policy.backward(loss_of(model))
    assert policy.step(Wrapping(list(model.parameters()))).applied
    assert not torch.equal(model.get_parameter("0.weight"), before)
    policy.backward(loss_of(model))
    with pytest.raises(UserError, match=r"^LBFGS runs the forward pass itself, in a closure"):
        policy.step(torch.optim.LBFGS(model.parameters()))


def test_a_mistake_on_another_rank_is_raised_here_too(world_where: Any) -> None:
    model = nn.Linear(4, 1)
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), world=world_where(lambda flags: [*flags[:-1], True]))
    policy.prepare(model)
    policy.backward(loss_of(model))
    before = model.weight.clone()
    with pytest.raises(UserError, match="another rank's step was refused"):
        policy.step(SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


@pytest.mark.parametrize("init", [0.25, 2.0**30])
def test_a_scaler_beyond_the_bounds_is_refused(init: float) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=init)
    policy = PrecisionPolicy(PrecisionConfig(mode="amp_fp16"), CPU, grad_scaler=scaler)
    with pytest.raises(UserError, match=r"^the GradScaler's scale is .*, outside precision\.loss_scale\.floor \(1\)"):
        policy.prepare(nn.Linear(2, 2))


@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16"])
def test_generation_runs_under_the_policy(mode: Any, training: Any) -> None:
    run = training(mode)
    run.step()
    with run.policy.autocast():
        words = run.model.generate(torch.arange(4)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert words.shape == (1, 8)


def test_running_means_of_the_model_are_float32_where_everything_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU).prepare(model)
    assert model.get_buffer("1.running_mean").dtype == torch.float32
    assert model.get_buffer("1.num_batches_tracked").dtype == torch.int64
    model(torch.ones(3, 4)).sum().backward()


@pytest.mark.parametrize("mode", ["fp32", "amp_fp16", "native_fp16"])
def test_a_window_can_be_dropped(mode: Any) -> None:
    norms = []
    for dropped in (False, True):
        torch.manual_seed(0)
        model, policy = model_and_policy(mode)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        if dropped:
            with policy.autocast():
                policy.backward(loss_of(model) * math.inf)
            policy.zero_grad(optimizer)
        with policy.autocast():
            policy.backward(loss_of(model))
        norms.append(policy.step(optimizer))
    assert norms[0] == norms[1]
    assert norms[0].applied


@pytest.mark.parametrize("mode", ["amp_fp16", "native_fp16"])
def test_a_window_that_was_given_up_scales_nothing_afterwards(mode: Any) -> None:
    model, policy = model_and_policy(mode)
    with policy.autocast():
        policy.backward(loss_of(model))
    optimizer = AdamW(model.parameters())
    policy.zero_grad(optimizer)
    with policy.autocast():
        loss = loss_of(model)
    torch.autograd.backward(loss)
    with pytest.raises(UserError, match=r"do not come from policy\.backward"):
        policy.step(optimizer)
