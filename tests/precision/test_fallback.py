"""Leaving a mode that does not work: each trigger, what is in a known state afterwards, and what stops."""

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from rawloop.errors import InterruptedUpdate, TrainingError, UserError
from rawloop.optim_state import NamedOptimizerState
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy

CPU = torch.device("cpu")
INF, NAN = math.inf, math.nan


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return set(first) == set(second) and all(same(first[key], second[key]) for key in first)
    return bool(torch.equal(first, second)) if isinstance(first, torch.Tensor) else bool(first == second)


CHAINS = [
    ("amp_fp16", ["bf16", "fp32"], {}),
    ("native_fp16", ["fp32"], {}),
    ("native_fp16", ["amp_fp16"], {}),
    ("bf16", ["fp32"], {"trainable_dtype": "bf16"}),
    ("amp_fp16", ["native_fp16"], {}),
]


@pytest.mark.parametrize(("mode", "fallback", "settings"), CHAINS)
def test_the_skip_limit_leaves_the_mode_and_loses_nothing(
    mode: str, fallback: list[str], settings: Any, training: Any
) -> None:
    run = training(mode, fallback, max_skips=3, **settings)
    for _ in range(3):
        assert run.step().applied
    values, moments, rate = run.values(), run.moments(), run.schedule.get_last_lr()
    results = [run.step(INF) for _ in range(3)]
    assert [result.applied for result in results] == [False] * 3
    assert [result.fell_back for result in results] == [None, None, f"{mode} -> {fallback[0]}"]
    assert run.policy.name == fallback[0]
    assert run.policy.reason == f"fell back from {mode}: 3 steps in a row had gradients that are not finite (norm nan)"
    assert same(values, run.values())  # masters are all there, in whatever form the next mode keeps them
    assert same(moments, run.moments())
    assert run.schedule.get_last_lr() == rate
    assert run.policy.skips_in_a_row == 0
    held = {id(p) for _, p in run.policy.named_parameters()}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == held
    assert {id(p) for p in run.optimizer.state} == held
    assert run.step().applied
    assert run.schedule.get_last_lr() < rate


def test_a_context_that_a_loop_keeps_follows_the_fallback(training: Any) -> None:
    run = training("amp_fp16", ["bf16", "fp32"], max_skips=1)
    kept = run.policy.autocast()
    found = []
    for _ in range(3):
        with kept, kept:
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert not torch.is_autocast_enabled("cpu")
        found.append(product.dtype)
        run.step(INF) if len(found) < 3 else None
    assert found == [torch.float16, torch.bfloat16, torch.float32]


def test_what_comes_after_a_fallback_is_what_the_next_mode_would_have_done(training: Any) -> None:
    run = training("native_fp16", ["fp32"], max_skips=1)
    for _ in range(3):
        run.step()
    values, moments = run.values(), run.moments()
    run.step(INF)
    other = training("fp32", [])
    with torch.no_grad():
        for name, weight in other.model.named_parameters():
            weight.copy_(values[name])
    NamedOptimizerState(other.optimizer, other.policy.named_parameters).load_state_dict(moments)
    for training in (run, other):
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-3
        for _ in range(3):
            training.backward()
            assert training.policy.step(training.optimizer, 1.0).applied
    assert same(run.values(), other.values())
    assert same(run.moments(), other.moments())


def test_losses_that_are_not_finite_leave_the_mode_before_the_skip_limit(training: Any) -> None:
    run = training("native_fp16", ["fp32"], max_skips=25, max_nonfinite_losses=2)
    assert run.step(INF).fell_back is None  # the gradient alone: a smaller loss scale may mend it
    with run.policy.autocast():
        for expected in (None, "native_fp16 -> fp32"):
            run.policy.backward(training.loss_of(run.model) * NAN)
            assert run.policy.step(run.optimizer).fell_back == expected
    assert "2 losses in a row were not finite" in run.policy.reason


def test_only_losses_in_a_row_count(training: Any) -> None:
    run = training("native_fp16", ["fp32"], max_skips=25, max_nonfinite_losses=2)
    for factor in (NAN, INF, NAN, 1.0, NAN, INF, INF, INF):  # INF: the gradient alone is infinite
        assert run.step(factor).fell_back is None
    assert run.step(NAN).fell_back is None
    assert run.step(NAN).fell_back == "native_fp16 -> fp32"


