"""Records what a loop does inside a block: calls of the model, torch operations around it, and backward passes."""

import functools
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rawloop.seed import RngCapture
from rawloop.watch.marks import Ambience, Line, Ref
from rawloop.watch.nest import tensors_in
from rawloop.watch.tape import Replay, Tape

WRITES = {
    f"__i{name}__"
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
}
WRITES |= {"__setitem__"}
Seen = Callable[[list[Tensor], Replay], Callable[[bool], None]]


class Recorder(TorchFunctionMode):
    """Writes the tape of each block.

    The mode is off inside the model, inside backward passes, and from a backward pass to the next call of the model, so
    that what runs there costs nothing.

    Args:
        model: the bare model, on which a pass runs again.
        roots: the model and what wraps it; a call of the outermost one is one entry of the tape.
        called: called with the model's mode, for each call of it with gradients.
        seen: called with the roots of each backward pass and how it can run again, before it runs. What it returns is
            called after it, with whether it succeeded.
    """

    def __init__(
        self, model: nn.Module, roots: Sequence[nn.Module], called: Callable[[bool], None], seen: Seen
    ) -> None:
        super().__init__()
        self.model, self.roots, self.called, self.seen = model, roots, called, seen
        self.tape: Tape | None = None
        self.calls = 0  # of the model in this block, with gradients
        self._batch: Any = None
        self._scalar: tuple[Tensor, Ref] | None = None  # the last number that could be a loss
        self._names = _Names(model)
        self._lines = _Lines()
        self._rng = RngCapture()
        self._depth = self._base = self._span = 0
        self._on_stack = self._muted = self._in_backward = self._through = False

    @contextmanager
    def block(self, batch: Any) -> Iterator[None]:
        """Record what runs inside the context."""
        with ExitStack() as stack:
            stack.enter_context(listening(torch.Tensor, "backward", self._before_method))
            stack.enter_context(listening(torch.autograd, "backward", self._before_backward))
            stack.enter_context(listening(torch, "clear_autocast_cache", self._left_autocast))
            for root in self.roots:
                pre = root.register_forward_pre_hook(self._before_call, prepend=True, with_kwargs=True)
                post = root.register_forward_hook(self._after_call, with_kwargs=True, always_call=True)
                stack.callback(pre.remove)
                stack.callback(post.remove)
            stack.callback(self._close)
            self._base = _stack_depth()
            self._depth = self.calls = 0
            self._muted = self._in_backward = False
            self._scalar = None
            self._batch = batch
            self._start_tape()
            self.resume()
            yield

    def after_update(self) -> None:
        """Start another tape: what was before an update cannot run again."""
        if self.tape is not None:
            self._start_tape()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Take no notice of calls of the model and backward passes inside the context."""
        before, self._in_backward = self._in_backward, True
        try:
            yield
        finally:
            self._in_backward = before

    def _start_tape(self) -> None:
        self.tape = Tape(self.model, self._names)
        self.tape.name_batch(self._batch)
        self.tape.begin_stretch(self._rng.take())

    def resume(self) -> None:
        """Record from here on."""
        self._muted = False
        if self.tape is not None and not self._on_stack and _stack_depth() == self._base:
            torch.overrides._push_mode(self)  # type: ignore[no-untyped-call]
            self._on_stack = True

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
        found = Line()
        while traceback is not None:
            file = traceback.tb_frame.f_code.co_filename
            found = Line(file, traceback.tb_lineno) if self._lines.rank(file) == 0 else found
            traceback = traceback.tb_next
        return found

    def _close(self) -> None:
        above = []
        while self._on_stack:
            mode = torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
            self._on_stack = mode is not self
            above += [mode] if mode is not self else []
        for mode in reversed(above):
            torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]
        self.tape = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it if it makes or writes tensors."""
        kwargs = kwargs or {}
        tape = self.tape
        if self._muted or tape is None or tape.broken or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._attribute(tape, func, name, args)
        if name == "backward":
            return func(*args, **kwargs)
        if name in WRITES or (name[-1:] == "_" and name[-2:] != "__") or kwargs.get("out") is not None:
            return self._write(tape, func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if tape.known(result) is None:
                self._record(tape, func, args, kwargs, result)
        elif name == "register_hook" or (isinstance(result, tuple | list) and any(tensors_in(result))):
            self._record(tape, func, args, kwargs, result)
        return result

    def _attribute(self, tape: Tape, func: Any, name: str, args: Any) -> Any:
        attribute = func.__self__.__name__
        if name == "__set__":
            return self._write(tape, func, args, {}) if attribute in ("data", "requires_grad") else func(*args)
        result = func(*args)
        if isinstance(result, Tensor):
            if attribute == "grad":
                tape.mark(result, "gradient")
            elif tape.known(result) is None:
                self._record(tape, func, args, {}, result)
        return result

    def _record(self, tape: Tape, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tape.foreign = tape.tainted = False
        refs, named = tape.refs(args, getattr(func, "__name__", "input")), tape.refs(kwargs)
        if tape.tainted:
            for _, tensor in tensors_in(result):
                tape.mark(tensor, "gradient")
        elif not (tape.foreign and isinstance(result, Tensor) and not result.requires_grad):
            tape.add(func, refs, named, self._lines.current(), self._ambience())
            self._note_outputs(tape, result)

    def _write(self, tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record an operation that writes to its first argument, or to `out`."""
        targets = [tensor for _, tensor in tensors_in(args[0] if kwargs.get("out") is None else kwargs["out"])]
        tape.tainted = False
        refs, named = tape.refs(args, getattr(func, "__name__", "input")), tape.refs(kwargs)
        weights = [name for target in targets if (name := self._names(target))]
        if tape.tainted or (weights and getattr(func, "__name__", "") == "requires_grad_"):
            return func(*args, **kwargs)
        line = self._lines.current()
        if weights:
            tape.spoiled = tape.broken = f"{line} writes to the weight {weights[0]}"
            return func(*args, **kwargs)
        for target in targets:
            tape.written(target)
        ambience = self._ambience()
        result = func(*args, **kwargs)
        tape.add(func, refs, named, line, ambience)
        for target in targets:
            tape.refresh(target)
        for _, tensor in tensors_in(result):
            if tape.known(tensor) is None:
                self._note_outputs(tape, result)
        return result

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
        if self._through:
            refs, named = self.tape.refs(args), self.tape.refs(kwargs)
            entry = self.tape.add(None, refs, named, self._lines.current(), self._ambience())
            entry.training = module.training
        self.pause()

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._in_backward or not self._depth:
            return
        self._depth -= 1
        if self._depth or self.tape is None:
            return
        if self._through:
            self._note_outputs(self.tape, output)
        self.resume()

    def _left_autocast(self) -> None:
        self._span += 1

    def _before_method(self, *args: Any, **kwargs: Any) -> None:
        self.pause()

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
            if retain_graph:
                self.resume()
            done(succeeded)

        return after


def _stack_depth() -> int:
    return torch._C._len_torch_function_stack()


@contextmanager
def listening(owner: Any, name: str, listener: Callable[..., Any]) -> Iterator[None]:
    """Call `listener` before each call of a function of torch, with its arguments.

    What it returns, if not None, is called afterwards, with whether the function succeeded, and its result.

    All listeners share one wrapper, so that they may leave in any order.
    """
    wrapper = getattr(owner, name)
    if not hasattr(wrapper, "listeners"):
        wrapper = _announcing(wrapper)
        setattr(owner, name, wrapper)
    wrapper.listeners.append(listener)
    try:
        yield
    finally:
        wrapper.listeners.remove(listener)
        if not wrapper.listeners and getattr(owner, name) is wrapper:
            setattr(owner, name, wrapper.__wrapped__)


def _announcing(function: Any) -> Any:
    @functools.wraps(function)
    def announced(*args: Any, **kwargs: Any) -> Any:
        done = [listener(*args, **kwargs) for listener in announced.listeners]  # type: ignore[attr-defined]
        succeeded, result = False, None
        try:
            result = function(*args, **kwargs)
            succeeded = True
            return result
        finally:
            for after in filter(None, done):
                after(succeeded, result)

    announced.listeners = []  # type: ignore[attr-defined]
    return announced


class _Names:
    """The names of a model's weights and buffers. A weight that is assigned later is looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._read()

    def _read(self) -> None:
        for named in (self.model.named_buffers(), self.model.named_parameters()):
            self.found.update({id(tensor): (weakref.ref(tensor), name) for name, tensor in named})

    def __call__(self, tensor: Tensor) -> str:
        name = self._known(tensor)
        if name is None and isinstance(tensor, nn.Parameter):
            self.found[id(tensor)] = weakref.ref(tensor), ""
            self._read()
            name = self._known(tensor)
        return name or ""

    def _known(self, tensor: Tensor) -> str | None:
        alive, name = self.found.get(id(tensor), (None, None))
        return name if alive is not None and alive() is tensor else None


class _Lines:
    """Finds the line of the user's code among the frames that run: the innermost one outside libraries."""

    def __init__(self) -> None:
        self.own = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
        self.libraries = (str(Path(torch.__file__).parent.parent), sysconfig.get_path("stdlib"), "<frozen")
        self.ranks: dict[str, int] = {}

    def current(self) -> Line:
        """Return the line; if all frames are those of libraries, the innermost outside torch and rawloop."""
        frame: FrameType | None = sys._getframe(1)
        second: FrameType | None = None
        while frame is not None:
            rank = self.rank(frame.f_code.co_filename)
            if rank == 0:
                return Line(frame.f_code.co_filename, frame.f_lineno)
            second = second or (frame if rank == 1 else None)
            frame = frame.f_back
        return Line(second.f_code.co_filename, second.f_lineno) if second is not None else Line()

    def rank(self, file: str) -> int:
        """Return 0 for the user's files, 1 for those of libraries, 2 for those of torch and rawloop."""
        rank = self.ranks.get(file)
        if rank is None:
            rank = 2 if file.startswith(self.own) else int(file.startswith(self.libraries))
            self.ranks[file] = rank
        return rank
