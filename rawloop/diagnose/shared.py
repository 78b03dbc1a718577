"""What the checks before step 0 share: naming the samples of an error, and the rounding of a model."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rawloop.errors import happening


def looking_at(ids: Iterable[str]) -> AbstractContextManager[None]:
    """Let an error inside say which samples the checks were looking at."""
    return happening(f"in the checks before step 0, on the samples {', '.join(dict.fromkeys(ids))}", name_own=True)


def coarsest_eps(model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> float:
    """The unit of rounding of the coarsest dtype in which a model computes."""
    one = torch.ones(1, 1, device=next(model.parameters()).device)
    with autocast():
        dtypes = {(one @ one).dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
