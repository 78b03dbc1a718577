"""Traces one pass of a step that is not finite: where it starts, by which sample, and why."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rawloop.errors import first_few
from rawloop.origin import Origin, Reason, Rows, batch_size, find_origin, guilty_rows, is_finite, is_finite_in, reason
from rawloop.seed import restore_rng
from rawloop.watch.findings import MOST_CAUSES, Cause, Place, Whose, short
from rawloop.watch.nest import map_tensors, shown, tensors_in
from rawloop.watch.subject import Pass, StepRecord, Subject

OUTSIDE = 100  # a sample is unlike the others if its largest value is this many times theirs


@dataclass
class PassTracer:
    """Traces one pass of a step; `number` is its place among the step's passes."""

    subject: Subject
    record: StepRecord
    number: int
    one: Pass
    ordinary: bool = False

    def run(self, inputs: Any = None) -> Tensor:
        """Run the forward pass from its random streams, and return the root of backward."""
        if self.one.rng:
            restore_rng(self.one.rng)
        return self.one.forward(self.one.inputs if inputs is None else inputs)

    def causes(self) -> list[Cause]:
        """Return the causes, the likeliest first; none if the pass is finite."""
        inputs = dict(tensors_in(self.one.inputs))
        origin = find_origin(self.run, self.subject.model, {f"the input '{path}'": t for path, t in inputs.items()})
        if origin is None:
            return []
        for path in (path for path in inputs if origin.given == f"the input '{path}'"):
            return [self.of_input(path, inputs[path])]
        why = reason(origin)
        if self.one.scale > 1 and (cause := self.of_scale(origin, why)) is not None:
            return [cause]
        rows = self.rows(origin)
        evidence: dict[str, float | int | str] = {**why.evidence, **self.passes()}
        whose: Whose = why.blamed if why.blamed != "code" else ("model" if origin.spot.inside else "loss")
        place = self.place(origin, why, rows)
        main = Cause(whose, f"{why.what}{self.of_rows(rows)}", place, evidence, why.advice)
        return [*self.unlike_others(rows, place), *self.of_range(origin, why, main), main][:MOST_CAUSES]

    def of_input(self, path: str, tensor: Tensor) -> Cause:
        """Return the cause of numbers in an input that are not finite."""
        wrong = ~tensor.isfinite()
        places = wrong.nonzero()
        batched = bool(self.size) and tensor.dim() > 0 and tensor.shape[0] == self.size
        row, position = [*places[0].tolist(), None, None][:2] if batched else (None, None)
        place = Place("data", tensor=path, sample=self.name(row), row=row, position=position, rank=self.rank)
        evidence: dict[str, float | int | str] = {"not finite": f"{len(places):,} of {tensor.numel():,}"}
        if batched:
            evidence["samples"] = len(set(places[:, 0].tolist()))
        evidence |= self.passes()
        what = f"the input '{shown(path)}' contains {'NaN' if bool(tensor.isnan().any()) else 'infinity'}"
        return Cause("data", what, place, evidence, "Drop or repair this sample")

    def of_scale(self, origin: Origin, why: Reason) -> Cause | None:
        """Return the cause if the loss scale is too high: divided by it, the gradient is finite."""
        scale = self.one.scale
        if origin.phase == "backward":
            best = self.largest_scale()
        else:  # the scaled loss itself
            scales = origin.operation.endswith("mul") and not origin.spot.inside and why.blamed == "precision"
            size = float(why.evidence["in float32"]) if scales else 0.0
            best = 2.0 ** math.floor(math.log2(scale * torch.finfo(origin.dtype).max / size)) if size else 0.0
        if not best:
            return None
        scaler = self.subject.scaler
        self.ordinary = scaler is not None and best >= 1 and getattr(scaler, "get_backoff_factor", lambda: 0.5)() < 1
        what = f"the loss scale {scale:g} is too high: {why.what}"
        place = self.place(origin, why, Rows(0))
        advice = f"The scaler lowers it by itself: {best:g} is finite" if self.ordinary else f"Take a scale of {best:g}"
        return Cause("precision", what, place, {**why.evidence, "largest finite scale": best}, advice)

    def largest_scale(self) -> float:
        """Return the largest scale, divided by a power of 2, whose gradients are finite; 0 if none is down to 1."""
        low, high = 0, max(1, math.ceil(math.log2(self.one.scale)))
        if not is_finite(self.run, self.subject.model, scale=0.5**high):
            return 0.0
        while high - low > 1:
            middle = (low + high) // 2
            if is_finite(self.run, self.subject.model, scale=0.5**middle):
                high = middle
            else:
                low = middle
        return self.one.scale * 0.5**high

    def of_range(self, origin: Origin, why: Reason, main: Cause) -> list[Cause]:
        """Return the cause that the pass is finite if all of it runs in float32, if the operation alone is not."""
        if origin.phase != "forward" or why.blamed != "code" or origin.narrow is None:
            return []
        if not is_finite_in(self.run, self.subject.model, torch.float32):
            return []
        narrow = str(origin.narrow).removeprefix("torch.")
        what = f"in float32 the same pass is finite: {narrow} rounds or flushes a number before {origin.operation}"
        return [Cause("precision", what, main.place, {}, f"Compute the part before it in float32 instead of {narrow}")]

    def rows(self, origin: Origin) -> Rows:
        """Find the rows that make the pass not finite alone."""
        size = self.size

        def finite(chosen: Sequence[int]) -> bool:
            def pick(tensor: Tensor) -> Tensor:
                if not tensor.dim() or tensor.shape[0] != size:
                    return tensor
                return tensor[torch.tensor(chosen, device=tensor.device)]

            inputs = map_tensors(pick, self.one.inputs)
            return is_finite(lambda: self.run(inputs), self.subject.model, origin.phase == "backward")

        return guilty_rows(size, finite)

    def of_rows(self, rows: Rows) -> str:
        """Return which rows cause it, as the end of a sentence."""
        if rows.size < 2:
            return ""
        if not rows.guilty:
            return "; no sample alone causes it, only together" if rows.complete else ""
        tried = "" if rows.complete else f" ({rows.tried} of {rows.size} samples tried in {rows.runs} passes)"
        if len(rows.guilty) == rows.tried:
            return f"; every sample causes it alone{tried}"
        names = first_few(self.name(row) or f"row {row}" for row in rows.guilty)
        which = f"the sample {names} alone causes it" if len(rows.guilty) == 1 else f"{names} cause it alone"
        return f"; {which}{tried}"

    def unlike_others(self, rows: Rows, place: Place) -> list[Cause]:
        """Return the cause that a guilty sample has values far outside those of the others."""
        if not rows.guilty or len(rows.guilty) * 2 > rows.size:
            return []
        row = rows.guilty[0]
        others = [other for other in range(rows.size) if other not in rows.guilty]
        for path, tensor in tensors_in(self.one.inputs):
            if not tensor.is_floating_point() or not tensor.dim() or tensor.shape[0] != rows.size:
                continue
            sizes = tensor.detach().flatten(1).abs().amax(1) if tensor.dim() > 1 else tensor.detach().abs()
            mine, most = sizes[row].item(), sizes[others].max().item()
            if most > 0 and math.isfinite(mine) and mine > OUTSIDE * most:
                what = f"the sample has values up to {mine:.4g} in '{shown(path)}', the others up to {most:.4g}"
                where = Place("data", tensor=path, sample=place.sample, row=row, rank=self.rank)
                return [Cause("data", what, where, {"largest": mine, "others": most}, "Drop or repair this sample")]
        return []

    def place(self, origin: Origin, why: Reason, rows: Rows) -> Place:
        """Return the place of an origin, with the first guilty row and its position."""
        row = rows.guilty[0] if rows.guilty and len(rows.guilty) < rows.tried else (0 if self.size == 1 else None)
        return Place(
            phase=origin.phase,
            module=origin.spot.module,
            parameter=origin.parameter or why.parameter,
            expression=origin.spot.line,
            sample=self.name(row),
            row=row,
            position=self.position(why, row),
            rank=self.rank,
        )

    def position(self, why: Reason, row: int | None) -> int | None:
        """Return the position in time of the first number that is not finite, if it is of this row."""
        lengths = Counter(t.shape[1] for _, t in tensors_in(self.one.inputs) if t.dim() > 1 and t.shape[0] == self.size)
        length = lengths.most_common(1)[0][0] if lengths else 0
        if row is None or not length or not why.index:
            return None
        if why.shape[0] == self.size * length:
            return why.index[0] % length if why.index[0] // length == row else None
        if why.shape[0] != self.size or why.index[0] != row:
            return None
        return next((i for i, n in zip(why.index[1:], why.shape[1:], strict=True) if n == length), None)

    def passes(self) -> dict[str, str]:
        """Return which of the step's passes this is, as evidence."""
        count = len(self.record.passes)
        return {"pass": f"{self.number + 1} of {count}"} if count > 1 else {}

    def not_again(self, error: Exception) -> list[Cause]:
        """Return what is known of a pass that cannot run again."""
        what = f"pass {self.number + 1} cannot run again: {short(error)}"
        causes = [Cause("not known", what, Place(rank=self.rank), {}, "The weights are finite: look at its inputs")]
        for path, tensor in tensors_in(self.one.inputs):
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                return [self.of_input(path, tensor), *causes]
        return causes

    @property
    def size(self) -> int:
        """The number of samples; 0 if unknown."""
        inputs, named = dict(tensors_in(self.one.inputs)), {path for path, _ in tensors_in(self.record.batch)}
        mine = [tensor for path, tensor in inputs.items() if path in named and tensor.dim()]
        return batch_size(mine or inputs.values(), self.one.ids)

    @property
    def rank(self) -> int:
        """The rank."""
        return self.subject.world.rank

    def name(self, row: int | None) -> str:
        """Return the name of a row's sample; empty if unknown."""
        return self.one.ids[row] if row is not None and row < len(self.one.ids) else ""
