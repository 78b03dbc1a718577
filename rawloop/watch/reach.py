"""What the loss reaches: parameters without a gradient, gradients that are exactly zero, heads that are dead."""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.look import Look, Seen
from rawloop.watch.subject import Detector, StepRecord, Subject
from rawloop.watch.unreached import module_of, unreached

LOOKS = 3  # in which a parameter has no gradient before that counts
MOST_LOOKS = 6  # in a row


class Reach(Detector):
    """Looks at which parameters the loss reaches."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self._dead: set[str] = (
            set()
        )  # modules whose dead heads are told: those of queries, keys and values are the same
        self._last: Seen | None = None
        self._missing: set[str] = set()  # parameters that had no gradient, or one of zeros, in every look
        self._looks = self._all_looks = 0  # those that count, and all
        self._first = 0  # the step of the first look
        self._nothing = 0  # steps in a row with a gradient of exactly zero

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Count the steps in a row whose gradient is exactly zero."""
        self._nothing = self._nothing + 1 if record.grad_norm == 0 else 0
        if self._nothing >= 2:
            yield _nothing(subject, record)

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Judge what the look has seen."""
        seen = self.look.seen(record)
        if seen is None or not seen.complete or not any(seen.gradients.values()) or record.grad_norm == 0:
            return
        self._gather(seen, _waiting(subject, record))
        if self._looks >= LOOKS:
            yield from self._report(subject, seen)

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Report what fewer looks have seen, if the watch was short."""
        if self._last is not None and 0 < self._looks < LOOKS and not self._last.zero_weights:
            yield from self._report(subject, self._last)

    def _gather(self, seen: Seen, waiting: set[str]) -> None:
        """Keep the parameters that had no gradient in any look and wait for no other update. If any, look again."""
        missing = {name for name, grad in seen.gradients.items() if grad is None or not grad.rows} - waiting
        self._first = seen.step if self._last is None else self._first
        self._missing = missing if self._last is None else self._missing & missing
        self._last = seen
        self._all_looks += 1
        self._looks += not seen.zero_weights - self._missing  # they block others, as LoRA's B does in the first step
        doubtful = self._missing or any(_some_rows(self.look, name, seen) for name in seen.gradients)
        self.look.again = bool(doubtful) and self._looks < LOOKS and self._all_looks < MOST_LOOKS

    def _report(self, subject: Subject, seen: Seen) -> Iterator[Finding]:
        missing = [name for name in seen.gradients if name in self._missing]
        idle = [name for name in missing if seen.calls and module_of(name) not in seen.calls]
        absent = [name for name in missing if seen.gradients[name] is None and name not in idle]
        zero = [name for name in missing if name not in (*idle, *absent) and not _is_bias_of(name, seen)]
        for names, kind in ((idle, "no_gradient"), (absent, "no_gradient"), (zero, "gradient_zero")):
            if names:
                yield unreached(subject, seen, names, kind, self._first, self._looks)
        for name in seen.gradients:
            yield from self._dead_rows(subject, seen, name)

    def _dead_rows(self, subject: Subject, seen: Seen, name: str) -> Iterator[Finding]:
        module = subject.model.get_submodule(module_of(name))
        parent = module_of(module_of(name))
        if not isinstance(module, nn.Linear) or not _some_rows(self.look, name, seen) or parent in self._dead:
            return
        alive: list[bool] = self.look.rows[name].tolist()
        block = dead_block(alive, padded=module.out_features > 2 * module.in_features)
        if block:
            self._dead.add(parent)
            yield _dead(subject, seen, name, alive, block)


def without_graph(error: BaseException, subject: Subject, record: StepRecord, line: str) -> Finding | None:
    """Return the finding for the error of `backward`, called in `line`, on a loss without a graph; None for others."""
    if "does not require grad and does not have a grad_fn" not in str(error):
        return None
    what = "the loss hangs on no trainable parameter: it was detached, made from numbers, or computed under no_grad"
    if not any(p.requires_grad for p in subject.model.parameters()):
        what = "no parameter of the model requires a gradient, so the loss hangs on nothing"
    advice = "Compute the loss from the model's output with torch operations, without .detach(), .item() or no_grad"
    cause = Cause("loss", what, Place("backward", expression=line), {}, advice)
    symptom = "backward has nothing to go through"
    return Finding("loss_without_graph", symptom, (cause,), record.step, subject.world.rank)


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


def _waiting(subject: Subject, record: StepRecord) -> set[str]:
    """Return the parameters of optimizers that the loop has not stepped, as a generator's while its critic learns."""
    stepped = record.facts.stepped
    others = [one for one in subject.optimizers if stepped and id(one) not in stepped]
    held = {id(parameter) for one in others for group in one.param_groups for parameter in group["params"]}
    return {name for name, parameter in subject.named() if id(parameter) in held}


def _is_bias_of(name: str, seen: Seen) -> bool:
    """Whether it is a bias beside weights that have gradients, as softmax cancels the bias of the keys."""
    beside = [grad for other, grad in seen.gradients.items() if module_of(other) == module_of(name) and other != name]
    return "bias" in name.rpartition(".")[2] and any(grad is not None and grad.rows for grad in beside)


def _some_rows(look: Look, name: str, seen: Seen) -> bool:
    grad = seen.gradients[name]
    return grad is not None and 0 < grad.rows < len(look.rows[name])


def _nothing(subject: Subject, record: StepRecord) -> Finding:
    absent = all(p.grad is None for p in subject.model.parameters())
    what = "every gradient of the model is exactly zero"
    advice = "Look for a batch without targets, a loss weight or mask of zero, and a clamped or saturated loss"
    if absent:
        what = "the loss depends on none of the model's parameters"
        advice = "Look for .detach() or no_grad between model and loss, and for an optimizer of another model"
    evidence = {"gradient norm": 0.0} | ({} if record.loss is None else {"loss": record.loss})
    data = Cause("data", "no target is scored", Place("data"), {}, "Count the labels that are not ignored")
    cause = Cause("loss", what, Place("backward"), evidence, advice)
    causes = (data, cause) if not absent and record.loss == 0 else (cause,)
    return Finding("no_gradient_at_all", "the gradient is exactly zero", causes, record.step, subject.world.rank)


def _dead(subject: Subject, seen: Seen, name: str, alive: Sequence[bool], size: int) -> Finding:
    first, dead = alive.index(False), len(alive) - sum(alive)
    cause = Cause(
        "model",
        f"rows {first} to {first + size - 1} of '{name}' are connected to the loss, and their gradient is exactly zero",
        Place("backward", module=module_of(name), parameter=name, row=first),
        {"rows without a gradient": dead, "rows": len(alive), "rows in a block": size},
        "Look for a mask or gate of zeros on these heads or channels, and for attention that is saturated",
    )
    what = f"{dead // size} of {len(alive) // size} blocks of '{name}' are dead"
    return Finding("dead_block", what, (cause,), seen.step, subject.world.rank)
