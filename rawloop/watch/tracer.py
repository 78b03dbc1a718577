"""The origin tracer: runs a step that is not finite again, and says where, by which sample, and why."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rawloop.origin import (
    Damage,
    Origin,
    Reason,
    Rows,
    batch_size,
    damaged,
    find_origin,
    guilty_rows,
    is_finite,
    reason,
)
from rawloop.seed import restore_rng
from rawloop.watch.findings import Cause, Finding, Place, Whose
from rawloop.watch.nest import map_tensors, tensors_in
from rawloop.watch.subject import Pass, StepRecord, Subject

KIND = "not_finite"


def trace(subject: Subject, record: StepRecord) -> Iterable[Finding]:
    """Find why the loss or the gradients of a step are not finite, by running its passes again.

    Call it before any weight has changed. The model, its gradients, buffers, modes and hooks and the random streams are
    as before when it returns. Code that runs recorded operations, outside the model's modules, names the user's line in
    `rawloop.origin.current_line` around each of them.
    """
    what = _symptom(record)
    damage = damaged(subject.model)
    if damage is not None:
        return [_finding(subject, record, what, [_of_damage(damage)])]
    problems: list[Cause] = []
    for number, one in enumerate(record.passes):
        tracer = _Tracer(subject, record, number, one)
        try:
            causes = tracer.causes()
        except Exception as error:
            problems.append(tracer.not_again(error))
            continue
        if causes:
            return [_finding(subject, record, what, causes, tracer.ordinary)]
    return [_finding(subject, record, what, problems or [Cause("not known", "each pass is finite when it runs again")])]


@dataclass
class _Tracer:
    """Traces one pass of a step."""

    subject: Subject
    record: StepRecord
    number: int
    one: Pass
    ordinary: bool = False

    def run(self, inputs: Any = None) -> Tensor:
        """Run the forward pass from its random streams."""
        if self.one.rng:
            restore_rng(self.one.rng)
        return self.one.forward(self.one.inputs if inputs is None else inputs)

    def causes(self) -> list[Cause]:
        """Return the causes, the likeliest first; none if the pass is finite."""
        model = self.subject.model
        inputs = {f"the input '{path}'": tensor for path, tensor in tensors_in(self.one.inputs)}
        origin = find_origin(self.run, model, inputs)
        if origin is None:
            return []
        why = reason(origin)
        evidence = dict(why.evidence)
        if len(self.record.passes) > 1:
            evidence["pass"] = f"{self.number + 1} of {len(self.record.passes)}"
        rows = self.rows()
        whose: Whose = why.blamed if why.blamed != "code" else ("model" if origin.spot.inside else "loss")
        place = self.place(origin, why, rows)
        return [Cause(whose, f"{why.what}{self.of_rows(rows)}", place, evidence, why.advice)]

    def rows(self) -> Rows:
        """Find the rows that make the pass not finite alone."""
        tensors = [tensor for _, tensor in tensors_in(self.one.inputs)]
        size = batch_size(tensors, self.one.ids)

        def finite(chosen: Sequence[int]) -> bool:
            def pick(tensor: Tensor) -> Tensor:
                if not tensor.dim() or tensor.shape[0] != size:
                    return tensor
                return tensor[torch.tensor(chosen, device=tensor.device)]

            return is_finite(lambda: self.run(map_tensors(pick, self.one.inputs)), self.subject.model)

        return guilty_rows(size, finite)

    def of_rows(self, rows: Rows) -> str:
        """Return which rows cause it, as the end of a sentence."""
        if rows.size < 2:
            return ""
        if not rows.guilty:
            return "; no sample alone causes it, only together" if rows.complete else ""
        names = [self.one.ids[row] if self.one.ids else f"row {row}" for row in rows.guilty[:5]]
        if len(rows.guilty) == rows.size:
            return "; every sample causes it alone"
        more = f" and {len(rows.guilty) - 5} more" if len(rows.guilty) > 5 else ""
        tried = "" if rows.complete else f" ({rows.tried} of {rows.size} rows tried in {rows.runs} passes)"
        return f"; alone it is caused by {', '.join(names)}{more}, of {rows.size} samples{tried}"

    def place(self, origin: Origin, why: Reason, rows: Rows) -> Place:
        """Return the place of an origin, with the first guilty row."""
        row = rows.guilty[0] if rows.guilty and len(rows.guilty) < rows.size else None
        return Place(
            phase=origin.phase,
            module=origin.spot.module,
            parameter=origin.parameter,
            expression=origin.spot.line,
            tensor=origin.given,
            sample=self.one.ids[row] if row is not None and self.one.ids else "",
            row=row,
            rank=self.subject.world.rank,
        )

    def not_again(self, error: Exception) -> Cause:
        """Return what is known of a pass that cannot run again."""
        text = str(error).partition("\n")[0][:200]
        return Cause("not known", f"pass {self.number + 1} cannot run again: {type(error).__name__}: {text}")


def _of_damage(damage: Damage) -> Cause:
    place = Place(parameter=damage.name, phase="update")
    what = f"the {damage.kind} '{damage.name}' is not finite, so no loss can be"
    evidence: dict[str, float | int | str] = {
        "not finite": f"{damage.wrong:,} of {damage.total:,}",
        "first index": str(list(damage.first)),
    }
    advice = "Start from a checkpoint before it, and look at the step that wrote it"
    return Cause("optimizer" if damage.kind == "weight" else "model", what, place, evidence, advice)


def _symptom(record: StepRecord) -> str:
    if record.loss is not None and not math.isfinite(record.loss):
        return "the loss is not finite"
    return "the gradients are not finite"


def _finding(
    subject: Subject, record: StepRecord, what: str, causes: Sequence[Cause], ordinary: bool = False
) -> Finding:
    return Finding(KIND, what, tuple(causes[:3]), record.step, subject.world.rank, ordinary)
