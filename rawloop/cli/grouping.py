"""Gradients and evaluation loss of the first window, to compare groupings of the same samples: `rawloop doctor`."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from rawloop.build import build_run
from rawloop.config import RunConfig
from rawloop.dist import World
from rawloop.errors import RawloopError
from rawloop.loop import Run, accumulate, agree_on_window, fetch

STEPS, HALF = 4, 2  # steps of a small run, and between its checkpoints
NOT_FINITE = "not finite: "
# Largest relative difference of gradients and evaluation losses between groupings of the same samples, by mode: some
# hundred units in the last place of what the mode computes in.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "amp_fp16": 5e-3, "native_fp16": 5e-3}


def small(config: RunConfig, output: Path, batch_size: int, accumulation: int) -> RunConfig:
    """The user's config with a small window, a few steps and nothing sent anywhere."""
    return replace(
        config,
        output=str(output),
        resume=None,
        adapter=replace(config.adapter, dropout=0.0),
        train=replace(config.train, batch_size=batch_size, accumulation=accumulation, max_steps=STEPS, log_every=1),
        checks=replace(config.checks, enabled=False),  # they have rows of their own
        evaluation=replace(config.evaluation, every=10**9, patience=0),
        checkpoint=replace(config.checkpoint, save_every=HALF, keep_last=0),
        records=replace(config.records, tensorboard=False, wandb=False, progress=False),
    )


class Measured(NamedTuple):
    """The first window's gradients (float32, by name), the evaluation loss, the mode, and everything not finite.

    `moving` names the buffers that training moves.
    """

    gradients: dict[str, Tensor]
    loss: float | None
    mode: str
    wrong: list[str]
    moving: Sequence[str] = ()


def measure(config: RunConfig, world: World, folder: Path) -> Measured:
    """Measure the first window, and the evaluation loss if there is one; write both into `folder`."""
    built = build_run(config, world, lambda line: None)
    try:
        gradients, names = first_gradients(built)
        wrong = not_finite(built.meter.take(world), gradients, names)
        evaluation = built.evaluator.run() if built.evaluator else None
    finally:
        built.close()
    loss = evaluation.metrics["eval_loss"] if evaluation else None
    if evaluation and not evaluation.valid:
        wrong.append(f"eval_loss {loss}, in the batches of the samples {', '.join(evaluation.bad_ids)}")
    measured = Measured(gradients, loss, built.policy.name, wrong, list(built.buffers.places if built.buffers else ()))
    if world.is_main:
        folder.mkdir(exist_ok=True)
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "loss.json").write_text(json.dumps({**measured._asdict(), "gradients": None}))
    return measured


def first_gradients(built: Run) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients of the first window over all ranks, without dropout, and the window's samples on this rank.

    A loss scale at which they overflow is lowered, as training does.
    """
    window, targets = agree_on_window(built, fetch(iter(built.windows(0))))
    built.module.eval()
    scaler = built.policy.scaler
    while True:
        accumulate(built, window, targets)
        scale = scaler.scale if scaler else 1.0
        weights = built.policy.trained.weights.items()
        found = {name: (p.grad.float() / scale).cpu().contiguous() for name, p in weights if p.grad is not None}
        if scaler is None or scale <= scaler.config.floor or all(bool(g.isfinite().all()) for g in found.values()):
            return found, [name for batch in window for name in batch.ids]
        scaler.update(finite=False)
        built.policy.zero_grad(built.optimizer)


def not_finite(losses: dict[str, float], gradients: dict[str, Tensor], names: list[str]) -> list[str]:
    """Say which losses and gradients of the first window are not finite."""
    wrong = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value) and name.count("/") == 1]
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    if bad:
        wrong.append(f"the gradients of {len(bad)} of {len(gradients)} trained weights (first {bad[0]})")
    return [f"{' and '.join(wrong)}, in the window of the samples {', '.join(names)}"] if wrong else []


def read_measure(folder: Path) -> Measured:
    """Read the files of `measure`."""
    found = json.loads((folder / "loss.json").read_text())
    return Measured(**{**found, "gradients": load_file(folder / "gradients.safetensors")})


def compare(first: Path, second: Path, cause: str) -> str:
    """Compare two measurements, or raise RawloopError if they differ by more than rounding."""
    (one, loss, mode, *_), (other, other_loss, _, wrong, _) = read_measure(first), read_measure(second)
    if wrong:
        raise RawloopError(f"{NOT_FINITE}{'; '.join(wrong)}; as one batch of 4 on one process all is finite")
    if set(one) != set(other) or not one:
        raise RawloopError(f"gradients reach {len(one)} weights in one and {len(other)} in the other: {cause}")
    square = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    size = sum(float(one[name].double().square().sum()) for name in one)
    if not size:
        raise RawloopError("the gradient is zero in every trained weight: nothing is learnt, and nothing is compared")
    gaps = {"gradients": (square / size) ** 0.5}
    if loss is not None and other_loss is not None:
        gaps["eval_loss"] = abs(loss - other_loss) / max(abs(loss), 1e-12)
    found = " and ".join(f"{name} differ by {gap:.1e}" for name, gap in gaps.items())
    if not all(gap <= TOLERANCE[mode] for gap in gaps.values()):  # nan is on neither side
        raise RawloopError(f"{found}; rounding in {mode} explains {TOLERANCE[mode]:.0e}: {cause}")
    return found
