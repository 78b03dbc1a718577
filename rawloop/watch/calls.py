"""The detector of labels that do not reach the loss: keywords that only `**kwargs` takes, and a loss of None."""

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.errors import UserError
from rawloop.inputs import check_inputs
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.guard import part_of
from rawloop.watch.subject import Detector, StepRecord, Subject

CALLS = 3  # that are looked at
PASSED_ON = ("num_items_in_batch", "cu_seq", "max_length", "output_", "use_cache", "cache_")  # transformers' own


class Calls(Detector):
    """Looks at the first calls of the model: their keywords, and whether they return a loss."""

    def __init__(self) -> None:
        self._hooks = ExitStack()
        self._seen: list[Finding] = []
        self._swallowed: list[str] = []
        self._calls = self._step = self._rank = 0

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Hook the model."""
        self._rank = subject.world.rank
        model, part = subject.model, part_of(self)
        before, after = (subject.guard.shield(part, hook) for hook in (self._before, self._after))
        self._hooks.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._hooks.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        return ()

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Note the step."""
        self._step = record.step
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Yield what the calls of this step have shown."""
        seen, self._seen = self._seen, []
        if self._calls >= CALLS:
            self._hooks.close()
        return seen

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Remove the hooks; yield what a step has shown that did not come to its end."""
        self._hooks.close()
        seen, self._seen = self._seen, []
        return seen

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._calls >= CALLS:
            return
        self._calls += 1
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        tensors = [name for name in tensors if not name.startswith(PASSED_ON)]
        self._swallowed = [name for name in tensors if not _takes(model, name)]
        for name in self._swallowed:
            self._seen += self._unknown(model, name)

    def _unknown(self, model: nn.Module, name: str) -> list[Finding]:
        try:
            check_inputs(model, [name])
        except UserError as error:
            if "does not take" not in str(error):  # forward names no parameter at all
                return []
            is_label = "label" in name or "target" in name
            what = f"{type(model).__name__}.forward takes '{name}' only through **kwargs, which ignore it"
            place = Place("forward", tensor=name)
            cause = Cause("data", f"{error}", place, {}, f"rename '{name}', or leave it out of the call")
            near = "did you mean" in str(error)
            return [Finding("input_swallowed", what, (cause,), self._step, self._rank, ordinary=not (is_label or near))]
        return []

    def _after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not _has_no_loss(output):
            return
        labels = [name for name, value in kwargs.items() if "label" in name and isinstance(value, Tensor)]
        if not labels or self._calls > CALLS:
            return
        name = labels[0]
        what = f"{type(model).__name__} was given '{name}' and returned loss=None"
        swallowed = name in self._swallowed
        why = f"its forward has no parameter '{name}'" if swallowed else "its forward computes no loss from them"
        advice = "call it with the labels that its forward names, or compute the loss from its logits"
        cause = Cause("data" if swallowed else "model", why, Place("forward", tensor=name), {}, advice)
        self._seen.append(Finding("labels_unused", what, (cause,), self._step, self._rank))


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a parameter of this name takes the keyword, or no `**kwargs` does: Python then raises by itself."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _has_no_loss(output: Any) -> bool:
    if isinstance(output, dict) and not hasattr(output, "loss"):
        return "loss" in output and output["loss"] is None
    return hasattr(output, "loss") and output.loss is None
