"""Checksums of a model's weights: to recognise the base model of an adapter, and to compare the ranks."""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError

BASE = "base.json"  # beside an adapter: the fingerprint of its base model, which PEFT has no use for
BLOCK = 1 << 22  # numbers that are widened at a time
ADAPTERS = (".lora_", ".modules_to_save.")  # what PEFT adds to a model's own weights
# PEFT writes these around the names of the base model's weights.
AROUND = ("base_model.model.", ".base_layer", ".original_module")


class BaseFingerprint:
    """Tells one set of frozen weights from another: an adapter means nothing on a base that it was not trained on.

    Take it before the precision policy casts anything. Where the weights came from and the hash of the model's config
    are kept beside it, for people: the same weights may lie elsewhere today.

    Args:
        model: with its adapter, if it has one. Of the base model alone, frozen, `weights` is the same.
        path: folder or hub id that it was loaded from.
        revision: of the hub repository.
        seed: of the random streams that `load_model` may have drawn from.
        full: whether to compute `sums`, which reads all numbers: one process of a machine does it for the others.

    Attributes:
        digest: of names, shapes and the first numbers of every frozen weight: all that older checkpoints hold.
        sums: checksum of every parameter and buffer, by name; see `checksum`. Empty until it is known.
    """

    SAMPLE = 64  # numbers per weight in `digest`

    def __init__(
        self, model: nn.Module, path: str = "", revision: str | None = None, seed: int = 0, *, full: bool = True
    ) -> None:
        self.origin = {"path": path, "revision": revision, "config": _config_hash(model), "seed": seed}
        self.notice = ""  # a difference from the checkpoint's although the weights are the same
        tensors = _distinct(model)
        with ThreadPoolExecutor(_usable_cores()) as pool:  # zlib lets go of the GIL
            sums = pool.map(checksum, tensors.values()) if full else ()
            self.sums = dict(zip(tensors, sums, strict=full))
        digest, named = hashlib.sha256(), dict(model.named_parameters())
        for name, parameter in named.items():
            if not parameter.requires_grad:
                numbers = parameter.detach().flatten()[: self.SAMPLE].float()
                digest.update(f"{name} {tuple(parameter.shape)} {numbers.tolist()}\n".encode())
        self.digest = digest.hexdigest()
        own = {name: named.get(name) for name in tensors if not any(mark in name for mark in ADAPTERS)}
        self._frozen = [name for name, weight in own.items() if weight is not None and not weight.requires_grad]
        if not any(weight is not None and weight.requires_grad for weight in own.values()):
            self._frozen = list(
                own
            )  # with the buffers: a model whose own weights are trained has its own in a checkpoint

    @property
    def weights(self) -> str | None:
        """Digest of the checksums of every frozen weight, under the base model's own names; None without `sums`.

        The buffers are in it if none of the base model's own weights is trained.
        """
        if not self.sums:
            return None
        lines = sorted(f"{_own_name(name)} {self.sums[name]}\n" for name in self._frozen)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def share_sums(self, world: World) -> None:
        """Take the sums of the process that has computed them on this machine. All ranks call this."""
        shares = world.gather(self.sums)
        self.sums = next((sums for sums in reversed(shares[: world.rank + 1]) if sums), {})

    def state_dict(self) -> dict[str, Any]:
        """Return the digests, and where the weights came from."""
        return {"digest": self.digest, "weights": self.weights, **self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other weights."""
        if state["digest"] != self.digest:
            raise self._other_weights(state)
        self.check_base(state)

    def check_base(self, state: Mapping[str, Any]) -> None:
        """Compare the base model alone: the adapter on it may be another one, or none."""
        if self.sums and state.get("weights", self.weights) != self.weights:
            raise self._other_weights(state)
        if state["config"] != self.origin["config"]:
            self.notice = f"the base model's config has changed, its weights have not: {_origin(state)} then"

    def _other_weights(self, state: Mapping[str, Any]) -> UserError:
        return UserError(
            f"the frozen weights are not those that the checkpoint was trained on: it was {_origin(state)}, this "
            f"is {_origin(self.origin)}: point model.path (and model.revision) at the same base model, and freeze "
            "the same weights"
        )


def stored_fingerprint(adapter: Path) -> tuple[dict[str, Any], str]:
    """Read the fingerprint beside an adapter, or in its checkpoint; empty if there is none.

    The second value says why the base model could not be checked, and is empty if it can be.
    """
    file = next((f for f in (adapter / BASE, adapter.resolve().parent / "state" / BASE) if f.is_file()), None)
    if file is None:
        return {}, f"no {BASE} lies beside it"
    try:
        stored = json.loads(file.read_bytes())
        named = {key: stored[key] for key in ("path", "revision", "config")}
        state = {**stored, **named, "seed": int(stored.get("seed", 0))}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{file} is damaged: {reason}") from error
    return state, "" if "weights" in state else f"{file} has no checksum of it"


def _usable_cores() -> int:
    # torchrun sets OMP_NUM_THREADS to 1, while the other processes of this machine wait
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checksum(tensor: Tensor) -> str:
    """Return shape and CRC-32 of all numbers of a tensor.

    Floats of 16 bits are widened to float32 first, so that a base saved in another dtype is the same base.
    """
    total = 0
    for block in torch.split(tensor.detach().flatten(), BLOCK):
        numbers = block.float() if block.is_floating_point() and block.itemsize < 4 else block
        total = zlib.crc32(numbers.cpu().contiguous().view(torch.uint8).numpy().data, total)
    return f"{tuple(tensor.shape)} {total:08x}"


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, and all buffers that a checkpoint would hold, each once."""
    kept = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


def _own_name(name: str) -> str:
    for part in AROUND:
        name = name.replace(part, "")
    return name


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
