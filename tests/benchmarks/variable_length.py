"""Tokens per second on samples of different lengths: rawloop's `train.max_frames` and its peers, on one tiny Llama.

    pip install -e '.[bench]'
    python tests/benchmarks/variable_length.py --rounds 5

Lengths are log-normal, as those of speech and of chats. All peers have the same largest number of positions in a batch,
which is what memory is needed for: a fixed batch size must leave room for the longest samples in every row. They get
the same weights, the same samples, the same loss function, fused AdamW, the norm clipped at 1.0 and a log line every
10 steps, and train one epoch.

The peers take turns, in another order in every round, and a ratio is taken within a round. The clock is the
processor's; it runs from the first forward pass to the last one. Only real tokens count, not padding. A peer that did
not train every token once did different work; the script names it and fails.
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
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from rawloop.contracts import Batch, StreamLoss
from rawloop.data.batches import BatchPlan, Loader, MicroBatches, Plan, TrainWindows
from rawloop.data.buckets import FramePlan
from rawloop.dist import World
from rawloop.loop import Run, train
from rawloop.losses import LossModule
from rawloop.moving_buffers import MovingBuffers
from rawloop.optim import OptimConfig, build_optimizer, lr_at
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import Records, RecordsConfig

LR, MAX_NORM, LOG_EVERY, PAD, IGNORE = 1e-3, 1.0, 10, 0, -100
BASE = "HF Trainer"
Row = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """So many samples, the median and the spread of their lengths, the batch size of the peers, and the model."""

    samples: int = 2000
    median: int = 60
    sigma: float = 0.8
    batch: int = 8
    hidden: int = 96
    layers: int = 2
    vocab: int = 512


class Rows(Dataset[Row]):
    """Random token ids above the padding's, the same for everybody."""

    def __init__(self, work: Work) -> None:
        self.work, generator = work, np.random.default_rng(0)
        lengths = generator.lognormal(np.log(work.median), work.sigma, work.samples)
        self.lengths = np.clip(lengths, 4, 12 * work.median).astype(np.int64)
        self.ids = [torch.from_numpy(generator.integers(1, work.vocab, length)) for length in self.lengths]

    @property
    def most(self) -> int:
        """The most positions of a batch of a fixed size."""
        return self.work.batch * int(self.lengths.max())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def collate(rows: list[Row]) -> Row:
    """Pad to the longest. Under a causal mask padding on the right needs no attention mask."""
    values = {"input_ids": PAD, "labels": IGNORE}
    return {k: pad_sequence([row[k] for row in rows], batch_first=True, padding_value=v) for k, v in values.items()}


def summed_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss function of all peers: the sum over a batch's targets."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def mean_nats(logits: Tensor, labels: Tensor) -> Tensor:
    return summed_nats(logits, labels) / (labels[:, 1:] != IGNORE).sum()


class Stopwatch:
    """The processor's time at each forward pass in training, and its ids, which are counted at the end."""

    def __init__(self, model: nn.Module) -> None:
        self.times: list[float] = []
        self.ids: list[Tensor] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, _: Any, given: dict[str, Any]) -> None:
        if module.training:
            self.times.append(time.process_time())
            self.ids.append(given["input_ids"])


def build_model(work: Work) -> Any:
    """A small Llama, the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=work.hidden,
        intermediate_size=2 * work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def write_line(folder: Path, step: int, loss: Tensor, norm: Any) -> None:
    with (folder / "log.jsonl").open("a") as log:
        print(json.dumps({"step": step, "loss": loss.item(), "grad_norm": norm.item()}), file=log, flush=True)


def shuffled(rows: Rows) -> DataLoader[Row]:
    return DataLoader(rows, batch_size=rows.work.batch, shuffle=True, collate_fn=collate)


def bare(model: Any, rows: Rows, folder: Path) -> None:
    """A loop by hand over random batches."""
    optimizer, loader = AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True), shuffled(rows)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    for step, batch in enumerate(loader, start=1):
        loss = mean_nats(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            write_line(folder, step, loss, norm)


def accelerate(model: Any, rows: Rows, folder: Path) -> None:
    """The loop of accelerate's own examples."""
    from accelerate import Accelerator

    accelerator, loader = Accelerator(cpu=True), shuffled(rows)
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for step, batch in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            loss = mean_nats(model(input_ids=batch["input_ids"]).logits, batch["labels"])
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            write_line(folder, step, loss, norm)
    accelerator.free_memory()


