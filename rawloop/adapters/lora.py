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
PREFIX = "base_model.model."  # PEFT's prefix of all names; patterns use the names without it
# Keys of AdapterConfig that change the output of the same weights, and their names in PEFT.
SCALE = MappingProxyType({"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"})


def add_adapter(model: nn.Module, config: AdapterConfig, notices: list[str], revision: str | None = None) -> nn.Module:
    """Add a LoRA adapter or unfreeze weights, as the config says, and return the model (wrapped by PEFT for LoRA).

    Weights that `load_model` has frozen stay frozen, unless `unfreeze` names them. Messages for the user are appended
    to `notices`.

    Raises:
        UserError: a target, module or pattern matches nothing; the message has similar names.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if config.mode == "lora" and len(frozen) == len(list(model.parameters())):
        frozen = set()  # the family freezes all weights for LoRA
    result = model
    if config.mode == "lora":
        targets, saved = _check_targets(model, config, notices)
        tied = tied_layers(model)
        result = _with_lora(model, config, revision)
        _report_tied(tied, lora_layers(result), saved, notices)
        check_lora(result, targets, config.target_modules != [ALL_LINEAR], notices)
    else:
        _set_trained(model, "unfreeze", config.unfreeze, True)
    _report_frozen(result, frozen, config.mode, notices)
    _set_trained(result, "freeze", config.freeze, False)
    trainable, total = count_parameters(result)
    if not trainable:
        loaded = f"; load_model has frozen {len(frozen)}, which adapter.unfreeze can train" if frozen else ""
        raise UserError(
            f"no weight of the model is trainable: adapter.mode is {config.mode} and adapter.freeze is {config.freeze}"
            f"{loaded}: change one of them"
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
        modules_to_save=_full_paths(model, config.modules_to_save) or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
    )
    try:
        with quiet():
            return cast(nn.Module, get_peft_model(model, lora, revision=revision))
    except ValueError as error:
        raise UserError(f"PEFT refuses the adapter's settings: {str(error).splitlines()[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of PEFT that are errors or notices of rawloop, and one about a deprecated name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but", category=UserWarning)
        for message in ("Model has `tie_word_embeddings=True`", "The following (rank|alpha)_pattern keys did not"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _full_paths(model: nn.Module, modules: list[str]) -> list[str]:
    """Return the modules to save, with full paths if PEFT would match more: for PEFT, `audio_mlp` ends with `mlp`."""
    names = [name for name, _ in model.named_modules()]
    paths: list[str] = []
    for module in modules:
        matched = _matching(module, names)
        # A module inside another match would be copied twice.
        matched = [path for path in matched if not any(path.startswith(f"{other}.") for other in matched)]
        paths += [module] if len(matched) == sum(name.endswith(module) for name in names) else matched
    return paths


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _check_targets(model: nn.Module, config: AdapterConfig, notices: list[str]) -> tuple[set[str], list[str]]:
    """Return the full names of the layers that get LoRA, and of the modules to train in full."""
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
                "in full: remove it from one of them"
            )
        targets |= set(matched) - set(both)
        ends = sorted({".".join(name.split(".")[-2:]) for name in matched if name not in both})
        if target != ALL_LINEAR and "." not in target and len(ends) > 1:  # such as the MLPs of text and audio
            advice = "use one of these names for only that kind"
            notices.append(f"target '{target}' matches {len(matched)} layers, which are {', '.join(ends)}: {advice}")
    return targets, saved


def _matching(target: str, names: Iterable[str]) -> list[str]:
    """Return the names that match by PEFT's rule for lists: the full path, or its end after a dot."""
    return [name for name in names if name == target or name.endswith("." + target)]


def _inside_parameters(model: nn.Module) -> str:
    """Return a clause about three-dimensional parameters, such as experts, which are not layers."""
    names = (name.split(".")[-2:] for name, weight in model.named_parameters() if weight.dim() == 3)
    found = sorted({".".join(ends) for ends in names if ends[-1] != "weight"})
    return f" ({', '.join(found)} are parameters, not layers: all-linear gives them LoRA)" if found else ""


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


