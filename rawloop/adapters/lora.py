"""LoRA through PEFT, full fine-tuning, and freezing by pattern."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from rawloop.adapters.config import ALL_LINEAR
from rawloop.adapters.config import AdapterConfig as AdapterConfig
from rawloop.adapters.fingerprint import ADAPTERS
from rawloop.errors import UserError

LINEAR = (nn.Linear, Conv1D)
PREFIX = "base_model.model."  # PEFT puts it before every name; patterns are written against the model's own names
# Keys of AdapterConfig that change what the same weights compute, and their names in PEFT.
SCALE = MappingProxyType({"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"})


def add_adapter(model: nn.Module, config: AdapterConfig, notices: list[str], revision: str | None = None) -> nn.Module:
    """Make the model trainable as the config asks, and return it (wrapped by PEFT for LoRA).

    Weights that `load_model` has frozen stay frozen, unless `unfreeze` names them. A target, module or pattern that
    matches nothing is refused with near matches. `notices` gets a line for everything the user should know.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if config.mode == "lora" and len(frozen) == len(list(model.parameters())):
        frozen = set()  # a family that freezes all for LoRA
    result = model
    if config.mode == "lora":
        targets, saved = _check_targets(model, config, notices)
        tied = tied_layers(model)
        result = _with_lora(model, config, revision)
        note_tied(tied, lora_layers(result), saved, notices)
        check_lora(result, targets, config.target_modules != [ALL_LINEAR], notices)
    else:
        _set_trained(model, "unfreeze", config.unfreeze, True)
    _note_frozen(result, frozen, config.mode, notices)
    _set_trained(result, "freeze", config.freeze, False)
    trainable, total = count_parameters(result)
    if not trainable:
        came = f"; load_model has frozen {len(frozen)}, which adapter.unfreeze can train" if frozen else ""
        raise UserError(
            f"no weight of the model is trainable: adapter.mode is {config.mode} and adapter.freeze is {config.freeze}"
            f"{came}: mend one of them"
        )
    notices.append(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f}%)")
    return result


def _with_lora(model: nn.Module, config: AdapterConfig, revision: str | None) -> nn.Module:
    targets: Any = config.target_modules
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        modules_to_save=_paths(model, config.modules_to_save) or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
    )
    try:
        with quiet():
            return cast(nn.Module, get_peft_model(model, lora, revision=revision))
    except ValueError as error:
        raise UserError(f"PEFT refuses what adapter asks for: {str(error).splitlines()[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of PEFT: of a name that transformers gives up, and of what is an error or said here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but", category=UserWarning)
        for said_here in ("Model has `tie_word_embeddings=True`", "The following (rank|alpha)_pattern keys did not"):
            warnings.filterwarnings("ignore", message=said_here)
        yield


def _paths(model: nn.Module, modules: list[str]) -> list[str]:
    """Whole paths of the modules to save, where PEFT would take more: to it, `mlp` is an end of `audio_mlp` too."""
    names = [name for name, _ in model.named_modules()]
    paths: list[str] = []
    for module in modules:
        matched = _matching(module, names)  # without what lies inside another match, which would be copied twice
        matched = [path for path in matched if not any(path.startswith(f"{other}.") for other in matched)]
        paths += [module] if len(matched) == sum(name.endswith(module) for name in names) else matched
    return paths


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _check_targets(model: nn.Module, config: AdapterConfig, notices: list[str]) -> tuple[set[str], list[str]]:
    """Return the layers that are to get LoRA, and the modules to train in full, by their whole names."""
    names = [name for name, _ in model.named_modules() if name]
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    saved: list[str] = []
    targets: set[str] = set()
    for module in config.modules_to_save:
        matched = _matching(module, names)
        if not matched:
            raise _no_match("adapter.modules_to_save", module, names)
        saved += matched
    for target in config.target_modules:
        matched = linear if target == ALL_LINEAR else _matching(target, linear)
        if not matched:
            raise _no_match("adapter.target_modules", target, linear, _inside_parameters(model))
        both = [name for name in matched if any(f"{name}.".startswith(f"{path}.") for path in saved)]
        if both and target != ALL_LINEAR:
            raise UserError(
                f"adapter.target_modules has '{target}', which is {both[0]}, and adapter.modules_to_save trains that "
                "in full: take it out of one of them"
            )
        targets |= set(matched) - set(both)
        _note_kinds(target, [name for name in matched if name not in both], notices)
    return targets, saved


