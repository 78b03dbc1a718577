"""The tensors of a batch, with what their names and dtypes say about them."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rawloop.contracts import Batch
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.nest import shown, tensors_in
from rawloop.watch.subject import StepRecord, Subject

Kind = Literal["ids", "labels", "mask", "loss mask", "positions", "features", "other"]
CHEAP = 1 << 16  # values of a host tensor that are looked at in every step: about 10 us
LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks", "label_mask")
TARGETS = ("target", "targets", "tgt")


class Entry(NamedTuple):
    """A tensor of a batch: its path, the last name in it, its kind, and the index of its micro-batch."""

    path: str
    name: str
    kind: Kind
    tensor: Tensor
    part: int = 0

    @property
    def shown(self) -> str:
        """The path as people read it."""
        return shown(self.path)

    @property
    def is_cheap(self) -> bool:
        """Whether reading it takes microseconds."""
        return self.tensor.is_cpu and self.tensor.numel() <= CHEAP


class Look(NamedTuple):
    """A batch to look at. `full` allows reading from the device and reading large tensors."""

    subject: Subject
    record: StepRecord
    entries: Sequence[Entry]
    full: bool

    @property
    def ours(self) -> bool:
        """Whether rawloop has made the batch, whose targets it has counted over all ranks."""
        return any(isinstance(part, Batch) for part in _parts(self.record.batch))

    def readable(self, *kinds: Kind) -> Iterator[Entry]:
        """Yield the entries of these kinds that may be read."""
        return (e for e in self.entries if e.kind in kinds and e.tensor.numel() and (self.full or e.is_cheap))

    def sample(self, entry: Entry, row: int) -> str:
        """Return the name of the sample in a row; empty if unknown."""
        parts = _parts(self.record.batch)
        part = parts[entry.part] if entry.part < len(parts) else None
        if isinstance(part, Batch):
            return part.ids[row] if len(part.ids) == len(entry.tensor) else ""
        rows = [len(e.tensor) for e in self.entries if e.name == entry.name and e.tensor.dim()]
        ids = self.record.ids
        if len(parts) > 1 and len(ids) == sum(rows):
            row += sum(len(e.tensor) for e in self.entries if e.name == entry.name and e.part < entry.part)
        elif not entry.tensor.dim() or len(ids) != len(entry.tensor):
            return ""
        return str(ids[row])

    def place(self, entry: Entry, row: int | None = None, position: int | None = None, module: str = "") -> Place:
        """Return the place of a value in a tensor."""
        sample = "" if row is None else self.sample(entry, row)
        return Place("data", module=module, tensor=entry.path, sample=sample, row=row, position=position)

    def finding(self, kind: str, what: str, *causes: Cause, ordinary: bool = False) -> Finding:
        """Return a finding about this batch."""
        return Finding(kind, what, causes, self.record.step, self.subject.world.rank, ordinary)


class Names:
    """Makes entries of a batch, and remembers what a path means."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, Any, int], tuple[str, Kind]] = {}

    def entries(self, batch: Any) -> list[Entry]:
        """Return the tensors of a batch, without nested and sparse ones, which lack most operations."""
        split = len(_parts(batch)) > 1 or _parts(batch)[0] is not batch
        found = []
        for path, tensor in tensors_in(batch):
            if tensor.layout is not torch.strided or tensor.is_nested:
                continue
            key = (path, tensor.dtype, tensor.dim())
            if key not in self._kinds:
                name = path.rpartition("/")[2].lower()
                self._kinds[key] = name, _kind(name, path, tensor)
            found.append(Entry(path, *self._kinds[key], tensor, int(path.partition("/")[0]) if split else 0))
        return found


def _parts(batch: Any) -> list[Any]:
    """Return the micro-batches of a batch: the items of a list of nests, or the batch itself."""
    if type(batch) in (list, tuple) and batch and all(isinstance(x, dict | list | tuple | Batch) for x in batch):
        return list(batch)
    return [batch]


def _kind(name: str, path: str, tensor: Tensor) -> Kind:
    floats = tensor.is_floating_point()
    if tensor.is_complex() or tensor.dim() == 0:
        return "other"
    if name in LOSS_MASKS:
        return "loss mask"
    if "mask" in name or (floats and "bias" in name):
        return "mask"
    if "label" in name or name in TARGETS:
        return "labels"
    if "position" in name:
        return "positions"
    if floats:
        return "features"
    return "other" if tensor.dtype.itemsize < 4 else "ids"
