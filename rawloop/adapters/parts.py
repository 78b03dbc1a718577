"""The parts of a checkpoint for any model: adapters in PEFT's format, the whole model, or the trained weights.

They are for your own loop, where a model has no family: only the modules are needed to restore them.
"""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from rawloop.adapters.compare import same_names
from rawloop.adapters.files import ModelFiles
from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.buffers import places
from rawloop.contracts import FolderState, Stateful
from rawloop.errors import UserError

What = Literal["auto", "all", "trained"]


class Weights:
    """Some weights and buffers of a model, as one state by name."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.model, self.names = model, frozenset(names)

    def _tensors(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: state[name] for name in state if name in self.names}

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by name."""
        return dict(self._tensors())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the tensors into the model."""
        tensors = self._tensors()
        same_names(state, tensors, Path(type(self.model).__name__))
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])


class Frozen(BaseFingerprint):
    """The fingerprint of the frozen weights, which no checkpoint holds. They must stay frozen."""

    def __init__(self, model: nn.Module, kept: Collection[str]) -> None:
        super().__init__(model)
        self.frozen = {name: weight for name, weight in model.named_parameters() if name not in kept}

    def state_dict(self) -> dict[str, Any]:
        """Return the fingerprint.

        Raises:
            UserError: a weight has been unfrozen, and would be in no checkpoint.
        """
        unfrozen = [name for name, weight in self.frozen.items() if weight.requires_grad]
        if unfrozen:
            raise UserError(
                f"{unfrozen[0]} is trained, and was frozen when the checkpoints were opened: no checkpoint would hold "
                "it. Unfreeze weights before, or save the whole model with what='all'"
            )
        return super().state_dict()


def model_parts(model: nn.Module, name: str = "model", what: What = "auto") -> dict[str, Stateful | FolderState]:
    """Return the parts that save a model, by name.

    Args:
        model: any module, without DDP.
        name: of the part and, with `adapter` for `model`, of its folder.
        what: `auto` saves PEFT adapters and all other trained weights, or the whole model if it has no adapter; `all`
            saves all weights; `trained` saves the weights that are trained now. Buffers are always saved.

    Raises:
        UserError: nothing is trained, or `what` has another value.
    """
    trained = {path for path, weight in model.named_parameters() if weight.requires_grad}
    if what not in ("auto", "all", "trained"):
        raise UserError(f"what is '{what}': it must be auto, all or trained")
    if not trained:
        raise UserError(f"the {type(model).__name__} that is to be saved trains nothing: no weight has requires_grad")
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, PeftModel)}
    if what == "all" and adapters:
        return {name: Weights(model, model.state_dict())}
    if what == "all" or (what == "auto" and not adapters):
        return {name: _files(model, name, whole=True)}
    of_adapters = {path for path, _ in model.named_parameters() if _is_of_adapter(path, adapters)}
    buffers = set(model.state_dict()) - {path for path, _ in model.named_parameters(remove_duplicate=False)}
    parts: dict[str, Stateful | FolderState] = {}
    rest = trained | of_adapters | buffers
    single = all(set(adapter.peft_config) == {"default"} for adapter in adapters.values())
    for path, adapter in adapters.items() if what == "auto" and single else ():
        key = name if len(adapters) == 1 else f"{name}.{path}"
        kept = {place: found for place, found in places(adapter).items() if _joined(path, place) in buffers}
        parts[key] = _files(adapter, key.replace("model", "adapter", 1), moving=kept)
        rest -= {place for place in of_adapters | buffers if place.startswith(_joined(path, ""))}
    if rest:
        parts[f"{name}.rest" if parts else name] = Weights(model, rest)
    return {**parts, f"{name}.base": Frozen(model, trained | of_adapters)}


def _files(model: nn.Module, folder: str, **options: Any) -> ModelFiles:
    files = ModelFiles(model, partial(_reload, model), **options)
    files.folder = folder
    return files


def _reload(model: nn.Module, folder: str) -> nn.Module:
    """Load a model whose stored names differ from its weights' names. Only `save_pretrained` writes such files."""
    kind: Any = type(model)
    loaded: nn.Module = kind.from_pretrained(folder) if hasattr(kind, "from_pretrained") else nn.Module()
    return loaded


def _is_of_adapter(path: str, adapters: Mapping[str, Any]) -> bool:
    """Whether PEFT has added a weight: then the adapter's name is part of the weight's name."""
    return any(
        path.startswith(_joined(place, "")) and any(f".{name}." in f"{path}." for name in adapter.peft_config)
        for place, adapter in adapters.items()
    )


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
