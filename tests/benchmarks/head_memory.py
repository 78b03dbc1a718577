"""Memory and time of a head and its cross-entropy, in chunks and with all logits at once.

    python tests/benchmarks/head_memory.py

Forward and backward of one linear head in float32, or under bfloat16 autocast; the head is frozen, as beside LoRA, or
trained. Memory is the most bytes of tensors held at once, counted as operations make them: hidden states, the weights
of the head and what was there before do not count. The ways take turns; the median time is shown.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rawloop.families.head import cross_entropy

Loss = Callable[[Tensor], Tensor]


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes held at once of tensors that were made since it was entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(t.untyped_storage()).cdata for t in _tensors((args, kwargs))}  # type: ignore[no-untyped-call]
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            if reference.cdata not in given:  # not a view
                self.made[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def ways(head: torch.nn.Linear, targets: Tensor) -> dict[str, Loss]:
    """Return the loss of hidden states (targets, hidden), with all logits at once and in chunks."""
    return {
        "at once": lambda rows: F.cross_entropy(head(rows).float(), targets, reduction="sum"),
        "in chunks": lambda rows: cross_entropy(head, lambda logits: logits, rows, targets, head.out_features).sum(),
    }


def step(head: torch.nn.Linear, loss: Loss, rows: Tensor, dtype: torch.dtype | None) -> None:
    """Run forward and backward."""
    head.weight.grad, rows.grad = None, None
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        total = loss(rows)
    total.div(len(rows)).backward()  # type: ignore[no-untyped-call]


def measure(
    vocabulary: int, count: int, hidden: int, *, trained: bool, dtype: torch.dtype | None, rounds: int
) -> dict[str, tuple[int, float]]:
    """Return the peak in bytes and the median seconds of each way."""
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(trained)
    rows, targets = torch.randn(count, hidden, requires_grad=True), torch.randint(vocabulary, (count,))
    runs = {name: partial(step, head, loss, rows, dtype) for name, loss in ways(head, targets).items()}
    peaks: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        head.weight.grad, rows.grad = None, None
        with Peak() as memory:
            run()
        peaks[name] = memory.peak
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (peaks[name], statistics.median(seconds[name] or [0.0])) for name in runs}


def main(words: list[str] | None = None) -> int:
    """Print one line of a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--targets", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(words)
    print("| vocabulary | targets | head | dtype | at once, MiB | in chunks, MiB | share | at once, s | in chunks, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for vocabulary in options.vocabularies:
        for count in options.targets:
            for trained in (False, True):
                for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
                    found = measure(
                        vocabulary, count, options.hidden, trained=trained, dtype=dtype, rounds=options.rounds
                    )
                    (full, slow), (few, fast) = found["at once"], found["in chunks"]
                    kind = "trained" if trained else "frozen"
                    shares = f"{full / 2**20:,.0f} | {few / 2**20:,.0f} | {few / full:.0%} | {slow:.2f} | {fast:.2f}"
                    print(f"| {vocabulary:,} | {count:,} | {kind} | {name} | {shares} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
