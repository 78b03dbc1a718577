"""Casts a model for a mode, and checks its weights before training."""

import gc
from collections.abc import Iterable

import torch
from torch import nn

from rawloop.dist import World, find_ddp, unwrap_ddp
from rawloop.errors import UserError
from rawloop.launcher import num_processes
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.masters import HALF
from rawloop.precision.modes import DTYPES, MODES, examine, stream_weights
from rawloop.sharding import assign, over_ranks

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_world(world: World | None) -> World:
    """Return the world, `World.current()` by default.

    Raises:
        UserError: it has fewer ranks than there are processes.
    """
    if world is not None and not world.alone and world.size < num_processes():
        raise UserError(
            f"the precision policy was given a world of {world.size} process(es), and there are {num_processes()}, "
            "which would not skip the same steps: omit world=, or pass World.current()"
        )
    return World.current() if world is None else world


def check_model(model: nn.Module) -> None:
    """Raise a UserError if no mode can train the model.

    Such a model is wrapped, has no trainable weight, or has a trainable weight of a dtype that no mode trains.
    """
    wrapped = next((m for m in model.modules() if isinstance(m, nn.DataParallel) or unwrap_ddp(m) is not m), None)
    if wrapped is None and num_processes() > 1 and find_ddp(model.parameters()):
        gc.collect()  # deletes wrappers that are no longer referenced
        wrapped = next(iter(find_ddp(model.parameters())), None)
    if wrapped is not None:
        raise UserError(
            f"the model is wrapped in {type(wrapped).__name__} already, which does not follow a cast of the weights: "
            "call policy.prepare(model) first and wrap the result"
        )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise UserError("no weight of the model is trainable: check adapter.mode and adapter.freeze")
    for name, parameter in trainable:
        if parameter.dtype not in FLOATS:
            raise UserError(
                f"trainable weight {name} is {parameter.dtype}: only 16- and 32-bit floats can be trained; cast it "
                "with .float(), or freeze it"
            )


def cast_frozen(model: nn.Module, name: str, config: PrecisionConfig, is_last: bool = False) -> torch.dtype:
    """Cast the frozen weights for the mode `name`, in place, and return the dtype for the trained ones.

    Args:
        model: any model with trainable weights.
        name: the mode.
        config: the dtype of trained weights.
        is_last: no fallback is left.

    Raises:
        UserError: the mode cannot train these weights, or FP16 cannot represent one of them. No weight was changed.
    """
    dtype = trainable_dtype(model, name, config)
    _check_range(model, name, dtype)
    _round(model.parameters(), MODES[name].frozen)
    _cast_for_autocast(model, MODES[name].autocast, is_last)
    stream = stream_weights(model).values()
    if any(parameter.requires_grad for parameter in stream):
        _round(stream, dtype)
    if name == "fp32":
        for buffer in model.buffers():  # such as running means that were stored in 16 bits
            if buffer.dtype in HALF:
                buffer.data = buffer.data.float()
    return dtype


def trainable_dtype(model: nn.Module, name: str, config: PrecisionConfig) -> torch.dtype:
    """Return the dtype for trained weights in the mode `name`.

    Raises:
        UserError: float32 weights would produce hidden states that do not fit the FP16 weights.
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
            assign(weight, weight.data.to(dtype))


def _cast_for_autocast(model: nn.Module, dtype: torch.dtype | None, is_last: bool) -> None:
    """Cast frozen weights of linear layers once. Autocast would cast them in every pass, and keep them until backward.

    The results are bitwise equal. These weights are not cast: float32 weights, if a fallback could use their digits;
    weights out of FP16's range; and any weight if most weights are trained, because then checkpoints contain all.
    """
    if dtype is None or examine(model).mostly_trained:
        return
    linear = {id(p): p for module in model.modules() if _is_linear(module) for p in module.parameters(recurse=False)}
    for module in model.modules():
        # Other modules may read these weights too: an embedding that is tied to the head, or PEFT's DoRA.
        if not _is_linear(module):
            is_dora = bool(getattr(module, "lora_magnitude_vector", None))
            for parameter in module.parameters(recurse=is_dora):
                linear.pop(id(parameter), None)
    for weight in linear.values():
        if not weight.requires_grad and weight.dtype in (FLOATS if is_last else HALF):
            value = weight.data.to(dtype)
            if weight.dtype != dtype and bool(over_ranks(torch.isfinite(value).all())):
                assign(weight, value)


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def _check_range(model: nn.Module, mode: str, trainable: torch.dtype) -> None:
    """Raise a UserError if a weight would be infinite in FP16, before any is cast: FP16 ends at 65504."""
    for name, weight in model.named_parameters():
        wanted = trainable if weight.requires_grad else MODES[mode].frozen
        if wanted != torch.float16 or weight.dtype not in FLOATS:
            continue
        if not bool(over_ranks(torch.isfinite(weight.detach().to(wanted)).all())):
            raise UserError(
                f"precision.mode is '{mode}' and {name} holds numbers that are not finite in FP16 (damaged, or above "
                "65504): use another mode"
            )
