"""Checksums of a model's weights: they identify the base model of an adapter, and compare the ranks."""

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

BASE = "base.json"  # beside an adapter: the fingerprint of its base model; PEFT ignores the file
BLOCK = 1 << 22  # numbers that are converted at a time
ADAPTERS = (".lora_", ".modules_to_save.")  # what PEFT adds to a model's own weights
# parts of names that PEFT adds to the base model's weights
AROUND = ("base_model.model.", ".base_layer", ".original_module")


class BaseFingerprint:
    """Identifies a set of frozen weights: an adapter works only on the base model that it was trained on.

    Take it before the precision policy casts anything. It also stores the path of the weights and the hash of the
    model's config, for messages only: the same weights may have another path later.

    Args:
        model: the model, with its adapter if it has one. `weights` is the same for the frozen base model alone.
        path: folder or hub id of the model.
        revision: of the hub repository.
        seed: of the random streams, which `load_model` may have used.
        quantization: how the weights are quantised afterwards; its digest is of the weights before.
        full: whether to compute `sums`, which reads all numbers. One process of a machine does it for the others.

    Attributes:
        sums: checksum of every parameter and buffer, by name; see `checksum`. Empty until they are computed or shared.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str = "",
        revision: str | None = None,
        seed: int = 0,
        quantization: str | None = None,
        *,
        full: bool = True,
    ) -> None:
        self.origin = {"path": path, "revision": revision, "config": _config_hash(model), "seed": seed}
        self.origin |= {"quantization": quantization} if quantization else {}
        self.notice = ""  # says so if the config differs from the checkpoint's, but the weights do not
        tensors = _distinct(model)
        with ThreadPoolExecutor(_usable_cores()) as pool:  # zlib releases the GIL
            sums = pool.map(checksum, tensors.values()) if full else ()
            self.sums = dict(zip(tensors, sums, strict=full))
        named = dict(model.named_parameters())
        of_base = [name for name in tensors if not any(mark in name for mark in ADAPTERS)]
        trained = {name for name, weight in named.items() if weight.requires_grad}
        # A checkpoint holds the buffers of a base model that is trained, so they are no part of its fingerprint.
        with_buffers = trained.isdisjoint(of_base)
        self._frozen = [name for name in of_base if name not in trained and (with_buffers or name in named)]

    @property
    def weights(self) -> str | None:
        """Digest of the checksums of all frozen weights, by their names in the base model; None without `sums`.

        It includes the buffers if no weight of the base model is trained.
        """
        if not self.sums:
            return None
        lines = sorted(f"{own_name(name)} {self.sums[name]}\n" for name in self._frozen)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def share_sums(self, world: World) -> None:
        """Take the sums from the process of this machine that has computed them. All ranks call this."""
        shares = world.gather(self.sums)
        self.sums = next((sums for sums in reversed(shares[: world.rank + 1]) if sums), {})

    def state_dict(self) -> dict[str, Any]:
        """Return the digest and the origin of the weights."""
        return {"weights": self.weights, **self.origin}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare the frozen weights with those of a checkpoint.

        Raises:
            UserError: they differ. A process without `sums` does not compare them.
        """
        if self.sums and state["weights"] != self.weights:
            raise UserError(
                f"the frozen weights are not those that the checkpoint was trained on: it was {_origin(state)}, this "
                f"is {_origin(self.origin)}: point model.path (and model.revision) at the same base model, and freeze "
                "the same weights"
            )
        if state["config"] != self.origin["config"]:
            self.notice = f"the base model's config has changed, its weights have not: {_origin(state)} then"
        then, now = (each.get("quantization") or "null" for each in (state, self.origin))
        if then != now:
            self.notice = f"the weights were trained beside a base with model.quantization {then}, and it is {now} here"


def stored_fingerprint(adapter: Path) -> tuple[dict[str, Any], str]:
    """Read the fingerprint beside an adapter, or in its checkpoint.

    Returns:
        the fingerprint, or an empty dict; and why the base model cannot be checked, or "".
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
    # not torch's number of threads: torchrun sets it to 1, and the other processes of this machine wait
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checksum(tensor: Tensor) -> str:
    """Return the shape and the CRC-32 of all numbers of a tensor.

    Floats of 16 bits are converted to float32 first, so that a base saved in another dtype is the same base.
    """
    total = 0
    for block in torch.split(tensor.detach().flatten(), BLOCK):
        numbers = block.float() if block.is_floating_point() and block.itemsize < 4 else block
        total = zlib.crc32(numbers.cpu().contiguous().view(torch.uint8).numpy().data, total)
    return f"{tuple(tensor.shape)} {total:08x}"


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and persistent buffers, each once."""
    kept = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


def own_name(name: str) -> str:
    """Return the name in the base model of a module or weight that PEFT has wrapped."""
    for part in AROUND:
        name = name.replace(part, "")
    return name


def _origin(state: Mapping[str, Any]) -> str:
    return f"'{state['path']}' (revision {state['revision']}, config {str(state['config'])[:12]})"


def _config_hash(model: nn.Module) -> str | None:
    """Return the SHA-256 of a transformers model's config, without its path and version; None for other models.

    It is computed from the loaded config: a hub id has no folder here.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    values = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
