"""Mistakes in the calls of a training loop: in which order scaler, optimizer and gradients are used."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from rawloop.errors import first_few
from rawloop.watch.findings import Cause, Evidence, Finding, Place, short
from rawloop.watch.marks import Line
from rawloop.watch.reach import without_graph
from rawloop.watch.subject import Detector, Facts, StepRecord, Subject

# symptom, cause, advice; `{optimizer}`, `{line}` and `{names}` are filled in
MISTAKES: dict[str, tuple[str, str, str]] = {
    "scaled_update": (
        "{optimizer} applies gradients that are still multiplied by the loss scale",
        "optimizer.step() was called on scaled gradients, without scaler.step or scaler.unscale_",
        "Call scaler.step(optimizer) and scaler.update() in place of optimizer.step()",
    ),
    "clipped_while_scaled": (
        "gradients were clipped or written while they were multiplied by the loss scale",
        "{line} changes gradients before scaler.unscale_(optimizer), so a threshold is too small by the scale, and the "
        "update's size depends on it",
        "Call scaler.unscale_(optimizer) before it",
    ),
    "scale_moved_in_window": (
        "the loss scale was updated between the backward passes of one update",
        "scaler.update() was called after a backward pass whose gradients no optimizer had stepped on: the gradients "
        "of one update have different scales",
        "Call scaler.update() once, after scaler.step(optimizer)",
    ),
    "gradients_not_zeroed": (
        "gradients of the last update are added to those of this one",
        "no zero_grad between the optimizer's last update and the next backward pass to its weights",
        "Call optimizer.zero_grad() after each optimizer.step()",
    ),
    "zeroed_before_update": (
        "the gradients were zeroed between the backward pass and the update",
        "zero_grad comes after the last backward pass and before the step, so the update has no gradients",
        "Call zero_grad after optimizer.step(), or before the forward pass",
    ),
    "update_without_backward": (
        "{optimizer} was stepped without a backward pass since its last step",
        "no backward pass was seen between two steps of the optimizer",
        "Call loss.backward() before each step, inside watch.step",
    ),
    "trained_in_eval_mode": (
        "the model is trained in evaluation mode",
        "every call of the model since the last update found it in evaluation mode, so {names} does not act",
        "Call model.train() after each evaluation",
    ),
    "optimizer_holds_stale_weights": (
        "the optimizer updates weights that the model does not use",
        "{names} of the model are in no optimizer, which holds others of the same shape: they were assigned after the "
        "optimizer was made",
        "Create the optimizer after the last change of the model, such as .to(), add_adapter, resize or tying",
    ),
    "weights_without_optimizer": (
        "weights get gradients and no optimizer updates them",
        "{names} require gradients, and no optimizer under watch holds them",
        "Pass them to an optimizer, name all optimizers to rawloop.Watch, or freeze them with requires_grad_(False)",
    ),
    "update_inside_backward": (
        "the optimizer is stepped by hooks while the backward pass runs",
        "the gradients of the other weights are not there yet, so those of this loop are not looked at",
        "To have them looked at, call the optimizer's step after backward for a few steps",
    ),
}
MEMORY = "Make the micro-batches smaller or their samples shorter, and accumulate over more of them"
SHAPES = "Compare the shapes at this line with those of a batch that works"
INDEX = "Compare the ids and labels of this batch with the size of the embedding or the head that they index"
ADVICE: tuple[tuple[type[Exception], tuple[str, ...], str], ...] = (  # for an exception with one of these words
    (torch.OutOfMemoryError, ("",), MEMORY),
    (RuntimeError, ("out of memory", "not enough memory"), MEMORY),
    (IndexError, ("",), INDEX),
    (RuntimeError, ("device-side assert", "index out of range"), INDEX),
    (RuntimeError, ("shape", "size"), SHAPES),
)


class Misuse(Detector):
    """Reports what the hooks of a foreign loop have seen. It reads nothing from the device."""

    def __init__(self) -> None:
        self._checked_holders = False

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at the calls since the last update."""
        facts = record.facts
        if facts.step_line is None:
            return
        for kind, line, evidence in _calls(record, facts):
            place = Place(phase="update", optimizer=facts.optimizer, expression=str(line))
            yield _finding(subject, record, kind, place, evidence)
        if facts.calls and facts.calls == facts.evaluating and (name := _acts_in_training(subject.model)):
            place = Place(phase="forward", module=name)
            yield _finding(subject, record, "trained_in_eval_mode", place, {"calls": facts.calls}, names=name)
        if record.probing or not self._checked_holders:
            self._checked_holders = True
            yield from _holders(subject, record)

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at an update that was made inside a backward pass."""
        if record.facts.inside_backward:
            place = Place(phase="update", expression=str(record.facts.step_line))
            yield _finding(subject, record, "update_inside_backward", place, {}, ordinary=True)


def left_by(subject: Subject, record: StepRecord, error: Exception, line: str) -> Finding:
    """Return the finding for an exception that leaves the block of a step."""
    if (known := without_graph(error, subject, record, line)) is not None:
        return known
    fits = (advice for kind, words, advice in ADVICE if isinstance(error, kind) and any(w in str(error) for w in words))
    advice = next(fits, "Read the traceback; the batch is that of this step")
    place, evidence = Place(expression=line, rank=subject.world.rank), {"backward passes": record.facts.backwards}
    cause = Cause("not known", short(error), place, evidence, advice)
    return Finding("exception", f"{type(error).__name__} ended the step", (cause,), record.step, subject.world.rank)


def without_backward(subject: Subject, record: StepRecord, loss: float | None, line: str) -> Finding:
    """Return the finding for a block in which the model ran, and no backward pass followed."""
    bad = loss is not None and not math.isfinite(loss)
    cause = Cause(
        "loss" if bad else "not known",
        f"the loop left the step before backward; the last number that it computed is {loss}",
        Place(phase="forward", expression=line),
        {} if loss is None else {"loss": loss},
        "Look at the finding on the loss" if bad else "",
    )
    what = "the model ran, and no backward pass followed" + (": the loss is not finite" if bad else "")
    return Finding("no_backward", what, (cause,), record.step, subject.world.rank, ordinary=not bad)


def _calls(record: StepRecord, facts: Facts) -> Iterator[tuple[str, Line | None, Evidence]]:
    """Yield mistakes in the order of calls, each with the line and numbers."""
    count: dict[str, float] = {"backward passes": facts.backwards}
    scale: dict[str, float] = {"scale": record.scale}
    if facts.scaled and not facts.unscaled and not facts.through_scaler:
        yield "scaled_update", facts.step_line, scale | count
    if facts.written:
        yield "clipped_while_scaled", facts.written, scale
    if facts.scale_moved:
        yield "scale_moved_in_window", facts.scale_moved, count
    if facts.left_over:
        norm = record.grad_norm
        yield "gradients_not_zeroed", facts.step_line, {} if norm is None else {"gradient norm": norm}
    if facts.zeroed and not facts.idle:
        yield "zeroed_before_update", facts.zeroed, count
    if facts.idle:
        yield "update_without_backward", facts.step_line, {}


def _holders(subject: Subject, record: StepRecord) -> Iterator[Finding]:
    """Compare the weights that the optimizers hold with those that are trained."""
    held = {id(w): w for o in subject.optimizers for group in o.param_groups for w in group["params"]}
    named = dict(subject.named())
    trained = {name: w for name, w in named.items() if w.requires_grad}
    free = {name: w for name, w in trained.items() if id(w) not in held and w.grad is not None}
    if not free or not held:
        return
    own = {id(w) for w in named.values()}
    strange = {w.shape for w in held.values() if id(w) not in own}
    stale = [name for name, w in free.items() if w.shape in strange]
    kind = "optimizer_holds_stale_weights" if stale else "weights_without_optimizer"
    names = stale or [*free]
    place = Place("update", parameter=names[0], optimizer=type(subject.optimizers[0]).__name__ if stale else "")
    evidence: Evidence = {"trained": len(trained), "held by no optimizer": len(free)}
    yield _finding(subject, record, kind, place, evidence, names=first_few(names))


def _acts_in_training(model: nn.Module) -> str:
    """Return the name of a module that does something else in training; empty if there is none."""
    kinds = (_NormBase, _DropoutNd)
    return next((str(n) for n, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "p", 1) > 0), "")


def _finding(
    subject: Subject,
    record: StepRecord,
    kind: str,
    place: Place,
    evidence: Evidence,
    names: str = "",
    ordinary: bool = False,
) -> Finding:
    line = place.expression or "code that is not seen"
    fill = {"optimizer": record.facts.optimizer, "line": line, "names": names}
    symptom, what, advice = (text.format(**fill) for text in MISTAKES[kind])
    cause = Cause("model" if place.phase == "forward" else "optimizer", what, place, evidence, advice)
    return Finding(kind, symptom, (cause,), record.step, subject.world.rank, ordinary)
