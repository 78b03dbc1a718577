"""Weights that change when nothing should change them: frozen ones, and trained ones without an update."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from os.path import commonpath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import first_few
from rawloop.watch.digests import Digest, Digests
from rawloop.watch.findings import Cause, Finding
from rawloop.watch.guard import part_of
from rawloop.watch.held import Evidence, held_by_optimizers, place_of, told, weights_of
from rawloop.watch.subject import Detector, StepRecord, Subject

COPY = 4  # a moving average of a module has at least so many tensors
NEAR = 0.5  # relative distance of a smaller one from the trained weights; that of random ones is about 1.4
WEIGHTS = 8  # that are followed between looks: load_state_dict and the like write all of them
NUMBERS = 8  # of each of these
WRITES = attrgetter("_version")  # how often torch has written a tensor in place; writes through `.data` do not count


class Look(NamedTuple):
    """The digests at one moment."""

    moment: str  # for people, such as `before step 0`
    step: int
    digests: dict[str, Digest]  # of each weight, and of the optimizers' parameters that are not the model's
    writes: dict[str, int]
    frozen: set[str]  # names of weights that no optimizer holds and that need no gradient

    def changed_since(self, earlier: "Look", names: Iterable[str]) -> list[str]:
        """Return those of the names whose digests differ from an earlier look's. A cast is no change."""
        pairs = [(name, self.digests.get(name), earlier.digests.get(name)) for name in names]
        return [name for name, now, then in pairs if now and then and now.dtype == then.dtype and now != then]


