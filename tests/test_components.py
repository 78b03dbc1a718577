"""What is said of layers, trained weights, dtypes and streams is read off the finished model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.files import ModelFiles
from rawloop.adapters.lora import add_adapter, check_lora, kinds, lora_layers
from rawloop.build import announce, build_run
from rawloop.components import check_streams
from rawloop.config import RunConfig
from rawloop.dist import World
from rawloop.errors import RawloopError, UserError
from rawloop.families import ModelConfig, load_family
from rawloop.loop import Run, TrainConfig
from rawloop.optim import build_optimizer
from rawloop.precision.config import PrecisionConfig

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ATTENTION = "self_attn.k_proj (2), self_attn.o_proj (2), self_attn.q_proj (2), self_attn.v_proj (2)"
EXPERTS = "mlp.experts.down_proj (2), mlp.experts.gate_up_proj (2), mlp.gate.weight (2)"


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def tied() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))


def adapted(build: Callable[[], Any], **keys: Any) -> tuple[nn.Module, list[str]]:
    notices: list[str] = []
    torch.manual_seed(0)
    return add_adapter(build(), AdapterConfig(rank=2, **keys), notices), notices[:-1]  # without the count


def test_experts_that_peft_takes_as_parameters_are_announced_saved_and_restored(tmp_path: Path) -> None:
    model, (line,) = adapted(mixtral, target_modules=["all-linear"])
    assert line == (
        f"LoRA on 14 layers: {EXPERTS}, {ATTENTION}; all-linear includes {EXPERTS}, which are not plain linear "
        "layers; not on lm_head (1), which all-linear excludes"
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(12)[None]
    ModelFiles(model, lambda path: model).snapshot(copy=False)(tmp_path)
    other, _ = adapted(mixtral, target_modules=["all-linear"])
    assert not torch.equal(model(ids).logits, other(ids).logits)
    ModelFiles(other, lambda path: other).load(tmp_path)
    assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("target", ["w1", "gate_up_proj"])
def test_experts_by_name_are_refused_with_what_they_are(target: str) -> None:
    with pytest.raises(
        UserError, match=r"no layer .* \(experts.down_proj, experts.gate_up_proj are parameters, not layers"
    ):
        adapted(mixtral, target_modules=[target])


def test_conv1d_of_gpt2_is_a_linear_layer() -> None:
    assert adapted(gpt2, target_modules=["c_attn", "c_fc"])[1] == ["LoRA on 4 layers: attn.c_attn (2), mlp.c_fc (2)"]
    model, (line,) = adapted(gpt2, target_modules=["all-linear"])
    assert line == (
        "LoRA on 8 layers: attn.c_attn (2), attn.c_proj (2), mlp.c_fc (2), mlp.c_proj (2); not on lm_head (1), which "
        "all-linear excludes"
    )
    assert len(lora_layers(model)) == 8


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            "a separate copy is trained for lm_head; model.embed_tokens keeps",
        ),
        (
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            "is trained for model.embed_tokens and for lm_head",
        ),
        (
            {"target_modules": ["lm_head"]},
            "LoRA changes it only in lm_head: such an adapter cannot be merged",
        ),
        ({}, None),
    ],
)
def test_a_weight_that_is_used_twice_is_told(keys: dict[str, Any], said: str | None) -> None:
    notices = adapted(tied, **keys)[1]
    assert [line for line in notices if "share a weight" in line] == (notices[:1] if said else [])
    assert said is None or said in notices[0]
    assert notices[0].startswith("model.embed_tokens and lm_head share a weight") == (said is not None)


def test_other_layers_than_those_that_were_named_are_refused() -> None:
    model, _ = adapted(tied)
    asked = lora_layers(model)
    check_lora(model, asked, True, [])
    with pytest.raises(UserError, match=r"additional layers none, missing layers mlp.up_proj \(1\)"):
        check_lora(model, {*asked, "model.layers.0.mlp.up_proj"}, True, [])
    with pytest.raises(UserError, match=r"additional layers self_attn.q_proj \(1\), missing layers none"):
        check_lora(model, asked - {"model.layers.1.self_attn.q_proj"}, True, [])
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    with pytest.raises(UserError, match=r"model.norm.weight \(of 1\) would be trained, and no key of"):
        check_lora(model, asked, True, [])
    assert kinds([]) == ""


# -- a whole run -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(text_checkpoint: Path, text_data: Path, tmp_path: Path) -> Callable[..., Run]:
    """Give `run(say, **groups)`: a run of the tiny text model, built and closed."""

    def build(said: list[str], **groups: Any) -> Run:
        config = RunConfig(output=str(tmp_path / "run"), device="cpu", train=TrainConfig(max_steps=1), **groups)
        config = replace(config, model=ModelConfig(path=str(text_checkpoint), stream_weights={"text": 0.5}))
        config.adapter.rank = 4
        config.data.train, config.data.eval = str(text_data / "train.jsonl"), str(text_data / "eval.jsonl")
        config.checks.enabled = config.records.progress = False
        built = build_run(config, World(), said.append)
        built.close()
        built.config = config  # type: ignore[attr-defined]
        return built

    return build


def test_a_run_says_what_it_trains_in_which_dtypes(run: Callable[..., Run]) -> None:
    said: list[str] = []
    built = run(said, precision=PrecisionConfig(mode="native_fp16"))
    count = sum(p.numel() for p in built.module.parameters() if p.requires_grad)
    base = sum(p.numel() for p in built.module.parameters()) - count
    trained = f"training {count:,} float32 weights, beside {base:,} float16 frozen"
    assert f"{trained}; streams: text x 0.5; attention: sdpa" in said


def test_a_run_that_came_out_otherwise_is_refused(run: Callable[..., Run]) -> None:
    built: Any = run([], precision=PrecisionConfig(mode="fp32"))
    family = load_family(built.config.model)
    model = built.module.model

    def check(optimizer: Any = built.optimizer) -> None:
        announce(built.config, family, built.module, built.policy, optimizer)

    check()
    first, *others = built.policy.named_parameters()
    with pytest.raises(
        RawloopError, match=f"1 weights are trained, and the optimizer does not hold them, first {first[0]}:"
    ):
        check(build_optimizer(others, built.config.optim))
    weight = model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    with pytest.raises(RawloopError, match="1 weights are trained by the model and not by the precision policy, first"):
        check()
    weight.requires_grad_(False)
    first[1].requires_grad_(False)
    with pytest.raises(RawloopError, match="1 weights are trained by the precision policy and not by the model, first"):
        check()
    first[1].requires_grad_(True)
    first[1].data = first[1].data.bfloat16()
    with pytest.raises(RawloopError, match="would be trained in bfloat16, and precision fp32 trains fp32"):
        check()


def test_a_family_that_weighs_its_streams_otherwise_is_refused(text_checkpoint: Path) -> None:
    config = RunConfig(model=ModelConfig(path=str(text_checkpoint), stream_weights={"text": 0.5}))
    family: Any = load_family(config.model)
    check_streams(config, family)
    family.stream_weights = {"text": 1.0}  # as one that does not look
    with pytest.raises(UserError, match=r"model.stream_weights.text is 0.5, and the family CausalLM weighs it 1 "):
        check_streams(config, family)
    check_streams(replace(config, model=ModelConfig()), family)
