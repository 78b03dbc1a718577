"""Follows the numbers that are not finite through a forward pass: each operation and each module."""

import linecache
import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from rawloop.origin.spots import NOWHERE, Call, Origin, Spot
from rawloop.origin.tensors import base_of, floats_in, limit, map_args, trouble

# The line of the user's code whose operation runs, for code that runs operations which it has recorded, so that the
# line is not on the stack: set it around each of them, as `train.py:41: loss = torch.log(p).mean()`. It is used for
# operations outside the model's modules.
current_line: ContextVar[str] = ContextVar("current_line", default="")

OUR_OWN = tuple(str(Path(__file__).parent.parent / room) for room in ("origin", "watch", "diagnose"))
NOT_THE_USERS = (str(Path(torch.__file__).parent), "<")  # torch, and generated code such as <frozen contextlib>

# Operations whose result should not be infinite where a mask blocks some of their inputs.
REDUCTIONS = ("sum", "mean", "logsumexp", "cross_entropy", "nll_loss", "kl_div", "gather", "take_along_dim")
# Operations that take masks with minus infinity.
MASKED = ("softmax", "log_softmax", "scaled_dot_product_attention", "logsumexp", "safe_softmax")

# Operations that make a zero of an infinity, those that keep a zero, and those whose result at a zero is not finite.
HIDES = ("div", "rdiv", "true_divide", "divide", "reciprocal", "rsqrt")
KEEPS_ZERO = (*HIDES, "mul", "rmul", "multiply", "neg", "abs", "sqrt", "square", "to", "float", "contiguous", "gather")
BREAKS_AT_ZERO = (*HIDES, "log", "log2", "log10", "pow")


