"""Time a loop under `rawloop.Watch` against the same loop without it, on a small language model.

    python tests/benchmarks/watch_overhead.py --steps 60       # --device cuda --modes fp32,bf16,fp16 --lora
    python tests/benchmarks/watch_overhead.py --tools          # each tool, and torch's and transformers' own

Both loops train a model of their own with the same weights on the same batches, and take turns of one step, in an
order that changes. The ratio is taken within each pair of steps; the table shows the median, its middle half, and the
difference in microseconds. On the CPU it is that of the processor's time, which other work disturbs less; on a GPU that
of the wall's. Steps that take the costly looks (`WatchConfig.every`) are shown on their own line; the last
line of a mode is the mean step of a loop that takes a look as often as the default says.

What the watch costs in rawloop's own loop is measured by tests/benchmarks/loop_overhead.py, peers "rawloop" and
"rawloop unwatched".

A step of this model takes more than 100 ms on one thread. The watch does the same work for a larger model, except that
its norm of the gradients reads them all.
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.debug_utils import DebugUnderflowOverflow

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
    lora: bool = False

    @property
    def name(self) -> str:
        """The mode, and what is trained."""
        return f"{self.mode}, {'LoRA' if self.lora else 'full'}"


@dataclass
class Times:
    """Seconds of each step, of both loops, and the losses."""

    bare: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    probing: list[bool] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)


def build(work: Work | None = None) -> Any:
    """A Llama, or one with LoRA on all of its layers; the same weights at every call."""
    work = work or Work()
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
    model: Any = LlamaForCausalLM(config)
    if work.lora:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model.to(work.device).train()


class Peer:
    """A loop that does one step at a time."""

    def __init__(self, work: Work, watch: Watch | None = None) -> None:
        self.work, self.model = work, build(work)
        self.optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], 1e-4)
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
        clock = time.thread_time if self.work.device == CPU else time.perf_counter
        start = clock()
        if self.watch is None:
            loss = self.step(ids)
        else:
            with self.watch.step({"input_ids": ids}):
                loss = self.step(ids)
        value = float(loss)  # waits for the device, as a loop does that logs
        return clock() - start, value


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


def lines(name: str, times: Times, every: int = WatchConfig().every) -> Iterator[str]:
    """Rows of the table: steps without the costly looks, steps with them, and the mean over `every` steps."""
    pairs = [*zip(times.bare, times.watched, times.probing, strict=True)]
    more = {}
    for probing, kind in ((False, "always on"), (True, "with a look")):
        chosen = [(bare, watched) for bare, watched, probed in pairs if probed is probing]
        if not chosen:
            continue
        ratios = sorted(watched / bare for bare, watched in chosen)
        more[probing] = statistics.median(watched - bare for bare, watched in chosen)
        bare = 1000 * statistics.median(bare for bare, _ in chosen)
        low, middle, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
        yield (
            f"| {name} | {kind} | {len(chosen)} | {bare:.1f} | {middle:.4f} | {low:.4f} to {high:.4f} "
            f"| {1e6 * more[probing]:.0f} |"
        )
    if len(more) == 2:
        mean = ((every - 1) * more[False] + more[True]) / every
        step = statistics.median(times.bare)
        yield f"| {name} | a look in {every} steps | | {1000 * step:.1f} | {1 + mean / step:.4f} | | {1e6 * mean:.0f} |"


HEAD = [
    "| mode | steps | number | ms per bare step | watched / bare | middle half | us more |",
    "|---|---|---|---|---|---|---|",
]


def poison(model: Any) -> None:
    """Make one row of the middle layer infinite in each forward pass from now on."""
    layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
    layer = layers[len(layers) // 2].mlp

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        factor = torch.ones(len(output), 1, 1, device=output.device)
        factor[1] = math.inf
        return output * factor

    layer.register_forward_hook(hook)


def bad_step(work: Work, out: Path | None) -> float:
    """Seconds of a step that is not finite, which the watch runs again to find the place."""
    peer = Peer(work)
    with Watch(peer.model, peer.optimizer, out=out, say=lambda text: None) as peer.watch:
        for number, ids in enumerate(batches(work, 4)):
            if number == 3:
                poison(peer.model)
            seconds, _ = peer.timed(ids)
        (finding,) = peer.watch.findings.alarms
        assert finding.kind == "not_finite", finding
        assert ".mlp" in finding.text(), finding
    return seconds


def tool_costs(work: Work, times: int) -> Iterator[str]:
    """Rows of the table of tools. Each is measured between bare steps."""
    ids = next(batches(work, 1))
    bare, debugged, anomalous = Peer(work), Peer(work), Peer(work)
    seen = compare(work, times, config=WatchConfig(every=1))
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds / statistics.median(bare.timed(ids)[0] for _ in range(3)))

    for peer in (bare, anomalous):
        peer.timed(ids)
    DebugUnderflowOverflow(debugged.model)
    for _ in range(times):
        note("DebugUnderflowOverflow, a healthy step", debugged.timed(ids)[0])
        with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
            note("anomaly mode, a healthy step", anomalous.timed(ids)[0])
        note("the step that is not finite, run again and traced", bad_step(work, None))
        with tempfile.TemporaryDirectory() as folder:
            note("the same, with a capsule", bad_step(work, Path(folder)))
            (capsule,) = Path(folder).glob("capsules/*")
            size = sum(file.stat().st_size for file in capsule.rglob("*")) / 1e6
    found["a step with a look"] = [watched / bare for bare, watched in zip(seen.bare, seen.watched, strict=True)]
    for name, ratios in found.items():
        more = f" of {size:.0f} MB" if "capsule" in name else ""
        yield f"| {name}{more} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"


def main() -> int:
    """Print the table. Return 1 if a watched loop has other losses than the bare one."""
    parser = argparse.ArgumentParser(description="Time a loop under rawloop.Watch against the same loop without it.")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each mode (default: %(default)s)")
    parser.add_argument("--modes", default="fp32,bf16", help="of fp32, bf16 and fp16 (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="train LoRA on all layers")
    parser.add_argument("--tools", action="store_true", help="time the tools against a bare step")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--hidden", type=int, default=384)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(device=options.device, hidden=options.hidden, lora=options.lora)
    if options.tools:
        print("| tool | bare steps | least and most |\n|---|---|---|")
        print("\n".join(tool_costs(work, max(2, options.steps // 10))))
        return 0
    print("\n".join(HEAD))
    other = False
    for mode in options.modes.split(","):
        times = compare(replace(work, mode=mode), options.steps, config=WatchConfig(every=20))
        other |= any(bare != watched for bare, watched in times.losses)
        print("\n".join(lines(replace(work, mode=mode).name, times)), flush=True)
    if other:
        print("a watched loop has other losses than the bare one", file=sys.stderr)
    return int(other)


if __name__ == "__main__":
    raise SystemExit(main())