def test_running_means_in_bfloat16_become_float32(training: Any) -> None:
    run = training("bf16", ["fp32"], trainable_dtype="bf16", masters="none", max_skips=1, say=lambda sentence: None)
    run.step()
    assert {state["exp_avg"].dtype for state in run.optimizer.state.values()} == {torch.bfloat16}
    run.step(INF)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in run.optimizer.state.values()} == {torch.float32}
    assert run.step().applied


def test_without_another_mode_only_the_skip_limit_ends_the_run(training: Any) -> None:
    run = training("native_fp16", [], max_skips=4, max_nonfinite_losses=2)
    for _ in range(3):
        run.policy.backward(training.loss_of(run.model) * NAN)
        assert not run.policy.step(run.optimizer).applied
    run.policy.backward(training.loss_of(run.model) * NAN)
    with pytest.raises(
        TrainingError, match=r"^4 steps in a row .* in precision\.mode native_fp16, and no mode is left"
    ):
        run.policy.step(run.optimizer)


def test_nothing_is_retried_for_ever(training: Any) -> None:
    run = training("amp_fp16", ["bf16", "fp32"], max_skips=2)
    assert [run.step(INF).fell_back for _ in range(5)] == [None, "amp_fp16 -> bf16", None, "bf16 -> fp32", None]
    with pytest.raises(TrainingError, match=r"in precision\.mode amp_fp16 -> bf16 -> fp32, and no mode is left"):
        run.step(INF)
    why = {"reason": "2 steps in a row had gradients that are not finite (norm nan)", "entered": True}
    assert run.policy.chain.history == [
        {"from": "amp_fp16", "to": "bf16", **why},
        {"from": "bf16", "to": "fp32", **why},
    ]


