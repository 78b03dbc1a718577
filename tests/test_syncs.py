"""What a step may ask of the device: one wait, however many micro-batches it has, and no memory that grows.

On a GPU every `.item()`, `.tolist()` or `.cpu()` makes the host wait for all that is queued. Here they are counted on
the CPU, where they cost nothing, in real training: what waits here waits there.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch has no types for its modes and weak references)

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from operator import call
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import rawloop
from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.buffers import places
from rawloop.contracts import Batch, Labels, StreamLoss
from rawloop.data.batches import BatchPlan, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.dist import World
from rawloop.evaluate import Evaluator
from rawloop.loop import Run, train
from rawloop.losses import LossModule, Meter
from rawloop.moving_buffers import MovingBuffers
from rawloop.optim import OptimConfig, build_optimizer
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import Records, RecordsConfig
from rawloop.settings import DDPConfig

CPU = torch.device("cpu")
PACKAGE = Path(rawloop.__file__).parent
VOCAB, LENGTH, LOG_EVERY = 64, 12, 3
STOCHASTIC = PrecisionConfig("bf16", trainable_dtype="bf16", masters="stochastic")
# Calls that read a tensor's values without an operator that the dispatcher would see.
READS = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__, Tensor.__repr__}
# Operators whose result, or its size, the host must know.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2", "_unique2", "unique_dim", "is_nonzero"}

Look = Callable[[Tensor], object]


class Waits:
    """Counts what makes the host wait, by the step in which it happens: `counts[step]["item"]`."""

    def __init__(self, step: Callable[[], int]) -> None:
        self.counts: dict[int, Counter[str]] = {}
        self.step = step

    def note(self, name: str) -> None:
        self.counts.setdefault(self.step(), Counter())[name] += 1


@contextmanager
def waits_counted(step: Callable[[], int] = int) -> Iterator[Waits]:
    waits = Waits(step)
    with Calls(waits), Operators(waits):
        yield waits


class Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in (args[1] if name == "index" else ()) if i is not None and i.dtype == torch.bool]
        if name in WAITS or masks:  # indexing with a mask looks for its true places
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class Memory(TorchDispatchMode):
    """Knows the bytes of all tensors made since it was entered that are still held, by Python or by a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = (reference, storage.nbytes())
        return result

    def held(self) -> int:
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        return sum(size for _, size in self.made.values())


def collate(rows: list[Tensor]) -> Batch:
    ids = torch.stack(rows)
    positions = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    labels = Labels(positions, ids[:, 1:].flatten())
    return Batch({"input_ids": ids}, {"text": labels}, {"text": len(positions)}, [f"row {i}" for i in range(len(rows))])


def as_it_is(row: Any) -> Any:
    return row


