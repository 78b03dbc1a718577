"""Compares a family's `losses`, which training uses, with the cross-entropy of its `logits`, which the checks use.

If the logits are right, the other checks miss an unshifted loss: with an untrained model it looks like chance.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rawloop.contracts import IGNORE, Batch, StreamLoss

ROWS = 256  # targets per call: a log-softmax of the whole batch would double the memory of its logits
# Largest relative difference of the two sums: in float32, and as a share of the eps of the coarsest dtype. rawloop's
# families differ by at most 2e-7; shifted labels differ by at least 1e-3, even in a model that guesses.
SINGLE, SHARE = 1e-5, 1 / 32


def find_mismatches(
    losses: Mapping[str, StreamLoss], logits: Mapping[str, Tensor], batch: Batch, eps: float
) -> dict[str, str]:
    """Return how a batch's losses differ from its logits, by stream (`audio`), or part (`audio/3`) if the sum agrees.

    Logits are (targets, [parts,] classes). `eps` is that of the model's coarsest dtype.
    """
    found: dict[str, str] = {}
    for stream, rows in logits.items():
        loss, targets = losses[stream], batch.labels[stream].targets
        if rows.shape[:-1] != targets.shape:
            found[stream] = f"`logits` gives {tuple(rows.shape)} for labels of {tuple(targets.shape)}"
            continue
        sums, counts = _scored(rows, targets)
        names = [stream, *(f"{stream}/{part}" for part in range(len(loss.part_targets)))]
        measured = [loss.total.item(), *(loss.parts.tolist() if loss.parts is not None else [])]
        numbers = [loss.targets, *loss.part_targets]
        wanted = [(sum(sums), sum(counts)), *zip(sums, counts, strict=True)]
        for name, nats, count, (true_nats, true_count) in zip(names, measured, numbers, wanted, strict=False):
            if stream not in found and (said := _difference(nats, count, true_nats, true_count, eps)):
                found[name] = said
    return found


def _scored(rows: Tensor, targets: Tensor) -> tuple[list[float], list[int]]:
    """Return the sum of the cross-entropy, in float64, and the number of targets of every part."""
    columns = targets.view(len(targets), -1)
    sums = torch.zeros(columns.shape[1], dtype=torch.float64)
    for some, wanted in zip(torch.split(rows, ROWS), torch.split(columns, ROWS), strict=True):
        nats = F.cross_entropy(some.flatten(0, -2).float(), wanted.flatten(), ignore_index=IGNORE, reduction="none")
        sums += nats.view(wanted.shape).sum(0).cpu()
    return sums.tolist(), (columns != IGNORE).sum(0).tolist()


def _difference(nats: float, count: int, true_nats: float, true_count: int, eps: float) -> str:
    if not math.isfinite(nats):
        return ""  # a separate finding
    if count != true_count:
        return f"`losses` counts {count} targets, the labels have {true_count}"
    if abs(nats - true_nats) <= max(SINGLE, SHARE * eps) * max(abs(nats), abs(true_nats)) or not count:
        return ""
    return (
        f"`losses` gives {nats / count:.4f} nats per target, and the cross-entropy of `logits` at the labels is "
        f"{true_nats / count:.4f}: another shift, weights, a further term, or 16 bits"
    )
