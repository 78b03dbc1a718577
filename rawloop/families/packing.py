"""Packing: the examples of a micro-batch in one row, without attention between them; clips' features, joined.

Positions start at 0 with every example. From them transformers makes each layer's mask (full, sliding window), which
separates the examples. A mask of ours would be the same for all layers. Layers mix positions in many ways, so the
loaded model itself is tested.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rawloop.contracts import Batch, Family
from rawloop.errors import UserError
from rawloop.families import ModelConfig

ATTENTION = ("sdpa", "eager")


def packed(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return sequences as one row: its `input_ids` and `position_ids`, (1, positions) int64."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return {"input_ids": torch.cat(list(rows))[None], "position_ids": positions[None]}


def check_packing(family: Family, model: Any, probe: Callable[[], Batch], config: ModelConfig) -> None:
    """Refuse a model that cannot pack, or that mixes the examples of a batch that `probe` makes, a packed row of two.

    Raises:
        UserError: the reason, and to set `data.packing` to false.
    """
    if config.attention not in ATTENTION:
        raise UserError(
            f"data.packing is true and model.attention is '{config.attention}': packing is tested with "
            f"{' and '.join(ATTENTION)} only; set one of them"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"data.packing is true, and {type(model).__name__} takes no position_ids: set data.packing to false"
        )
    check_causality(family, model, probe, "set data.packing to false", " or other documents of their row")


def check_causality(family: Family, model: Any, probe: Callable[[], Batch], fix: str, seen: str = "") -> None:
    """Refuse a model whose predictions depend on later tokens, or, in a packed row, on other documents.

    A model on the meta device is not tested, and `probe` is not called: under that device its batch has no numbers.

    Raises:
        UserError: the model, by how much its logits move, and `fix`.
    """
    if next(model.parameters()).is_meta:
        return
    batch = probe()
    changed = family.perturb(batch)
    with torch.no_grad():
        before, after = family.logits(model, batch), family.logits(model, changed.batch)
    # A mask is exact. But experts compute the tokens of all documents together, which may round differently.
    bound = 0.05 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-4
    for stream, earlier in changed.earlier.items():
        moved = (after[stream] - before[stream]).abs()
        leak = float(moved[earlier].max())
        if leak > bound * float(moved[~earlier].max()):
            raise UserError(
                f"{model.config.name_or_path}: predictions of {type(model).__name__} see later words{seen}, which move "
                f"logits by {leak:.2g}: {fix}"
            )


def joined(clips: Sequence[Tensor]) -> Tensor:
    """Join the features of samples, (windows, length, ...) or (windows,) each, padded with zeros to one length."""
    if clips[0].dim() < 2:
        return torch.cat(list(clips))
    longest = max(one.shape[1] for one in clips)
    return torch.cat([F.pad(one, (0, 0) * (one.dim() - 2) + (0, longest - one.shape[1])) for one in clips])