def losses(look: Look) -> Callable[[nn.Module, Batch], dict[str, StreamLoss]]:
    """The loss of a language model; `look` is shown the loss of every micro-batch.

    Without a whole mask transformers looks for packed sequences in every forward pass, and waits for what it finds.
    """
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]

    def score(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        positions, targets = batch.labels["text"]
        logits = model(**batch.inputs, attention_mask=causal).logits.flatten(0, 1).index_select(0, positions)
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        look(total.detach())
        return {"text": StreamLoss(total, batch.targets["text"])}

    return score


def nothing(_: Tensor) -> None:
    """Not looking."""


def loader(length: int) -> Loader:
    samples: Any = torch.randint(VOCAB, (length, LENGTH), generator=torch.Generator().manual_seed(1))
    return Loader(MicroBatches(samples, as_it_is, collate))


def build(
    folder: Path,
    *,
    steps: int,
    accumulation: int = 1,
    look: Look = nothing,
    world: World | None = None,
    mode: Any = "fp32",
    moving: bool = False,
) -> Run:
    """A real run of a Llama of one layer with LoRA."""
    torch.manual_seed(0)
    world = world or World()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    scale = LossScaleConfig(init=2.0**10) if "fp16" in mode else LossScaleConfig()  # small enough to skip nothing
    precision = STOCHASTIC if mode == "stochastic" else PrecisionConfig(mode=mode, loss_scale=scale)
    policy = PrecisionPolicy(precision, CPU, world=world)
    model: nn.Module = LlamaForCausalLM(config)
    model = policy.prepare(add_adapter(model, AdapterConfig(rank=2), []))
    return Run(
        module=world.wrap(LossModule(model, losses(look)), DDPConfig()),
        windows=TrainWindows(loader(64), BatchPlan(64, 2, accumulation, world.size, world.rank, shuffle=False)),
        policy=policy,
        optimizer=build_optimizer(model.named_parameters(), OptimConfig()),
        lr=lambda _: 1e-3,
        total_steps=steps,
        weights={"text": 1.0},
        records=Records(folder, world, RecordsConfig()),
        world=world,
        buffers=MovingBuffers(model, list(places(model)) if moving else []),
        log_every=LOG_EVERY,
    )


def waits_of(run: Run) -> list[Counter[str]]:
    """Train, and count from one window's taking to the next; a log line comes at the end of its step.

    The first is left out: there the loader is opened and draws a seed, on the CPU.
    """
    with run.records, waits_counted(lambda: run.state.window) as waits:
        train(run)
    return [waits.counts[step] for step in range(1, run.total_steps + 1)]


NORM = Counter(tolist=1)  # of the gradients, with the sum of the losses: are they finite?
LINE = Counter(_local_scalar_dense=1)  # the loss; counted with the step after


@pytest.mark.parametrize("mode", ["fp32", "bf16", "stochastic", "amp_fp16", "native_fp16"])
def test_a_step_waits_once_however_many_micro_batches_it_has(tmp_path: Path, mode: str) -> None:
    one = waits_of(build(tmp_path / "1", steps=7, mode=mode))
    four = waits_of(build(tmp_path / "4", steps=7, accumulation=4, mode=mode, moving=True))
    assert one == four == [NORM, NORM, LINE + NORM, NORM, NORM, LINE + NORM, LINE]


@pytest.mark.parametrize(
    "look",
    [
        lambda loss: loss.item(),
        lambda loss: loss.tolist(),
        lambda loss: loss.cpu(),
        lambda loss: loss.numpy(),
        lambda loss: float(loss),
        lambda loss: bool(loss),
        lambda loss: f"{loss:.3f}",
        lambda loss: str(loss),
        lambda loss: loss.nonzero(),
        lambda loss: loss[loss > 0],
    ],
)
def test_a_look_at_every_micro_batch_is_seen(tmp_path: Path, look: Look) -> None:
    counts = waits_of(build(tmp_path, steps=2, accumulation=4, look=look))
    assert (counts[0] - NORM).total() >= 4


def rank_waits(world: World, folder: Path) -> list[list[Counter[str]]]:
    runs = (build(folder / str(size), steps=4, accumulation=size, world=world) for size in (1, 4))
    return [waits_of(run) for run in runs]


def test_ranks_agree_without_more_waits_for_more_micro_batches(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    for one, four in run_ranks(rank_waits, tmp_path):
        assert one == four


def evaluator_of(run: Run, batches: int, look: Look = nothing) -> Evaluator:
    assert isinstance(run.module, LossModule)
    run.module.losses = losses(look)
    share = EvalBatches(loader(2 * batches), 2 * batches, 2)
    return Evaluator(call, share, model=run.module, policy=run.policy, world=run.world, weights=run.weights)


def test_an_evaluation_waits_no_more_for_more_batches(tmp_path: Path) -> None:
    run, counts = build(tmp_path, steps=1), []
    with run.records:
        for batches in (2, 20):
            with waits_counted() as waits:
                evaluator_of(run, batches).run()
            counts.append(waits.counts)
    assert counts[0] == counts[1]


def look_back(run: Run, measure: Callable[[], int]) -> list[int]:
    """Train, and measure twice: after 30 steps and after 99, when a window's micro-batches are loaded."""
    found: list[int] = []

    def lr(step: int) -> float:  # asked once per step
        if step in (30, 99):
            gc.collect()
            found.append(measure())
        return 1e-3

    run.lr = lr
    with run.records:
        train(run)
    return found


@pytest.mark.parametrize("log_every", [LOG_EVERY, pytest.param(1000, marks=pytest.mark.slow)])
def test_training_holds_no_more_tensors_after_more_steps(tmp_path: Path, log_every: int) -> None:
    run = build(tmp_path, steps=100, accumulation=2)
    run.log_every = log_every
    with Memory() as memory:
        first, last = look_back(run, memory.held)
    assert first == last > 0


@pytest.mark.parametrize("log_every", [pytest.param(LOG_EVERY, marks=pytest.mark.slow), 1000])
def test_training_holds_no_more_objects_after_more_steps(tmp_path: Path, log_every: int) -> None:
    run = build(tmp_path, steps=100, accumulation=2)
    run.log_every = log_every
    tracemalloc.start()
    try:
        first, last = look_back(run, bytes_of_rawloop)
    finally:
        tracemalloc.stop()
    assert last - first < 500  # a number kept per step would be 69 x 24 bytes


def bytes_of_rawloop() -> int:
    """Bytes of the Python objects that rawloop's own lines have made and that are still held."""
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, str(PACKAGE / "*"))])
    return sum(trace.size for trace in snapshot.traces)


def test_the_meter_holds_no_graph(tmp_path: Path) -> None:
    run = build(tmp_path, steps=1)
    meter = Meter()
    with run.records:
        for (batch,) in islice(run.windows(0), 2):
            meter.add(run.module(batch))
    assert not meter.totals["text"].requires_grad


def test_an_evaluation_holds_a_few_bytes_per_batch(tmp_path: Path) -> None:
    batches = 40
    held: list[int] = []

    def look_around(_: Tensor) -> None:
        held.append(memory.held())

    run = build(tmp_path, steps=1)
    with run.records, Memory() as memory:
        evaluator_of(run, batches, look_around).run()
    logits = 2 * LENGTH * VOCAB * 4  # bytes of one batch
    assert held[0] > logits
    assert held[-1] - held[0] < batches * 64 < logits
