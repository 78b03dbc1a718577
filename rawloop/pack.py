"""Writes nested state to files and reads it, without pickle: tensors as safetensors, everything else as JSON.

Loading a pickle runs code from the file; loading these files cannot. Every value is restored with its type and its
bits. A value that cannot be stored is refused, with its path in the state.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from rawloop.files import FileRecord, write_file
from rawloop.host_memory import copy_to_host
from rawloop.sharding import is_sharded, whole

# names of dtypes in the safetensors format
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


class Packed(NamedTuple):
    """A state as a tree of JSON values, and the CPU tensors that the tree refers to, by path."""

    tree: Any
    tensors: dict[str, Tensor]


def pack(
    state: Any, copy: bool = False, spare: Mapping[str, Tensor] = MappingProxyType({}), *, dry: bool = False
) -> Packed:
    """Split `state` into JSON values and contiguous CPU tensors.

    Args:
        state: dicts with string keys, lists, tuples, tensors, int, float, bool, str and None, nested.
        copy: copy all tensors; call `wait_for_copies` before reading them. Without it, contiguous CPU tensors are
            taken without a copy.
        spare: tensors by path that copies may overwrite, such as those of an earlier copy.
        dry: only check that the state can be stored; the tensors stay on their device.

    Raises:
        TypeError: the state has a value of another type; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    if copy:
        return Packed(tree, {path: copy_to_host(tensor, spare.get(path)) for path, tensor in tensors.items()})
    if dry:
        return Packed(tree, tensors)
    return Packed(tree, {p: whole(t).to("cpu").resolve_conj().resolve_neg().contiguous() for p, t in tensors.items()})


def has_shards(state: Any) -> bool:
    """Return whether a state has sharded tensors. All ranks must pack such a state; rank 0 gets the whole tensors."""
    return any(map(is_sharded, pack(state, dry=True).tensors.values()))


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        # JSON has neither inf nor nan, and the bits of a nan matter
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        tensors[path] = _checked(value, path)
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
    if any(key.startswith("$") for key in items):  # reading would take such a key for one of the marks above
        return {"$dict": [[key, item] for key, item in items.items()]}
    return items


def _checked(tensor: Tensor, path: str) -> Tensor:
    plain = tensor.detach()
    if (
        (type(plain) is not Tensor and not is_sharded(plain))
        or plain.layout != torch.strided
        or plain.dtype not in DTYPES
    ):
        kind = f"{_type(plain)} ({plain.layout}, {plain.dtype})"
        raise TypeError(f"state{_shown(path)} is a {kind}: only dense tensors of common dtypes can be stored")
    return plain


def _escaped(key: str) -> str:
    """Escape a key as JSON pointers do, so that no two paths read the same."""
    return key.replace("~", "~0").replace("/", "~1")


def _shown(path: str) -> str:
    return f" at {path}" if path else ""


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def unpack(packed: Packed) -> Any:
    """Return the state that was packed. The tensors are not copied."""
    return _unpack(packed.tree, packed.tensors.__getitem__)


def _unpack(tree: Any, tensor_at: Callable[[str], Any]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensor_at) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((key, value),) = tree.items()
        if key == "$tensor":
            return tensor_at(value)
        if key == "$float":
            return struct.unpack(">d", bytes.fromhex(value))[0]
        if key == "$tuple":
            return tuple(_unpack(item, tensor_at) for item in value)
        if key == "$dict":
            return {name: _unpack(item, tensor_at) for name, item in value}
    return {key: _unpack(item, tensor_at) for key, item in tree.items()}


def safetensors_header(tensors: dict[str, Tensor]) -> tuple[bytes, list[str]]:
    """Return the header of a safetensors file, and the names of the tensors in the order of their bytes.

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


def write_packed(packed: Packed, folder: Path, name: str) -> dict[str, FileRecord]:
    """Write a state as NAME.json, and NAME.safetensors if it has tensors. Returns a record of each file by name."""
    tree = json.dumps(packed.tree, indent=1, allow_nan=False).encode()
    records = {f"{name}.json": write_file(folder / f"{name}.json", [tree])}
    if packed.tensors:
        header, order = safetensors_header(packed.tensors)
        views = (packed.tensors[key].reshape(-1).view(torch.uint8).numpy().data for key in order)  # without a copy
        file = f"{name}.safetensors"
        records[file] = write_file(folder / file, chain([header], views))
    return records


def read_state(folder: Path, name: str, tensors: bool = True) -> Any:
    """Read a state from the files of `write_packed`. Without `tensors`, read only the JSON file: each tensor is None.

    The tensors are copied out of the file: a mapped tensor would change, or crash the process, when the file changes.
    """
    tree = json.loads((folder / f"{name}.json").read_bytes())
    path = folder / f"{name}.safetensors"
    stored = load_file(path) if tensors and path.exists() else {}
    return _unpack(tree, (lambda path: stored[path].clone()) if tensors else lambda path: None)
