"""Time rawloop's loop and its peers against a loop written by hand, on the same tiny LoRA model.

    pip install -e '.[bench]'
    python tests/benchmarks/loop_overhead.py --rounds 10 --steps 200       # --device cuda

A step of this model takes about 2 ms on one thread, so the overhead of a loop is visible. All peers get the same
weights, the same rows in the same order, the same loss function, fused AdamW, the norm clipped at 1.0, a linear
schedule and a log line every 10 steps.

The speed of a machine drifts, so the peers of a round take turns of a few steps, in a different order every round.
Ratios are taken within a turn, then the median over the turns of a round, then over the rounds. The clock runs from one
forward pass to a later one: it sees whole steps and one log line, but neither set-up nor the end of training.

A peer that ends with a different loss than the bare loop did different work; the script names it and fails.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import call
from pathlib import Path
from typing import Any, NamedTuple, TextIO

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from rawloop.checkpoint.best import BestTracker
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.contracts import Batch, StreamLoss
from rawloop.data.batches import BatchPlan, EvalBatches, Loader, MicroBatches, TrainWindows
from rawloop.dist import World
from rawloop.evaluate import Evaluator
from rawloop.loop import Run, train
from rawloop.losses import LossModule
from rawloop.moving_buffers import MovingBuffers
from rawloop.optim import OptimConfig, build_optimizer, lr_at
from rawloop.optim_state import NamedOptimizerState
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.modes import MODES
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import Records, RecordsConfig
from rawloop.run import TrainState
from rawloop.seed import RngState
from rawloop.watch.config import WatchConfig
from rawloop.watched import build_watch

HIDDEN = 192
LR, MAX_NORM, LOG_EVERY, NEVER = 1e-3, 1.0, 10, 10**9
TURN, TIMED = 12, LOG_EVERY  # steps; the first of a turn find the caches full of another peer's data
SAME_LOSS = 2e-5  # nats; other orders of summation differ by less, other work by more
CPU = torch.device("cpu")

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """A step: rows of so many tokens, on a device, with or without autocast to bfloat16."""

    batch: int = 2
    length: int = 16
    vocab: int = 256
    device: torch.device = CPU
    mode: Any = "fp32"

    @property
    def targets(self) -> int:
        return self.batch * (self.length - 1)

    def loss(self, model: Any, batch: Row) -> Tensor:
        """The mean over a batch's targets, for the peers that have no precision policy."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mode == "bf16"):
            return summed_nats(model(input_ids=batch["input_ids"]).logits, batch["labels"]) / self.targets


