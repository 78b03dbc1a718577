"""The costly look at a step: hooks on the modules, and the gradients of the parameters. Detectors share it."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from rawloop.origin.tensors import floats_in
from rawloop.watch.findings import Cause, Finding
from rawloop.watch.guard import Guard
from rawloop.watch.measure import Amounts, GradientAmounts, Readings
from rawloop.watch.subject import Detector, StepRecord, Subject

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_CALLS = 8  # of one module that are measured in a look
FIRST_LOOKS = 6  # in which weights of zeros are looked for


@dataclass
class Calls:
    """How a module was called in a look."""

    with_grad: bool = False  # autograd recorded a call
    dtype: torch.dtype = torch.float32  # of its output
    fed_without_graph: bool = False  # it was called with gradients, on floats that have no graph
    cut_by: str = ""  # the module that got its output without the graph


@dataclass
class ModuleHooks:
    """Hooks on the modules without children, which measure their outputs until `remove`. torch.compile passes them by.

    If they are `thorough`, they measure exponents and the gradients of the outputs too.
    """

    model: nn.Module
    readings: Readings
    guard: Guard = field(default_factory=Guard)
    thorough: bool = True
    calls: dict[str, Calls] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)
    _made: dict[int, tuple[Any, str]] = field(default_factory=dict)
    _counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def install(self) -> "ModuleHooks":
        """Put the hooks on."""
        for name, module in leaves(self.model):
            self._handles.append(module.register_forward_hook(self._shielded(self._look, name)))
        return self

    def _shielded(self, hook: Callable[..., None], *args: str) -> Any:
        return self.guard.shield("the measurement of modules", partial(hook, *args))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._made = [], {}

    def _look(self, name: str, module: nn.Module, inputs: object, output: object) -> None:
        if torch._C._functorch.maybe_current_level() is None:
            with torch._C.DisableTorchFunction():  # a loop that calls the model's parts has their operations recorded
                self._see(name, inputs, output)

    def _see(self, name: str, inputs: object, output: object) -> None:
        tensors = [tensor for tensor in floats_in(output) if tensor.dtype in FLOATS]
        if not tensors:
            return
        call = self.calls.setdefault(name, Calls())
        call.dtype = tensors[0].dtype
        if torch.is_grad_enabled():
            self._find_cuts(name, call, inputs)
        for tensor in tensors:
            self._measure("forward", name, tensor)
            if tensor.requires_grad:
                call.with_grad = True
                storage: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                self._made[storage.cdata] = storage, name
                if self.thorough:
                    hook = self._shielded(self._measure, "backward", name)
                    self._handles.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]

    def _find_cuts(self, name: str, call: Calls, inputs: object) -> None:
        given = list(floats_in(inputs))
        call.fed_without_graph = bool(given) and not any(tensor.requires_grad for tensor in given)
        for tensor in given:
            storage, maker = self._made.get(tensor.untyped_storage()._cdata, (None, ""))
            if storage is not None and not tensor.requires_grad and not storage.expired() and maker != name:
                self.calls[maker].cut_by = name

    def _measure(self, kind: str, name: str, tensor: Tensor) -> None:
        count = self._counts[kind, name] = self._counts.get((kind, name), 0) + 1
        if count <= MOST_CALLS:
            self.readings.add(kind, name, tensor, self.thorough)


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules without children, and those that have weights of their own; not those that pass values on."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Identity | nn.Dropout):
            continue
        if not any(True for _ in module.children()) or module._parameters:
            yield name, module


def _plain(tensor: Tensor) -> Tensor:
    """Return a dense tensor of real numbers; the two parts of a complex one are its last dimension."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass
