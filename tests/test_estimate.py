"""Estimates of a step against the bytes that PyTorch's profiler counts in a real one, allocation by allocation."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    Glm4MoeConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rawloop.adapters.config import AdapterConfig
from rawloop.allocations import peak_of
from rawloop.components import build_family
from rawloop.data.config import DataConfig
from rawloop.estimate import _count, estimate, skeleton_of
from rawloop.layers import block_kinds
from rawloop.precision.config import PrecisionConfig
from rawloop.settings import OptimConfig, TrainConfig
from tests.real_steps import FULL, batch_of, config_of, measured, planned, run_of, step


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def llama(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six blocks, so that an estimate looks at few of them."""
    folder: Path = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(text_checkpoint, folder)
    settings = LlamaConfig.from_pretrained(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "max_position_embeddings": 512}
    for name, value in sizes.items():
        setattr(settings, name, value)
    settings.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "each"), [("adafactor", 0.05), ("muon", 4.0), ("adamw_8bit", 2.0), ("lion", 4.0)])
def test_other_optimizers(name: str, each: float, llama: Path) -> None:
    config = config_of(llama, "fp32", FULL)
    config = replace(config, optim=replace(config.optim, name=name))  # type: ignore[arg-type]
    found = planned(config, batch_of(config, 16, 1))
    assert found.peak["optimizer"] == pytest.approx(each * found.trained, rel=0.25)


@pytest.mark.slow
def test_a_quantised_base(llama: Path) -> None:
    config = config_of(llama, "bf16")
    small = replace(config, model=replace(config.model, quantization="int8"))
    batch = batch_of(config, 64, 2)
    found = planned(small, batch)
    assert found.total == pytest.approx(measured(small, batch), rel=0.05)
    assert found.peak["frozen weights"] < 0.7 * planned(config, batch).peak["frozen weights"]


@pytest.mark.parametrize(
    ("mode", "adapter", "recompute"),
    [
        ("fp32", AdapterConfig(dropout=0.1), False),
        ("bf16", None, True),
        slow("bf16", FULL, False),
        slow("native_fp16", FULL, True),
    ],
)
def test_a_llama_takes_what_is_estimated(
    mode: str, adapter: AdapterConfig | None, recompute: bool, llama: Path
) -> None:
    config = config_of(llama, mode, adapter, recompute)
    batch = batch_of(config, 160, 3)
    assert planned(config, batch).total == pytest.approx(measured(config, batch), rel=0.05)


@pytest.mark.parametrize(
    ("mode", "adapter", "recompute"),
    [("bf16", None, False), slow("native_fp16", None, True), ("fp32", FULL, False)],
)
def test_a_higgs_takes_what_is_estimated(
    mode: str, adapter: AdapterConfig | None, recompute: bool, demo_checkpoint: Path
) -> None:
    config = config_of(demo_checkpoint / "model", mode, adapter, recompute)
    batch = batch_of(config, 150, 2)
    found = planned(config, batch)
    assert found.total == pytest.approx(measured(config, batch), rel=0.05)
    assert found.peak["loss head"] > 1e6 or adapter


@pytest.fixture(scope="module")
def mixtral(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("mixtral") / "model"
    shutil.copytree(text_checkpoint, folder)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    vocabulary = LlamaConfig.from_pretrained(folder).vocab_size
    torch.manual_seed(0)
    settings = MixtralConfig(vocab_size=vocabulary, num_hidden_layers=4, num_local_experts=4, **sizes)
    MixtralForCausalLM(settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("mode", "adapter"), [("fp32", FULL), ("bf16", None), slow("native_fp16", None)])
def test_experts_take_what_is_estimated(mode: str, adapter: AdapterConfig | None, mixtral: Path) -> None:
    config = config_of(mixtral, mode, adapter)
    batch = batch_of(config, 160, 3)
    assert planned(config, batch).total == pytest.approx(measured(config, batch), rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "higgs"])
