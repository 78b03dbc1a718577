"""Merging an adapter into its base model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from rawloop.adapters.compare import compare, tensors_of
from rawloop.adapters.files import load_buffers
from rawloop.adapters.fingerprint import BaseFingerprint, stored_fingerprint
from rawloop.adapters.lora import PREFIX, quiet
from rawloop.adapters.quantize import round_weights
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.seed import seed_all

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def merge_adapter(
    base: nn.Module, adapter: Path, probe: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module, Tensor, float]:
    """Merge an adapter into its base model, which must be in float32: 16 bits would round small updates away.

    Args:
        base: the base model.
        adapter: the adapter's folder.
        probe: runs a model on fixed inputs and returns its logits.

    Returns:
        the merged model, the logits of base plus adapter, and the largest difference of the merged model's logits,
        as a share of the largest logit.
    """
    stored = tensors_of(adapter)
    bare = stored and not any(name.startswith(PREFIX) for name in stored)
    stored = {f"{PREFIX}{name}": tensor for name, tensor in stored.items()} if bare else stored
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{adapter}: {name} is stored as {tensor.dtype}: an adapter's weights must be floats")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{adapter}: {name} has NaN or infinity: merge the adapter of an earlier checkpoint")
    try:
        with quiet():
            if bare:  # as transformers writes it: for PEFT these would be no weights of the adapter, and stay zero
                adapted: Any = PeftModel(base, PeftConfig.from_pretrained(adapter))
                set_peft_model_state_dict(adapted, stored)
            else:
                adapted = PeftModel.from_pretrained(base, adapter)
    except Exception as error:  # PEFT fails in many ways on a file with unexpected contents
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


def load_base(
    adapter: Path, load_model: Callable[[], nn.Module], path: str, revision: str | None
) -> tuple[nn.Module, str]:
    """Load the base model and compare it with the adapter's fingerprint. Return the model and a notice, or "".

    If the adapter was trained beside quantised layers, the base gets their numbers. The random seed is that of the
    training, so weights that the base model lacks (a new head) are the same.
    """
    stored, unchecked = stored_fingerprint(adapter)
    seed_all(stored.get("seed", 0), 0)
    base = load_model()
    if unchecked:
        return base, f"not checked whether {path} is the base model of {adapter}: {unchecked}"
    quantization = stored.get("quantization")
    fingerprint = BaseFingerprint(base.requires_grad_(False), path, revision, quantization=quantization)
    fingerprint.load_state_dict(stored)
    if quantization:
        round_weights(base, quantization)
    return base, fingerprint.notice


def _check_folder(adapter: Path) -> None:
    """Raise a UserError that names the right folder if this is not an adapter's."""
    if (adapter / "adapter_config.json").is_file():
        return
    advice = "pass a checkpoint's adapter folder"
    for inside in (".", "model", "best/model"):
        if (adapter / inside / "config.json").is_file():
            advice = f"{adapter / inside} is a whole model already: use it without merging"
    for inside in ("adapter", "best/adapter"):
        if (adapter / inside / "adapter_config.json").is_file():
            advice = f"did you mean {adapter / inside}?"
    raise UserError(f"--adapter is '{adapter}', which has no adapter_config.json: {advice}")


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Return the folder or hub id of the model that an adapter was trained on, empty if unknown, and its revision."""
    _check_folder(adapter)
    file = adapter / "adapter_config.json"
    try:
        values = json.loads(file.read_bytes())
        kind, scale = values.get("peft_type"), [values.get(key) for key in ("r", "lora_alpha")]
        config = PeftConfig.from_pretrained(adapter) if kind == "LORA" else None
    except Exception as error:  # as above
        raise RawloopError(f"{file} cannot be read: {_in_a_line(error)}") from error
    if config is None:
        raise UserError(f"{file} has the peft_type {kind!r}: rawloop merges adapters of type 'LORA'")
    if not all(type(value) in (int, float) for value in scale):
        raise RawloopError(f"{file} has no scale: r and lora_alpha are {scale}, and PEFT would guess them")
    base, revision = config.base_model_name_or_path or "", config.revision
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise RawloopError(f"{file} names no base model: base_model_name_or_path is {base!r}, revision {revision!r}")
    return base, revision


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
