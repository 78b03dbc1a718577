"""Choosing a mode: by card, by stored dtype, by what is trained; contradictions; hardware without bfloat16."""

from typing import Any

import pytest
import torch
from torch import nn

from rawloop.errors import UserError
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.modes import MODES, Hardware, ModeChain, Weights, describe, examine
from rawloop.precision.policy import PrecisionPolicy

TITAN = Hardware("cuda", "NVIDIA TITAN RTX", bf16=False)
H200 = Hardware("cuda", "NVIDIA H200", bf16=True)
MAC = Hardware("mps", "this Apple GPU", bf16=True)
OLD_MAC = Hardware("mps", "this Apple GPU", bf16=False)
CPU = Hardware("cpu", "the cpu", bf16=True)
LORA_FP16 = Weights({torch.float16}, mostly_trained=False, trained_stream=None)
LORA_BF16 = Weights({torch.bfloat16}, mostly_trained=False, trained_stream=None)
LORA_EMBEDDING = Weights({torch.float16}, mostly_trained=False, trained_stream="embed_tokens.weight")
FULL = Weights(set(), mostly_trained=True, trained_stream="embed_tokens.weight")


@pytest.mark.parametrize(
    ("hardware", "weights", "mode", "reason"),
    [
        (H200, LORA_BF16, "bf16", "NVIDIA H200 computes bfloat16 natively"),
        (H200, FULL, "bf16", "NVIDIA H200 computes bfloat16 natively"),
        (MAC, LORA_BF16, "bf16", "this Apple GPU computes bfloat16 natively"),
        (
            OLD_MAC,
            LORA_FP16,
            "native_fp16",
            "this Apple GPU has no native bfloat16; the frozen weights are stored in FP16",
        ),
        (TITAN, LORA_FP16, "native_fp16", "TITAN RTX has no native bfloat16; the frozen weights are stored in FP16"),
        (TITAN, LORA_BF16, "amp_fp16", "stored in bfloat16, whose range FP16 may not hold"),
        (TITAN, LORA_EMBEDDING, "amp_fp16", "embed_tokens.weight is trained, whose float32 output needs autocast"),
        (TITAN, FULL, "amp_fp16", "most weights are trained, in float32 under FP16 autocast"),
        (CPU, LORA_BF16, "fp32", "on the cpu no mode is faster than fp32 everywhere"),
    ],
)
def test_auto_chooses_and_says_why(hardware: Hardware, weights: Weights, mode: str, reason: str) -> None:
    modes = ModeChain(PrecisionConfig(), hardware)
    assert modes.name == "auto"
    modes.resolve_auto(weights)
    assert modes.name == mode
    assert modes.reason.startswith("precision.mode is 'auto': ")
    assert reason in modes.reason


def test_one_config_for_every_card() -> None:
    config = PrecisionConfig(mode="bf16", fallback=["native_fp16", "fp32"])
    assert ModeChain(config, H200).name == "bf16"
    modes = ModeChain(config, TITAN)
    assert (modes.name, modes.remaining) == ("native_fp16", ["fp32"])
    assert modes.reason == "fell back from bf16: NVIDIA TITAN RTX does not compute bf16 natively"
    assert modes.history == [
        {
            "from": "bf16",
            "to": "native_fp16",
            "reason": "NVIDIA TITAN RTX does not compute bf16 natively",
            "entered": False,
        }
    ]


def test_bf16_that_the_card_lacks_is_refused_with_what_works() -> None:
    message = (
        r"^precision\.mode is 'bf16', which NVIDIA TITAN RTX does not compute natively: use one of fp32, amp_fp16, "
        r"native_fp16, or name them in precision\.fallback$"
    )
    with pytest.raises(UserError, match=message):
        ModeChain(PrecisionConfig(mode="bf16"), TITAN)


def test_a_chain_passes_over_what_the_card_lacks() -> None:
    modes = ModeChain(PrecisionConfig(mode="amp_fp16", fallback=["bf16", "fp32"]), TITAN)
    assert modes.advance("it overflows")
    assert (modes.name, modes.remaining) == ("fp32", [])
    assert not modes.advance("again")
    assert modes.trail() == "amp_fp16 -> fp32"


@pytest.mark.parametrize(
    ("hardware", "weights", "chain"),
    [
        (TITAN, FULL, "amp_fp16 -> fp32"),
        (TITAN, LORA_FP16, "native_fp16 -> amp_fp16 -> fp32"),
        (H200, FULL, "bf16 -> fp32"),
    ],
)
def test_auto_has_a_chain_of_its_own_and_a_named_mode_has_none(
    hardware: Hardware, weights: Weights, chain: str
) -> None:
    modes = ModeChain(PrecisionConfig(), hardware)
    modes.resolve_auto(weights)
    while modes.advance("it does not work"):
        pass
    assert modes.trail() == chain
    assert not ModeChain(PrecisionConfig(mode="amp_fp16"), hardware).advance("it does not work")
    none = ModeChain(PrecisionConfig(fallback=[]), hardware)
    none.resolve_auto(weights)
    assert not none.advance("it does not work")


def test_a_run_that_auto_began_resumes_in_the_mode_it_fell_back_to() -> None:
    modes = ModeChain(PrecisionConfig(), TITAN)
    modes.resolve_auto(LORA_FP16)
    modes.advance("overflow")
    state = {"mode": modes.name, "reason": modes.reason, "history": modes.history}
    resumed = ModeChain(PrecisionConfig(), TITAN, state)
    resumed.resolve_auto(LORA_FP16)
    assert (resumed.name, resumed.remaining, resumed.reason) == ("amp_fp16", ["fp32"], modes.reason)


