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
            for context in _autocast(ambience):
                self.enter_context(context)
        with ExitStack() as inner:
            inner.enter_context(torch.set_grad_enabled(ambience.grad))
            if self.outer is not None and self.outer.autocast != ambience.autocast:
                on = dict(ambience.autocast)
                for device, dtype in self.outer.autocast:
                    if device not in on:
                        inner.enter_context(torch.autocast(device, dtype, enabled=False))
                for context in _autocast(ambience):
                    inner.enter_context(context)
            yield


@contextmanager
def running(line: Line) -> Iterator[None]:
    """Name the user's line to whoever looks at the operations inside."""
    token = current_line.set(str(line))
    try:
        yield
    finally:
        current_line.reset(token)


def _autocast(ambience: Ambience) -> list[torch.autocast]:
    return [torch.autocast(device, dtype, cache_enabled=ambience.cache) for device, dtype in ambience.autocast]
