"""The precision policy on a real tiny model: dtypes, skipping, clipping, refusals."""

from typing import Any, Literal, get_args

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.errors import TrainingError, UserError
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.gradients import global_norm
from rawloop.precision.policy import PrecisionPolicy

CPU = torch.device("cpu")


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config).to(dtype)
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % 64
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_trainables_are_fp32_whatever_was_stored(mode: Literal["fp32", "bf16"], stored: torch.dtype) -> None:
    model = tiny_llama(stored)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name and parameter.ndim == 2)
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    policy.prepare(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == ({torch.float32} if mode == "fp32" else {stored, torch.bfloat16})
    embedding = model.get_parameter("model.embed_tokens.weight").dtype  # autocast casts linear layers, and so do we
    assert embedding == (torch.float32 if mode == "fp32" else stored)


@pytest.mark.parametrize("trained", ["embed_tokens.weight", "layers.0.input_layernorm.weight"])
def test_weights_that_shape_the_hidden_states_are_of_one_dtype(trained: str) -> None:
    model = tiny_llama(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    PrecisionPolicy(PrecisionConfig(mode="bf16"), CPU).prepare(model)
    stream = {p.dtype for n, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in n}
    others = {p.dtype for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n}
    assert (stream, others) == ({torch.float32}, {torch.bfloat16})


def test_prepare_keeps_parameter_identity() -> None:
    model = tiny_llama(torch.bfloat16)
    before = [id(p) for p in model.parameters()]
    PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU).prepare(model)
    assert before == [id(p) for p in model.parameters()]


def test_auto_says_why_and_takes_fp32_on_the_cpu() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="auto"), CPU)
    policy.prepare(tiny_llama())
    assert policy.name == "fp32"
    assert "cpu" in policy.reason


def test_bf16_computes_in_bf16_and_trains_as_fp32_does() -> None:
    losses = {}
    for mode in get_args(Literal["fp32", "bf16"]):
        torch.manual_seed(0)
        policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
        model = policy.prepare(tiny_llama())
        optimizer = AdamW(model.parameters(), lr=1e-3)
        for _ in range(30):
            with policy.autocast():
                loss = loss_of(model)
            policy.backward(loss)
            assert policy.step(optimizer, 1.0).applied
        losses[mode] = loss.item()
        with policy.autocast():
            assert model.lm_head(torch.zeros(1, 32)).dtype == (torch.bfloat16 if mode == "bf16" else torch.float32)  # type: ignore[operator]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    assert losses["fp32"] < 4.0


def test_clipping_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = tiny_llama(), tiny_llama()
    theirs.load_state_dict(ours.state_dict())
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    policy.prepare(ours)
    policy.backward(loss_of(ours) * 100)
    loss_of(theirs).mul(100).backward()  # type: ignore[no-untyped-call]
    first, second = SGD(ours.parameters(), lr=0.1), SGD(theirs.parameters(), lr=0.1)
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    second.step()
    result = policy.step(first, 0.5)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(poison: float) -> None:
    model = tiny_llama()
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    policy.prepare(model)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    policy.backward(loss_of(model) * poison)
    result = policy.step(optimizer, 1.0)
    assert not result.applied
    assert result.skipped_because is not None
    assert result.skipped_because == f"losses that are not finite (loss {poison})"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state
    policy.backward(loss_of(model))
    assert policy.step(optimizer, 1.0).applied


MODES: list[dict[str, Any]] = [
    {"mode": "fp32"},
    {"mode": "bf16"},
    {"mode": "bf16", "trainable_dtype": "bf16", "masters": "none"},
    {"mode": "bf16", "trainable_dtype": "bf16"},
    {"mode": "amp_fp16"},
    {"mode": "native_fp16"},
]


