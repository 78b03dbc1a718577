"""Holding stored weights against a model's: by name, shape and bits, and never by nothing at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rawloop.errors import CheckpointError
from rawloop.sharding import part_of, sharded_as


def memory_of(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    if not tensor.numel():
        return (name,)
    own = part_of(tensor)  # may be empty, and has memory then too
    start = own.untyped_storage().data_ptr() + own.storage_offset() * own.itemsize
    return (start, tensor.shape, tensor.stride(), tensor.dtype)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a model's or an adapter's folder; what lies beside its own files is not looked at."""
    files = _weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file")
    odd = next((file for file in files if not file.is_file()), None)
    if odd is not None:  # a pipe would be waited for
        raise CheckpointError(f"{odd} is missing, or no plain file")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that PEFT or transformers would load; all there are, where a model writes itself under other names."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error


def same_names(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path) -> None:
    """Compare names and shapes of what is stored in a folder with those of a model. No weights at all are refused."""
    if not (wanted or stored):
        raise CheckpointError(f"{folder} holds no weight that could be compared with the model's")
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    shapes = [name for name in set(stored) & set(wanted) if stored[name].shape != wanted[name].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{folder} does not fit the model: {_some(missing, 'missing')}{_some(extra, 'unknown')}"
            f"{_some(sorted(shapes), 'of another shape')}were rank or targets changed?"
        )


def _some(names: list[str], what: str) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} weight(s) {what} ({', '.join(names[:3])}{more}); " if names else ""


def compare(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path, *, rounded: bool = False) -> None:
    """Compare stored weights with a model's, bit for bit: a NaN, too, must be the NaN that was meant.

    `rounded` allows for a model of another precision today. Of a sharded model this rank's part is compared.
    """
    same_names(stored, wanted, folder)
    for name, tensor in wanted.items():
        found = stored[name].to(tensor.dtype) if rounded else stored[name]
        own = part_of(sharded_as(found, tensor)), part_of(tensor)
        if found.dtype != tensor.dtype or not torch.equal(*map(_bits, own)):
            raise CheckpointError(f"{folder}: {name} read back differs from the weight in memory")


def compare_model(
    stored: Mapping[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, folder: Path, *, rounded: bool = False
) -> None:
    """Compare a whole model's files with its weights; see `compare`.

    transformers stores some weights under other names, and splits or joins them. Of these the numbers are compared, in
    whatever order. Frozen weights may be left out by a model that writes itself: `load_model` has them.
    """
    same = [name for name in own if name in stored]
    written = {memory_of(name, own[name]) for name in same}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    rest = {
        memory_of(name, tensor): (name, tensor)
        for name, tensor in own.items()
        if name not in ignored and memory_of(name, tensor) not in written
    }
    if same or not rest:
        compare({name: stored[name] for name in same}, {name: own[name] for name in same}, folder, rounded=rounded)
    others = [stored[name] for name in stored if name not in own]
    dtypes = {tensor.dtype for _, tensor in rest.values()}
    if rounded and len(dtypes) == 1:
        others = [tensor.to(next(iter(dtypes))) for tensor in others]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    choices = ([tensor for _, tensor in rest.values()], [t for name, t in rest.values() if name not in frozen])
    if all(_numbers(others) != _numbers(choice) for choice in choices):
        names = sorted(name for name, _ in rest.values())
        raise CheckpointError(
            f"{folder} does not hold the model: {_some(names, 'not found under their names')}and the numbers of the "
            f"{len(others)} that are stored under other names are not theirs"
        )


def _numbers(tensors: list[Tensor]) -> dict[torch.dtype, tuple[int, int, int]]:
    """By dtype, how many numbers there are, and the sums of their bits and of the squares of these, modulo 2^64."""
    found: dict[torch.dtype, tuple[int, int, int]] = {}
    for tensor in tensors:
        size = tensor.element_size()
        whole = torch.uint8 if size == 1 else {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        for bits in torch.split(_bits(tensor).view(whole), 1 << 22):
            count, total, squares = found.get(tensor.dtype, (0, 0, 0))
            wide = bits.long()
            more = (int(wide.sum()), int((wide * wide).sum()))
            found[tensor.dtype] = (count + len(bits), (total + more[0]) % 2**64, (squares + more[1]) % 2**64)
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
