"""What the precision policy costs a step, beside autocast, GradScaler and clipping written by hand.

    python tests/benchmarks/precision_overhead.py

Both sides train the same LoRA model on the same rows with fused AdamW, clipping at 1.0. They take turns of 10 steps in
one process, in changing order, so that a ratio is taken between neighbours in time; the median over all turns is shown.
A side that ends with another loss has not done the same work, and the script says so and fails.
"""

import argparse
import importlib.metadata
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy

BATCH, LENGTH, VOCAB = 2, 16, 256
TURN, WARM_UP = 10, 2  # steps; the first of a turn find the caches full of the other side's data
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "amp_fp16": torch.float16}
SAME = 2e-3  # nats; in 16 bits another order of rounding makes a difference, other work makes a larger one


class Sizes(NamedTuple):
    """Of the Llama; FP16 products are slow on a CPU, so that mode gets a smaller one."""

    hidden: int
    layers: int


SIZES = {"fp32": Sizes(192, 1), "bf16": Sizes(192, 1), "amp_fp16": Sizes(64, 1)}


def build_model(sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    return add_adapter(LlamaForCausalLM(config), AdapterConfig(rank=8, alpha=16.0), [])


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(VOCAB // 8, (BATCH, LENGTH), generator=generator)


def by_hand(mode: str, model: nn.Module) -> Iterator[None]:
    """One step each time it is asked."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(weights, lr=1e-3, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=mode == "amp_fp16", init_scale=2.0**15)
    for ids in batches():
        with autocast(mode):
            loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield


def by_policy(mode: Any, model: nn.Module) -> Iterator[None]:
    """The same with the policy."""
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), torch.device("cpu"))
    policy.prepare(model)
    optimizer = AdamW([p for _, p in policy.named_parameters()], lr=1e-3, weight_decay=0.0, fused=True)
    for ids in batches():
        with policy.autocast():
            loss = model(input_ids=ids, labels=ids).loss
        policy.backward(loss)
        policy.step(optimizer, 1.0)
        yield


SIDES: dict[str, Callable[[str, nn.Module], Iterator[None]]] = {"by hand": by_hand, "policy": by_policy}


class Measured(NamedTuple):
    """Seconds per step by hand, of each turn; the policy's share of it; the difference of the losses after."""

    by_hand: list[float]
    ratios: list[float]
    difference: float


def measure(mode: str, turns: int) -> Measured:
    """Train both sides in turns. The first turn is not counted."""
    models = {side: build_model(SIZES[mode]) for side in SIDES}
    steps = {side: SIDES[side](mode, models[side]) for side in SIDES}
    order = random.Random(0)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(turns + 1):
        for side in order.sample(list(SIDES), len(SIDES)):
            seconds[side].append(timed(steps[side]))
    ratios = [own / other for own, other in zip(seconds["policy"], seconds["by hand"], strict=True)]
    losses = [score(mode, model) for model in models.values()]
    return Measured(seconds["by hand"][1:], ratios[1:], abs(losses[0] - losses[1]))


def autocast(mode: str) -> AbstractContextManager[Any]:
    dtype = DTYPES[mode]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def score(mode: str, model: nn.Module) -> float:
    """The loss on rows that nobody trains on, in nats."""
    ids = torch.randint(VOCAB // 8, (64, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), autocast(mode):
        loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss.item()


def timed(steps: Iterator[None]) -> float:
    """Seconds per step of one turn."""
    for _ in range(WARM_UP):
        next(steps)
    start = time.perf_counter()
    for _ in range(TURN - WARM_UP):
        next(steps)
    return (time.perf_counter() - start) / (TURN - WARM_UP)


def main(arguments: list[str] | None = None) -> int:
    """Measure all modes, print the table and return 1 if the two sides did not do the same work."""
    parser = argparse.ArgumentParser(description="Time the precision policy against the same by hand.")
    parser.add_argument("--turns", type=int, default=300, help="of each side (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error("--turns must be 1 or more")
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{options.turns} turns of {TURN} steps, {versions}\n")
    print("| mode | ms per step by hand | policy against it | middle half of the turns |\n|---|---|---|---|")
    failed = 0
    for mode in DTYPES:
        got = measure(mode, options.turns)
        low, _, high = statistics.quantiles(got.ratios, n=4) if options.turns > 1 else got.ratios * 3
        middle = statistics.median(got.ratios)
        print(f"| {mode} | {1000 * statistics.median(got.by_hand):.2f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
        if not got.difference <= SAME:
            failed = 1
            print(f"{mode}: the losses differ by {got.difference:.2g} nats: the two did other work", file=sys.stderr)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
