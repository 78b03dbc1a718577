"""Batch keys against a model's forward signature.

Models of transformers 5 take `**kwargs` and swallow a keyword that they do not know: `label_ids` instead of `labels`
gives `loss=None`, not an error. So keys are matched by explicit parameter name, once per model.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.errors import UserError, nearest


def parameters_of(forward: Callable[..., Any]) -> list[str]:
    """The parameters that a function takes by an explicit name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(forward).parameters.items() if parameter.kind in kinds]


def check_inputs(forward: Callable[..., Any], names: Iterable[str], owner: str) -> None:
    """Refuse batch keys that `forward` has no parameter of that very name for.

    Raises:
        UserError: naming the key, the nearest parameter and the model.
    """
    known = parameters_of(forward)
    for name in names:
        if name not in known:
            raise UserError(
                f"the batch has '{name}', which {owner}.forward does not take{nearest(name, known)}: "
                f"its parameters are {', '.join(known)}"
            )


# What users call the same thing: a key of the batch -> what it may be called in the model's forward.
SYNONYMS = {
    "labels": ("label_ids",),
    "label_ids": ("labels",),
    "audio_labels": ("label_audio_ids",),
    "label_audio_ids": ("audio_labels",),
}
LABELS = tuple(SYNONYMS)


class BatchAdapter:
    """Turns somebody else's batch into keyword arguments for a model, on its device: for loops of your own.

    A batch is a mapping, or an object with attributes (with `keys()`, or a dataclass). Keys are matched to the
    parameters of `forward` by name, `labels` and `label_ids` (`audio_labels` and `label_audio_ids`) standing for each
    other; values of None are left out, and floating-point tensors are cast to `dtype` if one is given.

    Args:
        model: what will be called.
        device: where its weights are.
        dtype: of floating-point inputs, such as features; None leaves them.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.owner = type(model).__name__
        self.parameters = parameters_of(model.forward)

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Return the keyword arguments.

        Raises:
            UserError: the batch is of no known kind, has a key that the model does not take, or two for one parameter.
        """
        arguments: dict[str, Any] = {}
        for key, value in items_of(batch).items():
            if value is None:
                continue
            name = self._name(key)
            if name in arguments:
                raise UserError(f"the batch has both '{key}' and another key for {self.owner}.forward's '{name}'")
            arguments[name] = self._placed(value)
        return arguments

    def _name(self, key: str) -> str:
        taken: list[str] = [name for name in (key, *SYNONYMS.get(key, ())) if name in self.parameters]
        if not taken:
            check_inputs(self.model.forward, [key], self.owner)
        return taken[0]

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self.dtype if value.is_floating_point() else None
        return value.to(self.device, dtype, non_blocking=True)

    def loss(self, batch: Any) -> Tensor:
        """Call the model and return its own loss.

        Raises:
            UserError: see calling; or the model took the labels and gave no loss.
        """
        arguments = self(batch)
        loss = getattr(self.model(**arguments), "loss", None)
        if isinstance(loss, Tensor):
            return loss
        given = [name for name in LABELS if name in arguments]
        what = f"took {' and '.join(given)}" if given else "was given no labels"
        raise UserError(
            f"{self.owner}.forward {what} and returned no loss (the batch has {', '.join(arguments)}): give it the "
            f"labels that it scores, of {', '.join(name for name in LABELS if name in self.parameters) or 'none'}"
        )


def items_of(batch: Any) -> dict[str, Any]:
    """The keys and values of a mapping, or of an object that keeps them as attributes.

    Raises:
        UserError: it is neither.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    keys = getattr(batch, "keys", None)
    if callable(keys):
        return {key: getattr(batch, key) if hasattr(batch, key) else batch[key] for key in keys()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {item.name: getattr(batch, item.name) for item in dataclasses.fields(batch)}
    if hasattr(batch, "__dict__") and vars(batch):
        return {key: value for key, value in vars(batch).items() if not key.startswith("_")}
    raise UserError(
        f"the batch is a {type(batch).__name__}: it must be a mapping, or an object with the inputs as attributes"
    )
