"""Keeps the bad steps of a foreign loop as capsules."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rawloop.errors import RawloopError
from rawloop.watch.capsule import Capsule, Capsules, FlightRecorder, read_facts
from rawloop.watch.digests import Digest, Digests
from rawloop.watch.findings import Finding
from rawloop.watch.held import measurable
from rawloop.watch.nest import tensors_in
from rawloop.watch.rerun import digest, digests, run_again
from rawloop.watch.subject import Pass, StepRecord, Subject
from rawloop.watch.tape import Replay, Tape
from rawloop.watch.tape_state import tape_state

FUNCTION = "package.module:function"


class Keeper:
    """Keeps the last steps by reference, and writes a capsule of a step into the folder `out` if there is a reason."""

    def __init__(self, subject: Subject, out: Path) -> None:
        self.subject = subject
        self.flight = FlightRecorder(subject.config.steps)
        self.capsules = Capsules(out, subject.config, subject.world.rank)
        self.why = ""
        self._digests = Digests()
        self._at_start: dict[str, Digest] = {}

    def start(self) -> None:
        """Remember the frozen weights, by their digests: a capsule has those that have changed."""
        self._at_start = self._digests.of(self._frozen())

    def found(self, finding: Finding) -> None:
        """Keep the step of an alarm; the next one, if the update of its own has been made."""
        if not finding.ordinary:
            self.why = self.why or f"finding {finding.kind}: {finding.what}"

    def ended(self, record: StepRecord) -> None:
        """Remember a step that has ended."""
        rates = [float(group["lr"]) for one in self.subject.optimizers for group in one.param_groups]
        self.flight.keep(record, record.passes[0].rng if record.passes else {}, max(rates, default=0.0))

    def keep(self, record: StepRecord, alarms: Iterable[Finding], roots: Sequence[Tensor], failed: bool) -> str:
        """Write a capsule if there is a reason and room for it, and return a line for the user, or "".

        The weights must be those that the step started from. `roots` are those of its backward passes. If the step has
        failed, its passes are not run again: DDP may be waiting for gradients.
        """
        why, self.why = self.why, ""
        if not why or not self.capsules.has_room():
            return ""
        path, problem = self.capsules.write(record.step, lambda: self._contents(record, why, alarms, roots, failed))
        if path is None:
            return problem
        facts = read_facts(path)
        reason = "" if facts["passes"] else facts["why_no_passes"] or "it has no backward pass"
        if reason := facts["left_out"].get("passes", reason):
            return f"the step is kept in {path}; it can be read, not replayed: {reason}"
        return f"the step is kept: rawloop replay {path} --model {FUNCTION}, which builds the model"

    def _contents(
        self, record: StepRecord, why: str, alarms: Iterable[Finding], roots: Sequence[Tensor], failed: bool
    ) -> Capsule:
        subject, model = self.subject, self.subject.model
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        facts: dict[str, Any] = {
            **self.flight.facts(record, subject.world, why, alarms),
            "kind": "loop",
            "device": str(next(iter(model.parameters())).device),
            "precision": "the loop's own",
            "model": type(model).__qualname__,
            "why_no_passes": record.why_no_passes,
        }
        passes: dict[str, Any] = {"tapes": [], "passes": [], "batch": _batch_state(record.batch)}
        try:
            passes |= _tapes(record.passes, roots)
        except RawloopError as error:
            facts["why_no_passes"] = str(error)
        facts["passes"] = len(passes["passes"])
        frozen = self._frozen()
        now = self._digests.of(frozen)
        moved = {name: frozen[name] for name in now if now[name] != self._at_start.get(name)}
        states = {
            "passes": passes,
            "earlier": self.flight.state(_batch_state),
            "weights": {"trained": trained, "buffers": dict(model.named_buffers())},
            "optimizer": {"state": self._optimizer_state()},
            **({"frozen": moved} if moved else {}),
        }
        if failed and not record.passes:
            facts["why_no_passes"] = facts["why_no_passes"] or "an exception left the step before its backward pass"
        if record.passes and not failed:
            again = run_again(model, trained.items(), record.passes)
            facts["gradients"] = digests(again.gradients)
            facts["again"] = [digest(root) for root in again.roots]
            facts["frozen"] = self._frozen_digests()
        return Capsule(facts, states)

    def _optimizer_state(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self.subject.named()}
        state: dict[str, Any] = {}
        for parameter, values in (pair for optimizer in self.subject.optimizers for pair in optimizer.state.items()):
            if id(parameter) in names:
                kept = {key: value for key, value in values.items() if isinstance(value, Tensor | int | float)}
                state[names[id(parameter)]] = kept
        return state

    def _frozen(self) -> dict[str, Tensor]:
        named = self.subject.model.named_parameters()
        return {name: weight for name, weight in named if not weight.requires_grad and measurable(weight)}

    def _frozen_digests(self) -> dict[str, str]:
        """Return the digests of the weights that do not train; none if reading them takes long."""
        frozen = {name: weight for name, weight in self.subject.model.named_parameters() if not weight.requires_grad}
        small = sum(weight.nbytes for weight in frozen.values()) <= self.subject.config.capsule_mb * 10**6
        return {name: digest(weight) for name, weight in frozen.items()} if small else {}


def _batch_state(batch: Any) -> dict[str, Tensor]:
    return dict(tensors_in(batch))


def _tapes(passes: Sequence[Pass], roots: Sequence[Tensor]) -> dict[str, Any]:
    """Return the tapes of passes, and for each pass its place on them and the root that training has computed."""
    tapes: list[Tape] = []
    rows = []
    known: Sequence[Tensor | None] = roots if len(roots) == len(passes) else [None] * len(passes)
    for one, root in zip(passes, known, strict=True):
        assert isinstance(one.forward, Replay)
        tape = one.forward.tape
        # the loop may have left before the backward pass of this replay
        number, place = _number_of(tape, tapes), _number_of(one.forward, tape.replays)
        rows.append({"tape": number, "replay": place, "ids": list(one.ids), "scale": one.scale, "root": root})
    devices = [{name: str(leaf.tensor.device) for name, leaf in tape.leaves.items()} for tape in tapes]
    return {"tapes": [tape_state(tape) for tape in tapes], "devices": devices, "passes": rows}


def _number_of(item: Any, items: list[Any]) -> int:
    """Return the place of the item itself in a list, to which it is added if it is not there."""
    for number, other in enumerate(items):
        if other is item:
            return number
    items.append(item)
    return len(items) - 1
