"""Records what a loop does inside a block: calls of the model, torch operations around it, and backward passes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.seed import RngCapture
from rawloop.watch.guard import Guard, guarded
from rawloop.watch.listening import applied, listening
from rawloop.watch.marks import Line
from rawloop.watch.operations import PART, Operations, looking
from rawloop.watch.tape import Replay, Tape
from rawloop.watch.wrappers import is_compiled, outsides, replayed_model

Seen = Callable[[list[Tensor], Replay], Callable[[bool], None]]
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)  # take other kernels under a mode


class Recorder(Operations):
    """Writes the tape of each block.

    Operations are not recorded inside the model, inside backward passes, and from a backward pass to the next call of
    the model, so that what runs there costs nothing.

    Args:
        whole: the model as the loop calls it, in its wrappers. A call of the outermost one is one entry of the tape.
        model: the bare model, whose weights have the names.
        called: called with the model's mode, for each call of it with gradients.
        seen: called with the roots of each backward pass and how it can run again, before it runs. What it returns is
            called after it, with whether it succeeded.
        guard: keeps errors of the recording from the loop.
    """

    def __init__(
        self, whole: nn.Module, model: nn.Module, called: Callable[[bool], None], seen: Seen, guard: Guard
    ) -> None:
        super().__init__(model, guard)
        self.whole, self.called, self.seen = whole, called, seen
        self.calls = 0  # of the model in this block, with gradients
        self.in_backward = False  # a backward pass of the loop is running
        self._batch: Any = None
        self._rng = RngCapture()
        self._depth = 0
        self._through = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep hooks on the model inside the context. A compiled caller compiles again whenever hooks change."""
        roots = outsides(self.whole, self.model)
        with ExitStack() as stack:
            for root in roots:
                pre = root.register_forward_pre_hook(self._before_call, prepend=True, with_kwargs=True)
                post = root.register_forward_hook(self._after_call, with_kwargs=True, always_call=True)
                stack.callback(pre.remove)
                stack.callback(post.remove)
            if not any(is_compiled(root) for root in roots):
                for kind in FUSED:
                    stack.enter_context(listening(kind, "forward", self._aside))
            yield

    @contextmanager
    def block(self, batch: Any) -> Iterator[None]:
        """Record what runs inside the context."""
        with ExitStack() as stack:
            stack.enter_context(listening(torch.Tensor, "backward", lambda *args, **kwargs: self.pause()))
            stack.enter_context(listening(torch.autograd, "backward", self._before_backward))
            stack.enter_context(listening(torch, "clear_autocast_cache", self._left_autocast))
            stack.enter_context(applied(self._apply))
            stack.callback(self._close)
            self._depth = self.calls = 0
            self.in_backward = False
            self._scalar, self._batch = None, batch
            self._start_tape()
            self._go_on()
            yield

    def _close(self) -> None:
        self.pause()
        self.tape = None

    @guarded(PART)
    def after_update(self) -> None:
        """Start another tape: what was before an update cannot run again."""
        if self.tape is None:
            return
        self._start_tape()
        if self.calls == 0 and not self.in_backward:  # the loop calls parts of the model, which have no hooks
            self._go_on()

    @guarded(PART)
    def _go_on(self) -> None:
        if self.tape is not None:
            self.tape.begin_stretch(self._rng.take())
            self.resume()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Let no watch take notice of calls of the model and backward passes inside the context."""
        token = looking.set(True)
        try:
            yield
        finally:
            looking.reset(token)

    def _is_deaf(self) -> bool:
        return torch.compiler.is_compiling() or self.in_backward or self.tape is None or looking.get()

    @guarded(PART)
    def _start_tape(self) -> None:
        earlier = self.tape.tensors() if self.tape is not None else {}
        self.tape = Tape(self.model, self._names, earlier)
        self.tape.name_batch(self._batch)

    def last_scalar(self) -> tuple[Tensor | None, Line, Replay | None]:
        """Return the last number with a gradient that the block computed, its line, and how to compute it again."""
        if self.tape is None or self._scalar is None:
            return None, Line(), None
        tensor, ref = self._scalar
        replay = self.tape.replay([(ref, None)])
        return tensor, replay.line, replay

    def line(self) -> Line:
        """Return the line of the user's code that is running."""
        return self.lines.current()

    @guarded(PART)
    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._is_deaf():
            return
        assert self.tape is not None
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
            entry = self.tape.add(None, refs, named, self.line(), self._ambience())
            entry.training, entry.model = module.training, replayed_model(module)

    @guarded(PART)
    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._is_deaf() or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        assert self.tape is not None
        if self._through:
            self._note_outputs(self.tape, output)
        self.resume()

    @guarded(PART)
    def _aside(self, *args: Any, **kwargs: Any) -> Callable[[bool, Any], None] | None:
        """Leave the stack while another model's attention runs without gradients. What it returns is a leaf."""
        if self.tape is None or torch.is_grad_enabled() or not self.recording:
            return None
        self.pause()

        return lambda succeeded, result: self._go_on()

    @guarded(PART)
    def _left_autocast(self) -> None:
        self._span += 1

    @guarded(PART)
    def _before_backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, *args: Any, **kwargs: Any
    ) -> Callable[[bool, Any], None] | None:
        if self._is_deaf():
            return None
        tape = self.tape
        assert tape is not None
        self.pause()
        roots = list([tensors] if isinstance(tensors, Tensor) else tensors)
        given = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
        given += [None] * (len(roots) - len(given))
        refs = [(tape.ref(root, "root"), g if g is None else tape.ref(g, "grad")) for root, g in zip(roots, given)]
        replay = tape.replay(refs)
        tape.replays.append(replay)
        done = self.seen(roots, replay)
        self.in_backward = True

        def after(succeeded: bool, result: Any) -> None:
            self.in_backward = False
            if self.guard.is_off(PART):
                return
            with self.guard.over(PART):
                if retain_graph:
                    self.resume()
                done(succeeded)

        return after
