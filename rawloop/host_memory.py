"""Copies of tensors in host memory, for asynchronous saves.

If CUDA is available, the copies are pinned, so that they run in parallel; call `wait_for_copies` before reading them.
"""

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.sharding import whole


def copy_to_host(tensor: Tensor, spare: Tensor | None = None) -> Tensor:
    """Return a contiguous copy on the CPU, in the memory of `spare` if shape and dtype match.

    Allocating the memory takes five times as long. A copy into pinned memory is asynchronous; see `wait_for_copies`.
    A sharded tensor is gathered, for which all ranks call this: rank 0 gets the copy, the others an empty tensor.
    """
    tensor = whole(tensor)
    if spare is None or (spare.shape, spare.dtype) != (tensor.shape, tensor.dtype):
        spare = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    # into pageable memory, an asynchronous copy could still run when training changes the tensor
    return spare.copy_(tensor.detach(), non_blocking=spare.is_pinned())


def wait_for_copies() -> None:
    """Wait until all copies from GPUs are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_model(model: nn.Module, copies: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with `copies` as its weights and buffers, by name. Nothing is copied on the device."""
    memo: dict[int, Any] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        memo.setdefault(id(weight), nn.Parameter(copies[name], weight.requires_grad))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        memo.setdefault(id(buffer), copies[name] if name in copies else buffer.cpu().clone())
    copy: nn.Module = deepcopy(model, memo)
    return copy


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose weights and buffers are on the meta device: shapes and dtypes without numbers."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return host_model(model, {name: tensor.detach().to("meta") for name, tensor in chain(*named)})
