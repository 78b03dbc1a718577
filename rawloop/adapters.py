"""LoRA through PEFT, full fine-tuning, freezing by pattern, and the files that a checkpoint keeps of the model.

The only module that knows PEFT.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rawloop.errors import CheckpointError, UserError

ALL_LINEAR = "all-linear"
WEIGHTS = "model.safetensors"  # the name that transformers gives it, too
# Keys of AdapterConfig that change what the same weights compute, and their names in PEFT.
SCALE = MappingProxyType({"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"})


@dataclass
class AdapterConfig:
    """What is trained: a LoRA adapter beside frozen weights, or the weights themselves.

    Args:
        mode: lora or full.
        rank: rank of the LoRA matrices.
        alpha: LoRA scale; updates are multiplied by alpha / rank (alpha / sqrt(rank) with rslora).
        dropout: dropout on the input of the LoRA branch.
        target_modules: names of the linear layers that get LoRA. A name matches every layer whose path ends with it,
            so `mlp.up_proj` is narrower than `up_proj`. Or the single entry all-linear.
        modules_to_save: modules trained in full beside LoRA and stored with the adapter, such as audio_lm_head.
        dora: weight-decomposed LoRA (DoRA).
        rslora: rank-stabilised scale, alpha / sqrt(rank).
        freeze: patterns (`*` matches anything) of parameter names that are not trained, such as model.embed_tokens.*
    """

    mode: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    modules_to_save: list[str] = field(default_factory=list)
    dora: bool = False
    rslora: bool = False
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("lora", "full"):
            raise UserError(f"adapter.mode is '{self.mode}': it must be lora or full")
        if self.mode == "lora" and not self.target_modules:
            raise UserError(
                "adapter.target_modules is empty: name the layers that get LoRA, or set adapter.mode to full"
            )
        if ALL_LINEAR in self.target_modules[1:] or self.target_modules[:-1].count(ALL_LINEAR):
            raise UserError(f"adapter.target_modules has '{ALL_LINEAR}' beside others: it must stand alone")
        if self.rank < 1:
            raise UserError(f"adapter.rank is {self.rank}: it must be 1 or more")
        if not 0.0 < self.alpha < math.inf:
            raise UserError(f"adapter.alpha is {self.alpha}: it must be above 0, or LoRA changes nothing")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"adapter.dropout is {self.dropout}: it must be at least 0 and below 1")


def add_adapter(model: nn.Module, config: AdapterConfig, notices: list[str], revision: str | None = None) -> nn.Module:
    """Make the model trainable as the config asks, and return it (wrapped by PEFT for LoRA).

    Args:
        model: the loaded base model.
        config: LoRA or full, and what is frozen.
        notices: gets a line for everything the user should know, such as a target that matches two kinds of layer.
        revision: of the base model on the hub, kept with the adapter.

    Raises:
        UserError: a target, module or pattern matches nothing; near matches are named.
    """
    if config.mode == "full":
        model.requires_grad_(True)
        result = model
    else:
        _check_targets(model, config, notices)
        result = _with_lora(model, config, revision)
    _freeze(result, config.freeze)
    trainable, total = count_parameters(result)
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
        with _quiet():
            return cast(nn.Module, get_peft_model(model, lora, revision=revision))
    except ValueError as error:
        raise UserError(f"PEFT refuses what adapter asks for: {str(error).splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two warnings of PEFT: of a name that transformers gives up, and of missing weights, an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        yield


def _paths(model: nn.Module, modules: list[str]) -> list[str]:
    """Whole paths of the modules to save, where PEFT would take more: to it, `mlp` is an end of `audio_mlp` too."""
    names = [name for name, _ in model.named_modules()]
    paths: list[str] = []
    for module in modules:
        matched = _outermost(_matching(module, names))
        paths += [module] if len(matched) == sum(name.endswith(module) for name in names) else matched
    return paths


def _outermost(paths: list[str]) -> list[str]:
    """Leave out what lies inside another match: a module and its child of the same name would both be copied."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _check_targets(model: nn.Module, config: AdapterConfig, notices: list[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    saved: list[str] = []
    for module in config.modules_to_save:
        matched = _matching(module, names)
        if not matched:
            raise _no_match("adapter.modules_to_save", module, names)
        saved += matched
    for target in config.target_modules:
        matched = linear if target == ALL_LINEAR else _matching(target, linear)
        if not matched:
            raise _no_match("adapter.target_modules", target, linear)
        both = [name for name in matched if any(f"{name}.".startswith(f"{path}.") for path in saved)]
        if both and target != ALL_LINEAR:
            raise UserError(
                f"adapter.target_modules has '{target}', which is {both[0]}, and adapter.modules_to_save trains that "
                "in full: take it out of one of them"
            )
        _note_kinds(target, [name for name in matched if name not in both], notices)


