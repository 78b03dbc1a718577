"""What families have in common: loading without surprises, recomputed activations, exact logits, shifted labels."""

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from rawloop.contracts import IGNORE, Labels
from rawloop.errors import UserError
from rawloop.families import ModelConfig

# What transformers makes of a damaged folder.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError)


def load_settings(config: ModelConfig) -> tuple[Any, Any]:
    """Return the checkpoint's config and tokenizer.

    Raises:
        UserError: they cannot be read.
    """
    try:
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision)
        return settings, AutoTokenizer.from_pretrained(config.path, revision=config.revision)
    except UNREADABLE as error:
        raise UserError(f"config or tokenizer of {config.path} cannot be read: {first_line(error)}") from error


def load_weights(model_class: Any, config: ModelConfig, path: str | None, **options: Any) -> tuple[Any, list[str]]:
    """Load a model in its stored dtype on the CPU.

    Args:
        model_class: a model class of transformers, or an AutoModel.
        config: where it lies, and how it attends.
        path: another folder than the configured one, for the weights of a checkpoint.
        options: further keywords of `from_pretrained`.

    Returns:
        the model, and the names of the weights that the checkpoint lacks, sorted.

    Raises:
        UserError: the checkpoint cannot be read, or its weights have other shapes than its config says.
    """
    source = path or config.path
    try:
        model, info = model_class.from_pretrained(
            source,
            revision=None if path else config.revision,
            dtype="auto",
            attn_implementation=config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        asked = f" (model.attention is '{config.attention}')" if "attn_implementation" in str(error) else ""
        raise UserError(f"model.path is '{source}', which cannot be loaded: {first_line(error)}{asked}") from error
    for name, stored, wanted in sorted(info["mismatched_keys"])[:1]:
        raise UserError(
            f"{source}: {name} is stored as {tuple(stored)}, its config.json makes it {tuple(wanted)}: fetch it again"
        )
    return model, sorted(info["missing_keys"])


def refuse_missing(missing: list[str], source: str) -> None:
    """Refuse a checkpoint that lacks weights: they would be trained from random numbers."""
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights, first {missing[0]}: fetch it again")


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, non-reentrant (reentrant breaks under DDP with unused parameters)."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def exact(logits: Tensor) -> Tensor:
    """In float32 at least: 16 bits are too few for a log-softmax over a vocabulary. Float64 stays, for proofs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def shifted(labels: Tensor) -> Labels:
    """Targets with the positions that predict them: one to the left, in the flattened (batch, sequence)."""
    flat = labels.flatten()
    positions = torch.nonzero(torch.ne(flat, IGNORE)).squeeze(1)
    return Labels(positions - 1, flat[positions])


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT wrapper; adapters stay in its layers."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def first_line(error: Exception) -> str:
    """Return the first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
