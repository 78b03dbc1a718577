"""The loss verdict: the first loss of each stream and codebook, compared with chance before training.

A loss curve shows that a number falls. Only the loss of uniform guesses shows whether it started at the right value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rawloop.buffers import untouched
from rawloop.contracts import IGNORE, Batch, Family, StreamLoss, has
from rawloop.diagnose.mismatch import find_mismatches
from rawloop.diagnose.passes import Passes
from rawloop.diagnose.shared import Autocast, coarsest_eps, looking_at, table
from rawloop.losses import LossModule

Kind = Literal["OK", "CHANCE", "LEAK", "DEAD"]

# A loss of at least this share of chance is no better than guessing. Runs that had learnt nothing had 0.936 or more
# (6.49 of 6.93). The last codebooks of a residual quantizer come closest to it in a working model.
CHANCE_FROM = 0.93
# No model gets below this share of the targets' entropy without seeing them. Leaks reported 0.0028 and 0.0011 nats per
# code, less than a thousandth of it; memorised text keeps a few hundredths.
LEAK_BELOW = 0.01
# Targets with less entropy than this, in nats, may have no loss: the tokens at the end of a turn are always the same.
# Three tokens of equal share have 1.1.
VARIETY = 1.0
LOOKED_AT = 64  # targets whose logits are compared with each other
SAME = 1e-6  # logits that differ by less than this share of the largest logit are equal


@dataclass
class Reading:
    """The measurements of a stream or one of its codebooks.

    `nats` and `entropy` are sums over `targets`. The other fields are problems, or empty: `gradient`, why no trained
    weight learns from it; `logits`, they are equal at all positions; `not_finite`, the cause of a loss or gradient that
    is not finite; `mismatch`, how the loss differs from the logits' cross-entropy.
    """

    nats: float = 0.0
    targets: int = 0
    entropy: float = 0.0
    gradient: str = ""
    logits: str = ""
    not_finite: str = ""
    mismatch: str = ""

    def __add__(self, other: "Reading") -> "Reading":
        """Join two readings; one without targets is ignored. `gradient` and `logits` are problems only if in both."""
        if not self.targets or not other.targets:
            return self if self.targets else other
        return Reading(
            self.nats + other.nats,
            self.targets + other.targets,
            self.entropy + other.entropy,
            self.gradient and other.gradient,
            self.logits and other.logits,
            self.not_finite or other.not_finite,
            self.mismatch or other.mismatch,
        )


class Verdict(NamedTuple):
    """A verdict on one stream (`audio`) or codebook (`audio/3`): its mean loss, chance, and the reason."""

    name: str
    kind: Kind
    loss: float
    chance: float | None
    why: str
    mismatch: str = ""


def judge(name: str, reading: Reading, chance: float | None) -> Verdict:
    """Compare a reading with chance, if known. The verdict is the first of DEAD, CHANCE and LEAK that applies."""
    loss = reading.nats / reading.targets if reading.targets else math.nan
    kind, why = _judged(loss, reading, chance)
    return Verdict(name, kind, loss, chance, why, reading.mismatch)


def _judged(loss: float, reading: Reading, chance: float | None) -> tuple[Kind, str]:
    if not reading.targets:
        return "DEAD", "it has no target: all its labels are masked"
    if not math.isfinite(loss) or reading.not_finite:
        return "DEAD", reading.not_finite or "its loss is not finite"
    if reading.gradient or reading.logits:
        return "DEAD", "; ".join(filter(None, (reading.gradient, reading.logits)))
    if chance is not None and loss > chance / CHANCE_FROM:
        return "CHANCE", "worse than guessing: shift, order, tokenizer or codec of the labels are not the model's"
    if chance is not None and loss >= CHANCE_FROM * chance:
        return "CHANCE", "no better than guessing: random weights, or inputs and labels that do not belong together"
    entropy = reading.entropy / reading.targets
    if entropy >= VARIETY and loss < LEAK_BELOW * entropy:
        return "LEAK", "lower than any model gets: labels not shifted, a mask not causal, or memorised data"
    return "OK", ""


def read_losses(
    family: Family,
    module: LossModule,
    batches: Sequence[Batch],
    autocast: Autocast,
    groups: Sequence[Sequence[Any]] = (),
    passes: Passes | None = None,
) -> dict[str, Reading]:
    """Measure every stream and codebook on batches that are on the model's device. The model does not change.

    Losses are measured in evaluation mode (dropout off), gradients in training mode, where models may recompute
    activations. `groups` are the examples of each batch, to find the sample of a loss that is not finite. If the module
    is sharded, `passes` are the passes of all ranks.
    """
    readings = {stream: Reading() for stream in family.streams}
    passes = passes or Passes(family, module, autocast, batches, groups)
    scored: dict[int, dict[str, StreamLoss]] = {}
    with untouched(module, training=False, weights=True), torch.no_grad():
        for batch in batches:
            scored[id(batch)], measured = _scored(passes, batch, readings)
            for name, reading in measured.items():
                readings[name] = readings.get(name, Reading()) + reading
        first = {stream: next((b for b in batches if b.targets.get(stream)), None) for stream in family.streams}
        compared = {id(batch): batch for batch in first.values() if batch is not None and has(family, "logits")}
        for batch in compared.values():
            with looking_at(batch.ids):
                logits = passes.logits(batch)
            logits = {stream: logits[stream] for stream, chosen in first.items() if chosen is batch}
            for stream, rows in logits.items():
                _check_variety(readings, stream, rows)
            eps = coarsest_eps(module.model, autocast)
            for name, said in find_mismatches(scored[id(batch)], logits, batch, eps).items():
                readings[name].mismatch = said
    passes.leave_out([stream for stream in family.streams if readings[stream].not_finite])
    with untouched(module, training=True, weights=True):
        for stream, seen in [(s, b) for s, b in first.items() if b is not None and s not in passes.left_out]:
            with looking_at(seen.ids):
                none, not_finite = passes.gradient(seen, stream)
            for name in _names(readings, stream):
                readings[name] = replace(readings[name], gradient=none, not_finite=not_finite)
    return {name: readings[name] for stream in family.streams for name in _names(readings, stream)}


def _scored(
    passes: Passes, batch: Batch, readings: Mapping[str, Reading]
) -> tuple[dict[str, StreamLoss], dict[str, Reading]]:
    """Return a batch's losses and readings. The cause of a loss that is not finite is searched once per stream."""
    with looking_at(batch.ids):
        losses = passes.losses(batch)
        measured = _of_batch(losses, batch)
        for stream in (s for s in passes.family.streams if s in measured and not readings[s].not_finite):
            if not math.isfinite(measured[stream].nats):
                measured[stream].not_finite = passes.why_not_finite(batch, stream)
    return losses, measured


