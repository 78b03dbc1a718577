"""The tape of a step: the calls of the model and the torch operations around it, so that a pass can run again.

A `with` block cannot run twice. The tape holds what its passes were made of: functions, numbers and references. Of the
tensors it holds only the leaves: those that come neither from the model nor from an operation on the tape.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.seed import restore_rng
from rawloop.watch.marks import Ambience, Call, Entry, Leaf, Line, NotReplayable, Ref, base_of, refs_in, version_of
from rawloop.watch.nest import map_tensors, shown, tensors_in
from rawloop.watch.spans import Spans, running

MOST_ENTRIES = 20_000
PLAIN = frozenset((int, float, complex, bool, str, type(None), slice, type(...), torch.Size)) | {
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
}


class _Known(NamedTuple):
    alive: "weakref.ref[Tensor]"
    ref: Ref
    requires_grad: bool


@dataclass
class Tape:
    """The entries of one block, its leaves, and the random state at the start of each recorded stretch.

    Args:
        model: what calls of the model run on.
        names: returns the name of a weight or buffer of the model, or "".
        earlier: the tensors of the tape before an update in the same block, by id.
    """

    model: nn.Module
    names: Callable[[Tensor], str] = lambda tensor: ""
    earlier: dict[int, "weakref.ref[Tensor]"] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    stretches: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    replays: list["Replay"] = field(default_factory=list)  # of its backward passes
    broken: str = ""  # why nothing that is recorded from now on can run again
    spoiled: str = ""  # why nothing can run again
    tainted: bool = False  # a tensor that `refs` has met is a gradient
    foreign: bool = False  # an object that `refs` has met is neither a tensor nor a plain value
    _known: dict[int, _Known] = field(default_factory=dict)

    def begin_stretch(self, rng: dict[str, Any]) -> None:
        """Note the random state from which the next entries start."""
        self.stretches.append((len(self.entries), rng))

    def name_batch(self, batch: Any) -> None:
        """Give the tensors of a batch their paths as names of leaves."""
        for path, tensor in tensors_in(batch):
            self._know(tensor, Ref("batch", path))

    def add(self, function: Call | None, args: Any, kwargs: Any, line: Line, ambience: Ambience) -> Entry:
        """Append a call; its arguments hold references in place of tensors."""
        if len(self.entries) >= MOST_ENTRIES:
            self.broken = self.broken or f"the step has more than {MOST_ENTRIES} operations outside the model"
        entry = Entry(function, args, kwargs, line, ambience)
        self.entries.append(entry)
        return entry

    def outputs(self, result: Any) -> list[Tensor]:
        """Note the tensors that the last entry returned, and return them."""
        index, tensors = len(self.entries) - 1, [tensor for _, tensor in tensors_in(result)]
        for item, tensor in enumerate(tensors):
            self._know(tensor, Ref("entry", entry=index, item=item))
        return tensors

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Note that a tensor is of another kind, such as `gradient`: operations on it are not recorded."""
        self._know(tensor, Ref(kind))

    def known(self, tensor: Tensor) -> Ref | None:
        """Return the reference to a tensor; None if the tape has not met it."""
        found = self._known.get(id(tensor))
        return found.ref if found is not None and found.alive() is tensor else None

    def tensors(self) -> dict[int, "weakref.ref[Tensor]"]:
        """Return the tensors that the tape has met, and those before it, by id."""
        return {**self.earlier, **{key: known.alive for key, known in self._known.items()}}

    def is_earlier(self, tensor: Tensor) -> bool:
        """Whether a tensor that the tape has not met was computed before an update in the same block."""
        alive = self.earlier.get(id(tensor))
        return alive is not None and alive() is tensor and tensor.grad_fn is not None and self.known(tensor) is None

    def refs(self, nest: Any, hint: str = "input") -> Any:
        """Return a nest with references in place of its tensors."""
        kind = type(nest)
        if kind in PLAIN:
            return nest
        if isinstance(nest, Tensor):
            return self.ref(nest, hint)
        if kind is tuple or kind is list:
            return kind([self.refs(item, f"{hint}/{n}") for n, item in enumerate(nest)])
        if kind is dict:
            return {name: self.refs(item, str(name)) for name, item in nest.items()}
        self.foreign = True
        return map_tensors(lambda tensor: self.ref(tensor, hint), nest)

    def ref(self, tensor: Tensor, hint: str) -> Ref:
        """Return the reference to a tensor, which becomes a leaf if it comes from outside."""
        found = self._known.get(id(tensor))
        if found is not None and found.alive() is tensor:
            if found.ref.kind == "batch":
                return self._leaf(tensor, found.ref.name)
            if found.requires_grad != tensor.requires_grad and found.ref.kind == "entry":
                self.broken = self.broken or (
                    f"the result of {self.entries[found.ref.entry].line} has got another gradient from "
                    "code that is not seen, such as a torch.autograd.Function"
                )
            self.tainted |= found.ref.kind == "gradient"
            return found.ref
        if name := self.names(tensor):
            ref = Ref("weight", name)
            self._know(tensor, ref)
            return ref
        if tensor.grad_fn is not None:
            source = (
                "was computed before an update in the same block, which has changed the weights"
                if self.is_earlier(tensor)
                else "comes from code that is not seen: an earlier block, a compiled function, or a "
                "torch.autograd.Function"
            )
            what = f"a tensor of shape {tuple(tensor.shape)} ({type(tensor.grad_fn).__name__})"
            self.broken = self.broken or f"{what} {source}"
        return self._leaf(tensor, hint)

    def written(self, target: Tensor) -> None:
        """Copy the leaves that share a tensor's memory, before an entry writes to it."""
        base = base_of(target)
        for leaf in self.leaves.values():
            if not leaf.written and base_of(leaf.tensor) is base and not leaf.tensor.requires_grad:
                leaf.tensor, leaf.written = leaf.tensor.clone(), True

    def refresh(self, target: Tensor) -> None:
        """Note what an entry that writes to a tensor has made of its gradient."""
        if (ref := self.known(target)) is not None:
            self._know(target, ref)

    def _leaf(self, tensor: Tensor, name: str) -> Ref:
        unique, number = name, 1
        while unique in self.leaves:
            number += 1
            unique = f"{name}#{number}"
        ref = Ref("leaf", unique)
        self._know(tensor, ref)
        # a single number is likely to change in place, as a loss scale does
        kept = tensor.detach().clone() if tensor.dim() == 0 and not tensor.requires_grad else tensor
        self.leaves[unique] = Leaf(kept, version_of(kept))
        return ref

    def _know(self, tensor: Tensor, ref: Ref) -> None:
        self._known[id(tensor)] = _Known(weakref.ref(tensor), ref, tensor.requires_grad)

    def replay(self, roots: Sequence[tuple[Ref, Ref | None]]) -> "Replay":
        """Return the forward pass from its start to these roots of a backward pass, with the gradients given to it."""
        gradient = "it starts from a gradient" if any(ref.kind == "gradient" for ref, _ in roots) else ""
        return Replay(
            self, list(roots), self._start(roots), len(self.entries), len(self.leaves), self.broken or gradient
        )

    def _start(self, roots: Sequence[tuple[Ref, Ref | None]]) -> int:
        """Return the stretch from which everything before the roots can be computed."""
        if len(self.stretches) < 2:
            return 0
        number, first = len(self.stretches) - 1, min((ref.entry for ref, _ in roots if ref.kind == "entry"), default=0)
        while True:
            start = self.stretches[number][0]
            used = [r.entry for e in self.entries[start:] for r in refs_in((e.args, e.kwargs)) if r.kind == "entry"]
            first = min([first, *used])
            if first >= start:
                return number
            number = max(n for n, (begin, _) in enumerate(self.stretches) if begin <= first)


