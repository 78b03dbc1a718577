"""The detector of inputs that do not reach the model: keywords that only `**kwargs` takes, which ignore them."""

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from rawloop.errors import UserError
from rawloop.inputs import check_inputs
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.guard import part_of
from rawloop.watch.subject import Detector, StepRecord, Subject

CALLS = 3  # that are looked at
PASSED_ON = ("num_items_in_batch", "cu_seq", "max_length", "output_", "use_cache", "cache_")  # transformers' own


class Calls(Detector):
    """Looks at the keywords of the first calls of the model."""

    def __init__(self) -> None:
        self._hook = ExitStack()
        self._seen: list[Finding] = []
        self._calls = self._step = 0

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Hook the model."""
        hook = subject.guard.shield(part_of(self), partial(self._look, subject.world.rank))
        self._hook.callback(subject.model.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return ()

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Note the step."""
        self._step = record.step
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Yield what the calls of this step have shown."""
        if self._calls == CALLS:
            self._hook.close()
        seen, self._seen = self._seen, []
        return seen

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Remove the hook; yield what a step has shown that did not come to its end."""
        self._hook.close()
        return self._seen

    def _look(self, rank: int, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._calls == CALLS:
            return
        self._calls += 1
        parameters = inspect.signature(model.forward).parameters
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            return  # Python raises by itself
        for name, value in kwargs.items():
            named = name in parameters or name.startswith(PASSED_ON)
            if isinstance(value, Tensor) and not named and (why := _unknown(model, name)):
                what = f"{type(model).__name__}.forward takes '{name}' only through **kwargs, which ignore it"
                advice = f"rename '{name}', or leave it out of the call"
                told = "label" in name or "target" in name or "did you mean" in why
                cause = Cause("data", why, Place("forward", tensor=name), {}, advice)
                self._seen.append(Finding("input_swallowed", what, (cause,), self._step, rank, ordinary=not told))


def _unknown(model: nn.Module, name: str) -> str:
    """Return why a model does not take a keyword; empty if a part of it does, or if it names no parameter at all."""
    try:
        check_inputs(model, [name])
    except UserError as error:
        return str(error) if "does not take" in str(error) else ""
    return ""
