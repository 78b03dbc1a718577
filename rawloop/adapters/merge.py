"""Merging an adapter into its base model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from rawloop.adapters.compare import compare, tensors_of
from rawloop.adapters.files import load_buffers
from rawloop.adapters.fingerprint import BaseFingerprint, stored_fingerprint
from rawloop.adapters.lora import quiet
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.seed import seed_all

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def merge_adapter(
    base: nn.Module, adapter: Path, probe: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module, Tensor, float]:
    """Merge an adapter into its base model, which must be in float32: 16 bits would round small updates away.

    `probe` runs a model on fixed inputs and returns its logits. Returns the merged model, the logits of base plus
    adapter, and the largest difference of the merged model's logits from them, relative to the largest logit.
    """
    stored = tensors_of(adapter)
    for name, tensor in stored.items():
        _check_weight(adapter, name, tensor)
    try:
        with quiet():
            adapted: Any = PeftModel.from_pretrained(base, adapter)
    except Exception as error:  # PEFT meets whatever stands in a file that anybody may have written
        raise UserError(f"{adapter} does not fit the base model: {_in_a_line(error)}") from error
    compare(stored, get_peft_model_state_dict(adapted, save_embedding_layers=False), adapter, rounded=True)
    load_buffers(adapted, adapter)
    with torch.no_grad():
        before = probe(adapted)
        if not bool(before.isfinite().all()):
            raise RawloopError(f"base plus adapter {adapter} give logits that are not finite: nothing was written")
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except Exception as error:  # as above
            raise RawloopError(f"{adapter} cannot be merged: {_in_a_line(error)}") from error
        after = probe(merged)
    return merged, before, float((after - before).abs().max() / before.abs().max())


def _check_weight(adapter: Path, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{adapter}: {name} is stored as {tensor.dtype}: an adapter's weights are floats")
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{adapter}: {name} holds NaN or infinity: merge the adapter of an earlier checkpoint")


def load_base(
    adapter: Path, load_model: Callable[[], nn.Module], path: str, revision: str | None
) -> tuple[nn.Module, str]:
    """Load the base model and compare it with the fingerprint beside an adapter. Returns a sentence for the user.

    What `load_model` draws at random, as for a head that the base model lacks, it draws as at the training.
    """
    stored, unchecked = stored_fingerprint(adapter)
    seed_all(stored.get("seed", 0), 0)
    base = load_model()
    if unchecked:
        return base, f"that {path} is the base model of {adapter} could not be checked: {unchecked}"
    own = BaseFingerprint(base.requires_grad_(False), path, revision)
    own.load_state_dict(stored)
    return base, own.notice


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Return the folder or hub id of the model that an adapter was trained on, empty if unknown, and its revision."""
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise UserError(
            f"--adapter is '{adapter}', which has no adapter_config.json: give a checkpoint's adapter folder"
        )
    try:
        values = json.loads(file.read_bytes())
        kind, scale = values.get("peft_type"), [values.get(key) for key in ("r", "lora_alpha")]
        config = PeftConfig.from_pretrained(adapter) if kind == "LORA" else None
    except Exception as error:  # as above
        raise RawloopError(f"{file} cannot be read: {_in_a_line(error)}") from error
    if config is None:
        raise UserError(f"{file} has the peft_type {kind!r}: rawloop merges adapters of type 'LORA'")
    if not all(type(value) in (int, float) for value in scale):
        raise RawloopError(f"{file} does not say the scale: r and lora_alpha are {scale}, and PEFT would guess them")
    base, revision = config.base_model_name_or_path or "", config.revision
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise RawloopError(f"{file} names no base model: base_model_name_or_path is {base!r}, revision {revision!r}")
    return base, revision


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
