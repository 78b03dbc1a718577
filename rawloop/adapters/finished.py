"""Compares a finished model with what was asked for: PEFT may have given LoRA to other layers."""

import re
from collections import Counter
from collections.abc import Collection, Iterable

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from rawloop.errors import UserError

PREFIX = "base_model.model."  # PEFT puts it before every name; patterns are written against the model's own names
MADE_BY_PEFT = (".lora_", ".modules_to_save.")


def lora_layers(model: nn.Module) -> set[str]:
    """The layers that have LoRA, by the base model's own names; a parameter that has it by the parameter's name."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", None)  # of layers whose weights are no layers, as experts
            found.add(".".join(filter(None, (_own(name), parameter))))
    return found


def check_lora(model: nn.Module, asked: Collection[str], exactly: bool, notices: list[str]) -> None:
    """Hold the layers that have LoRA against those that were asked for, and say which have it.

    Args:
        model: as PEFT has made it.
        asked: names of layers.
        exactly: whether these were named; else (all-linear) PEFT has chosen, and what it chose otherwise is said.
        notices: gets a line about the layers.

    Raises:
        UserError: other layers have LoRA than those that were named, or a weight is trained that nobody asked for.
    """
    made = lora_layers(model)
    more, less = made - set(asked), set(asked) - made
    if exactly and (more or less):
        raise UserError(
            "adapter.target_modules does not come to what it says: PEFT has given LoRA to "
            f"{kinds(more) or 'no other layer'}, which are not named, and none to {kinds(less) or 'no layer less'}: "
            "name the layers by more of their path, or take another version of PEFT"
        )
    strange = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(mark in name for mark in MADE_BY_PEFT)
    ]
    if strange:
        raise UserError(f"{strange[0]} (of {len(strange)}) would be trained, which no key of adapter asks for")
    line = f"LoRA on {len(made)} layers: {kinds(made)}"
    if more:
        line += f"; among them {kinds(more)}, which are no plain linear layers and which all-linear includes"
    if less:
        line += f"; not on {kinds(less)}, which all-linear leaves out"
    saved = [_own(name) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    notices.append(f"{line}; in full: {', '.join(saved)}" if saved else line)


def tied_layers(model: nn.Module) -> list[list[str]]:
    """The layers that share a weight, by their names."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return [names for names in places.values() if len(names) > 1]


def note_tied(tied: Iterable[list[str]], targets: Collection[str], saved: Collection[str], notices: list[str]) -> None:
    """Say what becomes of a weight that the base model uses twice where the adapter takes one of its places.

    Args:
        tied: of the base model; see `tied_layers`.
        targets: the layers that have LoRA.
        saved: those that are trained in full.
        notices: gets a line for each.
    """
    for names in tied:
        shared = f"{' and '.join(names)} share a weight"
        copies = [name for name in names if name in saved]
        if copies:
            rest = ", ".join(name for name in names if name not in saved)
            stays = f"; {rest} keeps that of the base model" if rest else ""
            notices.append(f"{shared}: a copy of its own is trained for {' and for '.join(copies)}{stays}")
        changed = [name for name in names if name in targets]
        if changed:
            notices.append(
                f"{shared}, and LoRA changes it in {', '.join(changed)} alone: such an adapter cannot be merged; name "
                "the layer in adapter.modules_to_save instead if you want to merge it"
            )


def kinds(names: Collection[str]) -> str:
    """Layers by the last parts of their names, with how many there are: `self_attn.q_proj (28), lm_head (1)`."""
    counts = Counter(".".join(part for part in name.split(".")[-3:] if not part.isdecimal()) for name in names)
    counts = Counter({re.sub(r"^(layers|h|blocks)\.", "", name): count for name, count in counts.items()})
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _own(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".base_layer", "")
