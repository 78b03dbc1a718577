"""Real steps on the CPU, and their bytes by PyTorch's profiler, for tests of estimates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rawloop.adapters.config import AdapterConfig
from rawloop.components import build_family, build_model
from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.dist import World
from rawloop.estimate import Estimate, estimate, skeleton_of
from rawloop.families import ModelConfig
from rawloop.loop import Run, accumulate, update
from rawloop.losses import LossModule
from rawloop.optim import build_optimizer
from rawloop.precision.config import LossScaleConfig, PrecisionConfig

FULL = AdapterConfig("full")


def run_of(config: RunConfig) -> Run:
    """What the loop needs for real steps of a run."""
    family, world = build_family(config), World(device=torch.device(config.device))
    model, policy, _ = build_model(config, world, family, [])
    optimizer = build_optimizer(policy.named_parameters(), config.optim)
    policy.adopt(optimizer)
    module, records, weights = LossModule(model.train(), family.losses), Any, family.stream_weights
    return Run(module, lambda _: [], policy, optimizer, lambda _: 1e-4, 1, weights, records, world=world)  # type: ignore[arg-type]


def step(run: Run, window: list[Batch]) -> None:
    accumulate(run, window, {stream: len(window) * count for stream, count in window[0].targets.items()})
    assert update(run, window).applied


def held(run: Run) -> int:
    """The bytes that a run holds between two steps."""
    states = [value for state in run.optimizer.state.values() for value in state.values()]
    weights = [*run.module.parameters(), *(weight for _, weight in run.policy.named_parameters()), *states]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights}
    return sum(storages.values())


def measured(config: RunConfig, batch: Batch) -> int:
    """The peak of a real step on the CPU, by the allocations that PyTorch's profiler sees."""
    run, window = run_of(config), [batch] * config.train.accumulation
    step(run, window)
    before = held(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step(run, window)
    results: Any = prof.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 1e6
    return before + peak


def planned(config: RunConfig, batch: Batch, processes: int = 1) -> Estimate:
    family = build_family(replace(config, model=replace(config.model, activation_checkpointing=False)))
    return estimate(config, family, skeleton_of(config, family), batch, processes)


def config_of(path: Path, mode: str, adapter: AdapterConfig | None = None, recompute: bool = False) -> RunConfig:
    model = ModelConfig(path=str(path), activation_checkpointing=recompute)
    scale = LossScaleConfig(init=1.0 if mode == "native_fp16" else 2.0**15)  # the steps are not to overflow
    precision = PrecisionConfig(mode, loss_scale=scale)  # type: ignore[arg-type]
    return RunConfig(device="cpu", model=model, adapter=adapter or AdapterConfig(), precision=precision)


def batch_of(config: RunConfig, positions: int, samples: int) -> Batch:
    family: Any = build_family(config)
    made: Batch = family.sized(positions, samples)
    return made
