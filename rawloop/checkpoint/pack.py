"""Nested state to plain files and back, without pickle: tensors into safetensors, everything else into JSON.

Loading a pickle runs whatever is inside it; loading these files cannot. Every value comes back as it was, type and bit
for bit, or packing it is refused with the place where it stands.
"""

import json
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rawloop.host_memory import copy_to_host

# the names that the safetensors format gives to dtypes
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Packed(NamedTuple):
    """A state in two halves: a tree of JSON values, and the tensors it refers to, on the CPU, by path."""

    tree: Any
    tensors: dict[str, Tensor]


def pack(state: Any, copy: bool = False, spare: Mapping[str, Tensor] = NOTHING, *, dry: bool = False) -> Packed:
    """Split `state` into JSON and tensors.

    Takes dicts with string keys, lists, tuples, tensors, int, float, bool, str and None. A tensor becomes a plain,
    contiguous CPU tensor; one that is already so is copied only if `copy` says so. `spare` has memory by path that
    a copy may be written over, such as the tensors of an earlier copy; call `wait_for_copies` before reading copies.
    `dry` only looks whether it can be stored: tensors are left where they are.

    Raises:
        TypeError: anything else is in there; the message names its path.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    checked = {path: _checked(tensor, path) for path, tensor in tensors.items()}
    return Packed(tree, checked if dry else {p: _plain(tensor, copy, spare.get(p)) for p, tensor in checked.items()})


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        # JSON has no word for these, and a nan carries bits of its own
        finite = value - value == 0.0
        return value if finite else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        return _pack_dict(value, path, tensors)
    if type(value) in (list, tuple):
        items = [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    raise TypeError(f"state{_shown(path)} is a {_type(value)}: only tensors and JSON values can be stored")


def _pack_dict(value: dict[Any, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for key in value:
        if type(key) is not str:
            raise TypeError(f"state{_shown(path)} has the key {key!r}, a {_type(key)}: keys must be strings")
    items = {key: _pack(item, f"{path}/{_escaped(key)}", tensors) for key, item in value.items()}
    if any(key.startswith("$") for key in items):  # would be taken for one of our own marks
        return {"$dict": [[key, item] for key, item in items.items()]}
    return items


def _checked(tensor: Tensor, path: str) -> Tensor:
    plain = tensor.detach()
    if type(plain) is not Tensor or plain.layout != torch.strided or plain.dtype not in DTYPES:
        kind = f"{_type(plain)} ({plain.layout}, {plain.dtype})"
        raise TypeError(f"state{_shown(path)} is a {kind}: only dense tensors of common dtypes can be stored")
    return plain


def _plain(plain: Tensor, copy: bool, spare: Tensor | None) -> Tensor:
    if not copy:
        return plain.to("cpu").resolve_conj().resolve_neg().contiguous()
    return copy_to_host(plain, spare)


def _escaped(key: str) -> str:
    """Escape a key as JSON pointers do, so that no two paths read the same."""
    return key.replace("~", "~0").replace("/", "~1")


def _shown(path: str) -> str:
    return f" at {path}" if path else ""


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def unpack(packed: Packed) -> Any:
    """Put the two halves together again. The tensors are handed on, not copied."""
    return _unpack(packed.tree, packed.tensors)


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (key, value), *_ = tree.items()
        if key == "$tensor":
            return tensors[value]
        if key == "$float":
            return struct.unpack(">d", bytes.fromhex(value))[0]
        if key == "$tuple":
            return tuple(_unpack(item, tensors) for item in value)
        if key == "$dict":
            return {name: _unpack(item, tensors) for name, item in value}
    return {key: _unpack(item, tensors) for key, item in tree.items()}


def safetensors_header(tensors: dict[str, Tensor]) -> tuple[bytes, list[str]]:
    """Return the head of a safetensors file and the order in which the tensors' bytes must follow it.

    Wide dtypes come first, so that every tensor starts at a multiple of its element size.
    Format: https://huggingface.co/docs/safetensors/index#format
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header, order
