"""Rows and batches of which nothing is seen or nothing is scored: their softmax or their mean is 0/0."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rawloop.contracts import IGNORE
from rawloop.watch.entries import Entry, Look
from rawloop.watch.findings import Finding

HIDDEN = -1e4  # an additive mask with this or less hides a position, in any dtype
ATTENTION = ("attention_mask", "attn_mask", "key_padding_mask")


def find_masked(look: Look, ill: bool = False) -> Iterator[Finding]:
    """Find rows and micro-batches that are fully masked.

    A row that fills up a batch, of which nothing is seen and nothing is scored, is ordinary unless the step is `ill`.
    """
    labels = [e for e in look.entries if e.kind == "loss mask" or (e.kind == "labels" and not e.is_float)]
    by_part = {part: [entry for entry in labels if entry.part == part] for part in {entry.part for entry in labels}}
    if look.ours:  # its micro-batches may lack targets: the window counts them over all micro-batches and ranks
        by_part = {} if any(entry.tensor.numel() for entry in labels) or not labels else {0: labels}
    unscored = {part: _unscored(look, mine) for part, mine in by_part.items()}
    fillers: dict[int, set[int]] = {}
    for mask in look.readable("mask"):
        hidden = _hidden(look, mask)
        if hidden and _is_attention(look, mask):
            fillers[mask.part] = set() if ill else hidden & (unscored.get(mask.part) or set())
            yield _hides(look, mask, hidden, hidden - fillers[mask.part])
    for part, rows in unscored.items():
        if rows is not None:
            yield _no_target(look, by_part[part][0], rows, rows - fillers.get(part, set()))


def _is_attention(look: Look, mask: Entry) -> bool:
    """Whether a mask hides positions from attention. Other masks, such as those of images, may well be all zero."""
    if mask.name == "mask":
        shapes = [other.tensor.shape[:2] for other in look.entries if other.kind in ("ids", "features")]
        return mask.tensor.dim() == 2 and mask.tensor.shape in shapes
    return "cross" not in mask.name and any(word in mask.name for word in ATTENTION)


def _hidden(look: Look, entry: Entry) -> set[int]:
    """Return the rows that hide every position."""
    mask, (low, high) = entry.tensor, look.extremes(entry)
    if mask.dim() < 2:
        return set()
    if "key_padding_mask" in entry.name and mask.dtype == torch.bool:  # torch's own, which is true where it hides
        return {row for row, hides in enumerate(mask.flatten(1).all(1).tolist()) if hides} if high else set()
    # Of floats from 0 on, 0 hides if 1 shows; a mask of zeros alone may be an additive one that hides nothing.
    if low > 0 or (entry.is_float and not (low <= HIDDEN or low == 0 < high)):
        return set()
    hides = HIDDEN if low <= HIDDEN else 0
    return {row for row, top in enumerate(_largest(mask)) if top <= hides}


def _unscored(look: Look, labels: Sequence[Entry]) -> set[int] | None:
    """Return the rows of a micro-batch without a target in any of its labels; None without such rows."""
    if not any(entry.tensor.numel() for entry in labels):
        return set(range(len(labels[0].tensor)))
    if not all(map(look.may_read, labels)) or any(_is_target(entry, look.extremes(entry)[0]) for entry in labels):
        return None
    if not any(_is_target(entry, look.extremes(entry)[1]) for entry in labels):
        return set(range(len(labels[0].tensor)))
    if len({len(entry.tensor) for entry in labels}) > 1 or any(entry.tensor.dim() == 1 for entry in labels):
        return None
    scored = [[_is_target(entry, top) for top in _largest(entry.tensor)] for entry in labels]
    return {row for row, flags in enumerate(zip(*scored, strict=True)) if not any(flags)} or None


def _is_target(entry: Entry, value: float) -> bool:
    return not (value <= 0 if entry.kind == "loss mask" else value < 0)  # NaN is no sign of a missing target


def _largest(tensor: Tensor) -> list[float]:
    """Return the largest value of each row."""
    return list(tensor.amax(tuple(range(1, tensor.dim()))).tolist())


def _hides(look: Look, mask: Entry, hidden: set[int], alarming: set[int]) -> Finding:
    whole, row = len(hidden) == len(mask.tensor), min(alarming or hidden)
    what = f"{'every row' if whole else f'row {row}'} of '{mask.shown}' hides every position"
    advice = "leave the sample out, or correct the length or the padding that its mask is made from"
    evidence = {"hidden rows": len(hidden), "rows": len(mask.tensor)}
    kind, ordinary = "batch_masked" if whole else "row_masked", not (whole or alarming)
    return look.finding(kind, what, look.place(mask, row), evidence, advice, ordinary=ordinary)


def _no_target(look: Look, labels: Entry, unscored: set[int], alarming: set[int]) -> Finding:
    value, rows = 0 if labels.kind == "loss mask" else IGNORE, len(labels.tensor)
    if len(unscored) == rows:
        what = f"the batch has no target: all of '{labels.shown}' is {value}"
        advice = "leave such batches out: their mean loss is 0/0, and their gradient zero"
        return look.finding("batch_without_targets", what, look.place(labels), {"rows": rows}, advice)
    row = min(alarming or unscored)
    what = f"row {row} of '{labels.shown}' has no target: all its labels are {value}"
    advice = "leave samples without targets out; a mean over each sample's targets is 0/0 for them"
    evidence = {"rows without a target": len(unscored), "rows": rows}
    # Of a short text, masking at random may choose no token.
    ordinary = not alarming or "MaskedLM" in type(look.subject.model).__name__
    place = look.place(labels, row)
    return look.finding("row_without_targets", what, place, evidence, advice, ordinary=ordinary)