def _note_kinds(target: str, matched: list[str], notices: list[str]) -> None:
    """Say so when a named target matches layers of several kinds, such as the text's and the audio's MLPs."""
    if target == ALL_LINEAR:
        return
    kinds = sorted({".".join(name.split(".")[-2:]) for name in matched})
    if len(kinds) > 1 and "." not in target:
        advice = "name one of these to have only that kind"
        notices.append(f"target '{target}' matches {len(matched)} layers, which are {', '.join(kinds)}: {advice}")


def _matching(target: str, names: Iterable[str]) -> list[str]:
    """PEFT's rule for lists: the whole path, or its end after a dot."""
    return [name for name in names if name == target or name.endswith("." + target)]


def _inside_parameters(model: nn.Module) -> str:
    """A clause about weights that are no layers: of experts that are kept in one parameter each."""
    names = (name.split(".")[-2:] for name, weight in model.named_parameters() if weight.dim() == 3)
    found = sorted({".".join(ends) for ends in names if ends[-1] != "weight"})
    return f" ({', '.join(found)} are no layers but parameters: all-linear gives them LoRA)" if found else ""


def _no_match(key: str, target: str, names: list[str], more: str = "") -> UserError:
    ends = {".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2)}
    near = get_close_matches(target, sorted(ends), n=3, cutoff=0.4) or sorted(end for end in ends if "." not in end)[:8]
    return UserError(f"{key} has '{target}', which matches no layer of the model; near: {', '.join(near)}{more}")


def _set_trained(model: nn.Module, key: str, patterns: list[str], trained: bool) -> None:
    names = dict(model.named_parameters())
    for pattern in patterns:
        matched = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.removeprefix(PREFIX), pattern)]
        if not matched:
            near = get_close_matches(pattern.strip("*."), list(names), n=3, cutoff=0.3)
            raise UserError(f"adapter.{key} has '{pattern}', which matches no parameter; near: {', '.join(near)}")
        for name in matched:
            if trained and not names[name].is_floating_point():
                raise UserError(f"adapter.{key} has '{pattern}', and {name} is {names[name].dtype}: it has no gradient")
            names[name].requires_grad_(trained)


def _note_frozen(model: nn.Module, frozen: set[str], mode: str, notices: list[str]) -> None:
    """Say which weights the model comes with frozen, or which of its frozen layers get LoRA all the same."""
    trained = {name.removeprefix(PREFIX): p.requires_grad for name, p in model.named_parameters()}
    if mode == "full":
        kept = sorted(name for name in frozen if not trained[name])
        count = sum(model.get_parameter(name).numel() for name in kept)
        text = f"frozen by load_model: {count:,} parameters ({_in_words(kept)}); adapter.unfreeze would train them"
    else:
        layers = {re.split("|".join(map(re.escape, ADAPTERS)), name)[0] for name in trained if trained[name]}
        kept = sorted({layer for name in frozen for layer in [name.rpartition(".")[0]] if layer in layers})
        text = (
            f"LoRA or modules_to_save train {len(kept)} layers that load_model has frozen ({_in_words(kept)}): if they "
            "are to stay as they are, use narrower names"
        )
    if kept:
        notices.append(text)


def _in_words(names: list[str]) -> str:
    """Names of weights, in short: `model.audio_tower.*, lm_head.weight, ...`."""
    shown = sorted({".".join([*name.split(".")[:2], "*"]) if name.count(".") > 1 else name for name in names})
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def lora_layers(model: nn.Module) -> set[str]:
    """The layers that have LoRA, by the base model's own names; a parameter that has it by the parameter's name."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", None)  # of layers whose weights are no layers, as experts
            found.add(".".join(filter(None, (_own(name), parameter))))
    return found


def check_lora(model: nn.Module, asked: Collection[str], exactly: bool, notices: list[str]) -> None:
    """Compare the layers to which PEFT gave LoRA with those that were asked for; `notices` gets a line about them.

    `exactly`: the layers were named. Otherwise (all-linear) PEFT has chosen, and a difference is only told.
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
        if parameter.requires_grad and not any(mark in name for mark in ADAPTERS)
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
    """Say what becomes of `tied_layers` of the base model where the adapter takes one of them."""
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
