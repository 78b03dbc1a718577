"""LoRA beside quantised layers: every mode, resumed to the byte, merged into the numbers that it was trained beside."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop.adapters import quantize as quantizing
from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.adapters.lora import add_adapter
from rawloop.adapters.quantize import QuantizedLinear, layers_to_quantize, quantize
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig, load_family
from rawloop.loop import Run, TrainConfig, train
from rawloop.optim import OptimConfig
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.records import TIMES, read_events, read_metrics
from rawloop.trained import find_trained, load_trained, probe_logits

CPU = torch.device("cpu")
STEPS, STOP = 4, 2
NAMES = ("nf4", "int8")
SCALE = LossScaleConfig(init=2.0**8)  # fits from the first step
ERROR = {"nf4": 0.12, "int8": 0.01}  # of the numbers, relative


@pytest.fixture(autouse=True)
def packages(request: pytest.FixtureRequest) -> None:
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")


@pytest.fixture
def config(text_checkpoint: Path, text_data: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        output=str(tmp_path / "run"),
        device="cpu",
        model=ModelConfig(path=str(text_checkpoint), quantization="int8"),
        adapter=AdapterConfig(rank=4, modules_to_save=["lm_head"]),
        data=DataConfig(train=str(text_data / "train.jsonl"), eval=str(text_data / "eval.jsonl")),
        train=TrainConfig(batch_size=1, max_steps=STEPS, log_every=1),
        optim=OptimConfig(lr=3e-3),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=2, batch_size=5),
        checkpoint=CheckpointConfig(save_every=1, keep_last=0),
    )


def run(config: RunConfig, said: list[str] | None = None, change: Callable[[Run], None] = lambda run: None) -> Run:
    built = build_run(config, World(), (said if said is not None else []).append)
    try:
        change(built)
        train(built)
    finally:
        built.close()
    return built


def content(folder: str, step: int) -> dict[str, bytes]:
    slot = Path(folder) / "checkpoints" / f"step-{step:08d}"
    return {path.relative_to(slot).as_posix(): path.read_bytes() for path in slot.rglob("*") if path.is_file()}


def numbers(folder: str) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key not in TIMES} for line in read_metrics(Path(folder))]


# -- a layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_computes_with_the_numbers_that_its_codes_stand_for(name: Any, dtype: torch.dtype, bias: bool) -> None:
    quantizing.check_quantization(name)
    linear = nn.Linear(48, 40, bias=bias).requires_grad_(False)
    layer = QuantizedLinear(linear, name, CPU)
    assert 0 < (layer.weight - linear.weight).norm() / linear.weight.norm() < ERROR[name]
    assert layer.codes.nbytes == linear.weight.numel() // (2 if name == "nf4" else 1)
    linear.weight.data = layer.weight
    linear.to(dtype)
    layer.to(CPU)
    given = torch.randn(3, 5, 48).to(dtype)
    results = []
    for module in (linear, layer):
        inputs = given.clone().requires_grad_()
        output = module(inputs)
        output.square().sum().backward()
        results.append((output, inputs.grad))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == dtype
        assert torch.allclose(one.float(), other.float(), rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_follows_autocast(name: Any) -> None:
    quantizing.check_quantization(name)
    linear = nn.Linear(48, 40).requires_grad_(False)
    layer = QuantizedLinear(linear, name, CPU)
    linear.weight.data = layer.weight
    inputs = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
        assert torch.allclose(layer(inputs).float(), linear(inputs).float(), atol=1e-2)
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.dtype == torch.float32


def test_a_layer_keeps_no_whole_matrix_for_the_backward_pass() -> None:
    layer = QuantizedLinear(nn.Linear(64, 64).requires_grad_(False), "int8", CPU)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 64, requires_grad=True))
    assert [tensor for tensor in kept if tensor.numel() >= 64 * 64] == []


# -- which layers ------------------------------------------------------------------------------------------------------


def test_heads_embeddings_adapters_and_shared_weights_stay(demo_checkpoint: Path) -> None:
    family = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    model = add_adapter(family.load_model(), AdapterConfig(rank=2, modules_to_save=["audio_lm_head"]), [])
    chosen = layers_to_quantize(model)
    assert {name.replace(".base_layer", "").rpartition(".")[2] for name in chosen} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    said = quantize(model, "int8", CPU)
    assert "audio_mlp.up_proj (2)" in said
    assert "MB in place of" in said
    assert not any("head" in name for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).requires_grad_(False)
    tied["b"].weight = tied["a"].weight
    with pytest.raises(UserError, match="'int8', and the model has no frozen linear layer besides heads"):
        quantize(tied, "int8", CPU)


# -- a run -------------------------------------------------------------------------------------------------------------


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "mode", "dora"),
    [
        ("nf4", "bf16", False),
        ("int8", "fp32", False),
        *(slow("nf4", mode, False) for mode in ("fp32", "amp_fp16")),
        *(slow("int8", mode, False) for mode in ("bf16", "amp_fp16")),
        *(slow(name, "native_fp16", False) for name in NAMES),
        *(slow(name, "fp32", True) for name in NAMES),
    ],
)
def test_a_run_learns_and_resumes_to_the_byte(config: RunConfig, name: Any, mode: Any, dora: bool) -> None:
    heads = [] if mode == "native_fp16" else config.adapter.modules_to_save  # a float32 head fits no FP16 base
    config = replace(
        config,
        model=replace(config.model, quantization=name),
        precision=PrecisionConfig(mode=mode, loss_scale=SCALE if mode.endswith("fp16") else LossScaleConfig()),
        adapter=replace(config.adapter, dora=dora, modules_to_save=heads),
    )
    said: list[str] = []
    run(config, said)
    assert any(line.startswith(f"quantised to {name}: ") for line in said), said
    losses = [line["eval_loss"] for line in numbers(config.output) if "eval_loss" in line]
    assert losses[-1] < losses[0]
    findings = [event for event in read_events(Path(config.output)) if event["kind"] == "finding"]
    assert findings == []
    again = replace(config, output=f"{config.output}-again", resume="latest")
    shutil.copytree(config.output, again.output, symlinks=True)
    for step in range(STOP + 1, STEPS + 1):
        shutil.rmtree(Path(again.output) / "checkpoints" / f"step-{step:08d}")
    (Path(again.output) / "best").unlink()
    run(again)
    assert content(again.output, STEPS) == content(config.output, STEPS)
    assert numbers(again.output) == numbers(config.output)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_merged_into_the_numbers_that_it_was_trained_beside(
    config: RunConfig, name: Any, tmp_path: Path
) -> None:
    config = replace(config, model=replace(config.model, quantization=name))
    probe = probe_logits(load_family(config.model))
    assert probe is not None
    finished = run(config)
    assert finished.policy.model is not None
    expected = probe(finished.policy.model)
    copied = tmp_path / "elsewhere"
    shutil.copytree(Path(config.output) / "checkpoints" / f"step-{STEPS:08d}" / "adapter", copied)
    slot = str(Path(config.output) / "checkpoints" / f"step-{STEPS:08d}")
    for trained in (
        find_trained(slot, None, None, ModelConfig()),
        find_trained(None, None, str(copied), ModelConfig()),
    ):
        loaded = load_trained(trained, load_family(trained.model), lambda line: None)
        difference = (probe(loaded.model) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5
    with pytest.raises(UserError, match=r"model\.quantization is 'int8', and a trained model is used with the numbers"):
        find_trained(slot, None, None, ModelConfig(quantization="int8"))
    # the whole numbers of the base give another model
    file = copied / "base.json"
    stored = json.loads(file.read_text())
    assert stored.pop("quantization") == name
    file.write_text(json.dumps(stored))
    trained = find_trained(None, None, str(copied), ModelConfig())
    whole = load_trained(trained, load_family(trained.model), lambda line: None)
    assert (probe(whole.model) - expected).abs().max() / expected.abs().max() > 1e-4


def test_the_fingerprint_is_that_of_the_base_before_it_is_quantised(config: RunConfig, text_checkpoint: Path) -> None:
    config = replace(config, train=replace(config.train, max_steps=1))
    run(config)
    slot = Path(config.output) / "checkpoints" / "step-00000001"
    stored = json.loads((slot / "adapter" / "base.json").read_text())
    model = load_family(ModelConfig(path=str(text_checkpoint))).load_model().requires_grad_(False)
    assert stored["weights"] == BaseFingerprint(model).weights
    with pytest.raises(UserError, match=r"model\.quantization int8 -> null"):
        run(replace(config, model=replace(config.model, quantization=None), resume="latest"))
    said: list[str] = []
    plain = replace(config.model, quantization=None)
    run(replace(config, model=plain, output=f"{config.output}-plain", init_from=str(slot)), said)
    assert "the weights were trained beside a base with model.quantization int8, and it is null here" in said


# -- refused -----------------------------------------------------------------------------------------------------------


def test_full_training_of_quantised_weights_is_refused(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"'int8' and adapter.mode is 'full': .*; set adapter.mode to lora, or leave"):
        replace(config, adapter=AdapterConfig(mode="full"))
    with pytest.raises(UserError, match=r"model\.quantization is 'fp4': it must be nf4 or int8, or left out"):
        replace(config.model, quantization="fp4")  # type: ignore[arg-type]


def test_a_missing_package_is_told_with_the_line_that_installs_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "find_spec", lambda name: None)
    four = replace(config, model=replace(config.model, quantization="nf4"))
    with pytest.raises(UserError, match=r"'nf4', which needs bitsandbytes, .*'rawloop\[bitsandbytes\]'`, or take int8"):
        run(four)
