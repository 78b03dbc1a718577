"""A few numbers of each weight, kept on the device after each update: they tell whether later writes changed values."""

from collections.abc import Mapping

import torch
from torch import Tensor

NUMBERS = 8  # of each weight
EQUAL = 4  # comparisons without a change, after which writes are known to be of equal values


class FewNumbers:
    """Keeps numbers of weights with one call of the device in each step, and compares them with one read.

    A weight whose `.data` was replaced is compared with itself: it seems unchanged.
    """

    def __init__(self) -> None:
        self._views: dict[str, Tensor] = {}
        self._kept: dict[torch.device, Tensor] = {}
        self._equal = 0

    def forget(self) -> None:
        """Forget the weights, which may be others in the next step."""
        self._views, self._kept = {}, {}

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Keep numbers of these weights, which are the same ones until `forget`."""
        self._views = self._views or {name: _few(weight) for name, weight in weights.items()}
        self._kept = self._now()

    def changed(self, probing: bool) -> list[str]:
        """Return the names of weights whose numbers differ from those kept. It stops reading if they never do.

        Args:
            probing: read in any case.
        """
        if not self._kept or (self._equal >= EQUAL and not probing):
            return []
        differ = {device: (now != self._kept[device]).cpu() for device, now in self._now().items()}
        changed = []
        for device, flags in differ.items():
            mine = [(name, len(view)) for name, view in self._views.items() if view.device == device]
            parts = torch.split(flags, [length for _, length in mine])
            changed += [name for (name, _), part in zip(mine, parts, strict=True) if bool(part.any())]
        self._equal += not changed
        return changed

    def _now(self) -> dict[torch.device, Tensor]:
        devices = dict.fromkeys(view.device for view in self._views.values())
        return {device: torch.cat([v for v in self._views.values() if v.device == device]) for device in devices}


def _few(weight: Tensor) -> Tensor:
    """Return a view of some numbers in the middle of a weight."""
    view = weight.detach()
    view = view if view.dim() else view[None]
    while view.dim() > 1:
        view = view[len(view) // 2]
    return view[:NUMBERS]
