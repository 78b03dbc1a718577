"""A few numbers of a few weights, kept after each update: they tell whether anything else writes other values."""

from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import Tensor

WEIGHTS = 8  # of an optimizer: what writes weights between updates writes all of them, as load_state_dict does
NUMBERS = 8  # of each weight
EQUAL = 4  # comparisons without a change, after which writes are known to be of equal values
WRITES = attrgetter("_version")  # how often torch has written a tensor in place


class FewNumbers:
    """Keeps numbers of an optimizer's weights with one call of the device in each step, and compares them if need be.

    A weight whose `.data` was replaced is compared with itself: it seems unchanged.

    Args:
        weights: by name. Some of them are chosen, evenly spread.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        device = next(iter(weights.values())).device
        mine = [(name, weight) for name, weight in weights.items() if weight.device == device]
        self._chosen = dict(mine[:: -(-len(mine) // WEIGHTS)])
        self._views = [_few(weight) for weight in self._chosen.values()]
        self._kept: Tensor | None = None
        self._writes: list[int] = []
        self._equal = 0

    def keep(self) -> None:
        """Keep the numbers, after an update."""
        self._writes = [*map(WRITES, self._chosen.values())]
        self._kept = torch.cat(self._views)

    def changed(self, probing: bool) -> list[str]:
        """Return the names of weights whose numbers differ from those kept. Nothing is read if torch wrote none.

        Args:
            probing: read even if all writes so far were of equal values.
        """
        if self._kept is None or self._writes == [*map(WRITES, self._chosen.values())]:
            return []
        if self._equal >= EQUAL and not probing:
            return []
        flags = torch.split((torch.cat(self._views) != self._kept).cpu(), [len(view) for view in self._views])
        changed = [name for name, part in zip(self._chosen, flags, strict=True) if bool(part.any())]
        self._equal += not changed
        return changed


def _few(weight: Tensor) -> Tensor:
    """Return a view of some numbers in the middle of a weight."""
    view = weight.detach()
    view = view if view.dim() else view[None]
    while view.dim() > 1:
        view = view[len(view) // 2]
    return view[:NUMBERS]
