"""Measuring a model without a trace: what a check does must not be seen in what is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rawloop.seed import preserved_rng


@contextmanager
def undisturbed(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode; afterwards modes, buffers and random streams are as before."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    module.train(training)
    try:
        with preserved_rng():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