def _names(readings: Mapping[str, Reading], stream: str) -> list[str]:
    """Return the names of the stream and its codebooks."""
    return [name for name in readings if name.split("/")[0] == stream]


def _of_batch(losses: Mapping[str, StreamLoss], batch: Batch) -> dict[str, Reading]:
    readings = {}
    for stream, loss in losses.items():
        columns = batch.labels[stream].targets.unsqueeze(-1).flatten(1).unbind(1)
        entropies = [_entropy(column) for column in columns]
        mean = sum(entropies) / len(entropies)
        readings[stream] = Reading(loss.total.item(), loss.targets, mean * loss.targets)
        if loss.parts is not None:
            counts = loss.part_targets
            for part, (nats, count) in enumerate(zip(loss.parts.tolist(), counts, strict=True)):
                entropy = entropies[part] if len(entropies) == len(counts) else mean
                readings[f"{stream}/{part}"] = Reading(nats, count, entropy * count)
    return readings


def _entropy(targets: Tensor) -> float:
    """Return the entropy of the targets' frequencies in nats: the loss of a model that knows only these."""
    counts = torch.unique(targets[targets != IGNORE], return_counts=True)[1].cpu().float()
    return float(torch.special.entr(counts / counts.sum()).sum())


def _check_variety(readings: dict[str, Reading], stream: str, logits: Tensor) -> None:
    """Write into `readings` whether logits, (targets, [codebooks,] classes), are the same at all positions."""
    if len(logits) < 2:
        return
    rows = logits[:: max(1, len(logits) // LOOKED_AT)]
    spread, size = (rows - rows[:1]).abs().amax(-1).amax(0), rows.abs().amax()
    same = spread <= SAME * size  # false for NaN, which the loss shows
    found = f"its logits are the same at every position of {len(rows)}" if bool(size) else "its logits are all zero"
    readings[stream].logits = found if bool(same.all()) else ""
    for part, flag in enumerate(same.flatten().tolist() if same.dim() else []):
        if f"{stream}/{part}" in readings:
            readings[f"{stream}/{part}"].logits = found if flag else ""


def number(chance: float | None) -> str:
    """Return chance as text; `unknown` if the family does not give it."""
    return "unknown" if chance is None else f"{chance:.4f}"


def lines(verdicts: Sequence[Verdict], samples: int, expect_chance: bool) -> list[str]:
    """Return the verdicts as a table, with a row per stream and per codebook with another verdict."""
    kinds = {verdict.name: verdict.kind for verdict in verdicts}
    rows: list[list[object]] = [["stream", "loss", "chance", "verdict"]]
    for verdict in verdicts:
        same = verdict.kind == kinds[verdict.name.split("/")[0]] and not verdict.mismatch
        if same and "/" in verdict.name:
            continue
        expected = " (expected)" if verdict.kind == "CHANCE" and expect_chance else ""
        why = f": {verdict.why}" if verdict.why and not expected else ""
        why += f"; MISMATCH: {verdict.mismatch}" if verdict.mismatch else ""
        rows.append([verdict.name, f"{verdict.loss:.4f}", number(verdict.chance), f"{verdict.kind}{expected}{why}"])
    shown = table("lrrl", rows)
    for stream in dict.fromkeys(name.split("/")[0] for name in kinds):
        losses = [f"{verdict.loss:.2f}" for verdict in verdicts if verdict.name.startswith(f"{stream}/")]
        if losses:
            shown.append(f"{stream} by codebook: {' '.join(losses)}")
    return [f"first loss over {samples} samples, nats per target", *shown]
