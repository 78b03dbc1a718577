"""Compares a family's `losses`, which training uses, with the cross-entropy of its `logits`, which the checks look at.

A loss that is not shifted goes unseen where the logits are right, and looks like chance to a model that knows nothing.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rawloop.contracts import IGNORE, Batch, StreamLoss

ROWS = 256  # targets that are scored at once: a whole batch's log-softmax would need the memory of its logits again
# Largest relative difference of the two sums: in float32, and as a share of the coarsest dtype's eps, in which hidden
# states are computed. rawloop's own families differ by 2e-7 at most, labels beside the right ones by 1e-3 at least, in
# a model that guesses.
SINGLE, SHARE = 1e-5, 1 / 32


def disagreements(
    losses: Mapping[str, StreamLoss], logits: Mapping[str, Tensor], batch: Batch, eps: float
) -> dict[str, str]:
    """Return how losses differ from their logits, by stream (`audio`), or part (`audio/3`) if the whole agrees.

    Both are of `batch`; logits are (targets, [parts,] classes). `eps` is that of the coarsest dtype of the model.
    """
    found: dict[str, str] = {}
    for stream, rows in logits.items():
        loss, targets = losses[stream], batch.labels[stream].targets
        if rows.shape[:-1] != targets.shape:
            found[stream] = f"`logits` gives {tuple(rows.shape)} for labels of {tuple(targets.shape)}"
            continue
        sums, counts = _scored(rows, targets)
        names = [stream, *(f"{stream}/{part}" for part in range(len(loss.part_targets)))]
        given = [loss.total.item(), *(loss.parts.tolist() if loss.parts is not None else [])]
        numbers = [loss.targets, *loss.part_targets]
        wanted = [(sum(sums), sum(counts)), *zip(sums, counts, strict=True)]
        for name, nats, count, (true_nats, true_count) in zip(names, given, numbers, wanted, strict=False):
            if stream not in found and (said := _difference(nats, count, true_nats, true_count, eps)):
                found[name] = said
    return found


def _scored(rows: Tensor, targets: Tensor) -> tuple[list[float], list[int]]:
    """Sums of the cross-entropy in float64, and counts of targets, of every part."""
    columns = targets.view(len(targets), -1)
    sums = torch.zeros(columns.shape[1], dtype=torch.float64)
    for some, wanted in zip(torch.split(rows, ROWS), torch.split(columns, ROWS), strict=True):
        nats = F.cross_entropy(some.flatten(0, -2).float(), wanted.flatten(), ignore_index=IGNORE, reduction="none")
        sums += nats.view(wanted.shape).sum(0).cpu()
    return sums.tolist(), (columns != IGNORE).sum(0).tolist()


def _difference(nats: float, count: int, true_nats: float, true_count: int, eps: float) -> str:
    if not math.isfinite(nats):
        return ""  # a finding of its own
    if count != true_count:
        return f"`losses` counts {count} targets, the labels have {true_count}"
    if abs(nats - true_nats) <= max(SINGLE, SHARE * eps) * max(abs(nats), abs(true_nats)) or not count:
        return ""
    return (
        f"`losses` gives {nats / count:.4f} nats per target, and the cross-entropy of `logits` at the labels is "
        f"{true_nats / count:.4f}: another shift, weights, a further term, or 16 bits"
    )