class Seen:
    """What a look has seen: modules in the order of the forward pass, and trainable parameters."""

    step: int
    calls: dict[str, Calls]
    gradients: dict[str, GradientAmounts | None] = field(default_factory=dict)  # None for one without a gradient
    outputs: dict[str, Amounts] = field(default_factory=dict)  # of modules; only those that are finite
    zero_weights: set[str] = field(default_factory=set)  # zero in every value, as LoRA's B is at the start; no biases,
    # which block nothing. Only the first looks measure them.
    complete: bool = False  # the gradients were measured: they are not in a skipped step
    loss_scale: float = 1.0
    left: float = 1.0  # the scale that is left on the gradients; 1 after `unscale_`

    @property
    def fp16(self) -> bool:
        """Whether the model computes in FP16 somewhere on the way to the loss."""
        return any(call.dtype is torch.float16 and call.with_grad for call in self.calls.values())

    def in_fp16(self, parameter: str) -> bool:
        """Whether the gradient of a parameter was computed in FP16."""
        call, grad = self.calls.get(parameter.rpartition(".")[0]), self.gradients[parameter]
        return (call is not None and call.dtype is torch.float16) or (grad is not None and grad.dtype is torch.float16)


class Look(Detector):
    """Measures each probing step. Detectors that come after it judge what it has `seen`.

    Kind: `modules_not_seen`, ordinary: a compiled model.
    """

    def __init__(self) -> None:
        self.again = False  # take a look at the next step too
        self.rows: dict[str, Tensor] = {}  # whether each row of a parameter has had a gradient in any look
        self._looks = 0
        self._record: StepRecord | None = None
        self._hooks: ModuleHooks | None = None
        self._seen = Seen(-1, {})

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Say that a compiled model gets no hooks."""
        if not subject.compiled:
            return []
        what = "the modules of a compiled model are not measured: hooks on them would compile it again"
        advice = "Gradients of parameters are measured; watch the model before torch.compile to measure its modules"
        cause = Cause("not known", "torch.compile was called on the model, or on a part of it", advice=advice)
        return [Finding("modules_not_seen", what, (cause,), 0, subject.world.rank, ordinary=True)]

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Put hooks on before the forward pass of a probing step."""
        if self._record is not record:
            self.finish(subject)
            record.probing = record.probing or self.again
            if record.probing:
                self.again, self._record = False, record
                self._hooks = ModuleHooks(subject.model, Readings(), subject.guard, thorough=False)
                self._seen = Seen(record.step, self._hooks.calls)
                if not subject.compiled:
                    self._hooks.install()
        return ()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Measure the gradients before the update. With several optimizers the last call counts."""
        seen, finite = self._seen, record.grad_norm is None or math.isfinite(record.grad_norm)
        if self._record is not record or self._hooks is None or not finite:
            return ()
        named = [(name, p) for name, p in subject.model.named_parameters() if p.requires_grad]
        if all(p.grad is None for _, p in named):
            named = [(name, p) for name, p in subject.named() if p.requires_grad]
        seen.complete, seen.left, seen.gradients = True, record.scale, {name: None for name, _ in named}
        seen.loss_scale = subject.loss_scale() if subject.is_scaled else record.scale
        readings = self._hooks.readings
        readings.forget("gradient", "weight")
        for name, p in named:
            if p.grad is not None and p.numel():
                grad = _plain(p.grad)
                readings.add_gradient(name, grad, seen.in_fp16(name) or grad.dtype is torch.float16)
                if self._looks < FIRST_LOOKS and not name.endswith("bias"):
                    readings.add("weight", name, _plain(p), exponents=False)
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Read what was measured."""
        seen, hooks = self._seen, self._hooks
        if self._record is record and hooks is not None:
            self.finish(subject)
            self._looks += seen.complete
            for (kind, name), amounts in hooks.readings.read().items():
                if isinstance(amounts, GradientAmounts):
                    seen.gradients[name] = amounts
                    self.rows[name] = self.rows[name] | amounts.alive if name in self.rows else amounts.alive
                elif kind == "forward" and amounts.finite:
                    seen.outputs[name] = amounts
                elif kind == "weight" and amounts.lowest == amounts.highest == 0:
                    seen.zero_weights.add(name)
        return ()

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Take the hooks off."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None
        return ()

    def seen(self, record: StepRecord) -> Seen | None:
        """Return what was seen of a step, after its end; None if no look was taken."""
        return self._seen if self._record is record else None
