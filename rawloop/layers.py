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
    """Return the kinds of blocks of a model: those of a list that have the same layers, shapes of weights and type.

    Blocks of one class may be of several kinds: with attention or a convolution, with one MLP or with experts. Those of
    equal layers may have attention over all positions or over a window; then the model's config names their types.
    """
    kinds: dict[Any, Kind] = {}
    for name, blocks in block_lists(model).items():
        config = _config_with_types(model, name)
        types = config.layer_types if config else [None] * len(blocks)
        for place, block in enumerate(blocks):
            layers = tuple((part, type(layer)) for part, layer in block.named_modules())
            shapes = tuple((weight, values.shape) for weight, values in block.named_parameters())
            kinds.setdefault((name, layers, shapes, types[place]), Kind(name, [])).places.append(place)
    return list(kinds.values())


def remove_blocks(model: nn.Module, removed: Mapping[str, Collection[int]]) -> None:
    """Remove blocks in place: the name of their list, and their places in it. Configs then name the others' types."""
    for name, places in removed.items():
        blocks = model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        if config := _config_with_types(model, name):
            key = getattr(config, "attribute_map", {}).get("layer_types", "layer_types")
            config.__dict__[key] = [kind for at, kind in enumerate(config.layer_types) if at not in places]
        for place in sorted(places, reverse=True):
            del blocks[place]


def _config_with_types(model: nn.Module, name: str) -> Any:
    """Return the config that names the types of a list's blocks, of the nearest module around it; None if none does."""
    number, path = len(list(model.get_submodule(name).children())), name
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if len(getattr(config, "layer_types", None) or ()) == number:
            return config
    return None
