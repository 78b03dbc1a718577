"""The detector of targets that their own prediction can see.

It runs the first pass again with other ids in the input embedding, and compares the predictions that the user's own
cross-entropy scores. The ids that the loss sees as labels stay the same.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rawloop.buffers import untouched
from rawloop.contracts import Batch
from rawloop.seed import preserved_rng
from rawloop.watch.entries import first_place, micro_batches
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.mixing import at_positions, first_mixer
from rawloop.watch.nest import tensors_in
from rawloop.watch.subject import Detector, Pass, StepRecord, Subject

ALIGNED = 0.9  # of the targets must be the ids at one distance
SHORTEST = 6  # positions
AGAIN = 8  # the step of a second look: in a model whose last layer starts at zero, nothing moves at first


class Scored(NamedTuple):
    """The predictions that a loss scores: logits (rows, positions, classes), float32, and targets (rows, positions)."""

    logits: Tensor
    targets: Tensor


class Leaks(Detector):
    """Probes the first pass that can be run again, and a later one if it finds nothing: three forward passes each."""

    def __init__(self) -> None:
        self._next = 0.0  # the step of the next probe

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Probe the first pass of a step."""
        if record.step < self._next or not record.passes:
            return
        self._next = AGAIN if self._next < AGAIN else math.inf
        ours = any(isinstance(part, Batch) for part in micro_batches(record.batch))
        if not ours and "MaskedLM" not in type(subject.model).__name__:  # rawloop's own runs are probed before step 0
            for finding in probe(subject, record, record.passes[0]):
                self._next = math.inf
                yield finding


def probe(subject: Subject, record: StepRecord, one: Pass) -> Iterator[Finding]:
    """Look whether predictions move with their own and later tokens. The model does not change."""
    with (
        untouched(subject.model, training=False, weights=True),
        torch.enable_grad(),
    ):  # the pass may differentiate on its way
        spy = Spy(subject.model, one)
        before, ids = spy.run(), spy.ids
        if before is None or ids is None or (shift := _shift(before.targets, ids)) is None:
            return
        middle = ids.shape[1] // 2
        later = slice(middle, None)
        again, after = spy.run(), spy.run(later)
    if again is None or after is None:
        return
    tolerance = max(2 * float(_moved(before, again).max()), spy.rounding)
    tokens = torch.arange(before.targets.shape[1], device=ids.device) + shift  # the position of each target's token
    moved = _moved(before, after) > tolerance
    earlier, leaks = moved & (tokens < middle), moved & (tokens <= middle)
    sees_later = bool(earlier.any())
    if not bool(leaks.any()) or (shift == 0 and sees_later and "CausalLM" not in type(subject.model).__name__):
        return  # nothing moves; or it is an autoencoder or a tagger, which sees the whole row by design
    row, position = first_place(leaks)
    names = one.ids or record.ids
    place = Place("forward", sample=names[row] if len(names) == len(leaks) else "", row=row, position=position)
    evidence = {"predictions that moved": int(leaks.sum()), "tolerance": tolerance}
    causes = []
    if sees_later:
        module = _mixer(spy, earlier, later, tolerance)
        who = f"'{module}' carries later tokens to earlier positions" if module else "predictions see later tokens"
        advice = "give it a causal mask, added before softmax"
        causes.append(Cause("model", f"{who}: it is not causal", replace(place, module=module), evidence, advice))
    if shift == 0 or not sees_later:
        said = "the labels are not shifted" if shift == 0 else "logits and labels are shifted by one too little"
        why = f"{said}: each prediction is scored against a token that it sees"
        causes.append(Cause("loss", why, place, evidence, "compare logits[:, :-1] with labels[:, 1:]"))
    what = "a prediction moves when only its own target or later tokens change"
    yield Finding("target_visible", what, tuple(causes), record.step, subject.world.rank, since=0)