class Rows(Dataset[Row]):
    """Random token ids, the same for everybody, from a part of the vocabulary: something that can be learnt."""

    def __init__(self, steps: int, seed: int, work: Work) -> None:
        shape, generator = (steps * work.batch, work.length), torch.Generator().manual_seed(seed)
        self.ids, self.work = torch.randint(work.vocab // 8, shape, generator=generator), work

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def collate(rows: list[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Relay:
    """Lets one peer run at a time."""

    def __init__(self, names: list[str]) -> None:
        self.waiting = deque(names)
        self.changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Return when it is this peer's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == name)

    def hand_on(self) -> None:
        """Let the next one run; whoever calls this comes last."""
        with self.changed:
            self.waiting.rotate(-1)
            self.changed.notify_all()

    def leave(self) -> None:
        """Let the next one run, for good."""
        with self.changed:
            self.waiting.popleft()
            self.changed.notify_all()


class Seconds(NamedTuple):
    """Per step, by the wall's clock and by the processor's."""

    wall: float
    cpu: float


class Stopwatch:
    """Counts forward passes in training, hands on to the next peer where a turn ends, and times the turns' steps."""

    def __init__(self, model: Any, name: str, relay: Relay) -> None:
        self.name, self.relay, self.device = name, relay, next(model.parameters()).device
        self.steps = 0
        self.start = Seconds(0.0, 0.0)
        self.turns: list[Seconds] = []
        getattr(model, "get_base_model", lambda: model)().register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, _: Any) -> None:
        if not module.training:
            return
        place = self.steps % TURN
        if self.device.type == "cuda" and place in (0, TURN - TIMED):
            torch.cuda.synchronize()
        now = Seconds(time.perf_counter(), time.thread_time())
        if place == 0 and self.steps:
            self.turns.append(Seconds(*((end - start) / TIMED for end, start in zip(now, self.start, strict=True))))
            self.relay.hand_on()
            self.relay.wait(self.name)
        if place == TURN - TIMED:
            self.start = now
        self.steps += 1


def build_model(work: Work) -> Any:
    """A 1-layer Llama with LoRA on its attention, the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    return model.to(work.device).train()


def fused_adamw(model: nn.Module) -> AdamW:
    return AdamW(trainable(model), lr=LR, weight_decay=0.0, fused=True)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def in_order(rows: Rows) -> DataLoader[Row]:
    return DataLoader(rows, batch_size=rows.work.batch, shuffle=False, collate_fn=collate)


def summed_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss function of all peers: the sum over a batch's targets."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def write_line(log: TextIO, step: int, loss: Tensor, norm: Tensor | None, schedule: Any) -> None:
    assert norm is not None
    line = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": schedule.get_last_lr()[0]}
    print(json.dumps(line), file=log, flush=True)


def bare(model: Any, rows: Rows, folder: Path) -> None:
    """A loop by hand: no progress bar, no test for finite gradients, a line of JSON now and then."""
    optimizer = fused_adamw(model)
    loader = in_order(rows)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    parameters = trainable(model)
    with (folder / "log.jsonl").open("w") as log:
        for step, batch in enumerate(loader, start=1):
            inputs = {name: tensor.to(rows.work.device) for name, tensor in batch.items()}
            loss = rows.work.loss(model, inputs)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                write_line(log, step, loss, norm, schedule)


def losses(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
    logits = model(input_ids=batch.inputs["input_ids"]).logits
    return {"text": StreamLoss(summed_nats(logits, batch.inputs["labels"]), batch.targets["text"])}


def to_batch(rows: list[Row]) -> Batch:
    return Batch(
        collate(rows),
        {},
        {"text": len(rows) * (len(rows[0]["labels"]) - 1)},
        [str(i) for i in range(len(rows))],
    )


def as_it_is(row: Any) -> Any:
    return row


def rawloop(model: Any, rows: Rows, folder: Path, watched: bool = True) -> None:
    """With everything that is on by default; an evaluation and a save are asked for at every step, but never due."""
    work, world, state, best = rows.work, World(device=rows.work.device), TrainState(), BestTracker()
    total = len(rows) // work.batch
    config = OptimConfig(lr=LR, schedule="linear", max_norm=MAX_NORM)
    policy = PrecisionPolicy(PrecisionConfig(mode=work.mode), work.device, world=world)
    model = policy.prepare(model)
    module = LossModule(model, losses)
    optimizer = build_optimizer(policy.named_parameters(), config)
    samples: Any = rows
    loader = Loader(MicroBatches(samples, as_it_is, to_batch))
    weights = {"text": 1.0}
    with Records(folder, world, RecordsConfig()) as records:
        parts: dict[str, Any] = {
            "optimizer": NamedOptimizerState(optimizer, policy.named_parameters),
            "precision": policy,
            "train": state,
            "best": best,
            "rng": RngState(0, 0),
        }
        run = Run(
            module=module,
            windows=TrainWindows(loader, BatchPlan(len(rows), work.batch, shuffle=False)),
            policy=policy,
            optimizer=optimizer,
            lr=lambda step: lr_at(step, total, config),
            total_steps=total,
            weights=weights,
            records=records,
            world=world,
            state=state,
            buffers=MovingBuffers(model),  # it has none; looking for them takes a forward pass that is not timed
            evaluator=Evaluator(
                call,
                EvalBatches(loader, work.batch, work.batch),
                model=module,
                policy=policy,
                world=world,
                weights=weights,
                every=NEVER,
            ),
            checkpoints=CheckpointManager(folder, CheckpointConfig(save_every=NEVER), world, records, parts),
            best=best,
            max_norm=MAX_NORM,
            log_every=LOG_EVERY,
        )
        assert run.checkpoints is not None
        run.checkpoints.start(0)
        if watched:
            run.watch = build_watch(run, folder, WatchConfig())
        train(run)


def accelerate(model: Any, rows: Rows, folder: Path) -> None:
    """The loop of accelerate's own examples."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=rows.work.device == CPU)
    optimizer = fused_adamw(model)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(rows) // rows.work.batch)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, in_order(rows), schedule)
    parameters = trainable(model)
    with (folder / "log.jsonl").open("w") as log:
        for step, batch in enumerate(loader, start=1):
            with accelerator.accumulate(model):
                loss = rows.work.loss(model, batch)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(parameters, MAX_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                write_line(log, step, loss, norm, schedule)
    accelerator.free_memory()


def fabric(model: Any, rows: Rows, folder: Path) -> None:
    """The loop of Lightning Fabric's own examples."""
    from lightning_fabric import Fabric

    lightning = Fabric(accelerator=rows.work.device.type, devices=1)
    wrapped, optimizer = lightning.setup(model, fused_adamw(model))
    loader = lightning.setup_dataloaders(in_order(rows))
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    with (folder / "log.jsonl").open("w") as log:
        for step, batch in enumerate(loader, start=1):
            loss = rows.work.loss(wrapped, batch)
            lightning.backward(loss)
            norm = lightning.clip_gradients(wrapped, optimizer, max_norm=MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                write_line(log, step, loss, norm, schedule)


def trainer(model: Any, rows: Rows, folder: Path) -> None:
    """HF Trainer with its defaults, except for the settings that all peers share."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows.work.batch,
        max_steps=len(rows) // rows.work.batch,
        learning_rate=LR,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        max_grad_norm=MAX_NORM,
        logging_steps=LOG_EVERY,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        use_cpu=rows.work.device == CPU,
        bf16=rows.work.mode == "bf16",
    )

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return summed_nats(outputs.logits, labels) / rows.work.targets

    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, compute_loss_func=loss).train()


PEERS: dict[str, Callable[[Any, Rows, Path], None]] = {
    "bare loop": bare,
    "rawloop": rawloop,
    "rawloop unwatched": partial(rawloop, watched=False),
    "accelerate": accelerate,
    "Fabric": fabric,
    "HF Trainer": trainer,
}
PACKAGES = {"accelerate": "accelerate", "Fabric": "lightning-fabric"}


class Measured(NamedTuple):
    """One peer in one round: seconds per step of each turn, and its loss afterwards."""

    turns: list[Seconds]
    loss: float


def run_round(
    names: list[str], steps: int, folder: Path, work: Work, build: Callable[[Work], Any] = build_model
) -> dict[str, Measured]:
    """Train all peers, each in a thread of its own. One of them runs at a time."""
    rows, relay = Rows(steps, 1, work), Relay(names)
    with quiet(folder), ThreadPoolExecutor(len(names)) as threads:
        models = {name: build(work) for name in names}
        watches = {name: Stopwatch(models[name], name, relay) for name in names}

        def run(name: str) -> None:
            (folder / name).mkdir()
            relay.wait(name)
            try:
                PEERS[name](models[name], rows, folder / name)
            finally:
                relay.leave()

        for done in [threads.submit(run, name) for name in names]:
            done.result()
    assert {watch.steps for watch in watches.values()} == {steps}, "a peer took another number of steps"
    return {name: Measured(watches[name].turns[1:], score(models[name], work)) for name in names}


def score(model: Any, work: Work) -> float:
    """The loss on rows outside the training set, in nats."""
    parts = Rows(32, 2, work).ids.to(work.device).view(-1, work.batch, work.length)
    dtype = MODES[work.mode].autocast
    autocast = torch.autocast(work.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.no_grad(), autocast:
        total = sum(summed_nats(model.eval()(input_ids=ids).logits, ids).item() for ids in parts)
    return total / (len(parts) * work.targets)


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Send what is printed, progress bars too, to a file, as in a job of a cluster. Warnings are not of this topic."""
    folder.mkdir(exist_ok=True)
    with (
        (folder / "printed.txt").open("w") as printed,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def ratios(rounds: list[Measured], base: list[Measured], clock: int) -> list[float]:
    """One ratio per round: the median of those of its turns."""
    pairs = [zip(own.turns, other.turns, strict=True) for own, other in zip(rounds, base, strict=True)]
    return [statistics.median(own[clock] / other[clock] for own, other in turns) for turns in pairs]


def table(results: dict[str, list[Measured]]) -> str:
    """A markdown table of medians."""
    lines = [
        "| loop | ms per step | against the bare loop | least and most of a round | in processor time | loss after |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        wall, cpu = (ratios(rounds, results["bare loop"], clock) for clock in (0, 1))
        milliseconds = 1000 * statistics.median(turn.wall for one in rounds for turn in one.turns)
        lines.append(
            f"| {name} | {milliseconds:.2f} | {statistics.median(wall):.3f} | {min(wall):.3f} to {max(wall):.3f} "
            f"| {statistics.median(cpu):.3f} | {rounds[0].loss:.6f} |"
        )
    return "\n".join(lines)


def other_work(results: dict[str, list[Measured]]) -> list[str]:
    """A complaint about each peer whose last loss is not the bare loop's."""
    wanted = results["bare loop"][0].loss
    return [
        f"{name} ended with the loss {got.loss:.6f}, the bare loop with {wanted:.6f}: it did different work"
        for name, rounds in results.items()
        for got in rounds
        if not abs(got.loss - wanted) < SAME_LOSS
    ]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time rawloop's loop and its peers on the same tiny model.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="of each peer in a round (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="names, with commas between (default: %(default)s)")
    options = parser.parse_args()
    options.peers = ["bare loop", *(name for name in options.peers.split(",") if name != "bare loop")]
    unknown = set(options.peers) - set(PEERS)
    if unknown:
        parser.error(f"--peers has {sorted(unknown)}: there are {', '.join(PEERS)}")
    if options.rounds < 1 or options.steps <= 2 * TURN:
        parser.error(f"--rounds must be 1 or more and --steps above {2 * TURN}: the first turn is not counted")
    return options


def main() -> int:
    """Run all rounds, print the table and return 1 if the peers did not do the same work."""
    options = read_arguments()
    torch.set_num_threads(1)
    results: dict[str, list[Measured]] = {name: [] for name in options.peers}
    for number in range(options.rounds):
        order = random.Random(number).sample(options.peers, len(options.peers))
        with tempfile.TemporaryDirectory() as folder:
            for name, measured in run_round(order, options.steps, Path(folder), Work(device=options.device)).items():
                results[name].append(measured)
    packages = ["torch", "transformers", "peft", *(PACKAGES[name] for name in options.peers if name in PACKAGES)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{options.rounds} rounds of {options.steps} steps, {versions}\n\n{table(results)}")
    complaints = other_work(results)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
