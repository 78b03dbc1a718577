"""Faults in runs of rawloop: the same mistakes in the config, the checkpoint or the data of a small text model."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rawloop.build import build_run
from rawloop.config import parse
from rawloop.dist import World
from rawloop.errors import TrainingError
from rawloop.loop import train
from rawloop.run import Run
from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watched import RunWatch
from tests.faults.form import Control, Fault, within
from tests.faults.loops import Loop


class InRun(Loop):
    """A run from its config, without evaluation and saving. `spoil` changes its objects before the loop begins."""

    steps = 12
    settings: Mapping[str, Any] = {}

    def __init__(self) -> None:
        """Nothing is built before the run has a folder."""

    def change_model(self, model: nn.Module) -> None:
        """Change what is saved as the base model."""

    def records(self) -> list[dict[str, Any]]:
        return [{"text": f"{k}: " + "la " * (3 + k % 5)} for k in range(16)]

    def spoil(self, run: Run) -> None:
        """Change the run."""

    def watched(self, config: WatchConfig, crash: type[Exception] | None) -> list[Finding]:
        with tempfile.TemporaryDirectory() as name:
            return self._in(Path(name), config, crash)

    def _in(self, folder: Path, watch: WatchConfig, crash: type[Exception] | None) -> list[Finding]:
        save_model(folder / "model", self.change_model)
        lines = [json.dumps(record) + "\n" for record in self.records()]
        (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        settings = {
            "device": "cpu",
            "output": str(folder / "run"),
            "model": {"path": str(folder / "model")},
            "data": {"train": str(folder / "train.jsonl")},
            "train": {"max_steps": self.steps, "batch_size": 4},
            "checks": {"enabled": False},
            "evaluation": {"enabled": False},
            "checkpoint": {"save_at_end": False},
            "records": {"progress": False},
            "watch": {"every": watch.every},
            **self.settings,
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        run = build_run(parse(["--config", str(folder / "run.yaml")], "exam")[0], World(), lambda line: None)
        with closing(run):  # its watch looks at the end, too
            self.spoil(run)
            try:
                train(run)
            except Exception as error:
                if crash is None or not isinstance(error, crash):
                    raise
        return findings_of(run)


def findings_of(run: Run) -> list[Finding]:
    """What the watch of a run has found."""
    assert isinstance(run.watch, RunWatch)
    return list(run.watch.watch.findings)


def model_of(run: Run) -> nn.Module:
    assert run.policy.model is not None
    return run.policy.model


def save_model(folder: Path, change: Any) -> None:
    """Save a tiny Llama, after a change of it, with a tokenizer of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)


FULL = {"adapter": {"mode": "full"}}
LORA = {"adapter": {"rank": 4}}


class NanInBase(InRun):
    """The base model has NaN in one tensor."""

    settings = LORA | {"precision": {"mode": "fp32"}}

    def change_model(self, model: nn.Module) -> None:
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] = torch.nan


class OverflowInHalf(InRun):
    """One layer's weights have been scaled twice: its sums are too large for float16."""

    settings = LORA | {"precision": {"mode": "native_fp16", "fallback": ["fp32"]}}

    def change_model(self, model: nn.Module) -> None:
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(100)
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(3e4)


class RunRateJumps(InRun):
    """The schedule jumps to a hundred times its rate at step 40."""

    settings = FULL | {"precision": {"mode": "fp32"}, "optim": {"lr": 1e-3, "warmup_steps": 0}}
    steps = 50

    def spoil(self, run: Run) -> None:
        before = run.lr
        run.lr = lambda step: before(step) * (100 if step >= 40 else 1)


class RunLostUpdates(InRun):
    """Trained weights in bfloat16 without masters, with a rate that bfloat16 cannot add."""

    settings = FULL | {
        "precision": {"mode": "bf16", "trainable_dtype": "bf16", "masters": "none"},
        "optim": {"lr": 1e-5},
    }


class RunFrozenChanged(InRun):
    """A callback of the user writes into a frozen weight in the seventh step."""

    settings = LORA | {"precision": {"mode": "fp32"}}

    def spoil(self, run: Run) -> None:
        calls = []

        def write(module: nn.Module, inputs: Any) -> None:
            calls.append(1)
            if len(calls) == 7:
                with torch.no_grad():
                    module.get_parameter("self_attn.v_proj.base_layer.weight").mul_(0.9)

        model_of(run).get_submodule("base_model.model.model.layers.1").register_forward_pre_hook(write)


class RunNanSample(InRun):
    """One record makes a layer return NaN, as a broken kernel does for one length."""

    settings = LORA | {"precision": {"mode": "fp32", "max_skips": 50, "max_nonfinite_losses": 50}}

    def records(self) -> list[dict[str, Any]]:
        return [*super().records(), {"text": "17: ~"}]

    def spoil(self, run: Run) -> None:
        tilde = model_of(run).get_submodule("base_model.model.model.embed_tokens")

        def spoilt(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where((inputs[0] == ord("~") - ord("!")).any(1)[:, None, None], torch.nan, output)

        tilde.register_forward_hook(spoilt)


class HealthyRun(InRun):
    """LoRA in float16 with the policy's own scaler."""

    settings = LORA | {"precision": {"mode": "native_fp16"}}
    steps = 30


FAULTS = (
    Fault(
        "run: NaN in the base model",
        "weights",
        NanInBase,
        ("model", "hardware", "not known"),
        r"finite|nan",
        lambda f: f.cause.place.parameter.endswith("layers.1.mlp.down_proj.weight") and f.step == 0,
        crash=TrainingError,
    ),
    Fault(
        "run: float16 overflow in one layer",
        "origin",
        OverflowInHalf,
        ("precision", "model"),
        r"overflow|float16|65504|finite|\bsize\b|absurd",
        lambda f: f.cause.place.module.endswith("layers.1.mlp.down_proj") and f.step == 0,
    ),
    Fault(
        "run: the learning rate jumps",
        "jumps",
        RunRateJumps,
        ("optimizer",),
        r"\blr\b|learning rate",
        lambda f: within(f, 40, 41),
    ),
    Fault(
        "run: bfloat16 weights with lr 1e-5",
        "weights",
        RunLostUpdates,
        ("precision", "optimizer"),
        r"lost|round|updates?\b",
        lambda f: bool(f.cause.place.parameter or f.cause.place.optimizer) and within(f, 0, 10),
    ),
    Fault(
        "run: a frozen weight is changed",
        "weights",
        RunFrozenChanged,
        ("model", "optimizer", "hardware", "not known"),
        r"chang|written|differ",
        lambda f: f.cause.place.parameter.endswith("layers.1.self_attn.v_proj.base_layer.weight") and within(f, 5, 10),
    ),
    Fault(
        "run: NaN in the rows of one sample",
        "origin",
        RunNanSample,
        ("data", "model"),
        r"finite|nan",
        lambda f: "17" in f.cause.place.sample and f.cause.place.module.endswith("embed_tokens"),
    ),
)
CONTROLS = (Control("run: LoRA in native float16", HealthyRun),)
