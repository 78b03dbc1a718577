"""What the layers of a model are, by its structure and its names."""

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