def _note_kinds(target: str, matched: list[str], notices: list[str]) -> None:
    """Say so when a target matches layers of several kinds, such as the text's and the audio's MLPs."""
    kinds = sorted({".".join(name.split(".")[-2:]) for name in matched})
    if len(kinds) > 1 and "." not in target:
        advice = "" if target == ALL_LINEAR else ": name one of these to have only that kind"
        notices.append(f"target '{target}' matches {len(matched)} layers, which are {', '.join(kinds)}{advice}")


def _matching(target: str, names: Iterable[str]) -> list[str]:
    """PEFT's rule for lists: the whole path, or its end after a dot."""
    return [name for name in names if name == target or name.endswith("." + target)]


def _no_match(key: str, target: str, names: list[str]) -> UserError:
    ends = {".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2)}
    near = get_close_matches(target, sorted(ends), n=3, cutoff=0.4) or sorted(end for end in ends if "." not in end)[:8]
    return UserError(f"{key} has '{target}', which matches no layer of the model; near: {', '.join(near)}")


def _freeze(model: nn.Module, patterns: list[str]) -> None:
    names = dict(model.named_parameters())
    for pattern in patterns:
        # PEFT puts base_model.model. before every name; patterns are written against the model's own names.
        matched = [
            n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.removeprefix("base_model.model."), pattern)
        ]
        if not matched:
            near = get_close_matches(pattern.strip("*."), list(names), n=3, cutoff=0.3)
            raise UserError(f"adapter.freeze has '{pattern}', which matches no parameter; near: {', '.join(near)}")
        for name in matched:
            names[name].requires_grad_(False)


