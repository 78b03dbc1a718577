"""What became of a run, in words, and the facts that one looks up first."""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from rawloop.report.page import Note, Table
from rawloop.report.runs import RunData


def outcome(run: RunData, is_running: bool | None) -> list[Note]:
    """Return the first paragraphs of a page: how far the run came, how it ended, its best evaluation, its incidents.

    Args:
        run: the run.
        is_running: whether a process trains it now; None if that is not known.
    """
    notes = [Note(text, "warning", "Not read:") for text in run.unreadable]
    notes += [Note(f"{_trained(run)}.", head="Training:"), ended(run, is_running)]
    notes += [Note(text, head="Best:") for text in _best(run)]
    return notes + [Note(text, "warning", "Incidents:") for text in _incidents(run)]


def ended(run: RunData, is_running: bool | None) -> Note:
    """Return how the run ended: finished, stopped, still running, or without a word."""
    starts = run.of_kind("start")
    if is_running:
        return Note("a process trains this run now.", head="Still running:")
    if not starts:
        return Note("how it ended is not recorded: there is no start among its events.", head="End:")
    stops = [event for event in run.of_kind("stop") if event["time"] >= starts[-1]["time"]]
    if stops:
        return Note(f"at step {stops[-1]['step']:,}: {stops[-1].get('reason')}.", "warning", "Stopped:")
    total = starts[-1].get("total_steps")
    if isinstance(total, int) and run.last_step >= total:
        return Note(f"all {total:,} steps are done.", "good", "Finished:")
    written = f"the last line is of {moment(run.events[-1]['time'])}, the last step {run.last_step:,}"
    if is_running is None or total is None:
        return Note(f"{written}.", "warning", "No end is recorded:")
    return Note(f"{written}, and no process trains it now.", "alarm", "Crashed or killed:")


def _trained(run: RunData) -> str:
    totals = [event["total_steps"] for event in run.of_kind("start") if isinstance(event.get("total_steps"), int)]
    steps = f"{run.last_step:,} of {totals[-1]:,} steps" if totals else f"{run.last_step:,} steps"
    if not run.series:
        return f"there are no metrics, so there is nothing to draw ({steps})"
    epochs = run.series.get("epoch")
    return f"{steps}, {epochs.values[-1]:.4g} epochs" if epochs else steps


def _best(run: RunData) -> Iterator[str]:
    metric, value, step = (run.best.get(name) for name in ("metric", "value", "step"))
    if not isinstance(metric, str) or not isinstance(value, float | int) or not isinstance(step, int):
        return
    first = run.series[metric].values[0] if metric in run.series else 0.0
    change = f", {value / first - 1:+.1%} against the first evaluation, {first:.4f}" if first and step else ""
    yield f"{metric} {value:.4f} at step {step:,}{change}."


def _incidents(run: RunData) -> Iterator[str]:
    skips, falls, restores = len(run.of_kind("skip")), run.of_kind("fallback"), len(run.of_kind("start")) - 1
    alarms = [event for event in run.of_kind("finding") if not is_ordinary(event)]
    said = [f"{len(alarms)} alarm{'s' * (len(alarms) > 1)} among the findings"] if alarms else []
    said += [f"{skips:,} update{'s' * (skips > 1)} skipped"] if skips else []
    said += [f"fell back at step {event['step']:,} ({event.get('change')})" for event in falls]
    said += [f"started again {restores} time{'s' * (restores > 1)}"] if restores > 0 else []
    said += list(_not_finite(run))
    if said:
        yield f"{'; '.join(said)}."


def _not_finite(run: RunData) -> Iterator[str]:
    for name in ("loss", "eval_loss", "grad_norm"):
        if name in run.series:
            steps, values = run.series[name]
            bad = ~np.isfinite(values)
            if bad.any():
                yield f"{name} is not finite in {bad.sum():,} of {len(bad):,} lines, first at step {steps[bad][0]:,.0f}"


def is_ordinary(event: dict[str, Any]) -> bool:
    """Whether a finding belongs to healthy training."""
    found = event.get("finding")
    return isinstance(found, dict) and found.get("ordinary") is True


def moment(seconds: float) -> str:
    """Return a time as text."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def facts(run: RunData) -> Table:
    """Return the facts of a run as a table: those that are recorded."""
    of, modes = run.settings().get, run.of_kind("precision", "fallback")
    start: dict[str, Any] = next(iter(run.of_kind("start")[::-1]), {})
    lora = [f"{name} {of(f'adapter.{name}')}" for name in ("rank", "alpha", "dropout")]
    steps, ratio = of("optim.warmup_steps"), of("optim.warmup_ratio")
    warmup = f"{steps} warm-up steps" if steps else f"warm-up over {ratio:.1%} of the steps" if ratio else ""
    sizes: list[Any] = [of("train.batch_size"), of("train.accumulation"), start.get("world_size")]
    parts = "{} per pass, accumulation {}, world size {}".format(*sizes)
    batch = f"{math.prod(sizes):,} samples a step ({parts})" if all(isinstance(n, int) for n in sizes) else ""
    if most := of("train.max_frames"):
        batch = "up to {:,} positions per pass, accumulation {}, world size {}".format(most, *sizes[1:])
    rows: dict[str, list[object]] = {
        "model": [of("model.path"), "" if of("model.family") == "auto" else of("model.family")],
        "adapter": [of("adapter.mode"), *(lora if of("adapter.mode") == "lora" else [])],
        "precision": [of("precision.mode"), modes[-1].get("reason") if modes else ""],
        "learning rate": [of("optim.lr"), of("optim.schedule"), warmup],
        "batch": [batch],
        "data": [of("data.train")],
        "device": [start.get("device"), *(f"{n} {start[n]}" for n in ("torch", "transformers", "peft") if n in start)],
        "events": [f"{moment(run.events[0]['time'])} to {moment(run.events[-1]['time'])}"] if run.events else [],
        "folder": [run.folder],
    }
    texts = {name: ", ".join(str(part) for part in parts if part not in (None, "")) for name, parts in rows.items()}
    return Table(("setting", "value"), [(name, text) for name, text in texts.items() if text])
