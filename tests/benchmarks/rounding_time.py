"""Seconds of one update of a model's weights: float32, bfloat16 with masters, rounded stochastically, to nearest.

    python tests/benchmarks/rounding_time.py

The rows are measured in turn, round after round, in one process; the table has the least and the median of each.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
from torch import nn

from rawloop.optim import OptimConfig, build_optimizer
from rawloop.precision.masters import TrainedWeights
from rawloop.rounding import StochasticRounding

CPU = torch.device("cpu")
ROWS = {
    "float32": (torch.float32, False, False),
    "bfloat16, masters": (torch.bfloat16, True, False),
    "bfloat16, stochastic": (torch.bfloat16, False, True),
    "bfloat16, none": (torch.bfloat16, False, False),
}


def updates(row: str, optimizer: str, matrices: int, size: int) -> Callable[[], float]:
    """A function that makes one update, and returns its seconds."""
    dtype, masters, rounded = ROWS[row]
    torch.manual_seed(0)
    named = [(f"layers.{k}.weight", nn.Parameter(0.02 * torch.randn(size, size))) for k in range(matrices)]
    rounding = StochasticRounding(CPU) if rounded else None
    trained = TrainedWeights(named, dtype, CPU, masters, rounding)
    held = [parameter for _, parameter in trained.named_parameters()]
    stepped = build_optimizer(trained.named_parameters(), OptimConfig(name=optimizer, lr=1e-5))  # type: ignore[arg-type]
    gradients = [torch.randn_like(weight) for weight in trained.weights.values()]

    def update() -> float:
        for weight, gradient in zip(trained.weights.values(), gradients, strict=True):
            weight.grad = gradient
        start = time.perf_counter()
        trained.update(held, 1.0, lambda: stepped.step())
        return time.perf_counter() - start

    return update


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Time updates.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--matrices", type=int, default=12)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "adamw_8bit"])
    options = parser.parse_args(arguments)
    for name in options.optimizers:
        rows = {row: updates(row, name, options.matrices, options.size) for row in ROWS}
        seconds: dict[str, list[float]] = {row: [] for row in ROWS}
        for _ in range(options.rounds + 1):
            for row, update in rows.items():
                seconds[row].append(update())
        for row, found in seconds.items():  # the first update makes the state
            print(f"| {name} | {row} | {min(found[1:]):.6f} | {statistics.median(found[1:]):.6f} |")


if __name__ == "__main__":
    main()
