"""Mistakes in the calls of a training loop: in which order scaler, optimizer, gradients and schedule are used."""

import math
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from rawloop.errors import first_few
from rawloop.watch.findings import Cause, Finding, Place, Whose
from rawloop.watch.reach import without_graph
from rawloop.watch.subject import Detector, Facts, StepRecord, Subject


class Misuse(Detector):
    """Reports what the hooks of a foreign loop have seen. It reads nothing from the device."""

    def __init__(self) -> None:
        self._checked_holders = False

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at the calls since the last update."""
        facts = record.facts
        if not facts.step_line and not facts.optimizer:
            return
        yield from _scaling(subject, record, facts)
        yield from _zeroing(subject, record, facts)
        if facts.calls and facts.calls == facts.evaluating and (name := _acts_in_training(subject.model)):
            yield _finding(
                subject,
                record,
                "trained_in_eval_mode",
                "the model is trained in evaluation mode",
                "model",
                f"every call of the model since the last update found it in evaluation mode, so {name} does not act",
                Place(phase="forward", module=name),
                {"calls": facts.calls},
                "Call model.train() after each evaluation",
            )
        if record.probing or not self._checked_holders:
            self._checked_holders = True
            yield from _holders(subject, record)

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at an update that was skipped."""
        facts = record.facts
        if facts.lr_moved:
            yield _finding(
                subject,
                record,
                "schedule_without_update",
                "the learning rate moved after an update that the scaler had skipped",
                "optimizer",
                "the schedule counts steps that were not applied",
                Place(optimizer=facts.optimizer, phase="update"),
                {},
                "Step the schedule only if the scale did not fall in scaler.update()",
                ordinary=True,
            )


def left_by(subject: Subject, record: StepRecord, error: Exception, line: str) -> Finding:
    """Return the finding for an exception that leaves the block of a step."""
    if (known := without_graph(error, subject, record, line)) is not None:
        return known
    text = str(error).partition("\n")[0][:200]
    return _finding(
        subject,
        record,
        "exception",
        f"{type(error).__name__} ended the step",
        "not known",
        f"{type(error).__name__}: {text}",
        Place(expression=line, rank=subject.world.rank),
        {"backward passes": record.facts.backwards},
        "Read the traceback; the batch is that of this step",
    )


def without_backward(subject: Subject, record: StepRecord, loss: float | None, line: str) -> Finding:
    """Return the finding for a block in which the model ran, and no backward pass followed."""
    bad = loss is not None and not math.isfinite(loss)
    return _finding(
        subject,
        record,
        "no_backward",
        "the model ran, and no backward pass followed" + (": the loss is not finite" if bad else ""),
        "loss" if bad else "not known",
        f"the loop left the step before backward; the last number that it computed is {loss}",
        Place(phase="forward", expression=line),
        {} if loss is None else {"loss": loss},
        "Look at the finding on the loss" if bad else "",
        ordinary=not bad,
    )


def _scaling(subject: Subject, record: StepRecord, facts: Facts) -> Iterator[Finding]:
    """Yield findings about calls in the wrong order around the loss scale."""
    place = Place(phase="update", optimizer=facts.optimizer, expression=facts.step_line)
    count: dict[str, float | int | str] = {"backward passes": facts.backwards}
    if facts.scaled and not facts.unscaled and not facts.through_scaler:
        yield _finding(
            subject,
            record,
            "scaled_update",
            f"{facts.optimizer} applies gradients that are still multiplied by the loss scale",
            "optimizer",
            "optimizer.step() was called on scaled gradients, without scaler.step or scaler.unscale_",
            place,
            {"scale": record.scale, **count},
            "Call scaler.step(optimizer) and scaler.update() in place of optimizer.step()",
        )
    if facts.written:
        line = facts.written if ":" in facts.written else ""
        yield _finding(
            subject,
            record,
            "clipped_while_scaled",
            "gradients were clipped or written while they were multiplied by the loss scale",
            "optimizer",
            f"{facts.written} changes gradients before scaler.unscale_(optimizer), so a threshold is too small by the "
            "scale, and the update's size depends on it",
            Place(phase="update", optimizer=facts.optimizer, expression=line),
            {"scale": record.scale},
            "Call scaler.unscale_(optimizer) before it",
        )
    if facts.scale_moved:
        yield _finding(
            subject,
            record,
            "scale_moved_in_window",
            "the loss scale was updated between the backward passes of one update",
            "optimizer",
            "scaler.update() was called after a backward pass whose gradients no optimizer had stepped on: the "
            "gradients of one update have different scales",
            Place(phase="update", optimizer=facts.optimizer, expression=facts.scale_moved),
            count,
            "Call scaler.update() once, after scaler.step(optimizer)",
        )