@pytest.mark.parametrize("settings", MODES, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("window", [["masked"], ["masked", "good"], ["good", "masked", "good"]], ids=len)
def test_a_loss_of_nan_whose_gradient_is_zero_moves_nothing(settings: dict[str, Any], window: list[str]) -> None:
    """All labels masked in a mean: 0 / 0. Its gradients are zero, with which Adam's running means move the weights."""
    torch.manual_seed(0)
    policy = PrecisionPolicy(PrecisionConfig(**settings), CPU, say=lambda sentence: None)
    model = policy.prepare(tiny_llama())
    optimizer = AdamW([p for _, p in policy.named_parameters()], lr=1e-3)

    def backward(kind: str) -> None:
        with policy.autocast():
            ids = torch.arange(24).view(2, 12) % 64
            logits = model(input_ids=ids).logits.flatten(0, 1).float()
        targets = torch.full((24,), -100) if kind == "masked" else ids.flatten()
        policy.backward(nn.functional.cross_entropy(logits, targets))

    def state() -> list[torch.Tensor]:
        kept = [policy.trained.value(name).clone() for name in policy.trained.weights]
        return kept + [v.clone() for p in optimizer.state.values() for v in p.values()]

    backward("good")
    assert policy.step(optimizer, 1.0).applied
    before, scale = state(), policy.scaler and policy.scaler.scale
    for kind in window:
        backward(kind)
    result = policy.step(optimizer, 1.0)
    assert not result.applied
    assert result.skipped_because == "losses that are not finite (loss nan)"
    assert (result.grad_norm == 0.0) == (window == ["masked"])
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert (policy.scaler and policy.scaler.scale) == scale  # which is not to blame
    backward("good")
    assert policy.step(optimizer, 1.0).applied


@pytest.mark.parametrize(
    ("flags", "reason"),
    [((True, False), "gradients that are not finite"), ((False, True), "losses that are not finite")],
)
def test_another_rank_can_stop_a_step_here(flags: tuple[bool, bool], reason: str, world_where: Any) -> None:
    model = tiny_llama()
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), world=world_where(lambda own: [*flags, *own[2:]]))
    policy.prepare(model)
    policy.backward(loss_of(model))
    result = policy.step(AdamW(model.parameters()), 1.0)
    assert not result.applied
    assert result.skipped_because == f"{reason} (on another rank)"


@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16"])
def test_gradients_of_a_loss_that_nobody_saw_are_refused(mode: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    model = policy.prepare(tiny_llama())
    with policy.autocast():
        torch.autograd.backward(loss_of(model))
    with pytest.raises(UserError, match=r"replace loss\.backward\(\) by policy\.backward\(loss\)"):
        policy.step(AdamW([p for _, p in policy.named_parameters()]))


def test_too_many_skips_in_a_row_end_the_run() -> None:
    model = tiny_llama()
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32", max_skips=3), CPU)
    policy.prepare(model)
    optimizer = AdamW(model.parameters())
    for _ in range(2):
        policy.backward(loss_of(model) * float("nan"))
        policy.step(optimizer)
    other = PrecisionPolicy(PrecisionConfig(mode="fp32", max_skips=3), CPU)
    other.prepare(model)
    other.load_state_dict(policy.state_dict())
    other.backward(loss_of(model) * float("nan"))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        other.step(optimizer)


def test_a_disconnected_loss_is_refused() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    model = policy.prepare(tiny_llama())
    with pytest.raises(TrainingError, match="not connected to any trainable weight"):
        policy.backward(torch.tensor(0.0, requires_grad=True))
    with pytest.raises(TrainingError, match="not connected to any trainable weight"):
        policy.backward(loss_of(model).detach())
    with pytest.raises(TrainingError, match="no weight of the optimizer got a gradient"):
        policy.step(AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, UserError, r"the loss is None, not a tensor: a model returns None without labels, or with"),
        (1.5, UserError, r"the loss is a float, not a tensor"),
        ({"loss": torch.ones(())}, UserError, r"the loss is a dict, not a tensor"),
        (torch.ones(3, requires_grad=True) * 2, UserError, r"the loss has shape \(3,\): backward takes one number"),
        (torch.ones(()), TrainingError, r"no grad_fn\): it was detached, computed under torch.no_grad, or all weights"),
        (torch.tensor(2.0, requires_grad=True), TrainingError, r"no grad_fn\): it is a new tensor, such as"),
    ],
)
def test_what_is_no_loss_is_called_what_it_is(loss: Any, error: type[Exception], message: str) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    policy.prepare(tiny_llama())
    with pytest.raises(error, match=message):
        policy.backward(loss)


