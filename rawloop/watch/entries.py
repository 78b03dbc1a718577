"""The tensors of a batch, with what their names and dtypes say about them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.nest import shown, tensors_in
from rawloop.watch.subject import StepRecord, Subject

Kind = Literal["ids", "labels", "mask", "loss mask", "positions", "features", "other"]
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

    def __init__(self, subject: Subject, record: StepRecord, names: "Names", full: bool) -> None:
        self.subject, self.record, self.full = subject, record, full
        self.parts = micro_batches(record.batch)
        self.entries = names.entries(record.batch, self.parts)
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
        self,
        kind: str,
        what: str,
        place: Place,
        evidence: Mapping[str, float | int | str],
        advice: str,
        *,
        why: str = "",
        ordinary: bool = False,
    ) -> Finding:
        """Return a finding about this batch, whose cause is in the data; `why` says it, or else `what`."""
        cause = Cause("data", why or what, place, evidence, advice)
        return Finding(kind, what, (cause,), self.record.step, self.subject.world.rank, ordinary)


class Names:
    """Makes entries of a batch, and remembers what a path means."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, torch.dtype, int], tuple[str, Kind, bool]] = {}

    def entries(self, batch: Any, parts: list[Any]) -> list[Entry]:
        """Return the tensors of a batch, without those that lack most operations: nested, sparse, uint16, complex."""
        split = len(parts) > 1 or parts[0] is not batch
        found = []
        for path, tensor in tensors_in(batch):
            dtype = tensor.dtype
            if tensor.layout is not torch.strided or tensor.is_nested or dtype not in READABLE:
                continue
            key = (path, dtype, tensor.dim())
            if key not in self._known:
                name = path.rpartition("/")[2].lower()
                self._known[key] = name, _kind(name, tensor), dtype.is_floating_point
            is_cheap = 0 < tensor.numel() <= CHEAP and tensor.is_cpu
            part = int(path.partition("/")[0]) if split else 0
            found.append(Entry(path, *self._known[key], tensor, is_cheap, part))
        return found


def config_value(model: nn.Module, name: str) -> Any:
    """Return a value of a transformers model's config; None without one."""
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def stop_tokens(model: nn.Module) -> tuple[int, ...]:
    """Return the tokens that end a text of a transformers model; empty if none is known."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = config_value(model, "eos_token_id") if own is None else own
    return tuple(stops) if isinstance(stops, list | tuple) else () if stops is None else (int(stops),)


def micro_batches(batch: Any) -> list[Any]:
    """Return the items of a list of nests, or the batch itself."""
    if type(batch) in (list, tuple) and batch and all(isinstance(x, dict | list | tuple | Batch) for x in batch):
        return list(batch)
    return [batch]


def first_place(flags: Tensor) -> tuple[int, int | None]:
    """Return row and position of the first true value; the position is the last index, None with a row alone."""
    row, *others = flags.nonzero()[0].tolist()
    return row, others[-1] if others else None


def _kind(name: str, tensor: Tensor) -> Kind:
    floats = tensor.is_floating_point()
    if tensor.dim() == 0:
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