class FewNumbers:
    """Keeps some numbers of some weights after each update, with one call of the device.

    Args:
        weights: by name; those on the device of the first are followed. One whose `.data` is replaced seems unchanged.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        device = next(iter(weights.values())).device
        self._chosen = {name: weight for name, weight in weights.items() if weight.device == device}
        self._views = [_few(weight) for weight in self._chosen.values()]
        self._kept: Tensor | None = None
        self._writes: list[int] = []

    def keep(self) -> None:
        """Keep the numbers, after an update."""
        self._writes = [*map(WRITES, self._chosen.values())]
        self._kept = torch.cat(self._views)

    def changed(self) -> list[str]:
        """Return the names of weights that have other numbers than those kept. It reads only if torch wrote some."""
        if self._kept is None or self._writes == [*map(WRITES, self._chosen.values())]:
            return []
        flags = torch.split((torch.cat(self._views) != self._kept).cpu(), [len(view) for view in self._views])
        return [name for name, part in zip(self._chosen, flags, strict=True) if bool(part.any())]


def _few(weight: Tensor) -> Tensor:
    """Return a view of some numbers in the middle of a weight."""
    view = weight.detach()
    view = view if view.dim() else view[None]
    while view.dim() > 1:
        view = view[len(view) // 2]
    return view[:NUMBERS]


class ChangedWeights(Detector):
    """Compares digests of the weights: at the begin and end of probed steps, and at the begin of the steps after these.

    At the begin of every other step it asks torch whether something wrote some trained weights since their last update.
    If so, it compares a few numbers of them with those after the update.

    Kinds: `frozen_weights_changed`, `weights_changed_outside_optimizer`.
    """

    def __init__(self) -> None:
        self._digests = Digests()
        self._last: Look | None = None
        self._trained: dict[str, Tensor] = {}
        self._few: dict[int, FewNumbers] = {}  # by the optimizer's id
        self._fresh = False  # no update since the last look
        self._probing = False
        self._updated: dict[str, Digest] = {}  # right after the probed update
        self._hooks: list[Any] = []

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Follow the optimizers' updates."""

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._probing:  # an update with masters calls the optimizer several times, for some gradients each time
                held = [one for one in held_by_optimizers(subject) if one.optimizer is optimizer]
                self._updated |= self._digests.of({h.key: h.parameter for h in held if h.parameter.grad is not None})
            if few := self._few.get(id(optimizer)):
                few.keep()

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
        last, fresh, self._probing, self._updated = self._last, self._fresh, record.probing, {}
        written = [] if fresh else [name for few in self._few.values() for name in few.changed()]
        if last is None or record.probing or fresh:
            look = self._last = self._look(subject, f"before step {record.step}", record.step)
            if last is not None:
                yield from frozen_changed(subject, look, last)
                yield from changed_outside(subject, look, last, self._trained if fresh else ())
        if written:
            yield changed_by(subject, record.step, f"before step {record.step} than after the last update", written)

    def end(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Look at the weights after the update, or after a step without one."""
        before = self._last
        self._fresh &= not record.applied
        if record.probing:
            look = self._last = self._look(subject, f"after step {record.step}", record.step)
            if before is not None:
                yield from frozen_changed(subject, look, before)
                if record.applied:
                    update = f"right after the update of step {record.step}"
                    before = before._replace(moment=update, digests=self._updated)
                yield from changed_outside(subject, look, before, self._trained)

    def _look(self, subject: Subject, moment: str, step: int) -> Look:
        held, by_optimizer = held_by_optimizers(subject), dict[int, dict[str, Tensor]]()
        trained = [one for one in held if "train_mode" not in one.group]  # schedule-free ones swap theirs between steps
        self._trained = {one.key: one.numbers for one in trained}
        few = [one for one in trained if one.parameter is one.numbers]  # a stand-in has no numbers to follow
        for one in few[:: -(-len(few) // WEIGHTS) or 1]:  # evenly spread
            by_optimizer.setdefault(id(one.optimizer), {})[one.key] = one.parameter
        self._few = {key: FewNumbers(weights) for key, weights in by_optimizer.items()}
        ids = {id(one.numbers) for one in held}
        frozen = {n for n, p in subject.model.named_parameters() if not p.requires_grad and id(p) not in ids}
        tensors = weights_of(subject)
        writes = {name: WRITES(tensor) for name, tensor in tensors.items()}
        self._fresh = True
        return Look(moment, step, self._digests.of(tensors), writes, frozen & tensors.keys())


def frozen_changed(subject: Subject, look: Look, last: Look) -> Iterator[Finding]:
    """Yield a finding if weights that nothing trains have changed. A moving average of trained weights may."""
    changed = look.changed_since(last, [name for name in look.digests if name in look.frozen & last.frozen])
    if not changed:
        return
    place, writes = place_of(changed[0]), sum(look.writes[name] - last.writes[name] for name in changed)
    evidence: Evidence = {"changed": len(changed), "frozen": len(look.frozen), "writes that torch has counted": writes}
    what = "weights that no optimizer holds and that need no gradient were written between two looks"
    advice = "Look for code that assigns to it, or writes through .data or under no_grad, in these steps"
    causes = [Cause("model", what, place, evidence, advice)]
    if len(changed) == 1 and not writes:
        what = "a single tensor has changed without a write that torch counts, as a flipped bit in memory would"
        causes.append(Cause("hardware", what, place, {}, "If no code writes it, test the memory of this machine"))
    averaged = is_copy_of_trained(subject, changed, look.frozen)
    if averaged:
        what = "a frozen part with the shapes of a trained one changes as a whole, as a moving average of it would"
        causes = [Cause("model", what, place, evidence, "Nothing to do if it is one")]
    what = f"frozen weights are others {look.moment} than {last.moment}: {first_few(changed)}"
    since = last.step if look.moment.startswith("before") or last.moment.startswith("before") else last.step + 1
    since, rank = min(since, look.step), subject.world.rank
    yield Finding("frozen_weights_changed", what, tuple(causes), look.step, rank, averaged, since)


def is_copy_of_trained(subject: Subject, changed: list[str], frozen: set[str]) -> bool:
    """Whether these are all frozen weights of one module, and trained weights of the same shapes exist."""
    prefix = commonpath([name.rpartition(".")[0].replace(".", "/") for name in changed]).replace("/", ".")
    within = {name for name in frozen if f"{name}.".startswith(f"{prefix}.")}
    weights = dict(subject.model.named_parameters())
    copies = Counter(weights[name].shape for name in changed)
    trained = Counter(weight.shape for weight in weights.values() if weight.requires_grad)
    many = len(changed) >= COPY and copies <= trained
    return bool(prefix) and within == {*changed} and (many or all(is_near_trained(weights, name) for name in changed))


def is_near_trained(weights: Mapping[str, nn.Parameter], name: str) -> bool:
    """Whether a trained weight with the last name and the shape of this one has nearly the same numbers."""
    one, last = weights[name].detach(), name.rpartition(".")[2]
    alike = [w for n, w in weights.items() if w.requires_grad and n.endswith(f".{last}") and w.shape == one.shape]
    return any(float((w.detach() - one).norm()) <= NEAR * float(one.norm()) for w in alike)


def changed_outside(subject: Subject, look: Look, last: Look, trained: Iterable[str]) -> Iterator[Finding]:
    """Yield a finding if trained weights have changed between two looks without an update between them."""
    if changed := look.changed_since(last, trained):
        yield changed_by(subject, look.step, f"{look.moment} than {last.moment}", changed)


def changed_by(subject: Subject, step: int, moments: str, changed: list[str]) -> Finding:
    """Return the finding for trained weights that something other than the optimizer has changed."""
    what = f"trained weights are others {moments}, without an update between: {first_few(changed)}"
    advice = "Look for load_state_dict, averaged weights that were not restored, clipping, or writes through .data"
    evidence: Evidence = {"seen to change": len(changed)}
    kind, place = "weights_changed_outside_optimizer", place_of(changed[0])
    return told(subject, step, kind, "not known", what, place, evidence, advice)
