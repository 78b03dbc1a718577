"""The FP16 modes on a real tiny model: they train as float32 does, skip what overflows, and resume bit for bit."""

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.optim import SGD

from rawloop.errors import CheckpointError, UserError
from rawloop.families.loading import enable_activation_checkpointing
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.masters import TrainedWeights
from rawloop.precision.policy import PrecisionPolicy

CPU = torch.device("cpu")
FP16 = ["amp_fp16", "native_fp16"]
OVERFLOW = 1e38  # times the loss: infinite in every mode


@pytest.mark.parametrize("divisor", [1.0, 16384.0])
@pytest.mark.parametrize("mode", FP16)
def test_fp16_trains_as_fp32_does(mode: str, divisor: float, training: Any) -> None:
    reference, half = training("fp32", divisor=divisor), training(mode, divisor=divisor)
    start = reference.loss()
    for _ in range(40):
        assert reference.step().applied
        assert half.step().applied
    assert reference.loss() < start - 0.5
    assert half.loss() == pytest.approx(reference.loss(), abs=0.005)


def test_masters_keep_updates_that_fp16_would_lose(training: Any) -> None:
    run = training("native_fp16", lr=2e-6)
    assert {p.dtype for p in run.model.parameters()} == {torch.float16}
    assert {p.dtype for _, p in run.policy.named_parameters()} == {torch.float32}
    masters, weights = run.values(), [p.detach().clone() for p in run.model.parameters()]
    run.step()
    moved = [a != b for a, b in zip(masters.values(), run.values().values(), strict=True)]
    shown = [a != b for a, b in zip(weights, run.model.parameters(), strict=True)]
    share = [sum(int(t.sum()) for t in ts) / sum(t.numel() for t in ts) for ts in (moved, shown)]
    assert share[0] > 0.9
    assert share[1] < 0.7 * share[0]  # the rest is in the masters, not lost
    for name, master in run.policy.named_parameters():
        assert torch.equal(master.half(), run.model.get_parameter(name))


@pytest.mark.parametrize("mode", FP16)
def test_overflow_is_skipped_and_lowers_the_scale_to_its_floor(mode: str, training: Any) -> None:
    run = training(mode, loss_scale=LossScaleConfig(init=2.0**20, floor=2.0**18))
    before = run.values()
    for _ in range(4):
        assert not run.step(1e30).applied
    assert all(torch.equal(value, before[name]) for name, value in run.values().items())
    assert scale_of(run.policy) == 2.0**18
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("mode", FP16)
def test_the_scale_grows_after_good_steps_to_its_ceiling(mode: str, training: Any) -> None:
    run = training(mode, loss_scale=LossScaleConfig(init=2.0**4, ceiling=2.0**6, growth_interval=2))
    scales = []
    for _ in range(7):
        assert run.step().applied
        scales.append(scale_of(run.policy))
    assert scales == [2.0**4, 2.0**5, 2.0**5, 2.0**6, 2.0**6, 2.0**6, 2.0**6]


def scale_of(policy: PrecisionPolicy) -> float:
    state = policy.state_dict()["scaler"]
    return float(state["scale"])


@pytest.mark.parametrize("mode", ["fp32", "bf16", *FP16])
def test_resume_across_an_overflow_is_bit_identical(mode: str, training: Any) -> None:
    settings: dict[str, Any] = {"loss_scale": LossScaleConfig(growth_interval=3)} if mode in FP16 else {}
    straight = training(mode, **settings)
    for step in range(4):
        straight.step(OVERFLOW if step == 2 else 1.0)
    resumed = training(mode, **settings)
    resumed.load(straight.save())
    for _ in range(4):
        assert straight.step() == resumed.step()
    assert straight.policy.skips_in_a_row == 0
    assert all(torch.equal(value, straight.values()[name]) for name, value in resumed.values().items())
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert straight.policy.state_dict()["scaler"] == resumed.policy.state_dict()["scaler"]


def test_masters_of_other_weights_are_refused(training: Any) -> None:
    run = training("native_fp16")
    state = run.policy.state_dict()
    state["masters"]["kept"].pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"1 differ, first lm_head\.weight"):
        run.policy.load_state_dict(state)
    state = run.policy.state_dict()
    state["masters"]["kind"] = "Residuals"
    with pytest.raises(CheckpointError, match=r"^the checkpoint has \d+ residuals, and this model \d+ masters: start"):
        run.policy.load_state_dict(state)