def test_an_error_of_unscaling_leaves_the_mode_and_the_scaler_clean(training: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = training("amp_fp16", ["fp32"], scaler=scaler)
    assert run.step().applied
    values, moments = run.values(), run.moments()
    run.backward()
    scaler.unscale_(run.optimizer)  # an old habit: the gradients are unscaled once already
    result = run.policy.step(run.optimizer, 1.0)
    assert result.fell_back == "amp_fp16 -> fp32"
    assert result.skipped_because == (
        "unscaling failed: RuntimeError: unscale_() has already been called on this optimizer since the last update()."
    )
    assert same(values, run.values())
    assert same(moments, run.moments())
    assert all(p.grad is None for p in run.model.parameters())
    assert run.step().applied
    # the scaler can be used again, in its own protocol
    torch.autograd.backward(scaler.scale(training.loss_of(run.model)))
    scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10


def test_an_error_of_unscaling_without_another_mode_ends_the_run(training: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    run = training("amp_fp16", [], scaler=scaler)
    run.backward()
    scaler.unscale_(run.optimizer)
    with pytest.raises(TrainingError, match=r"unscaling failed: RuntimeError: unscale_\(\) has already been called"):
        run.policy.step(run.optimizer)


class Failing(SGD):
    """An optimizer that fails after it has moved the first weight."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        first = self.param_groups[0]["params"][0]
        first.data.add_(1.0)
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("mode", ["fp32", "amp_fp16", "native_fp16"])
def test_a_failure_inside_the_update_is_fatal(mode: Any, training: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode, fallback=None if mode == "fp32" else ["fp32"]), CPU)
    model = policy.prepare(training.tiny_llama())
    with policy.autocast():
        policy.backward(training.loss_of(model))
    message = r"failed in the middle of an update \(OutOfMemoryError: out of memory\): weights .* must not be used"
    with pytest.raises(InterruptedUpdate, match=message):
        policy.step(Failing([p for _, p in policy.named_parameters()], lr=0.1))
    assert policy.name == mode


@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16"])
def test_a_skip_leaves_nothing_behind_on_any_optimizer(mode: Any, training: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    model = policy.prepare(training.tiny_llama())
    held = [p for _, p in policy.named_parameters()]
    optimizers: list[Optimizer] = [AdamW(held[:3], lr=0.1, fused=True), AdamW(held[3:], lr=0.1)]
    for optimizer in optimizers:  # as a failed step under torch's scaler leaves them
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(1.0)  # type: ignore[attr-defined]
    with policy.autocast():
        policy.backward(training.loss_of(model) * NAN)
    assert not policy.step(optimizers).applied
    assert all(p.grad is None for p in [*held, *model.parameters()])
    assert all(not {"grad_scale", "found_inf"} & set(vars(optimizer)) for optimizer in optimizers)
    before = [p.detach().clone() for p in held]
    with policy.autocast():
        policy.backward(training.loss_of(model))
    assert policy.step(optimizers).applied
    assert not any(torch.equal(a, b) for a, b in zip(before, held, strict=True))  # a stale found_inf would stop them


@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16"])
def test_a_window_without_any_gradient_is_an_error_that_no_mode_mends(mode: Any, training: Any) -> None:
    run = training(mode, [] if mode == "fp32" else ["fp32"])
    run.step()
    values = run.values()
    with pytest.raises(TrainingError, match="no weight of the optimizer got a gradient"):
        run.policy.step(run.optimizer)
    assert run.policy.name == mode
    assert same(values, run.values())
    assert run.step().applied  # whoever catches it finds everything in order


@pytest.mark.parametrize(("mode", "fallback", "settings"), CHAINS)
def test_resume_across_a_fallback_is_bit_identical(
    mode: str, fallback: list[str], settings: Any, training: Any
) -> None:
    settings = {"max_skips": 2, "loss_scale": LossScaleConfig(growth_interval=2), **settings}
    if mode == "bf16":
        settings.pop("loss_scale")
    straight = training(mode, fallback, **settings)
    plan = [1.0, 1.0, INF, INF, 1.0, INF, 1.0]
    for factor in plan:
        straight.step(factor)
    assert straight.policy.name == fallback[0]
    saved = straight.save()
    resumed = training(mode, fallback, resume=saved[2], **settings)
    assert resumed.policy.name == fallback[0]
    resumed.load(saved)
    for factor in (1.0, 1.0, INF, 1.0):
        assert repr(straight.step(factor)) == repr(resumed.step(factor))  # nan is equal to nothing, not even itself
    assert same(straight.values(), resumed.values())
    assert same(straight.moments(), resumed.moments())
    assert same(straight.policy.state_dict(), resumed.policy.state_dict())


def test_a_resumed_run_knows_which_modes_are_left(training: Any) -> None:
    run = training("amp_fp16", ["bf16", "fp32"], max_skips=1)
    run.step(INF)
    resumed = training("amp_fp16", ["bf16", "fp32"], resume=run.policy.state_dict(), max_skips=1)
    assert (resumed.policy.name, resumed.policy.chain.remaining) == ("bf16", ["fp32"])
    fresh = training("amp_fp16", ["bf16", "fp32"])
    with pytest.raises(UserError, match=r"trained with precision\.mode 'bf16', this run has 'amp_fp16'"):
        fresh.policy.load_state_dict(run.policy.state_dict())
    own_choice = training("bf16", ["fp32"], resume=run.policy.state_dict())  # the user has followed it in the config
    own_choice.policy.load_state_dict(run.policy.state_dict())
    assert own_choice.policy.chain.remaining == ["fp32"]
    assert own_choice.policy.state_dict()["history"] == run.policy.state_dict()["history"]


def test_optimizers_of_other_steps_hold_the_new_mode_s_weights_too(training: Any) -> None:
    run = training("native_fp16", ["fp32"], max_skips=1)
    held = [p for _, p in run.policy.named_parameters()]
    first, second = SGD(held[:3], lr=0.1), SGD(held[3:], lr=0.1)
    run.backward()
    assert run.policy.step([first, second]).applied
    run.backward(INF)
    assert run.policy.step(first).fell_back
    before = run.values()
    run.backward()
    assert run.policy.step([first, second]).applied
    assert not any(torch.equal(value, before[name]) for name, value in run.values().items())


def test_a_mode_that_cannot_train_the_weights_is_passed_over(training: Any) -> None:
    model = training.tiny_llama()
    for name, weight in model.named_parameters():
        weight.requires_grad_("norm" in name)
    run = training("amp_fp16", ["native_fp16", "fp32"], model=model, max_skips=1)
    run.step()
    assert run.step(INF).fell_back == "amp_fp16 -> fp32"
    assert [step["from"] for step in run.policy.chain.history] == ["amp_fp16", "native_fp16"]
    assert run.step().applied
    assert training("native_fp16", ["fp32"], model=model).policy.name == "fp32"


def test_a_config_that_follows_the_fallback_rounds_frozen_weights_as_it_did(training: Any) -> None:
    def model() -> Any:
        net = training.tiny_llama()
        for name, weight in net.named_parameters():
            weight.requires_grad_("q_proj" in name)
        return net

    left = {"from": "native_fp16", "to": "fp32", "reason": "x", "entered": True}
    state = {"mode": "fp32", "reason": "x", "history": [left]}
    frozen = {}
    for mode, fallback, resume in (("native_fp16", ["fp32"], state), ("fp32", [], state), ("fp32", [], None)):
        run = training(mode, fallback, model=model(), resume=resume)
        frozen[mode, resume is None] = run.model.get_parameter("lm_head.weight").clone()
    assert torch.equal(frozen["native_fp16", False], frozen["fp32", False])
    assert not torch.equal(frozen["fp32", False], frozen["fp32", True])
    passed_over = {"mode": "fp32", "reason": "x", "history": [{**left, "entered": False}]}
    run = training("native_fp16", ["fp32"], model=model(), resume=passed_over)
    assert torch.equal(run.model.get_parameter("lm_head.weight"), frozen["fp32", True])


def test_frozen_norms_rounded_beside_bfloat16_weights_are_rounded_again(training: Any) -> None:
    def model() -> Any:
        net = training.tiny_llama()
        for name, weight in net.named_parameters():
            torch.nn.init.normal_(weight)
            weight.requires_grad_("input_layernorm" in name or "mlp" in name)
        return net

    settings = {"trainable_dtype": "bf16", "max_skips": 1}
    run = training("bf16", ["fp32"], model=model(), **settings)
    run.step()
    assert run.step(INF).fell_back == "bf16 -> fp32"
    frozen = run.model.get_parameter("model.norm.weight")
    assert torch.equal(frozen, frozen.bfloat16().float())
    resumed = training("bf16", ["fp32"], model=model(), resume=run.save()[2], **settings)
    assert torch.equal(resumed.model.get_parameter("model.norm.weight"), frozen)


def test_losses_of_a_window_and_of_a_left_mode_are_not_counted_again(training: Any) -> None:
    run = training("amp_fp16", ["bf16", "fp32"], max_nonfinite_losses=2)
    for _ in range(2):
        result = run.step(NAN)
    assert result.fell_back == "amp_fp16 -> bf16"
    assert run.step(NAN).fell_back is None  # the first in this mode
    assert run.step(INF).fell_back is None  # a loss that is finite again, a gradient that is not
    assert run.step(NAN).fell_back is None
    assert run.policy.name == "bf16"


def test_a_loss_that_is_not_finite_counts_whatever_its_gradients_are(training: Any) -> None:
    run = training("amp_fp16", ["fp32"], max_nonfinite_losses=2)
    for expected in (None, "amp_fp16 -> fp32"):
        with run.policy.autocast():
            loss = training.loss_of(run.model) + torch.tensor(NAN)  # not finite itself; its gradient is
        run.policy.backward(loss)
        assert run.policy.step(run.optimizer).fell_back == expected


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (
            lambda run: run.backward(NAN),
            r"losses that are not finite \(loss nan\).*The model's weights are finite, its",
        ),
        (
            lambda run: run.backward(INF),
            r"gradients that are not finite \(norm nan\).*weights and losses are finite, the",
        ),
    ],
)
def test_giving_up_says_what_was_found(spoil: Any, found: str, training: Any) -> None:
    run = training("fp32", [], max_skips=1)
    spoil(run)
    with pytest.raises(TrainingError, match=f"^1 steps in a row had {found}") as caught:
        run.policy.step(run.optimizer)
    assert "learning rate" not in str(caught.value)


def test_giving_up_with_spoilt_weights_names_them_and_no_learning_rate(training: Any) -> None:
    run = training("fp32", [], max_skips=1)
    name, weight = list(run.model.named_parameters())[3]
    with torch.no_grad():
        weight[0] = NAN
    run.backward()
    with pytest.raises(
        TrainingError, match=rf"1 of the model's .* not finite, first {name}.*earlier checkpoint"
    ) as caught:
        run.policy.step(run.optimizer)
    assert "learning rate" not in str(caught.value)


def test_the_modes_that_were_left_come_with_the_state(training: Any) -> None:
    run = training("amp_fp16", ["bf16"], max_skips=1)
    run.step(INF)
    other = training("bf16", [])
    other.policy.load_state_dict(run.policy.state_dict())
    assert other.policy.state_dict()["history"] == run.policy.state_dict()["history"]
