"""Training with sharded weights gives the losses, gradients and files of DDP, and either continues the other."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.listen.config import ListenConfig
from rawloop.loop import TrainConfig, train
from rawloop.optim import OptimConfig
from rawloop.precision.config import PrecisionConfig
from rawloop.records import read_metrics
from rawloop.settings import DDPConfig
from rawloop.sharding import find_blocks, part_of, shard
from rawloop.watch.config import WatchConfig

SLOT = "checkpoints/step-00000002"


@pytest.fixture(scope="module")
def base(text_checkpoint: Path, text_data: Path) -> RunConfig:
    """Full fine-tuning of a tiny Llama in two micro-batches a step; five evaluation samples: uneven shares."""
    return RunConfig(
        device="cpu",
        model=ModelConfig(path=str(text_checkpoint)),
        adapter=AdapterConfig(mode="full"),
        data=DataConfig(train=str(text_data / "train.jsonl"), eval=str(text_data / "eval.jsonl")),
        train=TrainConfig(batch_size=1, accumulation=2, max_steps=4, log_every=1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1),
        precision=PrecisionConfig(mode="fp32"),
        evaluation=EvaluationConfig(every=2, batch_size=1),
        checkpoint=CheckpointConfig(save_every=2, keep_last=0),
    )


def train_ranks(world: World, configs: Sequence[RunConfig]) -> list[list[str]]:
    """Train one config after another; return what each has told."""
    told: list[list[str]] = []
    for config in configs:
        told.append([])
        run = build_run(config, world, told[-1].append)
        try:
            train(run)
        finally:
            run.close()
    return told


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint but those of the ranks' random streams."""
    files = sorted((folder / "checkpoints" / "step-00000004").rglob("*.safetensors"))
    files = [file for file in files if not file.name.startswith("rng")]
    assert len(files) > 1
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def check_equal(first: Path, second: Path, rel: float = 2e-6) -> None:
    """Compare the last metrics of two runs, and the weights and optimizer states of their last checkpoints."""
    for key in ("loss", "grad_norm", "eval_loss"):
        one, other = ([line[key] for line in read_metrics(folder) if key in line] for folder in (first, second))
        assert other
        assert other == pytest.approx(one[-len(other) :], rel=rel, abs=0), key
    before, after = stored(first), stored(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        gap = float((tensor.double() - after[name].double()).abs().max())
        assert gap <= rel, f"{name} differs by {gap}"


def variants(base: RunConfig) -> dict[str, RunConfig]:
    """Full fine-tuning and LoRA in every mode, and what else changes which weights a pass uses."""
    lora, recompute = AdapterConfig(rank=4), replace(base.model, activation_checkpointing=True)
    return {
        "full_native_fp16": replace(base, precision=PrecisionConfig(mode="native_fp16")),
        "lora": replace(base, adapter=lora),
        "full": base,
        "full_bf16": replace(base, precision=PrecisionConfig(mode="bf16")),
        "full_pure_bf16": replace(base, precision=PrecisionConfig(mode="bf16", trainable_dtype="bf16")),
        "full_amp_fp16": replace(base, precision=PrecisionConfig(mode="amp_fp16")),
        "lora_native_fp16": replace(base, adapter=lora, precision=PrecisionConfig(mode="native_fp16")),
        "lora_bf16": replace(base, adapter=lora, precision=PrecisionConfig(mode="bf16")),
        "dora": replace(base, adapter=replace(lora, dora=True)),
        "saved_head": replace(base, adapter=replace(lora, modules_to_save=["lm_head"])),
        "recompute": replace(base, model=recompute),
        "lora_recompute": replace(base, model=recompute, adapter=lora),
    }


OFF = "as it needs whole weights: the watch"
QUICK = ("full_native_fp16", "lora")
# and by which kind a run is resumed from its checkpoint in the middle, as another run
KINDS = (("ddp", None), ("fsdp", None), ("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp"))


def runs_of(config: RunConfig, folder: Path, kinds: Any) -> Iterator[RunConfig]:
    for first, second in kinds:
        resume = str(folder / first / SLOT) if second else None
        output = str(folder / (f"{first}-{second}" if second else first))
        yield replace(config, output=output, parallel=second or first, resume=resume)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sharded_training_equals_ddp_also_when_one_continues_the_other(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]], quick: bool
) -> None:
    chosen = {name: config for name, config in variants(base).items() if name in QUICK or not quick}
    kinds = KINDS[:3] if quick else KINDS
    configs = [run for name, config in chosen.items() for run in runs_of(config, tmp_path / name, kinds)]
    told, _ = run_ranks(train_ranks, configs)
    lines = [[line for line in lines if line.startswith("parallel:")] for lines in told]
    sharded = [f"parallel: fsdp, 2 blocks and the rest sharded over 2 processes; off, {OFF}"]
    assert lines == [sharded if config.parallel == "fsdp" else [] for config in configs]
    for name in chosen:
        for first, second in kinds[1:]:
            check_equal(tmp_path / name / "ddp", tmp_path / name / (f"{first}-{second}" if second else first))
        if not quick:
            check_equal(tmp_path / name / "fsdp", tmp_path / name / "fsdp-fsdp", rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_sharded_run_goes_on_in_one_process_and_in_four(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]], name: str
) -> None:
    plain = replace(variants(base)[name], output=str(tmp_path / "two"), parallel="fsdp")
    run_ranks(train_ranks, [plain])
    other = replace(plain, resume=str(tmp_path / "two" / SLOT))
    train_ranks(World(), [replace(other, output=str(tmp_path / "one"), train=replace(base.train, batch_size=2))])
    four = replace(other, output=str(tmp_path / "four"), train=replace(base.train, accumulation=1))
    run_ranks(train_ranks, [four], world_size=4)
    for folder in ("one", "four"):
        check_equal(tmp_path / "two", tmp_path / folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": OptimConfig(name="muon")}, "optim.name 'muon': only adamw is known"),
        (
            {"listen": ListenConfig(samples=1)},
            "prompts in listen: generating needs whole weights: use `rawloop generate`",
        ),
        ({"watch": WatchConfig(spikes="skip")}, "watch.spikes 'skip': the watch needs whole weights: set it to off"),
        ({"ddp": DDPConfig(broadcast_buffers=True)}, "ddp.broadcast_buffers true: it is a switch of DDP"),
        (
            {"ddp": DDPConfig(static_graph=True)},
            "ddp.static_graph true: it is a switch of DDP: set it to false, or set",
        ),
    ],
)
def test_what_needs_whole_weights_is_refused(base: RunConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^parallel is 'fsdp', with {re.escape(message)}"):
        replace(base, parallel="fsdp", **change)
    replace(base, **change)  # under DDP all of it is right


class Layer(nn.Module):
    """A block: a layer inside of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class Stacks(nn.Module):
    """Two lists of blocks, the blocks of one in turn with blocks inside; heads; and a list of different modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.encoder = nn.ModuleList(Layer() for _ in range(2))
        self.decoder = nn.ModuleList(nn.Sequential(nn.ModuleList(Layer() for _ in range(2))) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(3, 5) for _ in range(4))
        self.mixed = nn.ModuleList([Layer(), nn.Sequential(Layer())])


def test_blocks_are_the_outermost_repeated_modules() -> None:
    model = Stacks()
    assert find_blocks(model) == [*model.encoder, *model.decoder]
    model.encoder[1].inner.weight = model.embed.weight  # type: ignore[union-attr]
    assert find_blocks(model) == [model.encoder[0], *model.decoder]
    model.encoder[0] = nn.Sequential(nn.ReLU())  # without weights, and of another class
    assert find_blocks(model) == [*model.decoder]


def shard_alone(world: World, trained: bool) -> list[int]:
    """Shard a model with a scalar weight; return how many numbers of each weight are on this rank."""
    model = Stacks()
    model.scale = nn.Parameter(torch.ones(()), requires_grad=trained)
    shard(model, world.device)
    return [part_of(weight).numel() for weight in (model.embed.weight, model.scale)]


def test_a_trained_scalar_cannot_be_sharded_and_a_frozen_one_stays_whole(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(shard_alone, False) == [[9, 1], [6, 1]]  # rows of 3 and of 2
    with pytest.raises(UserError, match="scale is trained and has no dimension to shard: freeze it, or set parallel"):
        run_ranks(shard_alone, True)


def test_one_process_has_nothing_to_shard() -> None:
    with pytest.raises(UserError, match="one process cannot shard its weights: start several with torchrun"):
        shard(Stacks(), torch.device("cpu"))
