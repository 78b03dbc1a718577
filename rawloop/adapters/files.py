"""The model's files in a checkpoint: written, read back, and compared with the weights in memory."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rawloop.adapters.compare import compare, compare_model, memory_of, same_names, tensors_of
from rawloop.adapters.fingerprint import BASE, BaseFingerprint
from rawloop.adapters.lora import PREFIX, SCALE
from rawloop.buffers import Place, places
from rawloop.errors import CheckpointError, UserError
from rawloop.host_memory import copy_to_host, host_model, wait_for_copies
from rawloop.sharding import is_sharded, write_part

WEIGHTS = "model.safetensors"  # the name that transformers gives it, too
BUFFERS = "buffers.safetensors"  # beside an adapter: buffers that training moves and PEFT's file does not hold


class ModelFiles:
    """The model's files in a checkpoint: `adapter/` in PEFT's format, or `model/`, written by `save_pretrained`.

    The files are read back after writing and compared with the weights in memory, by name, shape and value.

    Args:
        model: the model, or a module that contains it. A model without `save_pretrained` is written as safetensors.
        load_model: loads a model from a folder; used for weights that are stored under other names.
        base: fingerprint of the base model, written beside an adapter, so that copies of the adapter have it too.
        moving: buffers that training moves. Those that PEFT's file does not hold are written beside the adapter.
        whole: save all of `model`, even if an adapter, or a model with `save_pretrained`, is inside it.

    Raises:
        UserError: training moves a buffer outside of the saved module, or trains a weight outside of the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        load_model: Callable[[str], nn.Module],
        base: BaseFingerprint | None = None,
        moving: Mapping[str, Place] = MappingProxyType({}),
        whole: bool = False,
    ) -> None:
        self.base = base
        self.model: Any = model if whole else find_saved_module(model)
        self.load_model = load_model
        self.form = self.model  # has the names and the config; a save in another thread reads no more of it
        self.is_adapter = isinstance(self.model, PeftModel) and not whole
        self._copies: dict[str, Tensor] = {}  # of the last snapshot; the next one overwrites them
        self.folder = "adapter" if self.is_adapter else "model"
        self.add_moving(moving)

    def add_moving(self, moving: Mapping[str, Place]) -> None:
        """Set the buffers that training moves.

        Raises:
            UserError: one of them is outside of the saved module.
        """
        names = {place: name for name, place in places(self.model).items()}
        outside = [name for name, place in moving.items() if place not in names]
        if outside:
            raise UserError(
                f"training moves the buffer {outside[0]}, which is outside of the saved model: no checkpoint would "
                "hold it; move it into the model, or keep its module in evaluation mode"
            )
        self.moving = [names[place] for place in moving.values()]

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        """Take the weights. The frozen base of an adapter is not copied.

        Returns:
            a function that writes the weights into a folder, and raises CheckpointError if they differ when they are
            read back. Call it before the next snapshot, which overwrites the copies.
        """
        model, weights = self.form, self.model.state_dict()
        if copy or self.is_sharded:
            stored = self._adapter_weights(weights) if self.is_adapter else weights
            saved = {id(tensor) for tensor in [*stored.values(), *self._extra_buffers(weights).values()]}
            self._copies = copy_all({name: t for name, t in weights.items() if id(t) in saved}, self._copies)
            wait_for_copies()
            weights = weights | self._copies
            if not self.is_adapter and not _takes_weights(model):
                model = host_model(model, weights)
        return partial(self._write, model, weights)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded: then all ranks call `snapshot`, which gathers them on rank 0."""
        return is_sharded(self.model)

    def keep_form(self) -> None:
        """Copy the model without its numbers. Call it before the model is sharded.

        Saves then read the copy: any `state_dict()` of a sharded model, also in another thread, disturbs its pass.
        """
        self.form = host_model(self.model, {name: t.to("meta") for name, t in self.model.state_dict().items()})

    def _adapter_weights(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the adapter's weights by PEFT's names, from the model or from a state dict of the whole model."""
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self.model if weights is None else self.form, state_dict=weights, save_embedding_layers=False
        )
        return found

    def extra_buffers(self) -> dict[str, str]:
        """Return the buffers that are written beside PEFT's file, by name, with the names of their modules."""
        names = (name.removeprefix(PREFIX) for name in self._extra_buffers(self.model.state_dict()))
        return {name: name.rpartition(".")[0] for name in names}

    def _extra_buffers(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.is_adapter or not self.moving:
            return {}
        stored = {id(tensor) for tensor in self._adapter_weights(weights).values()}
        return {name: weights[name] for name in self.moving if id(weights[name]) not in stored}

    def _write(self, model: Any, weights: dict[str, Tensor], folder: Path) -> None:
        if not self.is_adapter:
            write_model(model, folder, weights)
            compare_model(tensors_of(folder), weights, model, folder)
            return
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
        _sort_targets(folder / "adapter_config.json")
        if self.base is not None:
            (folder / BASE).write_text(json.dumps(self.base.state_dict(), indent=1))
        buffers = {name.removeprefix(PREFIX): t.contiguous() for name, t in self._extra_buffers(weights).items()}
        if buffers:
            save_file(buffers, folder / BUFFERS)
            compare(load_file(folder / BUFFERS), buffers, folder / BUFFERS)
        _apply_umask(folder)
        compare(tensors_of(folder), self._adapter_weights(weights), folder)

    def load(self, folder: Path) -> None:
        """Load the stored weights into the model.

        Raises:
            CheckpointError: names or shapes differ from the model's.
        """
        if not self.is_adapter:
            self._load_full(folder)
            return
        stored = tensors_of(folder)
        same_names(stored, self._adapter_weights(), folder)
        self._check_scale(folder)
        if self.is_sharded:  # PEFT would copy whole tensors into parts
            for name, tensor in self._adapter_weights().items():
                write_part(tensor, stored[name])
        else:
            set_peft_model_state_dict(self.model, stored)
        compare(stored, self._adapter_weights(), folder, rounded=True)
        missing = sorted(set(self.extra_buffers()) - load_buffers(self.model, folder))
        if missing:
            raise CheckpointError(f"{folder} does not hold the buffer {missing[0]}, which training moves")

    def _check_scale(self, folder: Path) -> None:
        """Refuse another scale: it changes the model, but no name or shape."""
        stored, current = PeftConfig.from_pretrained(folder), self.model.peft_config["default"]
        for key, name in SCALE.items():
            then, now = getattr(stored, name), getattr(current, name)
            if then != now:
                raise CheckpointError(
                    f"{folder} was trained with adapter.{key} {then}, this run has {now}: set it back"
                )

    def _load_full(self, folder: Path) -> None:
        """Copy stored weights by name. `load_model` reads weights that are stored under other names."""
        weights, files = self.model.state_dict(), tensors_of(folder)
        same = {name: files[name] for name in files if name in weights}
        stored_at = {memory_of(name, weights[name]): tensor for name, tensor in same.items()}
        keys = {name: memory_of(name, tensor) for name, tensor in weights.items()}
        tied = {name: stored_at[key] for name, key in keys.items() if key in stored_at}
        stored = files | tied | same
        if weights.keys() - stored.keys():
            stored = {**self.load_model(str(folder)).state_dict(), **tied, **same}
        same_names(stored, weights, folder)
        for name, tensor in weights.items():
            write_part(tensor, stored[name])
        if self.is_sharded:  # the numbers of weights under other names cannot be summed over one rank's parts
            compare(stored, weights, folder, rounded=True)
        else:
            compare_model(files, weights, self.model, folder, rounded=True)


def load_buffers(model: nn.Module, folder: Path) -> set[str]:
    """Load the buffers beside an adapter into its model, and return their names.

    Raises:
        CheckpointError: the file is damaged, or the model has no such buffers.
    """
    file = folder / BUFFERS
    if not file.is_file():
        return set()
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    buffers = {name.removeprefix(PREFIX): place.buffer for name, place in places(model).items()}
    same_names(stored, {name: buffers[name] for name in stored if name in buffers}, file)
    with torch.no_grad():
        for name, tensor in stored.items():
            buffers[name].copy_(tensor)
    return set(stored)


def find_saved_module(model: nn.Module) -> nn.Module:
    """Return the adapter, or the module with `save_pretrained`, inside a model, if it has all trained weights.

    Returns the model itself if there is no such module.

    Raises:
        UserError: a weight outside of an adapter is trained, and would be in no checkpoint.
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
                f"{outside[0]} is trained and outside of the adapter, so no checkpoint would hold it: name its module "
                "in adapter.modules_to_save, or freeze it"
            )
    return model


def copy_all(tensors: Mapping[str, Tensor], spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU. The copies of tied weights share memory, too. Copies in `spare` may be overwritten."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    reused: set[int] = set()  # weights that are no longer tied must not share a buffer
    for name, tensor in tensors.items():
        key = memory_of(name, tensor)
        if key not in copies:
            free = spare.get(name)
            copies[key] = copy_to_host(tensor, None if id(free) in reused else free)
            reused.add(id(copies[key]))
    return {name: copies[memory_of(name, tensor)] for name, tensor in tensors.items()}


def write_model(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model by `save_pretrained`, or the weights of a model without it, for its family's `load_model`.

    Args:
        model: the model.
        folder: an empty folder.
        weights: a state dict to write instead of the model's present one.
    """
    if not hasattr(model, "save_pretrained"):
        weights = model.state_dict() if weights is None else weights
        first: dict[tuple[Any, ...], str] = {}
        names = {name: first.setdefault(memory_of(name, tensor), name) for name, tensor in weights.items()}
        kept = {name: weights[name].contiguous() for name in weights if names[name] == name}
        tied = {name: other for name, other in names.items() if name != other}  # safetensors refuses shared memory
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt", **tied})
    elif weights is not None and _takes_weights(model):
        model.save_pretrained(folder, state_dict=dict(weights))  # transformers empties the dict
    else:
        model.save_pretrained(folder)
    _apply_umask(folder)


def _sort_targets(path: Path) -> None:
    """Sort the targets of an adapter. PEFT has them in a set: its order would differ between files of equal runs."""
    config = json.loads(path.read_text())
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _apply_umask(folder: Path) -> None:
    """Give files the mode that the umask sets. safetensors writes files that only their owner can read."""
    probe = folder / ".umask"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _takes_weights(model: Any) -> bool:
    """Whether a model can write another state dict than its present one."""
    save = getattr(model, "save_pretrained", None)
    return save is None or "state_dict" in signature(save).parameters
