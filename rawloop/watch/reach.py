"""What the loss reaches: parameters without a gradient, gradients that are exactly zero, a loss that stands still."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import basename, sep
from traceback import extract_tb

import torch
from torch import nn

from rawloop.errors import first_few
from rawloop.watch.findings import Cause, Finding, Place, Whose
from rawloop.watch.look import Look, Seen
from rawloop.watch.subject import Detector, StepRecord, Subject

LOOKS = 3  # in which a parameter has no gradient before that counts
MOST_LOOKS = 6  # in a row
STILL, STILL_IN_BF16 = 5, 50  # updates over which a loss stands still to the bit
SMALL = 0.01  # share of the trained values below which an unused part is only noted


class Reach(Detector):
    """Looks at which parameters the loss reaches, and whether it moves."""

    def __init__(self, look: Look | None = None) -> None:
        self.look = look or Look()
        self._last: Seen | None = None
        self._missing: set[str] = set()  # parameters that had no gradient, or one of zeros, in every look
        self._looks = self._all_looks = 0  # those that count, and all
        self._nothing = 0  # steps in a row with a gradient of exactly zero
        self._losses: list[float] = []
        self._told: set[str] = set()

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Look for a model that trains nothing."""
        if any(p.requires_grad for p in subject.model.parameters()):
            return
        cause = Cause(
            "model",
            "no parameter of the model requires a gradient",
            Place("backward"),
            advice="Set requires_grad of the parts that are to be trained",
        )
        yield Finding("nothing_trained", "no parameter is trained", (cause,), 0, subject.world.rank)

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Begin the look."""
        self.look.begin(subject, record)
        return ()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Measure, and count the steps in a row whose gradient is exactly zero."""
        self.look.gradients(subject, record)
        self._nothing = self._nothing + 1 if record.grad_norm == 0 else 0
        if self._nothing >= 2:
            yield from self._once(_nothing(subject, record))

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Judge what the look has seen, and whether the loss stands still."""
        if record.applied:
            yield from self._still(subject, record)
        seen = self.look.seen(record)
        if seen is None or not seen.complete or not any(seen.gradients.values()) or record.grad_norm == 0:
            return
        self._gather(subject, seen)
        if self._looks >= LOOKS:
            yield from self._report(subject, seen)

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Report what fewer looks have seen, if the watch was short."""
        self.look.stop()
        if self._last is not None and 0 < self._looks < LOOKS and not self._last.zero_weights:
            yield from self._report(subject, self._last)

    def _gather(self, subject: Subject, seen: Seen) -> None:
        """Keep the parameters that had no gradient in any look, and look again while there are some."""
        missing = {name for name, grad in seen.gradients.items() if grad is None or not grad.rows}
        self._missing = missing if self._last is None else self._missing & missing
        self._last = seen
        self._all_looks += 1
        blocks = bool(set(seen.zero_weights) - self._missing)  # as LoRA's B does in the first step
        self._looks += not blocks
        doubtful = self._missing or any(_some_rows(self.look, name, seen) for name in seen.gradients)
        self.look.again = bool(doubtful) and self._looks < LOOKS and self._all_looks < MOST_LOOKS

    def _report(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        absent = [name for name in seen.gradients if name in self._missing and seen.gradients[name] is None]
        zero = [name for name in seen.gradients if name in self._missing and seen.gradients[name] is not None]
        zero = [name for name in zero if not _is_bias_of(name, seen)]
        for names, kind in ((absent, "no_gradient"), (zero, "gradient_zero")):
            called = [name for name in names if not seen.calls or _module(name) in seen.calls]
            idle = [name for name in names if name not in called]
            if idle:
                yield from self._once(_idle(subject, seen, idle))
            if called:
                yield from self._once(_unreached(subject, seen, called, kind))
        for name in seen.gradients:
            yield from self._dead_rows(subject, seen, name)

    def _dead_rows(self, subject: Subject, seen: Seen, name: str) -> Iterator[Finding]:
        module = subject.model.get_submodule(_module(name))
        parent = _module(_module(name))  # heads are dead in the queries, keys and values at once
        if not isinstance(module, nn.Linear) or not _some_rows(self.look, name, seen) or parent in self._told:
            return
        alive: list[bool] = self.look.rows[name].tolist()
        block = dead_block(alive, padded=module.out_features > 2 * module.in_features)
        if block:
            self._told.add(parent)
            yield _dead(subject, seen, name, alive, block)

    def _still(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        if record.loss is None or not record.grad_norm:
            self._losses.clear()
            return
        if self._losses and record.loss != self._losses[-1]:
            self._losses.clear()
        self._losses.append(record.loss)
        if len(self._losses) not in (STILL, STILL_IN_BF16):
            return
        coarse = float(torch.tensor(record.loss).bfloat16()) == record.loss
        if len(self._losses) == (STILL_IN_BF16 if coarse else STILL):
            yield from self._once(_still(subject, record, len(self._losses)))

    def _once(self, finding: Finding) -> Iterator[Finding]:
        key = str(finding.key())
        if key not in self._told:
            self._told.add(key)
            yield finding


def explain_backward_error(error: BaseException, subject: Subject, record: StepRecord) -> Finding | None:
    """Return the finding for the error that `backward` raises on a loss without a graph, or None for another error."""
    if "does not require grad and does not have a grad_fn" not in str(error):
        return None
    frames = [frame for frame in extract_tb(error.__traceback__) if f"{sep}torch{sep}" not in frame.filename]
    user = next((frame for frame in reversed(frames) if f"{sep}rawloop{sep}" not in frame.filename), None)
    line = f"{basename(user.filename)}:{user.lineno}: {user.line}" if user else ""
    what = "the loss hangs on no trainable parameter: it was detached, made from numbers, or computed under no_grad"
    if not any(p.requires_grad for p in subject.model.parameters()):
        what = "no parameter of the model requires a gradient, so the loss hangs on nothing"
    advice = "Compute the loss from the model's output with torch operations, without .detach(), .item() or no_grad"
    cause = Cause("loss", what, Place("backward", expression=line), {}, advice)
    return Finding(
        "loss_without_graph", "backward has nothing to go through", (cause,), record.step, subject.world.rank
    )


def dead_block(alive: Sequence[bool], padded: bool = False) -> int:
    """Return the largest size of aligned blocks that the rows without a gradient fill exactly; 0 if there is none.

    Dead units of a ReLU are scattered; the rows of a head lie together. If the rows may be `padded`, as those of a
    vocabulary are to a round number, dead rows at the end do not count.
    """
    rows = len(alive)
    dead = [place for place, lives in enumerate(alive) if not lives]
    if not dead or len(dead) == rows:
        return 0
    for size in (rows // count for count in range(2, rows // 4 + 1) if rows % count == 0):
        blocks = {place // size for place in dead}
        if len(blocks) * size == len(dead):
            return 0 if padded and dead == list(range(dead[0], rows)) else size
    return 0


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _is_bias_of(name: str, seen: Seen) -> bool:
    """Whether it is a bias beside weights that have gradients, as softmax cancels the bias of the keys."""
    beside = [grad for other, grad in seen.gradients.items() if _module(other) == _module(name) and other != name]
    return "bias" in name.rpartition(".")[2] and any(grad is not None and grad.rows for grad in beside)


def _some_rows(look: Look, name: str, seen: Seen) -> bool:
    grad = seen.gradients[name]
    return grad is not None and 0 < grad.rows < len(look.rows[name])


def _idle(subject: Subject, seen: Seen, names: Sequence[str]) -> Finding:
    cause = Cause(
        "model",
        f"the modules of {first_few(names)} were not called",
        Place("backward", module=_module(names[0])),
        {"parameters": len(names)},
        "This is usual for experts without tokens and for heads that this task does not use; else freeze them",
    )
    return Finding(
        "parts_not_called", "trained parts were not called", (cause,), seen.step, subject.world.rank, ordinary=True
    )


def _unreached(subject: Subject, seen: Seen, names: Sequence[str], kind: str) -> Finding:
    """Return the finding of modules that were called, and whose parameters get no gradient, or one of zeros."""
    order = {_module(name): seen.calls[_module(name)].order for name in names if _module(name) in seen.calls}
    last = max(order, key=lambda name: order[name], default=_module(names[-1]))
    sizes = {name: p.numel() for name, p in subject.model.named_parameters() if name in seen.gradients}
    share = sum(sizes.get(name, 0) for name in names) / max(sum(sizes.values()), 1)
    alarm = kind == "gradient_zero" or _is_start(seen, order) or (share >= SMALL and len(order) > 1)
    place, (whose, what, advice) = last, _why_zero(seen, names[0], last)
    if kind == "no_gradient":
        sure, place, what, advice = _why_absent(seen, order, last)
        whose, alarm = "model", alarm or sure
    cause = Cause(
        whose,
        what,
        Place("backward", module=place, optimizer=whole_group(subject, names)),
        {"parameters": len(names), "share of the trained values": share, "looks": LOOKS},
        advice,
    )
    such = "no gradient" if kind == "no_gradient" else "a gradient of exactly zero"
    symptom = f"{len(names)} trained parameters have {such}: {first_few(names, most=3)}"
    return Finding(kind, symptom, (cause,), seen.step, subject.world.rank, ordinary=not alarm)


def _why_absent(seen: Seen, order: Mapping[str, int], last: str) -> tuple[bool, str, str, str]:
    """Return whether a graph is surely cut, the module where, what has happened, and what to do."""
    calls = {name: seen.calls[name] for name in order}
    if calls and not any(call.with_grad for call in calls.values()):
        first = min(order, key=lambda name: order[name])
        advice = "Call it with gradients, or set requires_grad of its parameters to False"
        return True, first, f"'{first}' was called under no_grad or inference_mode", advice
    cut = max((name for name in order if calls[name].cut_by), key=lambda name: order[name], default="")
    reader = calls[cut].cut_by if cut else ""
    if not cut and order:  # computed from the output, and detached then
        later = [(call.order, name) for name, call in seen.calls.items() if call.order > order[last]]
        after = next((name for _, name in sorted(later) if seen.calls[name].fed_without_graph), "")
        cut, reader = (last, after) if _is_start(seen, order) else ("", "")
    if reader:
        what = f"the graph is cut between '{cut}' and '{reader}', as by .detach(), .data or no_grad"
        return True, cut, what, "Pass the tensor on as it is, or freeze what comes before"
    what = f"the output of '{last}' is detached, or nothing on the way to the loss uses it"
    return False, last, what, f"Look at what becomes of the output of '{last}', or freeze these parts"


def _is_start(seen: Seen, order: Mapping[str, int]) -> bool:
    """Whether the first module of the forward pass that has trained parameters is among them."""
    trained = [seen.calls[_module(name)].order for name in seen.gradients if _module(name) in seen.calls]
    return bool(trained) and min(trained) in order.values()


def _why_zero(seen: Seen, first: str, last: str) -> tuple[Whose, str, str]:
    if seen.in_fp16(first) and seen.loss_scale < 2**8:
        what = f"FP16 rounds gradients below 2^-25 to zero, and the loss scale is {seen.loss_scale:g}"
        return "precision", what, "Raise the loss scale, or use bfloat16"
    what = f"'{last}' is connected to the loss, and what comes after it multiplies its output by zero"
    advice = "Look for a gate, mask or weight of zeros, a saturated activation or a dead ReLU behind it"
    return "model", what, advice


def whole_group(subject: Subject, names: Sequence[str]) -> str:
    """Return the name of the optimizer's parameter group that has no other parameter; empty if there is none."""
    ids = {id(p) for name, p in subject.named() if name in set(names)}
    for optimizer in subject.optimizers:
        for place, group in enumerate(optimizer.param_groups):
            trained = [p for p in group["params"] if p.requires_grad]
            if trained and all(id(p) in ids for p in trained):
                return f"{type(optimizer).__name__}, parameter group {place}"
    return ""


def _nothing(subject: Subject, record: StepRecord) -> Finding:
    absent = all(p.grad is None for p in subject.model.parameters())
    evidence: dict[str, float | int | str] = {"gradient norm": 0.0}
    if record.loss is not None:
        evidence["loss"] = record.loss
    if absent:
        what = "the loss depends on none of the model's parameters"
        advice = "Look for .detach() or no_grad between model and loss, and for an optimizer of another model"
    else:
        what = "every gradient of the model is exactly zero"
        advice = "Look for a batch without targets, a loss weight or mask of zero, and a clamped or saturated loss"
    data = Cause("data", "no target is scored", Place("data"), {}, "Count the labels that are not ignored")
    cause = Cause("loss", what, Place("backward"), evidence, advice)
    causes = (data, cause) if not absent and record.loss == 0 else (cause,)
    return Finding("no_gradient_at_all", "the gradient is exactly zero", causes, record.step, subject.world.rank)


def _still(subject: Subject, record: StepRecord, updates: int) -> Finding:
    cause = Cause(
        "optimizer",
        "the updates change nothing that the loss sees: a learning rate of zero, weights in 16 bits that round them "
        "away, or an optimizer that holds other weights than the model",
        Place("update"),
        {"loss": record.loss or 0.0, "updates": updates, "gradient norm": record.grad_norm or 0.0},
        "Compare a weight before and after an update",
    )
    data = Cause("data", "the batches are equal", Place("data"), {}, "Look at the loader")
    return Finding(
        "loss_stands_still",
        f"the loss is the same to the bit over {updates} updates",
        (cause, data),
        record.step,
        subject.world.rank,
        since=record.step - updates + 1,
    )


def _dead(subject: Subject, seen: Seen, name: str, alive: Sequence[bool], size: int) -> Finding:
    first = alive.index(False)
    dead = len(alive) - sum(alive)
    cause = Cause(
        "model",
        f"rows {first} to {first + size - 1} of '{name}' are connected to the loss, and their gradient is exactly zero",
        Place("backward", module=_module(name), parameter=name, row=first),
        {"rows without a gradient": dead, "rows": len(alive), "rows in a block": size},
        "Look for a mask or gate of zeros on these heads or channels, and for attention that is saturated",
    )
    what = f"{dead // size} of {len(alive) // size} blocks of '{name}' are dead"
    return Finding("dead_block", what, (cause,), seen.step, subject.world.rank)
