"""Finds the rows of a batch that make a pass not finite alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

MOST_RUNS = 64
MOST_GUILTY = 8  # without a row that is finite: all of them are guilty, or nearly


@dataclass
class Rows:
    """Rows that alone make a pass not finite.

    Args:
        size: rows in the batch; 0 if unknown.
        guilty: those that do, in order.
        tried: rows that were decided.
        runs: passes that it took.
    """

    size: int
    guilty: list[int] = field(default_factory=list)
    tried: int = 0
    runs: int = 0

    @property
    def complete(self) -> bool:
        """Whether every row was decided."""
        return self.tried == self.size


def guilty_rows(size: int, finite: Callable[[Sequence[int]], bool], most: int = MOST_RUNS) -> Rows:
    """Return the rows that alone make a pass not finite. Halves that are finite are not divided further.

    Args:
        size: rows in the batch.
        finite: runs the pass with the batch's rows replaced by the rows of these indices (as many as the batch has),
            and returns whether it is finite.
        most: passes to run at most.
    """
    found = Rows(size)
    ahead = [list(range(size))] if size > 1 else []
    known_bad = True  # the whole batch
    while ahead and found.runs < most and (len(found.guilty) < MOST_GUILTY or found.tried > len(found.guilty)):
        part = ahead.pop()
        if not known_bad:
            found.runs += 1
            if finite([part[i % len(part)] for i in range(size)]):
                found.tried += len(part)
                continue
        known_bad = False
        if len(part) == 1:
            found.guilty += part
            found.tried += 1
        else:
            middle = len(part) // 2
            ahead += [part[middle:], part[:middle]]
    return found


def batch_size(tensors: Iterable[Tensor], ids: Sequence[str]) -> int:
    """Return the number of samples: of the names, or else the most common first dimension; 0 without tensors."""
    if ids:
        return len(ids)
    first = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
    return first.most_common(1)[0][0] if first else 0
