"""Time a loop under `rawloop.Watch` against the same loop without it, on a small language model.

    python tests/benchmarks/watch_overhead.py --steps 60       # --device cuda --modes fp32,bf16,fp16

Both loops train a model of their own with the same weights on the same batches, and take turns of one step, in an
order that changes. The ratio is taken within each pair of steps; the table shows the median, its middle half, and the
difference in microseconds. Steps that take the costly looks (`WatchConfig.every`) are shown on their own line.

A step of this model takes more than 100 ms on one thread. The watch does the same work for a larger model, except that
its norm of the gradients reads them all.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop import Watch, WatchConfig

CPU = torch.device("cpu")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """A step: rows of so many tokens, and the size of the model."""

    rows: int = 4
    length: int = 64
    hidden: int = 384
    layers: int = 6
    vocab: int = 512
    device: torch.device = CPU
    mode: str = "fp32"


@dataclass
class Times:
    """Seconds of each step, of both loops, and the losses."""

    bare: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    probing: list[bool] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)


class Peer:
    """A loop that does one step at a time."""

    def __init__(self, work: Work, watch: Watch | None = None) -> None:
        torch.manual_seed(0)
        heads = max(1, work.hidden // 64)
        config = LlamaConfig(
            vocab_size=work.vocab,
            hidden_size=work.hidden,
            intermediate_size=3 * work.hidden,
            num_hidden_layers=work.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            use_cache=False,
        )
        self.work, self.model = work, LlamaForCausalLM(config).to(work.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        on = work.mode == "fp16"
        self.scaler = torch.amp.GradScaler(work.device.type, init_scale=2.0**10, enabled=on) if on else None
        self.watch: Any = watch

    def step(self, ids: Tensor) -> Any:
        """One step of a loop as people write it."""
        dtype = DTYPES[self.work.mode]
        with torch.autocast(self.work.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = self.model(input_ids=ids).logits
            loss: Any = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if self.scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()

    def timed(self, ids: Tensor) -> tuple[float, float]:
        """Return the seconds of a step, and its loss."""
        start = time.perf_counter()
        if self.watch is None:
            loss = self.step(ids)
        else:
            with self.watch.step({"input_ids": ids}):
                loss = self.step(ids)
        value = float(loss)  # waits for the device, as a loop does that logs
        return time.perf_counter() - start, value


def batches(work: Work, steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(work.vocab, (work.rows, work.length), generator=generator)
        yield ids.to(work.device)


def compare(work: Work, steps: int, warm: int = 3, config: WatchConfig | None = None) -> Times:
    """Run both loops for `warm + steps` steps, and time the last ones."""
    times, order = Times(), random.Random(0)
    bare, watched = Peer(work), Peer(work)
    with ExitStack() as stack:
        watched.watch = stack.enter_context(
            Watch(watched.model, watched.optimizer, watched.scaler, config=config or WatchConfig())
        )
        for number, ids in enumerate(batches(work, warm + steps)):
            probing = watched.watch.record.step % watched.watch.subject.config.every == 0
            first = order.random() < 0.5
            got = {peer: peer.timed(ids) for peer in ((bare, watched) if first else (watched, bare))}
            times.losses.append((got[bare][1], got[watched][1]))
            if number >= warm:
                times.bare.append(got[bare][0])
                times.watched.append(got[watched][0])
                times.probing.append(probing)
        for finding in watched.watch.findings:
            print(f"finding {finding.kind}: {finding.what}", file=sys.stderr)
    return times


def line(mode: str, times: Times, probing: bool) -> str:
    """A row of the table, for steps with or without the costly looks; empty if there are none."""
    pairs = [p for p in zip(times.bare, times.watched, times.probing, strict=True) if p[2] == probing]
    if not pairs:
        return ""
    ratios = sorted(watched / bare for bare, watched, _ in pairs)
    more = statistics.median(watched - bare for bare, watched, _ in pairs)
    low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
    milliseconds = 1000 * statistics.median(bare for bare, _, _ in pairs)
    return (
        f"| {mode} | {'costly looks' if probing else 'always on'} | {len(pairs)} | {milliseconds:.1f} "
        f"| {statistics.median(ratios):.4f} | {low:.4f} to {high:.4f} | {1e6 * more:.0f} |"
    )


HEAD = [
    "| mode | steps | number | ms per bare step | watched / bare | middle half | us more |",
    "|---|---|---|---|---|---|---|",
]


def main() -> int:
    """Print the table. Return 1 if a watched loop has other losses than the bare one."""
    parser = argparse.ArgumentParser(description="Time a loop under rawloop.Watch against the same loop without it.")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each mode (default: %(default)s)")
    parser.add_argument("--modes", default="fp32,bf16", help="of fp32, bf16 and fp16 (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--hidden", type=int, default=384)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(HEAD))
    other = False
    for mode in options.modes.split(","):
        times = compare(Work(device=options.device, mode=mode, hidden=options.hidden), options.steps)
        other |= any(bare != watched for bare, watched in times.losses)
        print("\n".join(filter(None, [line(mode, times, False), line(mode, times, True)])), flush=True)
    if other:
        print("a watched loop has other losses than the bare one", file=sys.stderr)
    return int(other)


if __name__ == "__main__":
    raise SystemExit(main())
