"""Measuring a model without a trace: what a check does must not be seen in what is trained."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from rawloop.buffers import unmoved
from rawloop.errors import happening
from rawloop.seed import preserved_rng


def looking_at(ids: Iterable[str]) -> AbstractContextManager[None]:
    """Let an error inside say which samples the checks were looking at."""
    return happening(f"in the checks before step 0, on the samples {', '.join(dict.fromkeys(ids))}", name_own=True)


@contextmanager
def undisturbed(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode; afterwards modes, buffers and random streams are as before."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        with unmoved(module), preserved_rng():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def coarsest_eps(model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> float:
    """The unit of rounding of the coarsest dtype in which a model computes."""
    one = torch.ones(1, 1, device=next(model.parameters()).device)
    with autocast():
        dtypes = {(one @ one).dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