def test_a_users_grad_scaler_is_driven_and_stays_usable(training: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    policy = PrecisionPolicy(PrecisionConfig(mode="amp_fp16"), CPU, grad_scaler=scaler)
    model = policy.prepare(training.tiny_llama())
    optimizer = SGD(model.parameters(), lr=0.1)
    for factor in (1.0, 1e30, 1.0):
        with policy.autocast():
            loss = training.loss_of(model)
        policy.backward(loss * factor)
        assert policy.step(optimizer).applied == (factor == 1.0)
    assert scaler.get_scale() == 2.0**9
    torch.autograd.backward(
        scaler.scale(training.loss_of(model))
    )  # the scaler's own protocol goes on as if nothing had happened
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("mode", ["fp32", *FP16])
def test_several_optimizers_step_together_or_not_at_all(mode: Any, training: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    policy.prepare(model := training.tiny_llama())
    held = [p for _, p in policy.named_parameters()]
    optimizers = [SGD(held[:3], lr=0.1), SGD(held[3:], lr=0.1)]
    for factor, applied in ((1e30, False), (1.0, True)):
        before = [p.detach().clone() for p in held]
        with policy.autocast():
            loss = training.loss_of(model)
        policy.backward(loss * factor * (1.0 if mode != "fp32" else factor))
        assert policy.step(optimizers, 1.0).applied == applied
        assert [torch.equal(a, b) for a, b in zip(before, held, strict=True)].count(not applied) == len(held)


def test_an_fp16_loss_caps_the_scale(training: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16", loss_scale=LossScaleConfig(init=2.0**17)), CPU)
    model = policy.prepare(nn.Linear(4, 1))
    loss = model(torch.ones(2, 4, dtype=torch.float16)).square().mean()
    assert loss.dtype == torch.float16
    policy.backward(loss)
    assert scale_of(policy) == 2.0**15
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_contradictions_are_refused(training: Any) -> None:
    with pytest.raises(UserError, match=r"loss_scale is set and precision\.mode is 'bf16'"):
        PrecisionConfig(mode="bf16", loss_scale=LossScaleConfig(init=2.0))
    with pytest.raises(UserError, match=r"GradScaler was passed and precision\.mode is 'fp32'"):
        PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU, grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match="0 < floor <= init <= ceiling"):
        LossScaleConfig(init=1.0, floor=2.0)
    with pytest.raises(UserError, match="must be 1 or more"):
        LossScaleConfig(growth_interval=0)
    model = training.tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(UserError, match=r"input_layernorm\.weight would be trained in float32 beside FP16 weights"):
        PrecisionPolicy(PrecisionConfig(mode="native_fp16"), CPU).prepare(model)


def test_gradients_are_unscaled_in_float32(training: Any) -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    masters = TrainedWeights([("w", weight)], torch.float16, CPU)
    weight.grad = torch.full((4,), 2.0**-10, dtype=torch.float16)
    ((_, held),) = masters.named_parameters()
    seen: list[list[float]] = []

    def look() -> None:
        assert held.grad is not None
        assert weight.grad is None
        seen.append(held.grad.tolist())

    masters.update([held], 2.0**-15, look)
    assert seen == [[2.0**-25] * 4]  # zero in FP16


@pytest.mark.parametrize("trained", [True, False])
def test_weights_that_fp16_cannot_hold_are_named_and_refused(trained: bool, training: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).bfloat16()
    model.get_parameter("0.weight").data[0, 1] = 70000.0
    model.get_parameter("0.weight").requires_grad_(trained)
    with pytest.raises(UserError, match=r"'native_fp16' and 0\.weight holds numbers that are not finite in FP16"):
        PrecisionPolicy(PrecisionConfig(mode="native_fp16"), CPU).prepare(model)
    assert bool(torch.isfinite(model.get_parameter("0.weight")).all())  # refused before it was cast


@pytest.mark.parametrize("mode", FP16)
def test_hysteresis_forgives_single_overflows(mode: str, training: Any) -> None:
    run = training(mode, loss_scale=LossScaleConfig(init=2.0**10, hysteresis=2))
    scales = []
    for factor in (OVERFLOW, 1.0, OVERFLOW, OVERFLOW, OVERFLOW):
        run.step(factor)
        scales.append(scale_of(run.policy))
    assert scales == [2.0**10, 2.0**10, 2.0**10, 2.0**9, 2.0**9]


@pytest.mark.parametrize("mode", FP16)
def test_activation_checkpointing_changes_nothing(mode: str, training: Any) -> None:
    results = []
    for recompute in (False, True):
        model = training.tiny_llama()
        if recompute:
            enable_activation_checkpointing(model)
        run = training(mode, lr=1e-2, model=model.train())
        for _ in range(5):
            assert run.step().applied
        results.append(run.values())
    assert all(torch.equal(value, results[0][name]) for name, value in results[1].items())


@pytest.mark.parametrize(
    ("mode", "settings"), [("amp_fp16", {}), ("native_fp16", {}), ("native_fp16", {"trainable_dtype": "fp16"})]
)
def test_adapters_that_transformers_left_in_fp16_are_trained_as_fp32_trains_them(
    mode: str, settings: dict[str, Any], training: Any
) -> None:
    losses = {}
    for name in ("fp32", mode):
        model: Any = training.tiny_llama().half()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model)  # as model.add_adapter
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float16}
        run = training(name, lr=1e-2, model=model, **(settings if name != "fp32" else {}))
        assert {p.dtype for _, p in run.policy.named_parameters()} == {torch.float32}
        start = run.loss()
        for _ in range(20):
            assert run.step().applied
        losses[name] = run.loss()
    assert losses["fp32"] < start - 0.05
    assert losses[mode] == pytest.approx(losses["fp32"], abs=0.005)