def test_packed_rows_take_what_is_estimated(kind: str, llama: Path, demo_checkpoint: Path) -> None:
    config = config_of(llama if kind == "llama" else demo_checkpoint / "model", "fp32", FULL)
    config = replace(config, data=DataConfig(packing=True))
    batch = batch_of(config, 100, 3)
    assert len(batch.inputs["input_ids"]) == 1
    assert planned(config, batch).total == pytest.approx(measured(config, batch), rel=0.05)


def test_a_model_that_may_be_no_decoder_is_estimated(text_checkpoint: Path, tmp_path: Path) -> None:
    """Its causality is tested with numbers, which a skeleton has not."""
    shutil.copytree(text_checkpoint, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    settings = BertConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    settings.architectures = ["BertLMHeadModel"]
    settings.save_pretrained(tmp_path)
    config = config_of(tmp_path, "fp32", FULL)
    assert planned(config, batch_of(config, 20, 1)).parameters > 1e6


def test_a_gpu_keeps_a_byte_for_each_number_of_a_dropout(llama: Path) -> None:
    config = config_of(llama, "fp32", AdapterConfig(dropout=0.1))
    batch = batch_of(config, 160, 3)
    masks = 6 * 4 * 3 * 160 * 128  # in each block, of four layers with LoRA
    on_cpu, on_gpu = planned(config, batch), planned(replace(config, device="auto"), batch)
    assert on_cpu.total - on_gpu.total == pytest.approx(3 * masks, rel=0.15)  # some are gone at the peak


def test_gradients_are_kept_between_micro_batches(llama: Path) -> None:
    alone = config_of(llama, "fp32", FULL)
    config = replace(alone, train=TrainConfig(accumulation=2))
    batch = batch_of(config, 64, 2)
    found, gradients = planned(config, batch), 4 * planned(alone, batch).trained
    assert found.total == pytest.approx(measured(config, batch), rel=0.05)
    assert found.total > planned(alone, batch).total
    assert found.peak["gradients"] == pytest.approx(gradients, rel=0.01)


def test_few_blocks_say_what_the_whole_model_takes(llama: Path, tmp_path: Path) -> None:
    """To the byte; also where a small model takes most at the end of the backward pass, and the whole one before it."""
    wordy = tmp_path / "wordy"
    shutil.copytree(llama, wordy, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((wordy / "config.json").read_text())
    (wordy / "config.json").write_text(json.dumps(settings | {"vocab_size": 32000}))
    saved = AdapterConfig(modules_to_save=["embed_tokens"])
    cases = ((llama, "bf16", None, 100, 3), (llama, "fp32", FULL, 300, 3), (wordy, "fp32", saved, 40, 1))
    for folder, mode, adapter, positions, samples in cases:
        config = config_of(folder, mode, adapter)
        family, batch = build_family(config), batch_of(config, positions, samples)
        skeleton = skeleton_of(config, family)
        assert [len(kind.places) for kind in block_kinds(skeleton)] == [6]
        found, whole = estimate(config, family, skeleton, batch), _count(config, family, skeleton, batch, 1, {})
        assert found.total == sum(peak_of(whole).values())
        assert (found.flops, found.parameters) == (whole["flops"], whole["parameters"])


@pytest.mark.parametrize("pattern", ["model.layers.[0-2].*", "*.layers.?.mlp.*", "*layers.4*", "*.mlp.*"])
def test_what_is_frozen_in_some_blocks_is_not_taken_for_all_of_them(pattern: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": 11, "hidden_size": 32}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    config = config_of(tmp_path / "model", "fp32", AdapterConfig("full", freeze=[pattern]))
    family = build_family(config)
    skeleton = skeleton_of(config, family)
    names = [name for name, _ in skeleton.named_parameters() if not fnmatchcase(name, pattern)]
    trained = sum(skeleton.get_parameter(name).numel() for name in names)
    assert estimate(config, family, skeleton, batch_of(config, 16, 1)).trained == trained


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXED = {
    "convolutions": Lfm2Config(
        **SMALL, num_hidden_layers=10, layer_types=(["conv"] * 2 + ["full_attention"]) * 3 + ["conv"]
    ),
    "windows": Olmo3Config(
        **SMALL,
        num_hidden_layers=10,
        sliding_window=16,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2 + ["full_attention"] * 2,
    ),
    "experts": Glm4MoeConfig(
        **SMALL, num_hidden_layers=9, moe_intermediate_size=32, n_routed_experts=8, first_k_dense_replace=4, head_dim=16
    ),
}


@pytest.mark.parametrize("name", ["convolutions", "experts", slow("windows")])
def test_each_kind_of_block_has_its_own_count(name: str, text_checkpoint: Path, tmp_path: Path) -> None:
    """Some blocks have a convolution or a window of attention, others attention; the first an MLP, others experts."""
    shutil.copytree(text_checkpoint, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    settings = MIXED[name]
    settings.vocab_size = LlamaConfig.from_pretrained(text_checkpoint).vocab_size
    settings.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[settings.model_type]]
    settings.save_pretrained(tmp_path)
    for mode, adapter in (("bf16", AdapterConfig(target_modules=["all-linear"])), ("fp32", FULL)):
        config = config_of(tmp_path, mode, adapter)
        family, batch = build_family(config), batch_of(config, 100, 3)
        skeleton = skeleton_of(config, family)
        assert len(block_kinds(skeleton)) == 2
        found, whole = estimate(config, family, skeleton, batch), _count(config, family, skeleton, batch, 1, {})
        assert (found.flops, found.parameters) == (whole["flops"], whole["parameters"])
        assert found.total == pytest.approx(sum(peak_of(whole).values()), rel=0.01)


def test_operations_are_those_of_a_real_step(llama: Path) -> None:
    config = config_of(llama, "fp32", FULL, recompute=True)
    batch, run = batch_of(config, 64, 2), run_of(config)
    with FlopCounterMode(display=False) as counter:  # which does not know attention on a CPU
        step(run, [batch])
    model: Any = run.policy.model
    settings = model.config
    heads = settings.num_attention_heads * settings.head_dim
    passes = 2 + 2 + 5  # products of the size of the scores: forward, again for the backward pass, and in it
    attention = settings.num_hidden_layers * passes * 2 * 2 * 64 * 64 * heads // 2  # half of them are masked
    assert planned(config, batch).flops == counter.get_total_flops() + attention


def test_parts_are_counted_as_what_they_are(llama: Path) -> None:
    config = config_of(llama, "native_fp16", FULL)
    found = planned(config, batch_of(config, 16, 1), processes=2)
    numbers = found.trained
    assert found.parameters == numbers
    assert (found.peak["trained weights"], found.peak["masters"]) == (2 * numbers, 4 * numbers)
    assert found.peak["optimizer"] == pytest.approx(8 * numbers, rel=0.01)
    assert found.host == pytest.approx(14 * numbers, rel=0.01)
    assert found.peak["DDP buckets"] == 0
    bucketed = replace(config, ddp=replace(config.ddp, gradient_as_bucket_view=False))
    assert planned(bucketed, batch_of(config, 16, 1), processes=2).peak["DDP buckets"] == 2 * numbers
    lora = planned(config_of(llama, "bf16"), batch_of(config, 16, 1))
    assert lora.peak["frozen weights"] > 5 * lora.peak["trained weights"] > 0
    assert lora.host == pytest.approx(12 * lora.trained, rel=0.05)


def test_stochastic_rounding_keeps_no_float32_copy(llama: Path) -> None:
    rounded = PrecisionConfig("bf16", trainable_dtype="bf16", masters="stochastic", fallback=[])
    config = replace(config_of(llama, "bf16", FULL, recompute=True), precision=rounded)
    batch = batch_of(config, 100, 2)
    found, numbers = planned(config, batch), planned(config, batch).trained
    assert found.total == pytest.approx(measured(config, batch), rel=0.05)
    assert (found.peak["trained weights"], found.peak["masters"]) == (2 * numbers, 0)
    assert found.peak["optimizer"] == pytest.approx(8 * numbers, rel=0.01)
    assert found.host == pytest.approx(10 * numbers, rel=0.01)
    small = replace(config, device="auto", optim=OptimConfig(name="adamw_8bit"))
    assert planned(small, batch).peak["optimizer"] == pytest.approx(2 * numbers, rel=0.05)


def test_no_weights_are_read(llama: Path, tmp_path: Path, demo_config: Callable[..., Path]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((bare / "config.json").read_text())
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
    changed = settings | sizes | {"num_attention_heads": 24, "num_key_value_heads": 8, "dtype": "bfloat16"}
    (bare / "config.json").write_text(json.dumps(changed))
    config = replace(config_of(bare, "bf16"), device="auto")
    found = planned(config, batch_of(config, 500, 2))
    assert 2.8e9 < found.parameters < 2.9e9
    assert found.peak["frozen weights"] == pytest.approx(2 * found.parameters, rel=0.01)


def test_several_processes_share_a_model(llama: Path) -> None:
    config = config_of(llama, "bf16", FULL, recompute=True)
    batch = batch_of(config, 64, 2)
    alone, shared = planned(config, batch).peak, planned(replace(config, parallel="fsdp"), batch, processes=4)
    for kind in ("trained weights", "optimizer"):
        assert shared.peak[kind] == pytest.approx(alone[kind] / 4, rel=1e-3)
    numbers = alone["trained weights"]
    assert 0 < shared.peak["gathered"] < numbers  # with gradients
    # at no time, not at the start either, does a process hold the whole model
    assert shared.total < sum(alone.values()) / 2
    many = planned(replace(config, parallel="fsdp", train=TrainConfig(accumulation=2)), batch, processes=4)
    assert many.peak["gradients"] == pytest.approx(numbers, rel=0.01)


def test_whole_in_a_pass_is_what_is_outside_of_the_blocks_that_fsdp_gathers_alone(
    llama: Path,
) -> None:
    """As an audio encoder is, or whatever else has too few weights: also where its own blocks are alike."""
    config = replace(config_of(llama, "fp32", FULL, recompute=True), parallel="fsdp")
    batch, bare = batch_of(config, 16, 1), build_family(config)
    plain = skeleton_of(config, bare)
    block = sum(weight.nbytes for weight in plain.model.layers[0].parameters())  # type: ignore[union-attr, index]
    outside = sum(weight.nbytes for weight in plain.parameters()) - 6 * block
    found = planned(config, batch, processes=4)
    assert found.peak["gathered"] == 3 * outside + 4 * block  # at the end of the backward pass
    adding = planned(replace(config, train=TrainConfig(accumulation=2)), batch, processes=4)
    assert adding.peak["gathered"] == 2 * outside + 3 * block  # the gradients are whole anyway
    with torch.device("meta"):
        encoder = nn.ModuleList([nn.Sequential(nn.Linear(64, 64)) for _ in range(8)]).requires_grad_(False)
    size = sum(weight.nbytes for weight in encoder.parameters())
    plain.encoder = encoder
    assert len(block_kinds(plain)) == 2
    more = estimate(config, bare, plain, batch, 4).peak
    assert more["gathered"] - found.peak["gathered"] == size
    assert more["frozen weights"] - found.peak["frozen weights"] == pytest.approx(size / 4, abs=1000)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "adapter"), [("bf16", None), ("bf16", FULL), ("native_fp16", None), ("fp32", FULL)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_takes_what_is_estimated(
    mode: str, adapter: AdapterConfig | None, recompute: bool, text_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(text_checkpoint, folder)
    settings = LlamaConfig.from_pretrained(folder)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "max_position_embeddings": 2048}
    for name, value in (sizes | {"head_dim": 64, "num_attention_heads": 16, "vocab_size": 32000}).items():
        setattr(settings, name, value)
    LlamaForCausalLM(settings).save_pretrained(folder)
    config = replace(config_of(folder, mode, adapter, recompute), device="cuda")
    before = torch.cuda.memory_allocated()
    batch, run = batch_of(config, 1024, 4), run_of(config)
    step(run, [batch])
    torch.cuda.reset_peak_memory_stats()
    step(run, [batch])
    assert planned(config, batch).total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