def trainer(model: Any, rows: Rows, folder: Path, strategy: str = "random") -> None:
    """HF Trainer with its defaults, except for the settings that all peers share."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows.work.batch,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        max_grad_norm=MAX_NORM,
        logging_steps=LOG_EVERY,
        train_sampling_strategy=strategy,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return mean_nats(outputs.logits, labels)

    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, compute_loss_func=loss).train()


def losses(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
    logits = model(input_ids=batch.inputs["input_ids"]).logits
    return {"text": StreamLoss(summed_nats(logits, batch.inputs["labels"]), batch.targets["text"])}


def to_batch(rows: list[Row]) -> Batch:
    targets = sum(len(row["labels"]) - 1 for row in rows)
    return Batch(collate(rows), {}, {"text": targets}, [str(index) for index in range(len(rows))])


def rawloop(model: Any, rows: Rows, folder: Path, by_frames: bool = True) -> None:
    """rawloop's own loop, with `train.max_frames`, or with `train.batch_size` and random batches."""
    world, config = World(), OptimConfig(lr=LR, schedule="linear", max_norm=MAX_NORM)
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), torch.device("cpu"), world=world)
    model = policy.prepare(model)
    plan: Plan = FramePlan(rows.lengths, rows.most) if by_frames else BatchPlan(len(rows), rows.work.batch)
    total, samples = plan.windows(1), rows
    loader = Loader(MicroBatches(samples, lambda row: row, to_batch))  # type: ignore[arg-type]
    with Records(folder, world, RecordsConfig()) as records:
        run = Run(
            module=LossModule(model, losses),
            windows=TrainWindows(loader, plan),
            policy=policy,
            optimizer=build_optimizer(policy.named_parameters(), config),
            lr=lambda step: lr_at(step, total, config),
            total_steps=total,
            weights={"text": 1.0},
            records=records,
            world=world,
            buffers=MovingBuffers(model),
            max_norm=MAX_NORM,
            log_every=LOG_EVERY,
        )
        train(run)


PEERS: dict[str, Callable[[Any, Rows, Path], None]] = {
    BASE: trainer,
    "HF Trainer, group_by_length": partial(trainer, strategy="group_by_length"),
    "accelerate": accelerate,
    "bare loop": bare,
    "rawloop, train.batch_size": partial(rawloop, by_frames=False),
    "rawloop, train.max_frames": rawloop,
}


class Measured(NamedTuple):
    """One peer in one round: real tokens per second of processor time, the share of padding, batches, the largest."""

    speed: float
    padding: float
    batches: int
    largest: int
    tokens: int


def measure(name: str, rows: Rows, folder: Path) -> Measured:
    """Train one epoch."""
    model = build_model(rows.work)
    watch = Stopwatch(model)
    folder.mkdir()
    with quiet(folder):
        PEERS[name](model, rows, folder)
    real = [int((ids != PAD).sum()) for ids in watch.ids]
    all_of_them = [ids.numel() for ids in watch.ids]
    speed = sum(real[:-1]) / (watch.times[-1] - watch.times[0])
    return Measured(speed, 1 - sum(real) / sum(all_of_them), len(real), max(all_of_them), sum(real))


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Send what is printed, progress bars too, to a file. Warnings are not of this topic."""
    with (
        (folder / "printed.txt").open("w") as printed,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def run_round(names: list[str], rows: Rows, folder: Path) -> dict[str, Measured]:
    return {name: measure(name, rows, folder / str(number)) for number, name in enumerate(names)}


def table(results: dict[str, list[Measured]]) -> str:
    """A markdown table of medians; ratios are taken within a round."""
    lines = [
        f"| loop | real tokens per second | against {BASE} | least and most of a round | padding | batches | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        ratios = [own.speed / base.speed for own, base in zip(rounds, results[BASE], strict=True)]
        middle, one = statistics.median(ratios), rounds[0]
        lines.append(
            f"| {name} | {statistics.median(own.speed for own in rounds):,.0f} | {middle:.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} | {one.padding:.1%} | {one.batches} | {one.largest:,} |"
        )
    return "\n".join(lines)


def other_work(results: dict[str, list[Measured]], rows: Rows) -> list[str]:
    """A complaint about each peer that did not train every token once, or had a larger batch."""
    wanted, most = int(rows.lengths.sum()), rows.most
    return [
        f"{name} trained {one.tokens} tokens in batches of at most {one.largest} positions, not {wanted} of {most}"
        for name, rounds in results.items()
        for one in rounds
        if one.tokens != wanted or one.largest > most
    ]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Real tokens per second on samples of different lengths.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=Work.samples, help="of an epoch (default: %(default)s)")
    parser.add_argument("--sigma", type=float, default=Work.sigma, help="spread of the logarithms of the lengths")
    parser.add_argument("--batch", type=int, default=Work.batch, help="samples per batch of the peers")
    parser.add_argument("--hidden", type=int, default=Work.hidden, help="width of the model (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return options


def main() -> int:
    """Run all rounds, print the table and return 1 if the peers did not do the same work."""
    options = read_arguments()
    torch.set_num_threads(1)
    rows = Rows(Work(samples=options.samples, sigma=options.sigma, batch=options.batch, hidden=options.hidden))
    results: dict[str, list[Measured]] = {name: [] for name in PEERS}
    for number in range(options.rounds):
        order = random.Random(number).sample(list(PEERS), len(PEERS))
        with tempfile.TemporaryDirectory() as folder:
            for name, measured in run_round(order, rows, Path(folder)).items():
                results[name].append(measured)
    packages, lengths = ("torch", "transformers", "accelerate"), rows.lengths
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    shape = f"{len(rows)} samples of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} on average"
    print(f"{options.rounds} rounds, {shape}, {versions}\n\n{table(results)}")
    complaints = other_work(results, rows)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