def _zeroing(subject: Subject, record: StepRecord, facts: Facts) -> Iterator[Finding]:
    """Yield findings about gradients that are zeroed too late or too early, and about updates without a backward."""
    place = Place(phase="update", optimizer=facts.optimizer, expression=facts.step_line)
    if facts.left_over:
        yield _finding(
            subject,
            record,
            "gradients_not_zeroed",
            "gradients of the last update are added to those of this one",
            "optimizer",
            "no zero_grad between the optimizer's last update and the next backward pass to its weights",
            place,
            {} if record.grad_norm is None else {"gradient norm": record.grad_norm},
            "Call optimizer.zero_grad() after each optimizer.step()",
        )
    if facts.zeroed and not facts.idle:
        yield _finding(
            subject,
            record,
            "zeroed_before_update",
            "the gradients were zeroed between the backward pass and the update",
            "optimizer",
            "zero_grad comes after the last backward pass and before the step, so the update has no gradients",
            Place(phase="update", optimizer=facts.optimizer, expression=facts.zeroed),
            {"backward passes": facts.backwards},
            "Call zero_grad after optimizer.step(), or before the forward pass",
        )
    if facts.idle:
        yield _finding(
            subject,
            record,
            "update_without_backward",
            f"{facts.optimizer} was stepped without a backward pass since its last step",
            "optimizer",
            "no backward pass was seen between two steps of the optimizer",
            place,
            {},
            "Call loss.backward() before each step, inside watch.step",
        )


def _holders(subject: Subject, record: StepRecord) -> Iterator[Finding]:
    """Compare the weights that the optimizers hold with those that are trained."""
    held = {id(w): w for o in subject.optimizers for group in o.param_groups for w in group["params"]}
    named = dict(subject.named())
    trained = {name: w for name, w in named.items() if w.requires_grad}
    free = {name: w for name, w in trained.items() if id(w) not in held and w.grad is not None}
    own = {id(w) for w in named.values()}
    strange = [w for w in held.values() if id(w) not in own]
    if not free or not held:
        return
    stale = [name for name, w in free.items() if any(w.shape == other.shape for other in strange)]
    name = (stale or list(free))[0]
    evidence: dict[str, float | int | str] = {"trained": len(trained), "held by no optimizer": len(free)}
    if stale:
        yield _finding(
            subject,
            record,
            "optimizer_holds_stale_weights",
            "the optimizer updates weights that the model does not use",
            "optimizer",
            f"{first_few(stale)} of the model are in no optimizer, which holds others of the same shape: they were "
            "assigned after the optimizer was made",
            Place(phase="update", parameter=name, optimizer=type(subject.optimizers[0]).__name__),
            evidence,
            "Create the optimizer after the last change of the model, such as .to(), add_adapter, resize or tying",
        )
        return
    yield _finding(
        subject,
        record,
        "weights_without_optimizer",
        "weights get gradients and no optimizer updates them",
        "optimizer",
        f"{first_few(list(free))} require gradients, and no optimizer under watch holds them",
        Place(phase="update", parameter=name),
        evidence,
        "Pass them to an optimizer, name all optimizers to rawloop.Watch, or freeze them with requires_grad_(False)",
    )


def _acts_in_training(model: nn.Module) -> str:
    """Return the name of a module that does something else in training; empty if there is none."""
    kinds = (_NormBase, _DropoutNd)
    return next((str(n) for n, m in model.named_modules() if isinstance(m, kinds) and getattr(m, "p", 1) > 0), "")


def _finding(
    subject: Subject,
    record: StepRecord,
    kind: str,
    symptom: str,
    whose: Whose,
    what: str,
    place: Place,
    evidence: dict[str, float | int | str],
    advice: str,
    ordinary: bool = False,
) -> Finding:
    cause = Cause(whose, what, place, evidence, advice)
    return Finding(kind, symptom, (cause,), record.step, subject.world.rank, ordinary)
