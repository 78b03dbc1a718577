"""Nests of tensors: batches as loops have them, in dicts, lists, tuples, named tuples, dataclasses and objects."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(nest: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nest with their paths, such as `inputs/input_ids`."""
    if isinstance(nest, Tensor):
        yield path or "batch", nest
        return
    for name, value in _items(nest):
        yield from tensors_in(value, f"{path}/{name}" if path else str(name))


def shown(path: str) -> str:
    """Return a path as people read it: `1` of a tuple as `batch[1]`, `1/labels` as `batch[1]/labels`."""
    head, slash, tail = path.partition("/")
    return f"batch[{head}]{slash}{tail}" if head.isdigit() else path


def map_tensors(change: Callable[[Any], Any], nest: Any, kind: type = Tensor) -> Any:
    """Return a nest of the same structure with each tensor, or each value of `kind`, changed. Other values stay."""
    if isinstance(nest, kind):
        return change(nest)
    if isinstance(nest, Mapping):
        made = {name: map_tensors(change, value, kind) for name, value in nest.items()}
        return made if type(nest) is dict else _rebuilt(nest, made)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(map_tensors(change, value, kind) for value in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(map_tensors(change, value, kind) for value in nest)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        fields = {f.name: map_tensors(change, getattr(nest, f.name), kind) for f in dataclasses.fields(nest) if f.init}
        return dataclasses.replace(nest, **fields)
    return nest


def _rebuilt(nest: Mapping[Any, Any], made: dict[Any, Any]) -> Any:
    """Return a mapping of another type, such as transformers' BatchEncoding, with changed values."""
    try:
        return type(nest)(made)  # type: ignore[call-arg]
    except TypeError:
        return made


def _items(nest: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(nest, Mapping):
        yield from nest.items()
    elif isinstance(nest, tuple) and hasattr(nest, "_fields"):
        yield from zip(nest._fields, nest, strict=True)
    elif isinstance(nest, list | tuple):
        yield from enumerate(nest)
    elif dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        yield from ((f.name, getattr(nest, f.name)) for f in dataclasses.fields(nest))
