"""Features of a batch: values that are not finite, of an absurd size, constant, or never scaled."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rawloop.watch.entries import Entry, Look
from rawloop.watch.findings import Cause, Finding
from rawloop.watch.history import History

ABSURD = 100.0  # times the usual largest value
KNOWN = 5  # batches, before a size is usual
PCM = 1024.0  # audio between -1 and 1 has no such value; 16-bit integers do
PIXELS = 16.0
LONG = 400  # values in a row of audio


class Features:
    """Looks at the float tensors of batches, and remembers their sizes."""

    def __init__(self) -> None:
        self._sizes: dict[str, History] = {}

    def find(self, look: Look, ill: bool = False) -> Iterator[Finding]:
        """Find bad features. `ill` means that the step has gone wrong: what may be ordinary is then an alarm."""
        for entry in look.readable("features", "labels", "mask"):
            if not entry.tensor.is_floating_point() or entry.tensor.numel() == 0:
                continue
            low, high = (float(value) for value in torch.aminmax(entry.tensor))  # both are NaN with a NaN
            masks = entry.kind == "mask" or _is_mask(entry.tensor, low, high)
            if not (high < float("inf") and (masks or low > -float("inf"))):
                yield _not_finite(look, entry, masks)
            elif not masks and entry.kind == "features":
                yield from self._find_size(look, entry, max(-low, high))
                if look.full:
                    yield from _find_constant(look, entry, ill)
                    yield from _find_unscaled(look, entry, low, high)

    def _find_size(self, look: Look, entry: Entry, size: float) -> Iterator[Finding]:
        path = entry.path.partition("/")[2] if look.ours else entry.path
        history = self._sizes.setdefault(path, History(least=KNOWN))
        usual = history.median if history.is_known else 0.0
        if entry.tensor.dim() > 1 and ((0 < ABSURD * usual < size) or (not history.is_known and look.full)):
            rows = _row_sizes(entry.tensor)
            usual = usual or (float(rows.median()) if len(rows) > 3 else 0.0)
        if 0 < ABSURD * usual < size:
            row, position = _where(entry.tensor.abs().double() == entry.tensor.abs().double().amax())
            what = f"'{entry.shown}' has the value {size:.4g} at row {row}, {size / usual:.0f} times its usual largest"
            advice = "correct or leave out the sample, or normalise the features"
            evidence = {"largest": size, "usual largest": usual}
            cause = Cause("data", "a feature is absurdly large", look.place(entry, row, position), evidence, advice)
            yield look.finding("features_absurd", what, cause)
        history.add(size)


def _is_mask(tensor: Tensor, low: float, high: float) -> bool:
    """Whether a tensor without a telling name is an additive mask: 0, and one value that hides."""
    return low < -1e4 and high == 0 and bool(((tensor == 0) | (tensor == low)).all())


def _not_finite(look: Look, entry: Entry, masks: bool) -> Finding:
    bad = entry.tensor.isnan() | (entry.tensor == float("inf")) if masks else ~entry.tensor.isfinite()
    row, position = _where(bad)
    value = float(entry.tensor[bad][0])
    rows = int(bad.flatten(1).any(1).sum()) if bad.dim() > 1 else int(bad.sum())
    what = f"'{entry.shown}' has the value {value} at row {row}"
    evidence: dict[str, float | int | str] = {"values": int(bad.sum()), "rows": rows, "of rows": len(bad)}
    advice = "correct the source of these numbers (a log of 0, a division by a zero deviation), or leave the sample out"
    cause = Cause("data", "a feature is not finite", look.place(entry, row, position), evidence, advice)
    return look.finding("features_not_finite", what, cause)


def _find_constant(look: Look, entry: Entry, ill: bool) -> Iterator[Finding]:
    values = entry.tensor.flatten(1) if entry.tensor.dim() > 1 else entry.tensor[None, :0]
    if values.shape[1] < 16 or len(values) < 2:
        return
    constant = values.amax(1) == values.amin(1)
    rows = [row for row, flag in enumerate(constant.tolist()) if flag]
    if not rows:
        return
    value = float(values[rows[0], 0])
    alone = not any(other.kind == "ids" and other is not entry for other in look.entries)
    whole = len(rows) == len(values)
    what = f"{'every row' if whole else f'row {rows[0]}'} of '{entry.shown}' is constant"
    evidence = {"constant rows": len(rows), "rows": len(values), "value": value}
    advice = "look whether the file was decoded: a constant row teaches nothing, and normalising it divides by zero"
    cause = Cause("data", "a sample has empty features", look.place(entry, rows[0]), evidence, advice)
    yield look.finding("features_constant", what, cause, ordinary=not (ill or (whole and alone)))


def _find_unscaled(look: Look, entry: Entry, low: float, high: float) -> Iterator[Finding]:
    """Find audio as 16-bit integers and pictures as bytes, in float tensors."""
    tensor = entry.tensor
    audio = low < -PCM < PCM < high <= 32767 and low >= -32768 and tensor.shape[-1] >= LONG
    picture = any(word in entry.name for word in ("pixel", "image")) and low >= 0 and PIXELS < high <= 255
    if (audio or picture) and bool((tensor == tensor.round()).all()):
        unit = "32768" if audio else "255"
        what = f"'{entry.shown}' holds whole numbers from {low:g} to {high:g}: {'16-bit audio' if audio else 'bytes'}"
        advice = f"divide by {unit}, and normalise as the model's processor does"
        cause = Cause("data", "the values were never scaled", look.place(entry), {"least": low, "most": high}, advice)
        yield look.finding("features_unscaled", what, cause, ordinary=picture)  # some models scale pictures


def _row_sizes(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).abs().amax(1)


def _where(flags: Tensor) -> tuple[int, int | None]:
    """Return row and position of the first true value; the position is the last index."""
    first = [int(index) for index in flags.nonzero()[0]]
    return first[0], first[-1] if len(first) > 1 else None