class Recorder(TorchFunctionMode):
    """Sees the operations of a forward pass and the model's modules, and remembers the source of what is not finite.

    It keeps numbers and names, no tensors, except those of the operation `wanted`.

    Args:
        model: the bare model.
        given: tensors that exist before the pass, by name: weights, buffers, inputs.
        wanted: the number of the operation to capture.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor], wanted: int | None = None) -> None:
        super().__init__()
        self.stack: list[tuple[str, nn.Module]] = []
        self.sources: dict[int, Origin] = {}
        self.hidden: dict[int, Origin] = {}  # the infinities behind zeros
        self.spans: list[tuple[int, Spot]] = []  # the sequence number of autograd nodes after each place
        self.call: Call | None = None
        self.count, self.wanted = 0, wanted
        self.narrow: torch.dtype | None = None  # a 16-bit dtype that an operation has made
        self.weights = {id(weight): name for name, weight in model.named_parameters()}
        self.names = {module: name for name, module in model.named_modules()}
        self.on_exit: Any = None
        for name, tensor in given.items():
            for one in floats_in(tensor):
                if kind := trouble(one):
                    self.sources[_key(one)] = _origin(NOWHERE, kind, one, given=name, mask=not _not_a_mask(one))

    @contextmanager
    def watching(self) -> Iterator["Recorder"]:
        """Watch the operations and modules inside."""
        with ExitStack() as hooks:
            for module in self.names:
                hooks.callback(module.register_forward_pre_hook(self._enter).remove)
                hooks.callback(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True).remove)
            with self:
                yield self

    def source_of(self, tensor: Tensor) -> Origin | None:
        """Return the source of a tensor that is not finite."""
        return self.sources.get(_key(tensor))

    def spot_of(self, sequence_number: int) -> Spot | None:
        """Return the place that created an autograd node."""
        number = bisect_right(self.spans, sequence_number, key=itemgetter(0))
        return self.spans[number][1] if number < len(self.spans) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        number, self.count = self.count, self.count + 1
        given = list(floats_in((args, kwargs)))
        in_place = _in_place(name) or "out" in kwargs
        before = [self._seen(tensor) for tensor in given] if in_place else []
        if number == self.wanted:
            self._capture(func, args, kwargs)
        self._note(self._spot())  # nodes of kernels that torch does not show
        result = func(*args, **kwargs)
        made = list(floats_in(result)) or (given[:1] if in_place else [])
        spot = self._spot(number, resolve_name(func) or name, self._line())
        self._note(spot)
        for out in made:
            self.narrow = out.dtype if out.dtype.itemsize < 4 else self.narrow
            self._settle(out, spot, given, before if in_place else None, (args, kwargs))
        if number == self.wanted and self.call is not None:
            self._keep(self.call, made)
        return result

    def _settle(self, out: Tensor, spot: Spot, given: list[Tensor], before: Any, arguments: Any) -> None:
        """Remember the source of an output that is not finite."""
        kind, base = trouble(out), base_of(spot.operation)
        found = before if before is not None else [self._seen(one) for one in given] if kind or base in HIDES else []
        sources = [source for source in found if source is not None]
        if not kind:
            self._hide(out, base, given, sources)
            return
        self.hidden.pop(_key(out), None)
        real = [source for source in sources if not source.mask]
        if real:
            made = min(real, key=lambda source: source.spot.number)
        elif sources and kind == "inf" and base not in REDUCTIONS:
            made = sources[0]
        elif sources and sources[0].given and base not in MASKED:
            made = replace(sources[0], mask=False)  # numbers that are no mask, such as the logarithm of silence
        elif sources:
            made = _origin(spot, kind, out, blocked=True)
        elif hidden := self._behind_zero(base, given):
            made = replace(hidden, later=spot.operation)
        else:
            made = _origin(spot, kind, out, mask=_has_infinity(arguments, out.dtype) and not _not_a_mask(out))
        self.sources[_key(out)] = made

    def _hide(self, out: Tensor, base: str, given: list[Tensor], sources: Sequence[Origin]) -> None:
        """Remember the infinity of which an operation has made a zero, as a division by it does."""
        others = all(_key(out) != _key(one) for one in given)
        if others:
            self.sources.pop(_key(out), None)  # the memory of another tensor, used again
        real = (s for s in sources if base in HIDES and s.kind == "inf" and not s.mask and not s.given)
        kept = (self.hidden[_key(one)] for one in given if base in KEEPS_ZERO and _key(one) in self.hidden)
        hidden = next(real, None) or next(kept, None)
        if hidden is not None and bool((out.detach() == 0).any()):
            self.hidden[_key(out)] = hidden
        elif others:
            self.hidden.pop(_key(out), None)

    def _behind_zero(self, base: str, given: list[Tensor]) -> Origin | None:
        """Return the infinity behind a zero among the inputs of an operation that is not finite at zero."""
        zeros = (one for one in given if _key(one) in self.hidden and bool((one.detach() == 0).any()))
        return next((self.hidden[_key(one)] for one in zeros), None) if base in BREAKS_AT_ZERO else None

    def _seen(self, tensor: Tensor) -> Origin | None:
        """Return the source of an input; one that nobody has made comes from outside the pass."""
        kind = trouble(tensor)
        if not kind or _key(tensor) in self.sources:
            return self.sources[_key(tensor)] if kind else None
        shape = f"a tensor {tuple(tensor.shape)} from outside the pass"
        return _origin(self._spot(line=self._line()), kind, tensor, given=shape, mask=not _not_a_mask(tensor))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._note(self._spot())
        self.stack.append((self.names[module], module))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        spot = Spot(-1, type(module).__name__, self.names[module], True, "")
        self._note(spot)
        with torch._C.DisableTorchFunction():
            given = [*floats_in((args, kwargs))]
            for out in floats_in(made):
                if _key(out) not in self.sources and all(_key(out) != _key(one) for one in given):
                    self._settle(out, spot, given, None, ())
            if self.on_exit is not None:
                self.on_exit(made, spot)
        while self.stack and self.stack.pop()[1] is not module:
            pass

    def _spot(self, number: int = -1, operation: str = "", line: str = "") -> Spot:
        return Spot(number, operation, self.stack[-1][0] if self.stack else "", bool(self.stack), line)

    def _note(self, spot: Spot) -> None:
        now = torch._C._autograd._get_sequence_nr()
        if not self.spans or self.spans[-1][0] < now:
            self.spans.append((now, spot))

    def _line(self) -> str:
        if not self.stack and current_line.get():
            return current_line.get()
        if self.stack and type(self.stack[-1][1]).__module__.startswith("torch."):
            return ""
        return line_of(sys._getframe(1))

    def _capture(self, func: Any, args: Any, kwargs: Any) -> None:
        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().clone().requires_grad_(value.requires_grad and value.is_floating_point())

        given = enumerate(floats_in((args, kwargs)))
        weights = {n: self.weights[id(tensor)] for n, tensor in given if id(tensor) in self.weights}
        self.call = Call(func, map_args(copied, args), map_args(copied, kwargs), weights)

    def _keep(self, call: Call, made: list[Tensor]) -> None:
        call.outputs = [out.detach().clone() for out in made]
        for index, out in enumerate(made):
            if out.requires_grad:
                out.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient, index=index: call.gradients.__setitem__(index, gradient.detach().clone())
                )


def _origin(spot: Spot, kind: str, tensor: Tensor, **more: Any) -> Origin:
    return Origin("forward", spot.operation, spot, kind, tensor.dtype, **more)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _not_a_mask(tensor: Tensor) -> bool:
    """Whether a tensor contains NaN or +inf: masks have -inf only."""
    return bool((tensor.detach().isnan() | (tensor.detach() == math.inf)).any())


def _in_place(name: str) -> bool:
    """Whether an operation of this name writes into its first argument: `add_`, `__iadd__`, `__setitem__`."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__int__", "__index__"))
    return name.endswith("_")


def _has_infinity(arguments: Any, dtype: torch.dtype) -> bool:
    """Whether a plain number among the arguments is infinite in this dtype, as in a fill or a mask."""
    if isinstance(arguments, float | int) and not isinstance(arguments, bool):
        return not math.isnan(arguments) and abs(arguments) > limit(dtype)
    if isinstance(arguments, dict):
        return any(_has_infinity(item, dtype) for item in arguments.values())
    return isinstance(arguments, list | tuple) and any(_has_infinity(item, dtype) for item in arguments)


def line_of(frame: FrameType | None) -> str:
    """Return the innermost line outside torch and this package, up to the call that started the pass."""
    left = False
    while frame is not None:
        file = frame.f_code.co_filename
        ours = file.startswith(OUR_OWN[0])
        if ours and left:
            return ""
        left = left or not ours
        if not file.startswith((*OUR_OWN, *NOT_THE_USERS)) and "contextlib" not in file:
            text = linecache.getline(file, frame.f_lineno).partition("  #")[0].strip()
            return f"{Path(file).name}:{frame.f_lineno}: {text}".rstrip(": ")
        frame = frame.f_back
    return ""
