"""Weights that change when nothing should change them, stay when an update should, or differ between ranks."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from os.path import commonpath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import first_few
from rawloop.watch.differing import MASTER, Ranks
from rawloop.watch.digests import Digest, Digests
from rawloop.watch.few import FewNumbers
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.guard import part_of
from rawloop.watch.held import HALF, Evidence, Held, held_by_optimizers, measurable, module_of, norms, number, read
from rawloop.watch.subject import Detector, StepRecord, Subject

# A tensor whose gradient is this small beside the largest one may rightly stay: biases before a norm have none but
# rounding errors.
NEGLIGIBLE = 1e-3
VERSION = attrgetter("_version")  # faster than a comprehension
MANY = 4  # optimizers, as with one for each weight: they are then followed once for each step
COPY = 4  # a moving average of a module has at least so many tensors


class Look(NamedTuple):
    """The digests at one moment.

    Args:
        moment: for people, such as `before step 0`.
        step: the step.
        digests: the dtype and digest of each weight, and of the optimizers' parameters that are not the model's.
        writes: how often torch has written them in place. Writes through `.data` do not count.
        frozen: names of weights that no optimizer holds and that need no gradient.
        updates: updates since the watch began.
    """

    moment: str
    step: int
    digests: dict[str, tuple[torch.dtype, Digest]]
    writes: dict[str, int]
    frozen: set[str]
    updates: int

    def changed_since(self, earlier: "Look", names: Iterable[str]) -> list[str]:
        """Return those of the names whose digests differ from an earlier look's. A cast is no change."""
        pairs = [(name, self.digests.get(name), earlier.digests.get(name)) for name in names]
        return [name for name, now, then in pairs if now and then and now[0] == then[0] and now[1] != then[1]]


