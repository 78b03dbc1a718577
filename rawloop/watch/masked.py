"""Rows and batches of which nothing is seen or nothing is scored: their softmax or their mean is 0/0."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rawloop.contracts import IGNORE
from rawloop.watch.entries import Entry, Look
from rawloop.watch.findings import Cause, Finding

HIDDEN = -1e4  # an additive mask with this or less hides a position, in any dtype
MUCH_PADDING = 0.8


def find_masked(look: Look, ill: bool = False) -> Iterator[Finding]:
    """Find rows and batches that are fully masked, and batches that are mostly padding.

    A row that fills up a batch, of which nothing is seen and nothing is scored, is ordinary unless the step is `ill`.
    """
    unscored = {} if look.ours else {part: _unscored(look, part) for part in {entry.part for entry in look.entries}}
    fillers: dict[int, set[int]] = {}
    for entry in look.readable("mask"):
        if entry.tensor.dim() > 1 and _is_attention(entry, look):
            hidden, value = _hidden_rows(entry.tensor, "key_padding_mask" in entry.name)
            fillers[entry.part] = set() if ill else hidden & unscored.get(entry.part, set())
            yield from _find_hidden(look, entry, hidden, value, fillers[entry.part])
            if look.full:
                yield from _find_padding(look, entry)
    yield from _find_unscored(look, fillers)


def _is_attention(entry: Entry, look: Look) -> bool:
    """Whether a mask hides positions from attention. Other masks, such as those of images, may well be all zero."""
    name = entry.name
    if name == "mask":
        shapes = [other.tensor.shape[:2] for other in look.entries if other.kind in ("ids", "features")]
        return entry.tensor.shape[:2] in shapes and entry.tensor.dim() == 2
    return "cross" not in name and ("attention_mask" in name or "attn_mask" in name or "key_padding_mask" in name)


def _find_hidden(
    look: Look, entry: Entry, hidden: set[int], value: float | int, fillers: set[int]
) -> Iterator[Finding]:
    mask = entry.tensor
    whole = len(hidden) == len(mask)
    if hidden:
        first, ordinary = _first(hidden, fillers)
        which = "every row" if whole else f"row {first}"
        what = f"{which} of '{entry.shown}' hides every position"
        place = look.place(entry, first)
        advice = "leave the sample out, or correct the length or the padding that its mask is made from"
        cause = Cause("data", what, place, {"hidden rows": len(hidden), "rows": len(mask), "value": value}, advice)
        yield look.finding("batch_masked" if whole else "row_masked", what, cause, ordinary=ordinary and not whole)
    elif mask.is_floating_point() and mask.dim() > 2 and float(mask.amin()) == float("-inf"):
        yield from _find_hidden_query(look, entry)


def _first(rows: set[int], fillers: set[int]) -> tuple[int, bool]:
    """Return the first row that does not fill up the batch; or the first, and that all do."""
    return min(rows - fillers or rows), not rows - fillers


def _find_hidden_query(look: Look, entry: Entry) -> Iterator[Finding]:
    """Find a query that sees no key because all are minus infinity: its softmax is NaN."""
    blind = (entry.tensor.amax(-1) == float("-inf")).nonzero()
    if len(blind):
        row, *_, query = (int(index) for index in blind[0])
        what = f"all of '{entry.shown}' is minus infinity for the query at row {row}, position {query}"
        advice = "let each query see itself, or use torch.finfo(dtype).min: a softmax over minus infinity is NaN"
        evidence = {"queries that see nothing": len(blind)}
        yield look.finding("query_masked", what, Cause("data", what, look.place(entry, row, query), evidence, advice))


def _hidden_rows(mask: Tensor, true_hides: bool) -> tuple[set[int], float | int]:
    """Return the rows that hide all, and the value that hides."""
    flags, value = _hides_all(mask, true_hides)
    return {row for row, hides in enumerate(flags) if hides}, value


def _hides_all(mask: Tensor, true_hides: bool) -> tuple[list[bool], float | int]:
    if true_hides and mask.dtype == torch.bool:
        return mask.flatten(1).all(1).tolist(), 1
    top = mask.flatten(1).amax(1).tolist()
    if not mask.is_floating_point():
        return [value <= 0 for value in top], 0
    lowest = float(mask.amin())
    if lowest <= HIDDEN:
        return [value <= HIDDEN for value in top], lowest
    # Of floats from 0 on, 0 hides if 1 shows; a mask of zeros alone may be an additive one that hides nothing.
    return [value == 0 < max(top) for value in top], 0


def _find_padding(look: Look, entry: Entry) -> Iterator[Finding]:
    mask = entry.tensor
    if mask.dim() != 2 or mask.is_floating_point() or "key_padding" in entry.name:
        return
    share = 1 - float((mask != 0).double().mean())
    if MUCH_PADDING < share < 1:
        lengths = (mask != 0).sum(1)
        longest = int(lengths.argmax())
        what = f"{share:.0%} of '{entry.shown}' is padding"
        evidence = {"longest": int(lengths.max()), "median length": int(lengths.median())}
        advice = "batch samples of similar length together, or pack them"
        cause = Cause("data", "one sample is much longer than the others", look.place(entry, longest), evidence, advice)
        yield look.finding("much_padding", what, cause, ordinary=True)


def _labels(look: Look) -> list[Entry]:
    labels = [entry for entry in look.entries if entry.kind in ("labels", "loss mask")]
    return [entry for entry in labels if not entry.tensor.is_floating_point() or entry.kind == "loss mask"]


def _unscored(look: Look, part: int) -> set[int]:
    """Return the rows of a micro-batch without a target in any of its labels, if these may be read."""
    labels = [entry for entry in _labels(look) if entry.part == part and entry.tensor.dim() > 1]
    same = len({len(entry.tensor) for entry in labels}) == 1
    if not same or not all(look.full or entry.is_cheap for entry in labels):
        return set()
    scored = zip(*map(_scored_rows, labels), strict=True)
    return {row for row, flags in enumerate(scored) if not any(flags)}


def _find_unscored(look: Look, fillers: dict[int, set[int]]) -> Iterator[Finding]:
    """Find rows without a target in any labels of their micro-batch, and micro-batches without one."""
    labels = _labels(look)
    if look.ours:  # a micro-batch may lack targets there: the window counts them over all micro-batches and ranks
        empty = [entry for entry in labels if not entry.tensor.numel()]
        if labels and len(empty) == len(labels):
            yield _unscored_batch(look, empty[0], 0)
        return
    for part in dict.fromkeys(entry.part for entry in labels):
        mine = [entry for entry in labels if entry.part == part]
        if all(look.full or entry.is_cheap for entry in mine):
            yield from _find_unscored_rows(look, mine, fillers.get(part, set()))


def _find_unscored_rows(look: Look, labels: list[Entry], fillers: set[int]) -> Iterator[Finding]:
    entry = labels[0]
    if not any(any(_scored_rows(one)) for one in labels):
        yield _unscored_batch(look, entry, len(entry.tensor))
        return
    empty = set() if any(other.tensor.dim() < 2 for other in labels) else _unscored(look, entry.part)
    if empty:
        first, ordinary = _first(empty, fillers)
        what = f"row {first} of '{entry.shown}' has no target"
        advice = "leave samples without targets out; a mean over each sample's targets is 0/0 for them"
        evidence: dict[str, float | int | str] = {"rows without a target": len(empty), "rows": len(entry.tensor)}
        cause = Cause("data", f"all its labels are {IGNORE}", look.place(entry, first), evidence, advice)
        # Of a short text, masking at random may choose no token.
        ordinary = ordinary or "MaskedLM" in type(look.subject.model).__name__
        yield look.finding("row_without_targets", what, cause, ordinary=ordinary)


def _scored_rows(entry: Entry) -> list[bool]:
    if not entry.tensor.numel():
        return [False] * len(entry.tensor)
    top: list[float] = entry.tensor.flatten(1).amax(1).tolist() if entry.tensor.dim() > 1 else entry.tensor.tolist()
    return [value > 0 for value in top] if entry.kind == "loss mask" else [value >= 0 for value in top]


def _unscored_batch(look: Look, entry: Entry, rows: int) -> Finding:
    what = f"the batch has no target: all of '{entry.shown}' is {IGNORE if entry.kind == 'labels' else 0}"
    advice = "leave such batches out: their mean loss is 0/0, and their gradient zero"
    cause = Cause("data", "no position of the batch is scored", look.place(entry), {"rows": rows}, advice)
    return look.finding("batch_without_targets", what, cause)
