"""Casting a model for a mode: which dtype each weight gets, and what is refused before anything is trained."""

from collections.abc import Iterable

import torch
from torch import nn

from rawloop.errors import UserError
from rawloop.precision.masters import HALF, KINDS, Trained
from rawloop.precision.modes import DTYPES, MODES, PrecisionConfig, examine, stream_weights

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that cannot be trained in any mode.

    Raises:
        UserError: nothing is trainable, or a trainable weight is of a dtype that is never right.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError("no weight of the model is trainable: check adapter.mode and adapter.freeze")
    for name, parameter in trainable:
        if parameter.dtype not in FLOATS:
            raise UserError(
                f"trainable weight {name} is {parameter.dtype}: only 16- and 32-bit floats can be trained; cast it "
                "with .float(), or freeze it"
            )


def cast(model: nn.Module, name: str, config: PrecisionConfig, device: torch.device) -> Trained:
    """Cast a model's weights, in place, for the mode `name`.

    Returns:
        its trained weights, and what an optimizer is to hold in their place.

    Raises:
        UserError: the mode cannot train these weights, or FP16 cannot hold one of them.
    """
    dtype = cast_frozen(model, name, config)
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return KINDS[config.masters](named, dtype, device)


def cast_frozen(model: nn.Module, name: str, config: PrecisionConfig) -> torch.dtype:
    """Cast what the mode `name` does not train: trained weights are cast where what rounding takes from them is kept.

    Returns:
        what the trained weights shall be of.

    Raises:
        UserError: see `cast`; nothing was changed.
    """
    dtype = trainable_dtype(model, name, config)
    _check_range(model, name, dtype)
    _round(model.parameters(), MODES[name].frozen)
    stream = stream_weights(model).values()
    if any(parameter.requires_grad for parameter in stream):
        _round(stream, dtype)
    if name == "fp32":
        for buffer in model.buffers():  # running means of a model that was stored in 16 bits
            if buffer.dtype in HALF:
                buffer.data = buffer.data.float()
    return dtype


def trainable_dtype(model: nn.Module, name: str, config: PrecisionConfig) -> torch.dtype:
    """Return what the mode's trained weights shall be of.

    Raises:
        UserError: float32 weights would stand beside FP16 ones that they do not fit.
    """
    weights = examine(model)
    wanted = config.trainable_dtype if name == config.mode else "auto"
    if wanted == "auto":
        wanted = "fp16" if name == "native_fp16" and weights.mostly_trained else "fp32"
    if name == "native_fp16" and wanted == "fp32" and (weights.trained_stream or weights.mostly_trained):
        raise UserError(
            f"precision.mode is 'native_fp16' and {weights.trained_stream or 'most weights'} would be trained in "
            "float32 beside FP16 weights: its output would not fit their hidden states. Use amp_fp16, leave it "
            "frozen, or set precision.trainable_dtype to fp16 (with masters)"
        )
    return DTYPES[wanted]


def _round(weights: Iterable[nn.Parameter], dtype: torch.dtype | None) -> None:
    for weight in weights if dtype is not None else ():
        if not weight.requires_grad and weight.dtype in FLOATS:
            weight.data = weight.data.to(dtype)


def _check_range(model: nn.Module, mode: str, trainable: torch.dtype) -> None:
    """Refuse weights that would be infinite in FP16, before any is cast: other dtypes hold more than 65504."""
    for name, weight in model.named_parameters():
        wanted = trainable if weight.requires_grad else MODES[mode].frozen
        if wanted != torch.float16 or weight.dtype not in FLOATS:
            continue
        if not bool(torch.isfinite(weight.detach().to(wanted)).all()):
            raise UserError(
                f"precision.mode is '{mode}' and {name} holds numbers that are not finite in FP16 (damaged, or above "
                "65504): use another mode"
            )
