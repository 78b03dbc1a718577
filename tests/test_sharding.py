"""Training with sharded weights gives the losses, gradients and files of DDP, and either continues the other."""

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.contracts import Batch, StreamLoss
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import RawloopError, TrainingError, UserError
from rawloop.evaluate import EvaluationConfig, Evaluator
from rawloop.families import ModelConfig
from rawloop.host_memory import meta_copy
from rawloop.loop import TrainConfig, train
from rawloop.losses import LossModule
from rawloop.moving_buffers import MovingBuffers
from rawloop.optim import OptimConfig
from rawloop.precision.advice import explain_nonfinite, lost_updates
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.gradients import StepResult
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import read_metrics
from rawloop.rounding import StochasticRounding
from rawloop.settings import DDPConfig
from rawloop.sharding import find_blocks, lent_weights, part_of, reset, shard, whole
from tests.test_optimizers import options

SLOT = "checkpoints/step-00000002"
STOCHASTIC = PrecisionConfig(mode="bf16", trainable_dtype="bf16", masters="stochastic")


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


def check_metrics(first: Path, second: Path, rel: float) -> None:
    """Compare the last metrics of two runs."""
    for key in ("loss", "grad_norm", "eval_loss"):
        one, other = ([line[key] for line in read_metrics(folder) if key in line] for folder in (first, second))
        assert other
        assert other == pytest.approx(one[-len(other) :], rel=rel, abs=0), key


def check_equal(first: Path, second: Path, rel: float = 2e-6) -> None:
    """Compare the last metrics of two runs, and the weights and optimizer states of their last checkpoints."""
    check_metrics(first, second, rel)
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
        "full_stochastic": replace(base, precision=STOCHASTIC),
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


# Muon rounds to bfloat16 within its update; adamw_8bit has 32-bit state of parts without whole blocks.
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "full_native_fp16", "lora"])
@pytest.mark.parametrize(
    ("name", "rel"),
    [("lion", 2e-6), ("schedule_free", 2e-6), ("adafactor", 2e-6), ("muon", 1e-4), ("adamw_8bit", 1e-3)],
)
def test_every_optimizer_updates_parts_as_wholes(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]], name: str, rel: float, mode: str
) -> None:
    config = replace(variants(base)[mode], optim=options(name, lr=1e-3))
    if name == "schedule_free" and mode == "full_native_fp16":
        pytest.skip("schedule_free does not go with masters")
    run_ranks(train_ranks, list(runs_of(config, tmp_path, KINDS)))
    check = check_metrics if name == "adamw_8bit" else check_equal
    for first, second in KINDS[1:]:
        check(tmp_path / "ddp", tmp_path / (f"{first}-{second}" if second else first), rel)
    check_equal(tmp_path / "fsdp", tmp_path / "fsdp-fsdp", rel=0)


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
        (
            {"optim": OptimConfig(name="paged_adamw_8bit")},
            "optim.name 'paged_adamw_8bit': paged state is not sharded: take adamw_8bit, or set parallel to ddp",
        ),
        (
            {"model": ModelConfig(quantization="int8"), "adapter": AdapterConfig()},
            "model.quantization 'int8': quantised weights are not sharded: leave it out",
        ),
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
    model = Stacks()
    model.decoder.append(nn.Sequential(nn.ModuleList(Layer() for _ in range(2))))
    assert find_blocks(model) == [*model.decoder]  # the encoder has a fifth of the weights


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


class Branches(nn.Module):
    """Blocks of the same shapes, of which a pass runs the chosen ones."""

    def __init__(self, chosen: Sequence[int]) -> None:
        super().__init__()
        self.blocks, self.chosen = nn.ModuleList(Layer() for _ in range(3)), chosen

    def forward(self, x: Tensor) -> Tensor:
        for number in self.chosen:
            x = self.blocks[number](x)
        return x


