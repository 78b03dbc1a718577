"""The tensors of a batch, with what their names and dtypes say about them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.nest import shown, tensors_in
from rawloop.watch.subject import StepRecord, Subject

Kind = Literal["ids", "labels", "mask", "loss mask", "positions", "features", "other"]
Evidence = Mapping[str, float | int | str]
CHEAP = 1 << 16  # values of a host tensor that are read in every step: about 10 us
LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks", "label_mask")
TARGETS = ("target", "targets", "tgt")
INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
READABLE = INTEGERS | {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # torch orders no others


class Entry(NamedTuple):
    """A tensor of a batch: its path, the last name in it, its kind, and the index of its micro-batch.

    `is_cheap` says that it has values, and that reading them takes microseconds.
    """

    path: str
    name: str
    kind: Kind
    is_float: bool
    tensor: Tensor
    is_cheap: bool = False
    part: int = 0

    @property
    def shown(self) -> str:
        """The path as people read it."""
        return shown(self.path)


class Look:
    """A batch to look at. `full` allows reading from the device and reading large tensors."""

    def __init__(self, subject: Subject, record: StepRecord, full: bool) -> None:
        self.subject, self.record, self.full = subject, record, full
        self.parts = micro_batches(record.batch)
        self.entries = _entries(record.batch, split=len(self.parts) > 1 or self.parts[0] is not record.batch)
        self.ours = any(isinstance(part, Batch) for part in self.parts)  # rawloop counts its targets over all ranks
        self._extremes: dict[str, tuple[float, float]] = {}

    def readable(self, *kinds: Kind) -> list[Entry]:
        """Return the entries of these kinds that may be read."""
        return [entry for entry in self.entries if entry.kind in kinds and self.may_read(entry)]

    def may_read(self, entry: Entry) -> bool:
        """Whether a tensor has values, and reading them is cheap or allowed."""
        return entry.is_cheap or (self.full and entry.tensor.numel() > 0)

    def extremes(self, entry: Entry) -> tuple[float, float]:
        """Return the least and the largest value, read once; both are NaN if one value is."""
        if entry.path not in self._extremes:
            low, high = torch.aminmax(entry.tensor.detach())
            self._extremes[entry.path] = low.item(), high.item()
        return self._extremes[entry.path]

    def sample(self, entry: Entry, row: int) -> str:
        """Return the name of the sample in a row; empty if unknown."""
        part = self.parts[entry.part]
        if isinstance(part, Batch):
            return part.ids[row] if len(part.ids) == len(entry.tensor) else ""
        rows = {e.part: len(e.tensor) for e in (*self.entries, entry) if e.name == entry.name and e.tensor.dim()}
        row += sum(count for number, count in rows.items() if number < entry.part)
        return str(self.record.ids[row]) if row < len(self.record.ids) == sum(rows.values()) else ""

    def place(self, entry: Entry, row: int | None = None, position: int | None = None, module: str = "") -> Place:
        """Return the place of a value in a tensor."""
        sample = "" if row is None else self.sample(entry, row)
        return Place("data", module=module, tensor=entry.path, sample=sample, row=row, position=position)

    def finding(
        self, kind: str, what: str, place: Place, evidence: Evidence, advice: str, why: str = "", ordinary: bool = False
    ) -> Finding:
        """Return a finding about this batch, whose cause is in the data; `why` says it, or else `what`."""
        cause = Cause("data", why or what, place, evidence, advice)
        return Finding(kind, what, (cause,), self.record.step, self.subject.world.rank, ordinary)


def micro_batches(batch: Any) -> list[Any]:
    """Return the items of a list of nests, or the batch itself."""
    if type(batch) in (list, tuple) and batch and all(isinstance(x, dict | list | tuple | Batch) for x in batch):
        return list(batch)
    return [batch]


def config_value(model: nn.Module, name: str) -> Any:
    """Return a value of a transformers model's config; None without one."""
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def first_place(flags: Tensor) -> tuple[int, int | None]:
    """Return row and position of the first true value; the position is the last index, None with a row alone."""
    row, *others = flags.nonzero()[0].tolist()
    return row, others[-1] if others else None


def _entries(batch: Any, split: bool) -> list[Entry]:
    """Return the tensors of a batch, without those that lack most operations: nested, sparse, uint16, complex."""
    found = []
    for path, tensor in tensors_in(batch):
        if tensor.layout is torch.strided and not tensor.is_nested and tensor.dtype in READABLE:
            is_cheap = 0 < tensor.numel() <= CHEAP and tensor.is_cpu
            part = int(path.partition("/")[0]) if split else 0
            found.append(Entry(path, *_meaning(path, tensor.dtype, tensor.dim()), tensor, is_cheap, part))
    return found


@lru_cache(maxsize=1024)
def _meaning(path: str, dtype: torch.dtype, dim: int) -> tuple[str, Kind, bool]:
    """Return the name of a tensor, its kind, and whether it is of floats."""
    name, floats = path.rpartition("/")[2].lower(), dtype.is_floating_point
    if dim == 0:
        return name, "other", floats
    if name in LOSS_MASKS:
        return name, "loss mask", floats
    if "mask" in name or (floats and "bias" in name):
        return name, "mask", floats
    if "label" in name or name in TARGETS:
        return name, "labels", floats
    if "position" in name:
        return name, "positions", floats
    return name, "features" if floats else "other" if dtype.itemsize < 4 else "ids", floats