def write_model(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model as it writes itself; of a plain module the weights, for its family's `load_model` to read.

    Args:
        model: what is written.
        folder: where to.
        weights: its state, if it is to be another one than the model has now.
    """
    if not hasattr(model, "save_pretrained"):
        kept, tied = _untied(model.state_dict() if weights is None else weights)
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt", **tied})
    elif weights is not None and _takes_weights(model):
        model.save_pretrained(folder, state_dict=weights)
    else:
        model.save_pretrained(folder)


def _takes_weights(model: Any) -> bool:
    """Whether a model can write a state that is not its own now."""
    save = getattr(model, "save_pretrained", None)
    return save is None or "state_dict" in signature(save).parameters


def _untied(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights without those that are another one's memory, which safetensors refuses, and whose each of these is."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in weights.items():
        kept = first.setdefault(_memory(name, tensor), name)
        if kept != name:
            tied[name] = kept
    return {name: tensor.contiguous() for name, tensor in weights.items() if name not in tied}, tied


def _memory(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)


class BaseFingerprint:
    """Tells one set of frozen weights from another: an adapter means nothing on a base that it was not trained on.

    The digest runs over names, shapes and the first numbers of every frozen weight, so it costs no reading of
    gigabytes. It is taken before the precision policy casts anything. Where the weights came from and the hash of the
    model's config are kept beside it, for people: the same weights may lie elsewhere today.

    Args:
        model: with its adapter, if it has one.
        path: folder or hub id that it was loaded from.
        revision: of the hub repository.
    """

    SAMPLE = 64  # numbers per weight

    def __init__(self, model: nn.Module, path: str = "", revision: str | None = None) -> None:
        self.origin = {"path": path, "revision": revision, "config": _config_hash(model)}
        self.notice = ""  # what of a checkpoint's differs although the weights are the same
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                numbers = parameter.detach().flatten()[: self.SAMPLE].float()
                digest.update(f"{name} {tuple(parameter.shape)} {numbers.tolist()}\n".encode())
        self.digest = digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the digest, and where the weights came from."""
        return {"digest": self.digest, **self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the digest.

        Raises:
            UserError: the checkpoint was trained on other weights.
        """
        if state["digest"] != self.digest:
            raise UserError(
                f"the frozen weights are not those that the checkpoint was trained on: it was {_origin(state)}, this "
                f"is {_origin(self.origin)}: point model.path (and model.revision) at the same base model, and freeze "
                "the same weights"
            )
        if state["config"] != self.origin["config"]:
            self.notice = f"the base model's config has changed, its weights have not: {_origin(state)} then"


def _origin(state: Mapping[str, Any]) -> str:
    return f"'{state['path']}' (revision {state['revision']}, config {str(state['config'])[:12]})"


def _config_hash(model: nn.Module) -> str | None:
    """SHA-256 of a transformers model's config, without where it was loaded from and by which version; None for others.

    Taken of what is loaded, not of a file: a hub id has no folder here.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    values = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


class ModelFiles:
    """The model's files in a checkpoint: `adapter/` in PEFT's format, or `model/`, by `save_pretrained` if it has that.

    What was written is opened again and compared with the weights in memory, by name, shape and value. `forced` names
    keys of `AdapterConfig` that may be others than the stored adapter's.
    """

    def __init__(
        self, model: nn.Module, load_model: Callable[[str], nn.Module], forced: Collection[str] = frozenset()
    ) -> None:
        self.forced = forced
        self.model: Any = unwrapped(model)
        self.load_model = load_model
        self.is_adapter = isinstance(self.model, PeftModel)
        self._copies: dict[str, Tensor] = {}  # of the last snapshot; the next is written over them
        self.folder = "adapter" if self.is_adapter else "model"

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        """Take the weights; of an adapter, base weights are not copied, as training does not change them.

        What is returned writes them and raises a CheckpointError if what can be read back is not what was taken. It is
        of no use after the next call, whose copies take the place of its own.
        """
        model, weights = self.model, self.model.state_dict()
        if copy and not self.is_adapter and not _takes_weights(model):
            model = deepcopy(model)
            weights = model.state_dict()
        elif copy:
            stored = self._of_adapter(weights) if self.is_adapter else weights
            taken = {id(tensor) for tensor in stored.values()}
            self._copies = copied(
                {name: tensor for name, tensor in weights.items() if id(tensor) in taken}, self._copies
            )
            weights = weights | self._copies
        return partial(self._write, model, weights)

    def _of_adapter(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter's weights, by its own names; taken out of `weights`, a state of the whole model, if given."""
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self.model, state_dict=weights, save_embedding_layers=False
        )
        return found

    def _write(self, model: Any, weights: dict[str, Tensor], folder: Path) -> None:
        if self.is_adapter:
            model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
            _compare(_tensors(folder), self._of_adapter(weights), folder)
        else:
            write_model(model, folder, weights)
            stored = _tensors(folder)  # its names may differ from a module's own
            _compare(
                {n: stored[n] for n in stored if n in weights}, {n: weights[n] for n in weights if n in stored}, folder
            )

    def load(self, folder: Path) -> None:
        """Put the stored weights into the model.

        Raises:
            CheckpointError: names or shapes do not fit.
        """
        if not self.is_adapter:
            self._load_full(folder)
            return
        stored = _tensors(folder)
        _same_names(stored, self._of_adapter(), folder)
        self._check_scale(folder)
        set_peft_model_state_dict(self.model, stored)
        _compare(stored, self._of_adapter(), folder)

    def _check_scale(self, folder: Path) -> None:
        """Equal weights under another scale are another model, and nothing in their shapes shows it."""
        stored, own = PeftConfig.from_pretrained(folder), self.model.peft_config["default"]
        for key, name in SCALE.items():
            then, now = getattr(stored, name), getattr(own, name)
            if then != now and key not in self.forced:
                raise CheckpointError(
                    f"{folder} was trained with adapter.{key} {then}, this run has {now}: set it back"
                )

    def _load_full(self, folder: Path) -> None:
        """Copy by name what is stored; names that are not (tied, or stored under another) as a user would load them."""
        own, files = self.model.state_dict(), _tensors(folder)
        same = {name: files[name] for name in files if name in own}
        stored = files if len(same) == len(own) else {**self.load_model(str(folder)).state_dict(), **same}
        _same_names(stored, own, folder)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])
        _compare(same, {name: own[name] for name in same}, folder)


