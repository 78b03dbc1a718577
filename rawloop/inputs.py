"""Calls a model with a batch: each input is passed to the parameter of the model's forward with the same name.

Models of transformers 5 ignore an unknown keyword: `label_ids` instead of `labels` gives `loss=None`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import copy
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch
from rawloop.dist import unwrap_ddp
from rawloop.errors import UserError, nearest

LABELS = {
    "labels": "label_ids",
    "label_ids": "labels",
    "audio_labels": "label_audio_ids",
    "label_audio_ids": "audio_labels",
}  # synonyms, in both directions
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def outside_autocast() -> AbstractContextManager[Any]:
    """Make inputs in their own dtypes, also inside of a mode's autocast on the CPU: features in 16 bits are others."""
    return torch.autocast("cpu", enabled=False)


def call(model: nn.Module, batch: Any, **options: Any) -> Any:
    """Call a model with the inputs of a batch, matched by name to the parameters of its forward; return its output.

    This works through DDP, PEFT, torch.compile, and your own modules that pass `**kwargs` on. `labels` and `label_ids`
    are synonyms, and so are `audio_labels` and `label_audio_ids`. Tensors are moved to the model's device. Values of
    None are left out.

    Args:
        model: any module, wrapped or not.
        batch: a mapping, a dataclass, an object with its inputs as attributes (with or without `keys()`), or a
            `rawloop.Batch`, whose `inputs` are used.
        options: further keywords for the model, such as `use_cache=False`; they are not checked.

    Raises:
        UserError: the batch has another type, the model has no parameter for a key, two keys are for one parameter,
            or the model got labels and returned a loss of None.
    """
    arguments = arguments_for(model, batch)
    output = model(**arguments, **options)
    labels = [name for name in arguments if name in LABELS]
    if labels and _loss_of(output) is None:
        raise UserError(
            f"{_owner(model)}.forward was given {' and '.join(labels)} and returned a loss of None: the labels do not "
            f"reach its loss; call it with the labels that it uses, of {_listed(model)}"
        )
    return output


def arguments_for(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return the keywords that `call` passes to the model."""
    levels = list(_levels(model))
    first = next(chain(model.parameters(), model.buffers()), None)
    taken: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    for key, value in _items(batch):
        if value is None:
            continue
        name = next((n for names, _ in levels for n in (key, LABELS.get(key)) if n in names), None)
        if name is None:
            raise _unknown(model, key)
        if name in taken:
            raise UserError(
                f"the batch has both '{taken[name]}' and '{key}' for the parameter '{name}' of "
                f"{_owner(model)}.forward: remove one of them"
            )
        taken[name] = key
        arguments[name] = value if first is None else moved(value, first.device)
    return arguments


def check_inputs(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a UserError if a name is not a parameter of a model's forward; synonyms do not count."""
    for name in names:
        if name not in _names(model):
            raise _unknown(model, name)


def _unknown(model: nn.Module, key: Any) -> UserError:
    known = _names(model)
    return UserError(
        f"the batch has '{key}', which {_owner(model)}.forward does not take{nearest(str(key), known)}: its parameters "
        f"are {', '.join(known)}; rename the key, or remove it from the batch"
    )


def _levels(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Yield the parameter names of a model's forward and the model, then those of the module behind its `**kwargs`."""
    while True:
        while (inner := _wrapped(model)) is not None:
            model = inner
        names, passes_on = _signature(model)
        inner = _only_child(model) if passes_on else None
        if names:
            yield names, model
        elif inner is None:
            raise UserError(
                f"{type(model).__name__}.forward names no parameter, and has no single module inside that does: "
                "write its inputs into its signature, such as def forward(self, input_ids, labels)"
            )
        if inner is None:
            return
        model = inner


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DDP and torch.compile, which put their own prefix before every name."""
    while (inner := model._modules.get("_orig_mod") or unwrap_ddp(model)) is not model:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the module inside DDP, torch.compile or PEFT; None if there is no such wrapper."""
    if (inner := unwrap(model)) is not model:
        return inner
    if not hasattr(model, "get_base_model"):
        return None
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    names, passes_on = _signature(base)
    # A PEFT model with a task type passes these on even if they are None, which a base without **kwargs refuses.
    refused = {"inputs_embeds", "labels"} & {*_signature(model)[0]} - {*names}
    if refused and not passes_on:
        raise UserError(
            f"{type(model).__name__} of PEFT passes {', '.join(sorted(refused))} to {type(base).__name__}.forward, "
            "which does not take it: create the adapter without a task type, LoraConfig(task_type=None, ...)"
        )
    return base


def _only_child(model: nn.Module) -> nn.Module | None:
    """Return the only child module with weights, or None. Losses and metrics have no weights."""
    children = [child for child in model.children() if next(child.parameters(), None) is not None]
    inside = {id(part) for child in children for part in child.modules() if part is not child}
    children = [child for child in children if id(child) not in inside]  # Fabric registers the module twice
    return children[0] if len(children) == 1 else None


def _signature(model: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Return the names of forward's parameters, and whether it takes `**kwargs`."""
    replaced = vars(model).get("forward")  # accelerate sets one on the instance
    return _read_once(type(model).forward) if replaced is None else _read(replaced)


def _read(forward: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    parameters = inspect.signature(forward).parameters.values()
    names = tuple(parameter.name for parameter in parameters if parameter.kind in NAMED and parameter.name != "self")
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


_read_once = lru_cache(maxsize=256)(_read)


def _names(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for names, _ in _levels(model) for name in names))


def _listed(model: nn.Module) -> str:
    return ", ".join(name for name in _names(model) if name in LABELS)


def _owner(model: nn.Module) -> str:
    return type(next(_levels(model))[1]).__name__


def _items(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a batch of any kind."""
    if isinstance(batch, Batch):
        batch = batch.inputs
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, Mapping):
        yield from batch.items()
    elif callable(getattr(batch, "keys", None)):
        yield from ((key, getattr(batch, key) if hasattr(batch, key) else batch[key]) for key in batch.keys())  # noqa: SIM118
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        yield from ((item.name, getattr(batch, item.name)) for item in dataclasses.fields(batch))
    elif getattr(batch, "__dict__", None) and not callable(batch):
        yield from ((key, value) for key, value in vars(batch).items() if not key.startswith("_"))
    else:
        raise UserError(
            f"the batch is a {type(batch).__name__}: it must be a mapping, or an object with the inputs as attributes"
        )


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with all its tensors on `device`, including those in lists, tuples, mappings and attributes.

    Only copies of pinned memory are asynchronous.
    """
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=value.is_pinned())
    if callable(getattr(value, "to", None)):  # rawloop's Batch, and those of transformers
        return value.to(device)
    if isinstance(value, list | tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    attributes = {} if callable(value) else getattr(value, "__dict__", {})
    changed = {name: after for name, item in attributes.items() if (after := moved(item, device)) is not item}
    if changed:
        value = copy(value)
        vars(value).update(changed)
    return value


def looks_up(module: nn.Module) -> bool:
    """Whether a module looks up the ids that it is called with.

    Embeddings of positions in Whisper and BART are called with ids too, and count them only.
    """
    counts = type(module).forward is not nn.Embedding.forward and "position" in type(module).__name__.lower()
    return isinstance(module, nn.Embedding) and not counts


def _loss_of(output: Any) -> Any:
    """Return the loss of an output, or the output itself if it cannot have one."""
    if hasattr(output, "loss"):
        return output.loss
    return output.get("loss", output) if isinstance(output, Mapping) else output