class ChangedWeights(Detector):
    """Compares digests of the weights: at the begin and end of probed steps, and at the begin of the steps after these.

    At the begin of every other step it asks torch whether something wrote trained weights since their last update. If
    so, it compares a few numbers of each with those after the update.

    With several ranks, all ranks call `batch` equally often: the first two calls, and every `WatchConfig.every`th,
    gather the digests from all ranks. `end` must not: a rank that skips an update alone does not come there.

    Kinds: `frozen_weights_changed`, `weights_changed_outside_optimizer`, `update_changed_nothing`,
    `weights_differ_across_ranks`; ordinary are `weights_written_outside_optimizer`, `buffers_differ_across_ranks`.
    """

    def __init__(self) -> None:
        self._digests = Digests()
        self._ranks = Ranks(self._digests)
        self._last: Look | None = None
        self._trained: dict[str, nn.Parameter] = {}
        self._writes: list[int] = []  # how often torch has written each trained weight in place, at their last update
        self._few, self._by_step = FewNumbers(), False
        self._updates = self._calls = 0
        self._probing = False
        self._gradients: dict[str, tuple[float, float]] = {}  # largest gradient and learning rate of the probed update
        self._updated: dict[str, tuple[torch.dtype, Digest]] = {}  # right after the probed update
        self._hooks: list[Any] = []

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Follow the optimizers' updates."""

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._probing:  # an update with masters calls the optimizer several times, for some gradients each time
                held = [one for one in held_by_optimizers(subject) if one.optimizer is optimizer]
                given = {key_of(one): one.parameter for one in held if one.parameter.grad is not None}
                self._updated.update(self._digests_of(given))
            if not self._by_step:
                self._keep()

        shielded = subject.guard.shield(part_of(self), after)
        self._hooks = [optimizer.register_step_post_hook(shielded) for optimizer in subject.optimizers]
        return ()

    def finish(self, subject: Subject) -> Iterator[Finding]:
        """Compare the frozen weights a last time."""
        for hook in self._hooks:
            hook.remove()
        if self._last is not None:
            yield from frozen_changed(subject, self._look(subject, "at the end", self._last.step), self._last)

    def batch(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the weights before the forward pass."""
        last, self._probing, self._gradients, self._updated = self._last, record.probing, {}, {}
        comparing = subject.world.size > 1 and (self._calls == 1 or self._calls % subject.config.every == 0)
        self._calls += 1
        now = self._versions()
        written = []
        if self._writes and now != self._writes:
            written = [name for name, old, new in zip(self._trained, self._writes, now, strict=True) if old != new]
        fresh = last is not None and last.updates == self._updates
        if last is None or record.probing or fresh or comparing:
            look = self._last = self._look(subject, f"before step {record.step}", record.step)
            if comparing:
                yield from self._ranks.compare(subject, look.digests, record.step, look.moment)
            if last is None:
                return
            yield from frozen_changed(subject, look, last)
            if fresh:
                yield from changed_outside(subject, look, last, self._trained)
        if written and not fresh:
            changed = self._few.changed(record.probing)
            if changed:
                yield changed_by(
                    subject, record.step, f"the last update and step {record.step}", changed, self._trained
                )
            else:
                yield written_outside(subject, record.step, written)

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Note the gradients' sizes and the learning rates of a probed step."""
        if record.probing:
            held = [one for one in held_by_optimizers(subject) if one.gradient is not None]
            sizes = read(norms([one.gradient for one in held if one.gradient is not None], math.inf))
            for one, size in zip(held, sizes, strict=True):
                self._gradients[key_of(one)] = (size, number(one.group.get("lr", 0.0)))
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the weights after the update, or after a step without one."""
        before = self._last
        self._updates += bool(record.applied)
        if record.probing:
            look = self._last = self._look(subject, f"after step {record.step}", record.step)
            if before is not None:
                yield from frozen_changed(subject, look, before)
                yield from self._in_step(subject, record, before, look)
        if self._by_step and record.applied:
            self._keep()

    def _keep(self) -> None:
        """Keep what is needed to see later writes of trained weights."""
        self._writes = self._versions()
        self._few.keep(self._trained)

    def _versions(self) -> list[int]:
        return [*map(VERSION, self._trained.values())]

    def _digests_of(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, Digest]]:
        digests = self._digests.of(list(tensors.values()))
        return {name: (t.dtype, digest) for (name, t), digest in zip(tensors.items(), digests, strict=True)}

    def _look(self, subject: Subject, moment: str, step: int) -> Look:
        tensors, self._trained = weights_of(subject), trained_weights(subject)
        self._writes = self._versions()
        self._few.forget()
        self._by_step = len(subject.optimizers) > MANY or any(name.startswith(MASTER) for name in self._trained)
        held = {id(one.parameter) for one in held_by_optimizers(subject)}
        frozen = {n for n, p in subject.model.named_parameters() if not p.requires_grad and id(p) not in held}
        writes = {name: tensor._version for name, tensor in tensors.items()}
        return Look(moment, step, self._digests_of(tensors), writes, frozen & tensors.keys(), self._updates)

    def _in_step(self, subject: Subject, record: StepRecord, before: Look, after: Look) -> Iterator[Finding]:
        """Compare the trained weights before and after a probed step."""
        if not record.applied:
            yield from changed_outside(subject, after, before, self._trained)
            return
        update = f"right after the update of step {record.step}"
        updated = Look(update, record.step, self._updated, before.writes, set(), 0)
        yield from changed_outside(subject, after, updated, self._trained)
        largest = max((size for size, _ in self._gradients.values()), default=0.0)
        pushed = {k: v for k, v in self._gradients.items() if NEGLIGIBLE * largest < v[0] < math.inf and v[1] > 0}
        moved = set(after.changed_since(before, pushed))
        same = [key for key in pushed if key in self._updated and key not in moved]
        if same:
            yield unchanged(subject, record.step, same, pushed)


def frozen_changed(subject: Subject, look: Look, last: Look) -> Iterator[Finding]:
    """Yield a finding if weights that nothing trains have changed. A moving average of trained weights may."""
    changed = look.changed_since(last, [name for name in look.digests if name in look.frozen & last.frozen])
    if not changed:
        return
    averaged = is_copy_of_trained(subject, changed, look.frozen)
    evidence: Evidence = {"changed": len(changed), "frozen": len(look.frozen)}
    evidence["writes that torch has counted"] = sum(look.writes[name] - last.writes[name] for name in changed)
    place = Place(phase="update", module=module_of(changed[0]), parameter=changed[0])
    what = "weights that no optimizer holds and that need no gradient were written between two looks"
    advice = "Look for code that assigns to it, or writes through .data or under no_grad, in these steps"
    causes = [Cause("model", what, place, evidence, advice)]
    if len(changed) == 1 and not evidence["writes that torch has counted"]:
        what = "a single tensor has changed without a write that torch counts, as a flipped bit in memory would"
        causes.append(Cause("hardware", what, place, {}, "If no code writes it, test the memory of this machine"))
    if averaged:
        what = "a frozen part with the shapes of a trained one changes as a whole, as a moving average of it would"
        causes = [Cause("model", what, place, evidence, "Nothing to do if it is one")]
    what = f"frozen weights changed between {last.moment} and {look.moment}: {first_few(changed)}"
    since = last.step if look.moment.startswith("before") or last.moment.startswith("before") else last.step + 1
    yield Finding(
        "frozen_weights_changed", what, tuple(causes), look.step, subject.world.rank, averaged, min(since, look.step)
    )


def is_copy_of_trained(subject: Subject, changed: list[str], frozen: set[str]) -> bool:
    """Whether these are all frozen weights of one module, and trained weights of the same shapes exist."""
    prefix = commonpath([module_of(name).replace(".", "/") for name in changed]).replace("/", ".")
    within = {name for name in frozen if f"{name}.".startswith(f"{prefix}.")}
    weights = dict(subject.model.named_parameters())
    copies = Counter(weights[name].shape for name in changed)
    return (
        bool(prefix)
        and within == {*changed}
        and len(changed) >= COPY
        and copies <= Counter(weight.shape for weight in weights.values() if weight.requires_grad)
    )


def changed_outside(subject: Subject, look: Look, last: Look, trained: Iterable[str]) -> Iterator[Finding]:
    """Yield a finding if trained weights have changed between two looks without an update between them."""
    changed = look.changed_since(last, trained)
    if changed:
        yield changed_by(subject, look.step, f"{last.moment} and {look.moment}", changed, trained)


def changed_by(subject: Subject, step: int, moments: str, changed: list[str], trained: Iterable[str]) -> Finding:
    """Return the finding for trained weights that something other than the optimizer has changed."""
    evidence = {"changed": len(changed), "trained": len([*trained])}
    name = changed[0].removeprefix(MASTER)
    place = Place(phase="update", module=module_of(name), parameter=name)
    what = "something other than the optimizer has changed trained weights"
    advice = "Look for load_state_dict, averaged weights that were not restored, clipping, or writes through .data"
    cause = Cause("not known", what, place, evidence, advice)
    what = f"trained weights changed between {moments}: {first_few(changed)}"
    return Finding("weights_changed_outside_optimizer", what, (cause,), step, subject.world.rank)


def written_outside(subject: Subject, step: int, written: list[str]) -> Finding:
    """Return the finding for trained weights that torch has written between two steps, perhaps to the same values."""
    name = written[0].removeprefix(MASTER)
    place = Place(phase="update", module=module_of(name), parameter=name)
    what = "they may hold the same values as before, as after an evaluation of averaged weights"
    advice = "Nothing to do if it is meant so; else probe every step to see whether values change"
    cause = Cause("not known", what, place, {"written": len(written)}, advice)
    what = f"something other than the optimizer wrote trained weights before step {step}: {first_few(written)}"
    return Finding("weights_written_outside_optimizer", what, (cause,), step, subject.world.rank, ordinary=True)


def unchanged(subject: Subject, step: int, same: list[str], pushed: Mapping[str, tuple[float, float]]) -> Finding:
    """Return the finding for trained weights of which an update has changed no bit, though they have a gradient."""
    held = next(one for one in held_by_optimizers(subject) if key_of(one) == same[0])
    size, lr = pushed[same[0]]
    dtype = held.parameter.dtype
    evidence: Evidence = {"unchanged": len(same), "with gradient": len(pushed), "largest gradient": size, "lr": lr}
    evidence["dtype"] = str(dtype).removeprefix("torch.")
    place = Place(phase="update", module=module_of(held.name), parameter=held.name, optimizer=held.label)
    if dtype in HALF:
        what = f"every update of it is smaller than half a unit in the last place of {evidence['dtype']}"
        cause = Cause("precision", what, place, evidence, "Train float32 weights under autocast, or float32 masters")
    else:
        what = "the update is too small for the dtype, or something puts the old values back"
        cause = Cause("optimizer", what, place, evidence, "Raise the learning rate, or look for code that restores it")
    what = f"an update changed no bit of weights that have a gradient: {first_few(same)}"
    return Finding("update_changed_nothing", what, (cause,), step, subject.world.rank)


def weights_of(subject: Subject) -> dict[str, Tensor]:
    """Return the model's weights, and the optimizers' parameters that are not among them (masters), by name."""
    found: dict[str, Tensor] = {name: p for name, p in subject.model.named_parameters() if measurable(p)}
    return found | {key_of(one): one.parameter for one in held_by_optimizers(subject)}


def trained_weights(subject: Subject) -> dict[str, nn.Parameter]:
    """Return the parameters of the optimizers, by name. Schedule-free optimizers swap theirs between steps."""
    held = held_by_optimizers(subject)
    return {key_of(one): one.parameter for one in held if "train_mode" not in one.group}


def key_of(held: Held) -> str:
    """Return a name that a master does not share with its weight."""
    return held.name if held.weight is held.parameter else f"{MASTER}{held.name}"