class Spy(TorchFunctionMode):
    """Runs a pass, with changed ids in the model's first embedding, and keeps what cross-entropy scores."""

    def __init__(self, model: nn.Module, one: Pass) -> None:
        super().__init__()
        self.model, self.one = model, one
        self.ids: Tensor | None = None
        self.rounding = 0.0
        self._given = [t for _, t in tensors_in(one.inputs) if not t.is_floating_point() and t.dim() == 2]
        self._kept: list[Scored] = []
        self._change: slice | None = None
        self._first: nn.Module | None = None

    def run(self, change: slice | None = None) -> Scored | None:
        """Run the pass with other ids at these positions; return what its largest cross-entropy scores."""
        self._kept, self._change = [], change
        with ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_pre_hook(self._embed).remove)
            with preserved_rng(), self:
                self.one.forward(self.one.inputs)
        best = max(self._kept, key=lambda scored: scored.targets.numel(), default=None)
        return best if best is not None and bool(best.logits.isfinite().all()) else None

    def _embed(self, table: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        ids = given[0] if given else None
        if torch.compiler.is_compiling() or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < SHORTEST:
            return None
        if self._first is None and any(_starts_with(whole, ids) for whole in self._given):
            self._first, self.ids = table, ids.clone()
        if table is not self._first or self._change is None or self.ids is None or ids.shape != self.ids.shape:
            return None
        changed = ids.clone()
        values, places = torch.unique(ids, return_inverse=True)
        changed[:, self._change] = values.roll(-1)[places][:, self._change]  # the next larger id of the batch
        return (changed, *given[1:])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the arguments of a cross-entropy over ids."""
        if func in (F.cross_entropy, F.nll_loss) and self.ids is not None and len(args) > 1:
            self._keep(args[0], args[1], len(self.ids))
        return func(*args, **(kwargs or {}))

    def _keep(self, logits: Tensor, targets: Tensor, rows: int) -> None:
        if targets.is_floating_point() or logits.dim() != targets.dim() + 1 or targets.numel() % rows:
            return
        logits = logits.movedim(1, -1).reshape(rows, -1, logits.shape[1])
        dtypes = {weight.dtype for weight in self.model.parameters()} | {logits.dtype}
        coarse = torch.is_autocast_enabled(logits.device.type) or any(dtype.itemsize < 4 for dtype in dtypes)
        self.rounding = max(self.rounding, 2e-3 if coarse else 1e-5)
        self._kept.append(Scored(logits.detach().float(), targets.reshape(rows, -1)))


def _starts_with(whole: Tensor, ids: Tensor) -> bool:
    part = whole[:, : ids.shape[1]]
    return part.shape == ids.shape and torch.equal(part.to(ids), ids) and bool((ids != ids[0, 0]).any())


def _shift(targets: Tensor, ids: Tensor) -> int | None:
    """Return how far the token of a target is behind the target's own position; None if that is not clear."""
    shares = []
    for shift in range(3):
        length = min(targets.shape[1], ids.shape[1] - shift)
        there, here = ids[:, shift : shift + length], targets[:, :length]
        scored = here >= 0
        shares.append(float(((here == there) & scored).sum() / scored.sum().clamp(min=1)))
    clear = [shift for shift, share in enumerate(shares) if share >= ALIGNED]
    return clear[0] if len(clear) == 1 else None


def _moved(before: Scored, after: Scored) -> Tensor:
    """Return how far each scored prediction moved, as a share of the largest logit: (rows, positions)."""
    moved = (after.logits - before.logits).abs().amax(-1) / before.logits.abs().amax().clamp(min=1e-30)
    return moved.where(before.targets >= 0, 0)


def _mixer(spy: Spy, earlier: Tensor, later: slice, tolerance: float) -> str:
    """Return the module that lets predictions see later tokens; empty if none shows it."""
    assert spy.ids is not None
    row, _ = first_place(earlier)
    pick = partial(at_positions, row, earlier[row].nonzero().flatten().tolist(), len(spy.ids), spy.ids.shape[1])
    with untouched(spy.model, training=False, weights=True), torch.no_grad():
        return first_mixer(spy.model, pick, (spy.run, lambda: spy.run(later)), tolerance)
