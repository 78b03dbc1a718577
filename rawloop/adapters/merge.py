"""Merging an adapter into its base model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from rawloop.adapters.compare import same_names, tensors_of
from rawloop.adapters.lora import quiet
from rawloop.errors import RawloopError, UserError


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
    stored = tensors_of(adapter)
    try:
        with quiet():
            adapted: Any = PeftModel.from_pretrained(base, adapter)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} does not fit the base model: {' '.join(str(error).split())[:300]}") from error
    same_names(stored, get_peft_model_state_dict(adapted, save_embedding_layers=False), adapter)
    with torch.no_grad():
        before = probe(adapted)
        merged = adapted.merge_and_unload(safe_merge=True)
        after = probe(merged)
    return merged, before, float((after - before).abs().max() / before.abs().max())


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Return the folder or hub id of the model that an adapter was trained on, empty if unknown, and its revision.

    Raises:
        UserError: the folder holds no adapter.
        RawloopError: its adapter_config.json cannot be read.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter is '{adapter}', which has no adapter_config.json: give a checkpoint's adapter folder"
        )
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, AttributeError) as error:
        raise RawloopError(f"{adapter / 'adapter_config.json'} cannot be read: {error}") from error
    return config.base_model_name_or_path or "", config.revision
