"""Records torch operations around a model on a tape."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rawloop.watch.guard import Guard, guarded
from rawloop.watch.lines import Lines
from rawloop.watch.marks import Ambience, Ref, writes
from rawloop.watch.named import TensorNames
from rawloop.watch.nest import tensors_in
from rawloop.watch.tape import Tape

After = Callable[[Any], object]
PART = "recording"
looking = ContextVar("looking", default=False)  # a watch looks at a step: what it runs is recorded by none


class Operations(TorchFunctionMode):
    """A function mode that writes operations on a tape.

    It lies below the user's modes, which leave the stack by popping its top, and sees what they make of an operation.
    """

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        super().__init__()
        self.model, self.guard, self.lines = model, guard, Lines()
        self.tape: Tape | None = None
        self._names = TensorNames(model)
        self._device = next((weight.device.type for weight in model.parameters()), "cpu")
        self._scalar: tuple[Tensor, Ref] | None = None  # the last number that could be a loss
        self._span = 0  # autocast contexts that were left
        self._on_stack = self._muted = False

    @property
    def recording(self) -> bool:
        """Whether operations are recorded."""
        return self._on_stack and not self._muted

    def resume(self) -> None:
        """Record from here on."""
        self._muted = False
        if not self._on_stack and self.tape is not None and not self.guard.is_off(PART):
            _put_below(self)
            self._on_stack = True

    def pause(self) -> None:
        """Do not record from here on."""
        self._on_stack = self._on_stack and not _take_off(self)
        self._muted = self._on_stack  # inside an operation of its own, after which torch puts it back

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it if it makes or writes tensors."""
        kwargs = kwargs or {}
        tape = self.tape
        if self._muted or tape is None or tape.broken or torch.compiler.is_compiling() or looking.get():
            return func(*args, **kwargs)
        after = self._before_operation(tape, func, args, kwargs)
        result = func(*args, **kwargs)
        if after is not None:
            self._after_operation(after, result)
        return result

    @guarded(PART)
    def _before_operation(self, tape: Tape, func: Any, args: Any, kwargs: Any) -> After | None:
        """Return what is to be called with the operation's result; None if it is not recorded."""
        name = getattr(func, "__name__", "")
        if name == "__set__":
            attribute = func.__self__.__name__
            return self._write(tape, func, args, {}) if attribute in ("data", "requires_grad") else None
        if name == "__get__" and func.__self__.__name__ == "grad":
            return lambda grad: tape.mark(grad, "gradient") if isinstance(grad, Tensor) else None
        if name == "backward" or (name == "detach" and args and tape.is_earlier(args[0])):  # its result is a leaf
            return None
        if torch._C._functorch.maybe_current_level() is not None:
            tape.broken = f"{self.lines.current()} runs inside torch.func"
            return None
        if writes(name) or kwargs.get("out") is not None:
            return self._write(tape, func, args, kwargs)
        return lambda result: self._made(tape, func, args, kwargs, result)

    @guarded(PART)
    def _after_operation(self, after: After, result: Any) -> None:
        after(result)

    def _made(self, tape: Tape, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record an operation that has made tensors."""
        if isinstance(result, Tensor):
            makes = tape.known(result) is None
        else:
            makes = isinstance(result, tuple | list) and any(tensors_in(result))
        if makes or getattr(func, "__name__", "") == "register_hook":
            self._record(tape, func, args, kwargs, result)

    def _record(self, tape: Tape, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tape.foreign = tape.tainted = False
        refs, named = tape.refs(args, getattr(func, "__name__", "input")), tape.refs(kwargs)
        if tape.tainted:
            for _, tensor in tensors_in(result):
                tape.mark(tensor, "gradient")
        elif not (tape.foreign and isinstance(result, Tensor) and not result.requires_grad):
            tape.add(func, refs, named, self.lines.current(), self._ambience())
            self._note_outputs(tape, result)

    def _apply(self, function: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """Run and record the user's own `torch.autograd.Function`, as one operation."""
        tape = self.tape
        if torch.compiler.is_compiling() or not self.recording or tape is None or tape.broken or looking.get():
            return call(*args, **kwargs)
        self.pause()
        try:
            result = call(*args, **kwargs)
            if any(tensors_in(result)):
                self._after_operation(lambda made: self._record(tape, function.apply, args, kwargs, made), result)
        finally:
            self.resume()
        return result

    def _write(self, tape: Tape, func: Any, args: Any, kwargs: Any) -> After | None:
        """Record an operation that writes to its first argument, or to `out`, once it has run."""
        targets = [tensor for _, tensor in tensors_in(args[0] if kwargs.get("out") is None else kwargs["out"])]
        tape.tainted = False
        refs, named = tape.refs(args, getattr(func, "__name__", "input")), tape.refs(kwargs)
        weights = [name for target in targets if (name := self._names(target))]
        if tape.tainted or (weights and getattr(func, "__name__", "") == "requires_grad_"):
            return None
        line = self.lines.current()
        if weights:
            tape.spoiled = tape.broken = f"{line} writes to the weight {weights[0]}"
            return None
        for target in targets:
            tape.written(target)
        ambience = self._ambience()

        def after(result: Any) -> None:
            tape.add(func, refs, named, line, ambience)
            for target in targets:
                tape.refresh(target)
            if any(tape.known(tensor) is None for _, tensor in tensors_in(result)):
                self._note_outputs(tape, result)

        return after

    def _note_outputs(self, tape: Tape, result: Any) -> None:
        for tensor in tape.outputs(result):
            if tensor.dim() == 0 and tensor.requires_grad and (ref := tape.known(tensor)) is not None:
                self._scalar = tensor.detach(), ref

    def _ambience(self) -> Ambience:
        grad = torch.is_grad_enabled()
        if not torch._C._is_any_autocast_enabled():
            return Ambience(self._span, (), True, grad)
        devices = sorted({"cpu", self._device})
        on = tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))
        return Ambience(self._span, on, torch.is_autocast_cache_enabled(), grad)


def _put_below(mode: TorchFunctionMode) -> None:
    """Put a mode at the bottom of the stack, above torch's own for `torch.set_default_device`, which must be there."""
    above = [_pop() for _ in range(torch._C._len_torch_function_stack())]
    default = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    if above and above[-1] is default:
        _push(above.pop())
    _push(mode)
    for other in reversed(above):
        _push(other)


def _take_off(mode: TorchFunctionMode) -> bool:
    """Take a mode off the stack, and return whether it was there."""
    above: list[Any] = []
    while torch._C._len_torch_function_stack() and (not above or above[-1] is not mode):
        above.append(_pop())
    found = bool(above) and above[-1] is mode
    for other in reversed(above[:-1] if found else above):
        _push(other)
    return found


def _pop() -> Any:
    return torch.overrides._pop_mode()  # type: ignore[no-untyped-call]


def _push(mode: Any) -> None:
    torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]
