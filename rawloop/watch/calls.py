"""Inputs that do not reach the model: keywords of a call that only `**kwargs` takes, which ignore them."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rawloop.errors import UserError
from rawloop.inputs import check_inputs
from rawloop.watch.entries import Look
from rawloop.watch.findings import Finding, Place

PASSED_ON = ("num_items_in_batch", "cu_seq", "max_length", "output_", "use_cache", "cache_")  # transformers' own


def find_swallowed(look: Look, model: nn.Module, kwargs: dict[str, Any]) -> Iterator[Finding]:
    """Find tensors among the keywords of a call for which the model's forward has no parameter."""
    parameters = inspect.signature(model.forward).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return  # Python raises by itself
    for name, value in kwargs.items():
        named = name in parameters or name.startswith(PASSED_ON)
        if isinstance(value, Tensor) and not named and (why := _unknown(model, name)):
            what = f"{type(model).__name__}.forward takes '{name}' only through **kwargs, which ignore it"
            advice = f"rename '{name}', or leave it out of the call"
            told = "label" in name or "target" in name or "did you mean" in why
            place = Place("forward", tensor=name)
            yield look.finding("input_swallowed", what, place, {}, advice, why=why, ordinary=not told)


def _unknown(model: nn.Module, name: str) -> str:
    """Return why a model does not take a keyword; empty if a part of it does, or if it names no parameter at all."""
    try:
        check_inputs(model, [name])
    except UserError as error:
        return str(error) if "does not take" in str(error) else ""
    return ""
