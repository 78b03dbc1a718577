"""The files that a checkpoint keeps of the model: written, opened again, and compared."""

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

WEIGHTS = "model.safetensors"  # the name that transformers gives it, too
BUFFERS = "buffers.safetensors"  # beside an adapter: those that training moves and PEFT's file does not hold


class ModelFiles:
    """The model's files in a checkpoint: `adapter/` in PEFT's format, or `model/`, by `save_pretrained` if it has that.

    Files are opened again after writing and compared with the weights in memory, by name, shape and value. `base` is
    written beside an adapter, which so names the weights that it was trained on wherever it is copied to. The buffers
    of `moving` that PEFT's own file does not hold are written there too; a whole model's are in its state. With `whole`
    all of `model` is kept, not the adapter or the model that writes itself inside it.

    Raises:
        UserError: training moves a buffer outside of what is saved.
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
        self.model: Any = model if whole else unwrapped(model)
        self.load_model = load_model
        self.is_adapter = isinstance(self.model, PeftModel) and not whole
        self._copies: dict[str, Tensor] = {}  # of the last snapshot; the next is written over them
        self.folder = "adapter" if self.is_adapter else "model"
        own = {place: name for name, place in places(self.model).items()}
        outside = [name for name, place in moving.items() if place not in own]
        if outside:
            raise UserError(
                f"training moves the buffer {outside[0]}, which stands outside of the model that is saved: no "
                "checkpoint would hold it; move it into the model, or keep its module in evaluation mode"
            )
        self.moving = [own[place] for place in moving.values()]

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        """Take the weights; of an adapter, base weights are not copied, as training does not change them.

        What is returned writes them and raises a CheckpointError if what can be read back is not what was taken. It is
        of no use after the next call, whose copies take the place of its own.
        """
        model, weights = self.model, self.model.state_dict()
        if copy:
            stored = self._of_adapter(weights) if self.is_adapter else weights
            taken = {id(tensor) for tensor in [*stored.values(), *self._beside(weights).values()]}
            self._copies = copied(
                {name: tensor for name, tensor in weights.items() if id(tensor) in taken}, self._copies
            )
            wait_for_copies()
            weights = weights | self._copies
            if not self.is_adapter and not _takes_weights(model):
                model = host_model(model, weights)
        return partial(self._write, model, weights)

    def _of_adapter(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter's weights, by its own names; taken out of `weights`, a state of the whole model, if given."""
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self.model, state_dict=weights, save_embedding_layers=False
        )
        return found

    def beside(self) -> dict[str, str]:
        """The buffers that training moves and PEFT's own file does not hold, and the modules that they are of."""
        names = (name.removeprefix(PREFIX) for name in self._beside(self.model.state_dict()))
        return {name: name.rpartition(".")[0] for name in names}

    def _beside(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.is_adapter or not self.moving:
            return {}
        stored = {id(tensor) for tensor in self._of_adapter(weights).values()}
        return {name: weights[name] for name in self.moving if id(weights[name]) not in stored}

    def _write(self, model: Any, weights: dict[str, Tensor], folder: Path) -> None:
        if self.is_adapter:
            model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
            _in_order(folder / "adapter_config.json")
            if self.base is not None:
                (folder / BASE).write_text(json.dumps(self.base.state_dict(), indent=1))
            beside = {name.removeprefix(PREFIX): t.contiguous() for name, t in self._beside(weights).items()}
            if beside:
                save_file(beside, folder / BUFFERS)
                compare(load_file(folder / BUFFERS), beside, folder / BUFFERS)
            _readable_as_the_umask_says(folder)
            compare(tensors_of(folder), self._of_adapter(weights), folder)
        else:
            write_model(model, folder, weights)
            compare_model(tensors_of(folder), weights, model, folder)

    def load(self, folder: Path) -> None:
        """Put the stored weights into the model.

        Raises:
            CheckpointError: names or shapes do not fit.
        """
        if not self.is_adapter:
            self._load_full(folder)
            return
        stored = tensors_of(folder)
        same_names(stored, self._of_adapter(), folder)
        self._check_scale(folder)
        set_peft_model_state_dict(self.model, stored)
        compare(stored, self._of_adapter(), folder, rounded=True)
        missing = sorted(set(self.beside()) - load_buffers(self.model, folder))
        if missing:
            raise CheckpointError(f"{folder} does not hold the buffer {missing[0]}, which training moves")

    def _check_scale(self, folder: Path) -> None:
        """Equal weights under another scale are another model, and nothing in their shapes shows it."""
        stored, own = PeftConfig.from_pretrained(folder), self.model.peft_config["default"]
        for key, name in SCALE.items():
            then, now = getattr(stored, name), getattr(own, name)
            if then != now:
                raise CheckpointError(
                    f"{folder} was trained with adapter.{key} {then}, this run has {now}: set it back"
                )

    def _load_full(self, folder: Path) -> None:
        """Copy by name what is stored; names that are not (tied, or stored under another) as a user would load them."""
        own, files = self.model.state_dict(), tensors_of(folder)
        same = {name: files[name] for name in files if name in own}
        by_memory = {memory_of(name, own[name]): tensor for name, tensor in same.items()}
        tied = {name: by_memory[key] for name, tensor in own.items() if (key := memory_of(name, tensor)) in by_memory}
        stored = files | tied | same
        if own.keys() - stored.keys():
            stored = {**self.load_model(str(folder)).state_dict(), **tied, **same}
        same_names(stored, own, folder)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])
        compare_model(files, own, self.model, folder, rounded=True)


def load_buffers(model: nn.Module, folder: Path) -> set[str]:
    """Put the buffers that lie beside an adapter into the model that has it, and return their names.

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
    own = {name.removeprefix(PREFIX): place.buffer for name, place in places(model).items()}
    same_names(stored, {name: own[name] for name in stored if name in own}, file)
    with torch.no_grad():
        for name, tensor in stored.items():
            own[name].copy_(tensor)
    return set(stored)


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
        key = memory_of(name, tensor)
        if key not in made:
            free = spare.get(name)
            made[key] = copy_to_host(tensor, None if id(free) in reused else free)
            reused.add(id(made[key]))
        result[name] = made[key]
    return result


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
        model.save_pretrained(folder, state_dict=dict(weights))  # transformers empties the dict that it is given
    else:
        model.save_pretrained(folder)
    _readable_as_the_umask_says(folder)


def _in_order(path: Path) -> None:
    """PEFT keeps the targets in a set, whose order differs from process to process: equal runs have equal files."""
    config = json.loads(path.read_text())
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _readable_as_the_umask_says(folder: Path) -> None:
    """Safetensors makes files that only their owner can read."""
    probe = folder / ".umask"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _takes_weights(model: Any) -> bool:
    """Whether a model can write a state that is not its own now."""
    save = getattr(model, "save_pretrained", None)
    return save is None or "state_dict" in signature(save).parameters


def _untied(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights without those that are another one's memory, which safetensors refuses, and whose each of these is."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in weights.items():
        kept = first.setdefault(memory_of(name, tensor), name)
        if kept != name:
            tied[name] = kept
    return {name: tensor.contiguous() for name, tensor in weights.items() if name not in tied}, tied
