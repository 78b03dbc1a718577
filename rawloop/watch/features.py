"""Features of a batch: values that are not finite, or of an absurd size."""

from collections.abc import Iterator

from rawloop.watch.entries import Entry, Look, first_place
from rawloop.watch.findings import Finding
from rawloop.watch.history import History

ABSURD = 100.0  # times the usual largest value
KNOWN = 5  # batches, before a size is usual
INFINITE = float("inf")


class Features:
    """Looks at the float tensors of batches, and remembers their sizes."""

    def __init__(self) -> None:
        self._sizes: dict[str, History] = {}

    def find(self, look: Look) -> Iterator[Finding]:
        """Find bad features."""
        for entry in look.readable("features", "labels", "mask"):
            if not entry.is_float:
                continue
            low, high = look.extremes(entry)
            # a mask without a telling name has 0, and one value that hides
            additive = low < -1e4 and high == 0 and bool(((entry.tensor == 0) | (entry.tensor == low)).all())
            masks = entry.kind == "mask" or additive
            if not (high < INFINITE and (masks or low > -INFINITE)):
                yield _not_finite(look, entry, masks)
            elif entry.kind == "features" and not masks:
                yield from self._find_absurd(look, entry, low, high)

    def _find_absurd(self, look: Look, entry: Entry, low: float, high: float) -> Iterator[Finding]:
        tensor, size = entry.tensor, max(-low, high)
        path = entry.path.partition("/")[2] if look.ours else entry.path
        history = self._sizes.setdefault(path, History(least=KNOWN))
        usual = history.median if history.is_known else 0.0
        if not history.is_known and look.full and tensor.dim() > 1 and len(tensor) > 3:
            usual = float(tensor.flatten(1).abs().amax(1).median())
        history.add(size)
        if 0 < ABSURD * usual < size:
            row, position = first_place(tensor == (high if high == size else low))
            what = f"'{entry.shown}' has the value {size:.4g} at row {row}, {size / usual:.0f} times its usual largest"
            advice = "correct or leave out the sample, or normalise the features"
            evidence = {"largest": size, "usual largest": usual}
            yield look.finding("features_absurd", what, look.place(entry, row, position), evidence, advice)


def _not_finite(look: Look, entry: Entry, masks: bool) -> Finding:
    bad = entry.tensor.isnan() | (entry.tensor == INFINITE) if masks else ~entry.tensor.isfinite()
    row, position = first_place(bad)
    what = f"'{entry.shown}' has the value {float(entry.tensor[bad][0])} at row {row}"
    rows = int(bad.flatten(1).any(1).sum()) if bad.dim() > 1 else int(bad.sum())
    evidence = {"values": int(bad.sum()), "rows": rows, "of rows": len(bad)}
    advice = "correct the source of these numbers (a log of 0, a division by a zero deviation), or leave the sample out"
    return look.finding("features_not_finite", what, look.place(entry, row, position), evidence, advice)