def test_a_loss_of_one_number_in_a_row_is_a_loss() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    model = policy.prepare(tiny_llama())
    policy.backward(loss_of(model))
    policy.backward(loss_of(model).view(1))
    assert policy.step(AdamW(model.parameters())).applied


def test_a_model_with_nothing_to_train_is_refused() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    with pytest.raises(UserError, match="no weight of the model is trainable"):
        policy.prepare(tiny_llama().requires_grad_(False))
    with pytest.raises(UserError, match=r"weight is torch.float64"):
        policy.prepare(nn.Linear(2, 2).double())


def test_state_of_another_mode_is_refused() -> None:
    fp32, bf16 = (PrecisionPolicy(PrecisionConfig(mode=mode), CPU) for mode in get_args(Literal["fp32", "bf16"]))
    with pytest.raises(UserError, match=r"trained with precision.mode 'bf16'.*--precision.mode bf16"):
        fp32.load_state_dict(bf16.state_dict())


def test_norm_of_fp16_gradients_does_not_overflow() -> None:
    big = [torch.full((4096,), 1000.0, dtype=torch.float16)]
    assert float(global_norm(big)) == pytest.approx(64000.0)


def test_gradients_below_the_limit_are_not_scaled_up() -> None:
    model, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    other.load_state_dict(model.state_dict())
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    policy.prepare(model)
    for net in (model, other):
        loss = net(torch.ones(1, 2)).sum() * 0.5  # a norm of 0.71
        policy.backward(loss) if net is model else torch.autograd.backward(loss)
    policy.step(SGD(model.parameters(), lr=1.0), max_norm=1.0)
    SGD(other.parameters(), lr=1.0).step()
    assert torch.equal(model.weight, other.weight)


def test_weights_that_are_added_to_an_optimizer_later_are_looked_at_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16"), CPU)
    policy.prepare(model)
    optimizer = SGD(model.get_submodule("0").parameters(), lr=0.1)

    def step() -> None:
        policy.backward(model(torch.ones(1, 2).half()).float().sum())
        assert policy.step(optimizer).applied

    step()
    optimizer.add_param_group({"params": list(model.get_submodule("1").parameters())})
    step()
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(UserError, match=r"holds 5 weights, 1 of which \(first of shape \(3,\)\)"):
        step()


def test_float32_trainables_of_a_whole_model_are_no_native_fp16() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    config = PrecisionConfig(mode="native_fp16", trainable_dtype="fp32")
    with pytest.raises(UserError, match="'native_fp16' and most weights would be trained in float32 beside FP16"):
        PrecisionPolicy(config, CPU).prepare(model)


def test_a_weight_in_two_optimizers_is_refused() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    model = policy.prepare(nn.Linear(2, 1))
    policy.backward(model(torch.ones(1, 2)).sum())
    with pytest.raises(UserError, match="held by two optimizers, or twice by one"):
        policy.step([SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)])


def test_a_cast_between_two_steps_is_found() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    model = policy.prepare(nn.Linear(2, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    policy.backward(model(torch.ones(1, 2)).sum())
    policy.step(optimizer)
    model.half()
    policy.backward(model(torch.ones(1, 2).half()).sum())
    with pytest.raises(UserError, match=r"weight was cast after policy\.prepare"):
        policy.step(optimizer)
