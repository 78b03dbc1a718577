"""Keeps the bad steps of a foreign loop as capsules."""

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.errors import RawloopError
from rawloop.files import in_words
from rawloop.versions import installed_versions
from rawloop.watch.capsule import Capsule, Capsules
from rawloop.watch.findings import Finding
from rawloop.watch.flight import FlightRecorder
from rawloop.watch.nest import tensors_in
from rawloop.watch.rerun import digest, digests, run_again
from rawloop.watch.subject import Pass, StepRecord, Subject
from rawloop.watch.tape import Replay, Tape
from rawloop.watch.tape_state import tape_state


class Keeper:
    """Keeps the last steps by reference, and writes a capsule of a step if there is a reason.

    Args:
        subject: the loop's objects.
        out: the folder of the watch.
    """

    def __init__(self, subject: Subject, out: Path) -> None:
        self.subject = subject
        self.flight = FlightRecorder(subject.config.steps)
        self.capsules = Capsules(out, subject.config, subject.world.rank)
        self.why = ""

    def found(self, finding: Finding) -> None:
        """Keep the step of an alarm; the next one, if the update of its own has been made."""
        if not finding.ordinary:
            self.why = self.why or f"finding {finding.kind}: {finding.what}"

    def ended(self, record: StepRecord) -> None:
        """Remember a step that has ended."""
        rates = [float(group["lr"]) for one in self.subject.optimizers for group in one.param_groups]
        self.flight.keep(record, record.passes[0].rng if record.passes else {}, max(rates, default=0.0))

    def keep(self, record: StepRecord, alarms: Iterable[Finding], roots: Sequence[Tensor], failed: bool) -> str:
        """Write a capsule if there is a reason and room for it. The weights must be those that the step started from.

        Args:
            record: the step.
            alarms: so far.
            roots: of the backward passes.
            failed: the step has failed: its passes are not run again, as DDP may be waiting for gradients.

        Returns:
            a line for the user, or "".
        """
        why, self.why = self.why, ""
        if not why or not self.capsules.has_room():
            return ""
        try:
            path = self.capsules.write(record.step, self._contents(record, why, alarms, roots, failed))
        except OSError as error:
            return f"a capsule could not be written: {in_words(error)}"
        except (RuntimeError, TypeError) as error:  # the device has failed, or its memory is full
            return f"a capsule could not be made: {type(error).__name__}: {error}"
        return f"the step is kept: rawloop replay {path} --model package.module:function, which builds the model"

    def _contents(
        self, record: StepRecord, why: str, alarms: Iterable[Finding], roots: Sequence[Tensor], failed: bool
    ) -> Capsule:
        subject, model = self.subject, self.subject.model
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        facts: dict[str, Any] = {
            "kind": "loop",
            "why": why,
            "step": record.step,
            "rank": subject.world.rank,
            "world_size": subject.world.size,
            "device": str(next(iter(model.parameters())).device),
            "precision": "the loop's own",
            "threads": torch.get_num_threads(),
            "versions": {**installed_versions(), "python": platform.python_version()},
            "model": type(model).__qualname__,
            "scale": record.scale,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "findings": [finding.as_json() for finding in alarms],
            "history": [kept.numbers() for kept in self.flight.steps],
            "why_no_passes": record.why_no_passes,
        }
        states: dict[str, Any] = {"passes": {"tapes": [], "passes": [], "batch": dict(tensors_in(record.batch))}}
        try:
            states["passes"] |= _tapes(record.passes, roots)
        except RawloopError as error:
            facts["why_no_passes"] = str(error)
        states["earlier"] = {
            "steps": [{"step": k.step, "rng": k.rng, "batch": dict(tensors_in(k.batch))} for k in self.flight.steps]
        }
        states["weights"] = {"trained": trained, "buffers": dict(model.named_buffers())}
        states["optimizer"] = {"state": self._optimizer_state()}
        if record.passes and not failed:
            facts["own_gradients"] = digests(run_again(model, trained.items(), record.passes).gradients)
            facts["frozen"] = self._frozen()
        return Capsule(facts, states)

    def _optimizer_state(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self.subject.named()}
        state: dict[str, Any] = {}
        for optimizer in self.subject.optimizers:
            for parameter, values in optimizer.state.items():
                if id(parameter) in names:
                    kept = {key: value for key, value in values.items() if isinstance(value, Tensor | int | float)}
                    state[names[id(parameter)]] = kept
        return state

    def _frozen(self) -> dict[str, str]:
        """Return the digests of the weights that do not train; none if reading them takes long."""
        frozen = {name: weight for name, weight in self.subject.model.named_parameters() if not weight.requires_grad}
        size = sum(weight.numel() * weight.element_size() for weight in frozen.values())
        small = size <= self.subject.config.capsule_mb * 10**6
        return {name: digest(weight) for name, weight in frozen.items()} if small else {}


def _tapes(passes: Sequence[Pass], roots: Sequence[Tensor]) -> dict[str, Any]:
    """Return the tapes of passes, and for each pass its place on them and the root that training has computed."""
    tapes: list[Tape] = []
    rows = []
    known: Sequence[Tensor | None] = roots if len(roots) == len(passes) else [None] * len(passes)
    for one, root in zip(passes, known, strict=True):
        assert isinstance(one.forward, Replay)
        tape = one.forward.tape
        if not any(tape is other for other in tapes):
            tapes.append(tape)
        if not any(one.forward is other for other in tape.replays):  # the loop has left before its backward pass
            tape.replays.append(one.forward)
        place = next(n for n, other in enumerate(tape.replays) if other is one.forward)
        number = next(n for n, other in enumerate(tapes) if other is tape)
        rows.append({"tape": number, "replay": place, "ids": list(one.ids), "scale": one.scale, "root": root})
    devices = [{name: str(leaf.tensor.device) for name, leaf in tape.leaves.items()} for tape in tapes]
    return {"tapes": [tape_state(tape) for tape in tapes], "devices": devices, "passes": rows}