def _report_frozen(model: nn.Module, frozen: set[str], mode: str, notices: list[str]) -> None:
    """Append a notice about weights that stay frozen as loaded, or about frozen layers that the adapter trains."""
    trained = {name.removeprefix(PREFIX): p.requires_grad for name, p in model.named_parameters()}
    if mode == "full":
        kept = sorted(name for name in frozen if not trained[name])
        count = sum(model.get_parameter(name).numel() for name in kept)
        text = f"frozen by load_model: {count:,} parameters ({_shortened(kept)}); adapter.unfreeze would train them"
    else:
        layers = {re.split("|".join(map(re.escape, ADAPTERS)), name)[0] for name in trained if trained[name]}
        kept = sorted({layer for name in frozen for layer in [name.rpartition(".")[0]] if layer in layers})
        text = (
            f"LoRA or modules_to_save train {len(kept)} layers that load_model has frozen ({_shortened(kept)}): use "
            "narrower names to keep them frozen"
        )
    if kept:
        notices.append(text)


def _shortened(names: list[str]) -> str:
    """Return names of weights in short: `model.audio_tower.*, lm_head.weight, ...`."""
    shown = sorted({".".join([*name.split(".")[:2], "*"]) if name.count(".") > 1 else name for name in names})
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def lora_layers(model: nn.Module) -> set[str]:
    """Return the layers and parameters with LoRA, under the base model's names."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", None)  # set if LoRA is on a parameter, as for experts
            found.add(".".join(filter(None, (_base_name(name), parameter))))
    return found


def check_lora(model: nn.Module, asked: Collection[str], exactly: bool, notices: list[str]) -> None:
    """Compare the layers with LoRA with those that were asked for, and append a notice.

    With `exactly`, the layers were named, and a difference is an error. Otherwise (all-linear) PEFT has chosen them,
    and the notice includes a difference.
    """
    made = lora_layers(model)
    more, less = made - set(asked), set(asked) - made
    if exactly and (more or less):
        raise UserError(
            "PEFT has put LoRA on other layers than adapter.target_modules names: additional layers "
            f"{kinds(more) or 'none'}, missing layers {kinds(less) or 'none'}; use longer names of layers, or another "
            "version of PEFT"
        )
    unexpected = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(mark in name for mark in ADAPTERS)
    ]
    if unexpected:
        raise UserError(f"{unexpected[0]} (of {len(unexpected)}) would be trained, and no key of adapter names it")
    line = f"LoRA on {len(made)} layers: {kinds(made)}"
    if more:
        line += f"; all-linear includes {kinds(more)}, which are not plain linear layers"
    if less:
        line += f"; not on {kinds(less)}, which all-linear excludes"
    saved = [_base_name(name) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    notices.append(f"{line}; in full: {', '.join(saved)}" if saved else line)


def tied_layers(model: nn.Module) -> list[list[str]]:
    """Return the names of layers that share a weight."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return [names for names in places.values() if len(names) > 1]


def _report_tied(
    tied: Iterable[list[str]], targets: Collection[str], saved: Collection[str], notices: list[str]
) -> None:
    """Append a notice about each pair of `tied_layers` if the adapter changes one of them."""
    for names in tied:
        shared = f"{' and '.join(names)} share a weight"
        copies = [name for name in names if name in saved]
        if copies:
            rest = ", ".join(name for name in names if name not in saved)
            stays = f"; {rest} keeps the base model's weight" if rest else ""
            notices.append(f"{shared}: a separate copy is trained for {' and for '.join(copies)}{stays}")
        changed = [name for name in names if name in targets]
        if changed:
            notices.append(
                f"{shared}, and LoRA changes it only in {', '.join(changed)}: such an adapter cannot be merged; name "
                "the layer in adapter.modules_to_save instead if you want to merge it"
            )


def kinds(names: Collection[str]) -> str:
    """Count layers by the last parts of their names: `self_attn.q_proj (28), lm_head (1)`."""
    counts = Counter(".".join(part for part in name.split(".")[-3:] if not part.isdecimal()) for name in names)
    counts = Counter({re.sub(r"^(layers|h|blocks)\.", "", name): count for name, count in counts.items()})
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _base_name(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".base_layer", "")