@dataclass
class Replay:
    """The forward pass before one backward pass. Call it with the leaves, by name."""

    tape: Tape
    roots: list[tuple[Ref, Ref | None]]
    stretch: int
    stop: int
    num_leaves: int
    broken: str = ""

    def why_not(self) -> str:
        """Return why it cannot run again; empty if it can."""
        if reason := self.tape.spoiled or self.broken:
            return reason
        for name, leaf in islice(self.tape.leaves.items(), self.num_leaves):
            if not leaf.written and version_of(leaf.tensor) != leaf.version:
                return f"the tensor '{shown(name)}' was changed in place after it was used"
        return ""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The leaves by name."""
        return {name: leaf.tensor for name, leaf in islice(self.tape.leaves.items(), self.num_leaves)}

    @property
    def rng(self) -> dict[str, Any]:
        """The random state from which it starts."""
        return self.tape.stretches[self.stretch][1] if self.tape.stretches else {}

    @property
    def line(self) -> Line:
        """The line of the user's code that computed the root."""
        ref = self.roots[0][0]
        return self.tape.entries[ref.entry].line if ref.kind == "entry" else Line()

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the tensor from which backward started.

        Raises:
            NotReplayable: see `why_not`.
        """
        if reason := self.why_not():
            raise NotReplayable(f"this pass cannot run again: {reason}")
        made: dict[int, list[Tensor]] = {}
        grad = torch.is_grad_enabled()
        leaves = {name: t.clone() if self.tape.leaves[name].written else t for name, t in inputs.items()}
        model = self.tape.model
        weights = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )

        def tensor(ref: Ref) -> Tensor:
            if ref.kind == "entry":
                return made[ref.entry][ref.item]
            return leaves[ref.name] if ref.kind == "leaf" else weights[ref.name]

        start = self.tape.stretches[self.stretch][0] if self.tape.stretches else 0
        later = {begin: rng for begin, rng in self.tape.stretches[self.stretch + 1 :] if begin < self.stop}
        with Spans() as spans:
            for index in range(start, self.stop):
                if index in later:
                    restore_rng(later[index])
                entry = self.tape.entries[index]
                args, kwargs = map_tensors(tensor, (entry.args, entry.kwargs), Ref)
                with spans.like(entry.ambience._replace(grad=entry.ambience.grad and grad)), running(entry.line):
                    result = self._run(entry, args, kwargs)
                made[index] = [found for _, found in tensors_in(result)]
        return _joined([(tensor(root), tensor(grad) if grad else None) for root, grad in self.roots])

    def _run(self, entry: Entry, args: Any, kwargs: Any) -> Any:
        if entry.function is not None:
            hooks = entry.function is Tensor.register_hook
            return None if hooks and not args[0].requires_grad else entry.function(*args, **kwargs)
        model = self.tape.model if entry.model is None else entry.model
        if model.training == entry.training:
            return model(*args, **kwargs)
        modes = [(module, module.training) for module in model.modules()]
        try:
            return model.train(entry.training)(*args, **kwargs)
        finally:
            for module, mode in modes:
                module.training = mode


def _joined(roots: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return one tensor whose backward pass starts at all roots, with the gradients given to them."""
    if len(roots) == 1 and roots[0][1] is None:
        return roots[0][0]
    parts = [root if grad is None else (root * grad).sum() for root, grad in roots]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
