"""Float32 masters of 16-bit weights.

An update below half a unit in the last place of an FP16 weight rounds to nothing: at a learning rate of 1e-5 more than
half of all updates are lost. The optimizer therefore holds float32 copies, and the model computes with their rounding.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.errors import CheckpointError

HALF = (torch.float16, torch.bfloat16)


class Masters:
    """Pairs of a 16-bit weight and its float32 master, by name. Weights in float32 are their own masters."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.weights = dict(named)
        self.masters = {
            name: nn.Parameter(weight.detach().float()) for name, weight in self.weights.items() if weight.dtype in HALF
        }
        self._weight_of = {id(master): self.weights[name] for name, master in self.masters.items()}

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer must hold, by the names of the model's weights."""
        return [(name, self.masters.get(name, weight)) for name, weight in self.weights.items()]

    def gradient(self, held: Tensor) -> Tensor | None:
        """The gradient of a parameter that an optimizer holds, where backward has put it: on the model's weight."""
        return self._weight_of.get(id(held), held).grad

    def hand_over(self, held: Iterable[Tensor], factor: float) -> None:
        """Give each held parameter its gradient times `factor`, in float32; 16-bit gradients are freed on the way.

        Unscaling in 16 bits would flush to zero what loss scaling has just saved.
        """
        plain = []
        for parameter in held:
            weight = self._weight_of.get(id(parameter))
            if weight is None:
                if parameter.grad is not None:
                    plain.append(parameter.grad)
            elif weight.grad is not None:
                parameter.grad = weight.grad.float().mul_(factor)
                weight.grad = None
        if plain and factor != 1.0:
            torch._foreach_mul_(plain, factor)

    def write_weights(self) -> None:
        """Round the masters into the model's weights."""
        with torch.no_grad():
            for name, master in self.masters.items():
                self.weights[name].copy_(master)

    def clear_gradients(self) -> None:
        """Drop the gradients that the optimizer does not see: those of weights with a master."""
        for name in self.masters:
            self.weights[name].grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the masters by name."""
        return {name: master.detach() for name, master in self.masters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the masters; made anew from the rounded weights they would lose what they are kept for.

        Raises:
            CheckpointError: they are of other weights.
        """
        if set(state) != set(self.masters):
            different = sorted(set(state) ^ set(self.masters))
            raise CheckpointError(f"master weights do not fit the model: {len(different)} differ, first {different[0]}")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state[name])
