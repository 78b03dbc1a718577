"""Autocast, gradient mode and the name of the user's line, set again around the entries of a tape."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from rawloop.origin import current_line
from rawloop.watch.marks import Ambience, Line


class Spans(ExitStack):
    """Repeats autocast contexts: the casts of weights are cached until the outermost one is left."""

    def __init__(self) -> None:
        super().__init__()
        self.outer: Ambience | None = None

    @contextmanager
    def like(self, ambience: Ambience) -> Iterator[None]:
        """Set autocast and gradient mode as they were."""
        if self.outer is not None and self.outer.span != ambience.span:
            self.close()
            self.outer = None
        if self.outer is None and ambience.autocast:
            self.outer = ambience
            _enter(self, ambience)
        with ExitStack() as inner:
            inner.enter_context(torch.set_grad_enabled(ambience.grad))
            if self.outer is not None and self.outer.autocast != ambience.autocast:
                _enter(inner, ambience, off=self.outer)
            yield


def _enter(stack: ExitStack, ambience: Ambience, off: Ambience | None = None) -> None:
    """Enter the autocast contexts, and switch off those of the devices that only `off` has."""
    on = dict(ambience.autocast)
    for device, dtype in off.autocast if off is not None else ():
        if device not in on:
            stack.enter_context(torch.autocast(device, dtype, enabled=False))
    for device, dtype in ambience.autocast:
        stack.enter_context(torch.autocast(device, dtype, cache_enabled=ambience.cache))


@contextmanager
def running(line: Line) -> Iterator[None]:
    """Name the user's line to whoever looks at the operations inside."""
    token = current_line.set(str(line))
    try:
        yield
    finally:
        current_line.reset(token)
