"""Records what a loop does inside a block: calls of the model, torch operations around it, and backward passes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rawloop.seed import RngCapture
from rawloop.watch.guard import Guard, guarded
from rawloop.watch.lines import Lines
from rawloop.watch.listening import applied, listening
from rawloop.watch.marks import Ambience, Line, Ref, writes
from rawloop.watch.named import TensorNames
from rawloop.watch.nest import tensors_in
from rawloop.watch.tape import Replay, Tape
from rawloop.watch.wrappers import is_compiled, replayed_model

Seen = Callable[[list[Tensor], Replay], Callable[[bool], None]]
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)  # take other kernels under a mode
After = Callable[[Any], object]
PART = "recording"


class Recorder(TorchFunctionMode):
    """Writes the tape of each block.

    The mode is off inside the model, inside backward passes, and from a backward pass to the next call of the model, so
    that what runs there costs nothing.

    Args:
        model: the bare model, whose weights have the names.
        roots: the model and what wraps it; a call of the outermost one is one entry of the tape.
        called: called with the model's mode, for each call of it with gradients.
        seen: called with the roots of each backward pass and how it can run again, before it runs. What it returns is
            called after it, with whether it succeeded.
        guard: keeps errors of the recording from the loop.
    """

    def __init__(
        self, model: nn.Module, roots: Sequence[nn.Module], called: Callable[[bool], None], seen: Seen, guard: Guard
    ) -> None:
        super().__init__()
        self.model, self.roots, self.called, self.seen, self.guard = model, roots, called, seen, guard
        self.tape: Tape | None = None
        self.calls = 0  # of the model in this block, with gradients
        self._batch: Any = None
        self._scalar: tuple[Tensor, Ref] | None = None  # the last number that could be a loss
        self._names = TensorNames(model)
        self._lines = Lines()
        self._rng = RngCapture()
        self._depth = self._base = self._span = 0
        self._on_stack = self._muted = self._in_backward = self._through = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep hooks on the model inside the context. A compiled caller compiles again whenever hooks change."""
        with ExitStack() as stack:
            for root in self.roots:
                pre = root.register_forward_pre_hook(self._before_call, prepend=True, with_kwargs=True)
                post = root.register_forward_hook(self._after_call, with_kwargs=True, always_call=True)
                stack.callback(pre.remove)
                stack.callback(post.remove)
            if not any(is_compiled(root) for root in self.roots):
                for kind in FUSED:
                    stack.enter_context(listening(kind, "forward", self._aside))
            yield

    @contextmanager
    def block(self, batch: Any) -> Iterator[None]:
        """Record what runs inside the context."""
        with ExitStack() as stack:
            stack.enter_context(listening(torch.Tensor, "backward", self._before_method))
            stack.enter_context(listening(torch.autograd, "backward", self._before_backward))
            stack.enter_context(listening(torch, "clear_autocast_cache", self._left_autocast))
            stack.enter_context(applied(self._apply))
            stack.callback(self._close)
            self._base = _stack_depth()
            self._depth = self.calls = 0
            self._muted = self._in_backward = False
            self._scalar = None
            self._batch = batch
            self._start_tape(begins=True)
            self.resume()
            yield

    @guarded(PART)
    def after_update(self) -> None:
        """Start another tape: what was before an update cannot run again."""
        if self.tape is not None:
            self._start_tape(begins=self._on_stack)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Take no notice of calls of the model and backward passes inside the context."""
        before, self._in_backward = self._in_backward, True
        try:
            yield
        finally:
            self._in_backward = before

    @guarded(PART)
    def _start_tape(self, begins: bool) -> None:
        self.tape = Tape(self.model, self._names)
        self.tape.name_batch(self._batch)
        if begins:  # else the next call of the model does
            self.tape.begin_stretch(self._rng.take())

    def resume(self) -> None:
        """Record from here on."""
        self._muted = False
        off = self.tape is None or self.guard.is_off(PART)
        if not off and not self._on_stack and _stack_depth() == self._base:
            torch.overrides._push_mode(self)  # type: ignore[no-untyped-call]
            self._on_stack = True

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass of the loop is running."""
        return self._in_backward

    @property
    def recording(self) -> bool:
        """Whether operations are recorded."""
        return self._on_stack and not self._muted

    def pause(self) -> None:
        """Do not record from here on."""
        if self._on_stack and torch.overrides._get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
            self._on_stack = False
        self._muted = self._on_stack  # a mode of the user's is above: it has to be left first

    def last_scalar(self) -> tuple[Tensor | None, Line, Replay | None]:
        """Return the last number with a gradient that the block computed, its line, and how to compute it again."""
        if self.tape is None or self._scalar is None:
            return None, Line(), None
        tensor, ref = self._scalar
        replay = self.tape.replay([(ref, None)])
        return tensor, replay.line, replay

    def line(self) -> Line:
        """Return the line of the user's code that is running."""
        return self._lines.current()

    def line_of(self, traceback: TracebackType | None) -> Line:
        """Return the innermost line of the user's code in a traceback."""
        return self._lines.in_traceback(traceback)

    def _close(self) -> None:
        """Take this mode off the stack, wherever modes around and inside it have left it."""
        modes = [torch.overrides._pop_mode() for _ in range(_stack_depth())]  # type: ignore[no-untyped-call]
        for mode in reversed(modes):
            if mode is not self:
                torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]
        self._on_stack = False
        self.tape = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it if it makes or writes tensors."""
        kwargs = kwargs or {}
        tape = self.tape
        if self._muted or tape is None or tape.broken or torch.compiler.is_compiling():
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
        if name == "backward":
            return None
        if torch._C._functorch.maybe_current_level() is not None:
            tape.broken = f"{self._lines.current()} runs inside torch.func"
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
            if tape.known(result) is None:
                self._record(tape, func, args, kwargs, result)
        elif getattr(func, "__name__", "") == "register_hook" or (
            isinstance(result, tuple | list) and any(tensors_in(result))
        ):
            self._record(tape, func, args, kwargs, result)

    def _record(self, tape: Tape, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tape.foreign = tape.tainted = False
        refs, named = tape.refs(args, getattr(func, "__name__", "input")), tape.refs(kwargs)
        if tape.tainted:
            for _, tensor in tensors_in(result):
                tape.mark(tensor, "gradient")
        elif not (tape.foreign and isinstance(result, Tensor) and not result.requires_grad):
            tape.add(func, refs, named, self._lines.current(), self._ambience())
            self._note_outputs(tape, result)

    def _apply(self, function: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """Run and record the user's own `torch.autograd.Function`, as one operation."""
        tape = self.tape
        if not self.recording or tape is None or tape.broken or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            result = call(*args, **kwargs)
            if any(tensors_in(result)):
                self._after_operation(lambda made: self._record(tape, function.apply, args, kwargs, made), result)
        return result

    def _write(self, tape: Tape, func: Any, args: Any, kwargs: Any) -> After | None:
        """Record an operation that writes to its first argument, or to `out`, once it has run."""
        targets = [tensor for _, tensor in tensors_in(args[0] if kwargs.get("out") is None else kwargs["out"])]
        tape.tainted = False
        refs, named = tape.refs(args, getattr(func, "__name__", "input")), tape.refs(kwargs)
        weights = [name for target in targets if (name := self._names(target))]
        if tape.tainted or (weights and getattr(func, "__name__", "") == "requires_grad_"):
            return None
        line = self._lines.current()
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
        tape.outputs(result)
        for _, tensor in tensors_in(result):
            if tensor.dim() == 0 and tensor.requires_grad and (ref := tape.known(tensor)) is not None:
                self._scalar = tensor.detach(), ref

    def _ambience(self) -> Ambience:
        grad = torch.is_grad_enabled()
        if not torch._C._is_any_autocast_enabled():
            return Ambience(self._span, (), True, grad)
        devices = {"cpu", self.model_device}
        on = tuple((d, torch.get_autocast_dtype(d)) for d in sorted(devices) if torch.is_autocast_enabled(d))
        return Ambience(self._span, on, torch.is_autocast_cache_enabled(), grad)

    @functools.cached_property
    def model_device(self) -> str:
        """The type of the device of the model's first weight."""
        return next((weight.device.type for weight in self.model.parameters()), "cpu")

    @guarded(PART)
    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._in_backward or self.tape is None:
            return
        self._depth += 1
        if self._depth > 1:
            return
        if torch.is_grad_enabled():
            self.calls += 1
            self.called(module.training)
        if not self._on_stack:
            self.tape.begin_stretch(self._rng.take())
        self._through = not self._muted and not self.tape.broken
        self.pause()  # before tensors are looked at: the mode sees each of their attributes that is read
        if self._through:
            refs, named = self.tape.refs(args), self.tape.refs(kwargs)
            entry = self.tape.add(None, refs, named, self._lines.current(), self._ambience())
            entry.training, entry.model = module.training, replayed_model(module)

    @guarded(PART)
    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._in_backward or not self._depth:
            return
        self._depth -= 1
        if self._depth or self.tape is None:
            return
        if self._through:
            self._note_outputs(self.tape, output)
        self.resume()

    @guarded(PART)
    def _aside(self, *args: Any, **kwargs: Any) -> Callable[[bool, Any], None] | None:
        """Leave the stack while another model's attention runs without gradients. What it returns is a leaf."""
        tape = self.tape
        if tape is None or torch.is_grad_enabled() or not self.recording or _stack_depth() != self._base + 1:
            return None
        self.pause()

        def after(succeeded: bool, result: Any) -> None:
            tape.begin_stretch(self._rng.take())
            self.resume()

        return after

    @guarded(PART)
    def _left_autocast(self) -> None:
        self._span += 1

    @guarded(PART)
    def _before_method(self, *args: Any, **kwargs: Any) -> None:
        self.pause()

    @guarded(PART)
    def _before_backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, *args: Any, **kwargs: Any
    ) -> Callable[[bool, Any], None] | None:
        if self._in_backward or self.tape is None:
            return None
        self.pause()
        roots = list([tensors] if isinstance(tensors, Tensor) else tensors)
        given = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
        given += [None] * (len(roots) - len(given))
        refs = [
            (self.tape.ref(root, "root"), g if g is None else self.tape.ref(g, "grad")) for root, g in zip(roots, given)
        ]
        replay = self.tape.replay(refs)
        self.tape.replays.append(replay)
        done = self.seen(roots, replay)
        self._in_backward = True

        def after(succeeded: bool, result: Any) -> None:
            self._in_backward = False
            if self.guard.is_off(PART):
                return
            with self.guard.over(PART):
                if retain_graph:
                    self.resume()
                done(succeeded)

        return after


def _stack_depth() -> int:
    return torch._C._len_torch_function_stack()