def test_this_device_is_described_and_models_are_examined() -> None:
    assert describe(torch.device("cpu")) == CPU
    model = nn.ModuleDict({"e": nn.Embedding(4, 2), "a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    assert examine(model) == Weights(set(), mostly_trained=True, trained_stream="e.weight")
    model.half().requires_grad_(False).get_submodule("a").requires_grad_(True)
    assert examine(model) == Weights({torch.float16}, mostly_trained=False, trained_stream=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fp8"}, r"precision\.mode is 'fp8': it must be auto, fp32, bf16, amp_fp16, native_fp16"),
        ({"mode": "amp_fp16", "fallback": ["fp16"]}, r"fallback has 'fp16': it must be one of fp32"),
        (
            {"mode": "amp_fp16", "fallback": ["bf16", "amp_fp16"]},
            r"amp_fp16 -> bf16 -> amp_fp16\): no mode is tried twice",
        ),
        (
            {"mode": "fp32", "fallback": ["bf16"]},
            r"continues after fp32 \(fp32 -> bf16\): fp32 must be last",
        ),
        (
            {"mode": "amp_fp16", "trainable_dtype": "fp16"},
            r"which trains fp32: GradScaler refuses them \(`Attempting to",
        ),
        (
            {"mode": "bf16", "trainable_dtype": "fp16"},
            r"'fp16' and precision\.mode is 'bf16', which trains fp32 or bf16",
        ),
        ({"mode": "fp32", "trainable_dtype": "bf16"}, r"which trains fp32; mode bf16 can train bfloat16 weights"),
        ({"trainable_dtype": "bf16"}, r"precision\.mode is 'auto': name the mode"),
        ({"mode": "native_fp16", "masters": "none"}, r"FP16 weights without masters lose most of their"),
        ({"mode": "native_fp16", "masters": "none", "trainable_dtype": "fp16"}, r"only bf16 trainables go without"),
        ({"mode": "bf16", "masters": "none"}, r"precision\.masters is 'none'"),
        ({"mode": "bf16", "masters": "stochastic"}, r"'stochastic' and precision\.trainable_dtype is 'auto': only upd"),
        (
            {"mode": "native_fp16", "masters": "stochastic", "trainable_dtype": "fp16"},
            r"trainable_dtype is 'fp16': only updates of bf16 trainables are rounded stochastically",
        ),
        (
            {"mode": "bf16", "trainable_dtype": "bf16", "masters": "stochastic", "fallback": ["native_fp16"]},
            r"masters is 'stochastic' and precision\.fallback has native_fp16",
        ),
        (
            {"mode": "bf16", "trainable_dtype": "bf16", "masters": "none", "fallback": ["native_fp16"]},
            r"fallback has native_fp16, whose FP16 weights lose most",
        ),
        (
            {"mode": "native_fp16", "masters": "residual"},
            r"'residual': it must be fp32, stochastic or none; where it was residual",
        ),
        ({"mode": "bf16", "loss_scale": LossScaleConfig(init=2.0)}, r"loss_scale is set and precision\.mode is 'bf16'"),
        ({"mode": "bf16", "max_skips": 0}, r"precision\.max_skips is 0: it must be 1 or more"),
        ({"mode": "bf16", "max_nonfinite_losses": 0}, r"precision\.max_nonfinite_losses is 0"),
    ],
)
def test_contradictions_are_refused_with_both_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrecisionConfig(**settings)


def test_a_chain_may_use_what_its_first_mode_has_no_use_for() -> None:
    PrecisionConfig(mode="bf16", fallback=["native_fp16"], loss_scale=LossScaleConfig(init=2.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_trainables_of_a_dtype_that_is_never_right_are_refused(dtype: torch.dtype) -> None:
    for mode in MODES:
        policy = PrecisionPolicy(PrecisionConfig(mode=mode), torch.device("cpu"))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"trainable weight weight is {dtype}: only 16- and 32-bit floats"):
            policy.prepare(nn.Linear(2, 2, dtype=dtype))


def test_a_resumed_mode_is_one_that_the_card_has_and_the_config_means() -> None:
    state = {"mode": "bf16", "reason": "x", "history": [{"from": "amp_fp16", "to": "bf16", "reason": "x"}]}
    with pytest.raises(UserError, match="trained in bf16, which NVIDIA TITAN RTX does not compute natively: resume it"):
        ModeChain(PrecisionConfig(mode="amp_fp16", fallback=["bf16"]), TITAN, state)
    with pytest.raises(UserError, match=r"trained with precision.mode 'bf16', this run has 'fp32': resume with --prec"):
        ModeChain(PrecisionConfig(mode="fp32"), H200, state)
    assert ModeChain(PrecisionConfig(mode="fp32"), H200, {**state, "mode": "bf17"}).name == "fp32"
    followed = ModeChain(PrecisionConfig(mode="bf16", fallback=["fp32"]), H200, state)
    assert (followed.name, followed.remaining, followed.history) == ("bf16", ["fp32"], state["history"])


def test_auto_tries_nothing_twice_in_a_chain_of_the_users() -> None:
    modes = ModeChain(PrecisionConfig(fallback=["bf16", "fp32"]), CPU)
    modes.resolve_auto(LORA_BF16)
    assert (modes.name, modes.remaining) == ("fp32", [])
    modes = ModeChain(PrecisionConfig(fallback=["bf16", "fp32"]), H200)
    modes.resolve_auto(LORA_BF16)
    assert (modes.name, modes.remaining) == ("bf16", ["fp32"])
