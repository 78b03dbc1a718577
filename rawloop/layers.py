"""What the layers of a model are, by its structure and its names."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of repeated blocks by name, such as decoder layers: the outermost lists of one class each.

    Lists of single layers, such as heads, are none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        if not isinstance(part, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if len({type(block) for block in part}) == 1 and all(any(True for _ in block.children()) for block in part):
            found[name] = part
    return found


def is_embedding_or_head(name: str) -> bool:
    """Return whether a weight or a layer belongs to an embedding or a head, by its name in the model."""
    return any("embed" in part or part.endswith("head") or part in ("wte", "wpe") for part in name.split("."))


class Kind(NamedTuple):
    """Blocks of a list that are alike: the list's name, and the blocks' places in it."""

    blocks: str
    places: list[int]


def block_kinds(model: nn.Module) -> list[Kind]:
    """Return the kinds of blocks of a model: those of a list that have the same layers and shapes of weights.

    Blocks of one class may be of several kinds: with attention or a convolution, with one MLP or with experts.
    """
    kinds: dict[Any, Kind] = {}
    for name, blocks in block_lists(model).items():
        for place, block in enumerate(blocks):
            layers = tuple((part, type(layer)) for part, layer in block.named_modules())
            shapes = tuple((weight, values.shape) for weight, values in block.named_parameters())
            kinds.setdefault((name, layers, shapes), Kind(name, [])).places.append(place)
    return list(kinds.values())


def remove_blocks(model: nn.Module, removed: Mapping[str, Collection[int]]) -> None:
    """Remove blocks in place: the name of their list, and their places in it. Configs then name the others' types."""
    for name, places in removed.items():
        blocks = model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        for part in model.modules():
            types = getattr(getattr(part, "config", None), "layer_types", None)
            if types is not None and len(types) == len(blocks):
                part.config.__dict__["layer_types"] = [kind for at, kind in enumerate(types) if at not in places]
        for place in sorted(places, reverse=True):
            del blocks[place]