def unwrapped(model: nn.Module) -> nn.Module:
    """The adapter, or the model that writes itself, inside whatever wraps it: DDP, torch.compile, a user's module.

    Raises:
        UserError: what wraps an adapter has trained weights of its own, which would be in no checkpoint.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for kind in (lambda module: isinstance(module, PeftModel), lambda module: hasattr(type(module), "save_pretrained")):
        found = next(filter(kind, model.modules()), None)
        inside = {id(p) for p in found.parameters()} if found is not None else set()
        outside = sorted(name for key, name in trained.items() if key not in inside)
        if found is not None and not outside:
            return found
        if isinstance(found, PeftModel):
            raise UserError(
                f"{outside[0]} is trained and stands outside of the adapter, whose files would not hold it: "
                "name its module in adapter.modules_to_save, or freeze it"
            )
    return model


def copied(tensors: Mapping[str, Tensor], spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, of which those of the same memory share theirs again: tied weights are told by that.

    `spare` are copies that may be written over.
    """
    made: dict[tuple[Any, ...], Tensor] = {}
    result: dict[str, Tensor] = {}
    reused: set[int] = set()  # weights that were tied at the last copy and no longer are must not share one
    for name, tensor in tensors.items():
        key = _memory(name, tensor)
        if key not in made:
            free = spare.get(name)
            made[key] = _copy(tensor.detach(), None if id(free) in reused else free)
            reused.add(id(made[key]))
        result[name] = made[key]
    return result


def _copy(tensor: Tensor, spare: Tensor | None) -> Tensor:
    if spare is None or (spare.shape, spare.dtype) != (tensor.shape, tensor.dtype):
        return tensor.to("cpu", copy=True)
    return spare.copy_(tensor)


def merge_adapter(
    base: nn.Module, adapter: Path, probe: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module, Tensor, float]:
    """Merge an adapter into its base model, which must be in float32: 16 bits would round small updates away.

    Args:
        base: the base model.
        adapter: folder in PEFT's format.
        probe: runs a model on fixed inputs and returns its logits, any shape.

    Returns:
        the merged model, the logits of base plus adapter, and the largest difference of the merged model's logits from
        them, relative to the largest logit.

    Raises:
        UserError: the adapter is of another model.
        CheckpointError: its weights are damaged or not complete.
    """
    stored = _tensors(adapter)
    try:
        with _quiet():
            adapted: Any = PeftModel.from_pretrained(base, adapter)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} does not fit the base model: {' '.join(str(error).split())[:300]}") from error
    _same_names(stored, get_peft_model_state_dict(adapted, save_embedding_layers=False), adapter)
    with torch.no_grad():
        before = probe(adapted)
        merged = adapted.merge_and_unload(safe_merge=True)
        after = probe(merged)
    return merged, before, float((after - before).abs().max() / before.abs().max())


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Return the folder or hub id of the model that an adapter was trained on, empty if unknown, and its revision.

    Raises:
        UserError: the folder holds no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter is '{adapter}', which has no adapter_config.json: give a checkpoint's adapter folder"
        )
    config = PeftConfig.from_pretrained(adapter)
    return config.base_model_name_or_path or "", config.revision


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error


def _same_names(stored: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    shapes = [name for name in set(stored) & set(wanted) if stored[name].shape != wanted[name].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{folder} does not fit the model: {len(missing)} weights missing {missing[:3]}, {len(extra)} unknown "
            f"{extra[:3]}, {len(shapes)} of another shape {sorted(shapes)[:3]}; were rank or targets changed?"
        )


def _compare(stored: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    _same_names(stored, wanted, folder)
    for name, tensor in wanted.items():
        if not torch.equal(stored[name], tensor.detach().cpu()):
            raise CheckpointError(f"{folder}: {name} read back differs from the weight in memory")
