"""Passes that need all ranks, in numbers that differ between ranks, as those of a sharded model."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rawloop.dist import World

T = TypeVar("T")


class InStep:
    """Lets ranks run different numbers of passes: each pass is announced, and ranks that want none run a filler.

    If ranks want passes of different kinds, the first kind is run first. At the end each rank calls `finish`.

    Args:
        world: the ranks.
        fillers: for each kind of pass a function that runs one without effect. The same kinds on all ranks.
    """

    def __init__(self, world: World, fillers: Sequence[Callable[[], Any]]) -> None:
        self.world, self.fillers = world, fillers

    def run(self, kind: int, work: Callable[[], T]) -> T:
        """Run a pass of a kind, when all ranks run one of that kind."""
        while (chosen := self._next(kind)) != kind:
            assert chosen is not None, "this rank wants one"
            self.fillers[chosen]()
        return work()

    def finish(self) -> None:
        """Run fillers until no rank wants another pass."""
        while (chosen := self._next(None)) is not None:
            self.fillers[chosen]()

    def _next(self, wanted: int | None) -> int | None:
        """Return the first kind that a rank wants; None if no rank wants any."""
        flags = self.world.any([wanted == kind for kind in range(len(self.fillers))])
        return next((kind for kind, flag in enumerate(flags) if flag), None)
