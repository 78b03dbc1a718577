"""Helpers of the checks before step 0: samples in errors, the rounding of a model, and text tables."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from rawloop.errors import LESS_MEMORY, happening

Autocast = Callable[[], AbstractContextManager[Any]]


def looking_at(ids: Iterable[str]) -> AbstractContextManager[None]:
    """Add the samples to errors that are raised inside."""
    where = f"in the checks before step 0, on the samples {', '.join(dict.fromkeys(ids))}"
    return happening(where, name_own=True, less=lambda: LESS_MEMORY)


def coarsest_eps(model: nn.Module, autocast: Autocast) -> float:
    """Return the eps of the coarsest dtype in which a model computes."""
    one = torch.ones(1, 1, device=next(model.parameters()).device)
    with autocast():
        dtypes = {(one @ one).dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def table(align: str, rows: Sequence[Sequence[object]]) -> list[str]:
    """Return rows as lines of aligned columns; `align` has `l` or `r` for each column."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        columns = zip(row, widths, align, strict=True)
        lines.append("  ".join(c.ljust(w) if side == "l" else c.rjust(w) for c, w, side in columns).rstrip())
    return lines