def square(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
    return {"y": StreamLoss(model(batch.inputs["x"]).square().sum(), batch.targets["y"])}


def batch_of(number: int) -> Batch:
    return Batch({"x": torch.full((1, 3), float(number))}, {}, {"y": 1}, [f"sample {number}"])


class Own:
    """A loop of one's own with a sharded model."""

    def __init__(self, world: World, kind: Callable[[], nn.Module] = lambda: Branches((0, 1, 2))) -> None:
        torch.manual_seed(0)
        self.policy = PrecisionPolicy("fp32", world.device, world=world)
        self.module = LossModule(kind(), square)
        self.policy.prepare(self.module.model, shard(self.module, world.device) if world.size > 1 else None)
        self.optimizer = torch.optim.AdamW([weight for _, weight in self.policy.named_parameters()])

    def step(self, factor: float = 1.0) -> StepResult:
        self.policy.backward(self.module(batch_of(1))["y"].total * factor)
        return self.policy.step(self.optimizer, max_norm=1.0)


class Sometimes(nn.Module):
    """Blocks, one with a weight that a pass may leave out, and a head that it leaves out, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head, self.uses_all = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(3, 3), True
        self.blocks[0].gate = nn.Linear(3, 3)
        self.blocks[0].register_forward_hook(lambda block, _, y: block.gate(y) if self.uses_all else y)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x) if self.uses_all else x


def step_in_part(world: World) -> float:
    """Make a step in which rank 0 alone uses all weights; without ranks, from the mean of both losses."""
    own = Own(world, Sometimes)
    for rank in range(2) if world.size == 1 else [world.rank]:
        own.module.model.uses_all = rank == 0  # type: ignore[assignment]
        own.policy.backward(own.module(batch_of(1))["y"].total * (0.5 if world.size == 1 else 1.0))
    return own.policy.step(own.optimizer, max_norm=1.0).grad_norm


def test_a_weight_that_one_rank_alone_uses_is_reduced_with_zeros(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(step_in_part) == [pytest.approx(step_in_part(World()))] * 2


def run_branches(world: World, chosen: Sequence[Sequence[int]]) -> float:
    return Own(world, lambda: Branches(chosen[world.rank])).step().grad_norm


def test_ranks_that_run_different_blocks_are_found_before_the_update(run_ranks: Callable[..., list[Any]]) -> None:
    alone = Own(World()).step().grad_norm
    assert run_ranks(run_branches, [(0, 1, 2)] * 2) == [pytest.approx(alone)] * 2
    with pytest.raises(TrainingError, match="the ranks have run different blocks of the model, each of which gathers"):
        run_ranks(run_branches, [(0, 1, 2), (0, 2, 1)])


class Fails(torch.autograd.Function):
    """Passes numbers on, and fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise ArithmeticError("in the backward pass")


def fail(*_: Any) -> None:
    raise ArithmeticError("in the forward pass")


def go_on_after_failures(world: World) -> list[float]:
    """Let a pass fail on all ranks in the second of three blocks, forward and then backward; return later norms."""
    own, norms = Own(world), []
    inner = own.module.model.blocks[1].inner  # type: ignore[index]
    for what in (fail, lambda module, inputs, output: Fails.apply(output)):  # type: ignore[no-untyped-call]
        hook = inner.register_forward_hook(what)  # type: ignore[union-attr]
        with pytest.raises(ArithmeticError):
            own.module(batch_of(1))["y"].total.backward()
        hook.remove()
        reset(own.module)
        own.policy.zero_grad()
        norms.append(own.step().grad_norm)
    return norms


def test_passes_after_one_that_failed_on_all_ranks_are_as_usual(run_ranks: Callable[..., list[Any]]) -> None:
    alone = Own(World())
    norms = [alone.step().grad_norm, alone.step().grad_norm]
    assert run_ranks(go_on_after_failures) == [pytest.approx(norms)] * 2


class SharedBuffer(nn.Module):
    """Two blocks with the same tensor as a buffer of each, and a head with the weight of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        positions = torch.randn(3)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        for block in self.blocks:
            block.register_buffer("positions", positions)
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def lend(world: World) -> None:
    """Check that a copy has all numbers of a sharded model, also those that it has in two places."""
    model, plain = SharedBuffer(), SharedBuffer()
    plain.load_state_dict(model.state_dict())
    form = meta_copy(model)
    model.register_buffer("cache", torch.ones(2), persistent=False)  # as a forward pass may
    shard(model, world.device)
    with lent_weights(form, model):
        found = form.state_dict()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(found[name], tensor), name
        assert form.head.weight is form.embed.weight  # type: ignore[union-attr]
    assert all(tensor.is_meta for tensor in form.state_dict().values())


def test_lent_weights_and_buffers_are_in_each_of_their_places(run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(lend)


def skip_once(world: World) -> list[Any]:
    """Two steps, the first with a loss that is not finite on rank 1; return what a rank has seen."""
    own = Own(world)
    results = [own.step(math.nan if world.rank else 1.0), own.step()]
    return [[result.applied for result in results], results[1].grad_norm, len(own.optimizer.state)]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(skip_once) == [[[False, True], pytest.approx(Own(World()).step().grad_norm), 6]] * 2


class Norms(nn.Module):
    """Blocks with buffers that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def train_norms(world: World, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Two windows of which the second is not finite on rank 1; return this rank's buffers, and rank 0's weights."""
    torch.manual_seed(0)
    policy = PrecisionPolicy("fp32", world.device, world=world)
    raw = LossModule(Norms(), square)
    policy.prepare(raw.model, shard(raw, world.device) if kind == "fsdp" else None)
    module = world.wrap(raw)
    assert policy.model is not None
    buffers = MovingBuffers(policy.model, [name for name, _ in policy.model.named_buffers()])
    optimizer = torch.optim.AdamW([weight for _, weight in policy.named_parameters()], lr=0.1)
    for factor in (1.0, math.nan if world.rank else 1.0):
        buffers.start_window()
        batch = Batch({"x": torch.randn(4, 3) + world.rank}, {}, {"y": 4}, ["a"])
        policy.backward(module(batch)["y"].total * factor)
        result = policy.step(optimizer, 1.0, buffers.floats())
        buffers.make_equal(world) if result.applied else buffers.restore()
    return buffers.values(), [whole(weight.detach()) for _, weight in policy.named_parameters()]


def test_moving_buffers_are_equal_on_all_ranks_as_under_ddp(run_ranks: Callable[..., list[Any]]) -> None:
    (plain, weights), _ = run_ranks(train_norms, "ddp")
    (first, trained), (second, _) = run_ranks(train_norms, "fsdp")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    for one, other in zip([*plain, *weights], [*first, *trained], strict=True):
        torch.testing.assert_close(one, other)
    assert [int(count) for count in first if count.ndim == 0] == [1, 1]  # batches that were applied


class Batches:
    """Some batches; after them, perhaps, an error."""

    def __init__(self, numbers: Sequence[int], error: Exception | None) -> None:
        self.numbers, self.error = numbers, error

    def __call__(self) -> Iterator[Batch]:
        yield from map(batch_of, self.numbers)
        if self.error is not None:
            raise self.error


def evaluate_rank(world: World, numbers: Sequence[Sequence[int]], fails: bool, stops: bool) -> Any:
    error = UserError("a bad sample") if fails and world.rank else None
    own = Own(world)
    ready = Evaluator(operator.call, Batches(numbers[world.rank], error), model=own.module, policy=own.policy)
    try:
        metrics = ready.run(lambda: "SIGTERM" if stops and world.rank else None).metrics
    except RawloopError as caught:
        return type(caught).__name__, str(caught)
    assert own.step().applied  # the ranks are in step with each other
    return metrics["eval_loss"], metrics["eval_targets/y"]


@pytest.mark.parametrize("numbers", [[(1, 2, 3), ()], [(), (1, 2, 3)], [(1,), (2, 3)]])
def test_an_evaluation_takes_uneven_shares(run_ranks: Callable[..., list[Any]], numbers: list[tuple[int, ...]]) -> None:
    alone = evaluate_rank(World(), [(1, 2, 3)], False, False)
    assert alone[1] == 3
    assert run_ranks(evaluate_rank, numbers, False, False) == [pytest.approx(alone)] * 2


def test_an_evaluation_ends_on_all_ranks_with_the_cause_of_one(run_ranks: Callable[..., list[Any]]) -> None:
    numbers = [(1, 2, 3), (4,)]
    failed = [("UserError", "rank 1: a bad sample"), ("UserError", "a bad sample")]
    assert run_ranks(evaluate_rank, numbers, True, False) == failed
    assert run_ranks(evaluate_rank, numbers, False, True) == [("Preempted", "SIGTERM on rank 1")] * 2


def train_and_count(world: World, configs: Sequence[RunConfig]) -> list[tuple[int, int]]:
    """Train; return how many numbers of weights and optimizer state this rank holds, and how often it has reduced."""
    found = []
    for config in configs:
        run = build_run(config, world, lambda line: None)
        with mock.patch.object(dist, "reduce_scatter_single", wraps=dist.reduce_scatter_single) as reduce:
            train(run)
        run.close()
        weights = [weight for _, weight in run.policy.named_parameters()]
        states = [value for weight in weights for value in run.optimizer.state[weight].values() if value.ndim]
        found.append((sum(part_of(tensor).numel() for tensor in [*weights, *states]), reduce.call_count))
    return found


def test_ranks_share_the_memory_and_reduce_each_group_once_a_step(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    plain = replace(base, evaluation=EvaluationConfig(enabled=False), checkpoint=CheckpointConfig(0))
    runs = [replace(plain, parallel=kind, output=str(tmp_path / kind)) for kind in ("ddp", "fsdp")]
    shares = run_ranks(train_and_count, runs)
    held = shares[0][0][0]
    assert [share[0] for share in shares] == [(held, 0)] * 2
    assert sum(share[1][0] for share in shares) == held
    assert max(share[1][0] for share in shares) < 0.51 * held
    assert [share[1][1] for share in shares] == [4 * 3] * 2  # steps x (2 blocks and the rest), in 2 micro-batches each


def explain(world: World) -> tuple[str, str]:
    """What a rank says of a weight with a NaN in the last rank's part, and of the updates that bfloat16 loses."""
    model = Branches([0, 1])
    with torch.no_grad():
        next(iter(model.parameters()))[-1] = math.nan
    shard(model, torch.device("cpu"))
    wrong = explain_nonfinite(model, "loss", [], fp16=False)
    with torch.no_grad():
        for weight in model.parameters():
            part_of(weight).zero_()
    assert ", or set parallel to ddp for the finding `not_finite`" in explain_nonfinite(model, "norm", [], fp16=False)
    policy = PrecisionPolicy(PrecisionConfig(mode="bf16", trainable_dtype="bf16", masters="none"), world=world)
    half = policy.prepare(Branches([0, 1]))
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-5)
    whole_share = lost_updates(policy.trained, optimizer)
    shard(half, torch.device("cpu"))
    share = lost_updates(policy.trained, torch.optim.AdamW(half.parameters(), lr=1e-5))
    assert share == whole_share
    rounded = [nn.Linear(6, 5).bfloat16(), nn.Linear(6, 5).bfloat16()]  # 3 rows and 2; the numbers are rank 0's
    for tensor in (w for each in rounded for w in each.parameters()):
        nn.init.ones_(tensor)
    shard(rounded[1], torch.device("cpu"))
    for module in rounded:
        lent = StochasticRounding(torch.device("cpu"))
        held = [(name, lent.stand_in(weight)) for name, weight in module.named_parameters()]
        lent.fill([each for _, each in held])
        for _, each in held:
            part_of(each.detach()).add_(2**-8)
        lent.write(held)
    for one, other in zip(rounded[0].parameters(), rounded[1].parameters(), strict=True):
        assert torch.equal(one, other.full_tensor())  # type: ignore[attr-defined]
        assert one.ndim == 1 or 1 < one.float().mean() < 1 + 2**-7
    return wrong, share


def test_what_is_said_of_the_numbers_holds_for_the_parts_of_all_ranks(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(explain)
    assert first == second
    assert first[0].startswith("1 of the model's weights and buffers are not finite, first ")


def held_in_rehearsals(world: World, configs: Sequence[RunConfig]) -> list[int]:
    """The bytes of all empty tensors that are made until a run starts, for each run; then those of the weights."""
    found: list[int] = []
    for config in configs:
        with mock.patch.object(torch, "empty", wraps=torch.empty) as made:
            run = build_run(config, world, lambda line: None)
        run.close()
        shapes = [call.args[0] for call in made.call_args_list if isinstance(call.args[0], torch.Size)]
        found.append(4 * sum(map(math.prod, shapes)))
    return [*found, sum(4 * weight.numel() for _, weight in run.policy.named_parameters())]


def test_the_rehearsal_holds_whole_gradients_if_they_are_added_up(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    plain = replace(base, parallel="fsdp", checks=ChecksConfig(enabled=False))
    runs = [
        replace(plain, output=str(tmp_path / str(number)), train=replace(base.train, accumulation=number))
        for number in (1, 2)
    ]
    (none, held, weights), _ = run_ranks(held_in_rehearsals, runs)
    assert held - none == weights
