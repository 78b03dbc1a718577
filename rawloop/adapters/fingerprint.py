"""What identifies the weights that an adapter stands on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from rawloop.errors import UserError


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
