"""Runs the passes of a step again, from the random streams that they started with, and compares the results by bits."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.buffers import untouched
from rawloop.moving_buffers import MovingBuffers
from rawloop.seed import restore_rng
from rawloop.watch.subject import Pass


class Rerun(NamedTuple):
    """What the passes gave: the tensor from which each backward pass started, and the gradients by parameter name."""

    roots: list[Tensor]
    gradients: dict[str, Tensor]


def run_again(
    model: nn.Module,
    named: Iterable[tuple[str, nn.Parameter]],
    passes: Sequence[Pass],
    *,
    buffers: MovingBuffers | None = None,
    before: Sequence[Tensor] = (),
    seen: Callable[[int, Tensor], None] = lambda number, root: None,
) -> Rerun:
    """Run passes again, and leave the model, its gradients and the random streams as they were.

    Args:
        model: the bare model. No hook of DDP may be waiting for gradients.
        named: the parameters whose gradients are wanted, by name.
        passes: the passes of one window, in order.
        buffers: the moving buffers.
        before: their values before the window.
        seen: called with each pass's number and root, before its backward pass.
    """
    roots: list[Tensor] = []
    with untouched(model, weights=True):
        if buffers and before:
            buffers.write(before)
        for number, one in enumerate(passes):
            if one.rng:
                restore_rng(one.rng)
            root = one.forward(one.inputs)
            moved = buffers.values() if buffers and buffers.twice else None
            seen(number, root)
            torch.autograd.backward(root)
            if buffers and moved is not None:
                buffers.write(moved)
            roots.append(root.detach())
        gradients = {name: weight.grad for name, weight in named if weight.grad is not None}
    return Rerun(roots, gradients)


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hex: equal if dtype, shape and all bits are equal."""
    plain = tensor.detach().to("cpu").contiguous()
    found = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digests(gradients: dict[str, Tensor]) -> dict[str, Any]:
    """Return the digest and the L2 norm of each gradient, by parameter name."""
    if not gradients:
        return {}
    norms = torch.stack(torch._foreach_norm(list(gradients.values()), 2, dtype=torch.float32)).tolist()
    shas = map(digest, gradients.values())
    return {name: {"sha256": sha, "norm": norm} for name, sha, norm in zip(gradients, shas, norms, strict=True)}