@pytest.mark.parametrize("mode", FP16)
def test_only_good_steps_in_a_row_let_the_scale_grow(mode: str, training: Any) -> None:
    run = training(mode, loss_scale=LossScaleConfig(init=2.0**10, growth_interval=3))
    scales = []
    for factor in (1.0, 1.0, OVERFLOW, 1.0, 1.0, 1.0):
        run.step(factor)
        scales.append(scale_of(run.policy))
    assert scales == [2.0**10, 2.0**10, 2.0**9, 2.0**9, 2.0**9, 2.0**10]


@pytest.mark.parametrize("mode", FP16)
def test_counts_of_bad_steps_are_resumed(mode: str, training: Any) -> None:
    settings = {"loss_scale": LossScaleConfig(init=2.0**10, hysteresis=2), "max_nonfinite_losses": 7}
    run, other = training(mode, **settings), training(mode, **settings)
    run.step()
    run.step(OVERFLOW)
    state = run.policy.state_dict()
    assert (state["scaler"]["bad_steps"], state["skips_in_a_row"], state["bad_losses_in_a_row"]) == (1, 1, 1)
    other.load(run.save())
    assert other.policy.state_dict()["bad_losses_in_a_row"] == 1
    other.step(OVERFLOW)
    assert scale_of(other.policy) == 2.0**9


def test_the_torch_scaler_always_has_the_policys_scale(training: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_factor=4.0, backoff_factor=0.25, growth_interval=2)
    run = training("amp_fp16", scaler=scaler, loss_scale=LossScaleConfig(floor=2.0**7))
    scales = []
    for factor in (1.0, 1.0, 1.0, OVERFLOW, OVERFLOW, OVERFLOW):
        run.step(factor)
        assert scaler.get_scale() == scale_of(run.policy)
        scales.append(scale_of(run.policy))
    assert scales == [2.0**8, 2.0**10, 2.0**10, 2.0**8, 2.0**7, 2.0**7]
    run = training("amp_fp16", loss_scale=LossScaleConfig(init=2.0**9))
    run.backward()
    assert run.policy.scaler.torch_scaler.get_scale() == 2.0**9  # torch's own default is 2^16


@pytest.mark.parametrize("mode", FP16)
def test_the_scale_stays_within_a_window_whatever_the_loss_is_of(mode: str) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode, loss_scale=LossScaleConfig(init=2.0**17)), CPU)  # type: ignore[arg-type]
    model = policy.prepare(nn.Linear(2, 1, bias=False))
    x = torch.ones(1, 2, dtype=next(model.parameters()).dtype)
    policy.backward(model(x).float().sum() * 1e-6)
    policy.backward(model(x).half().sum() * 0.0)  # an FP16 loss in the middle of the window
    assert scale_of(policy) == 2.0**17
    policy.step(SGD([p for _, p in policy.named_parameters()], lr=0.1))
    policy.backward(model(x).half().sum())
    assert scale_of(policy) == 2.0**15
