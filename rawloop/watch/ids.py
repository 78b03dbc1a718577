"""Ids outside the embedding or the head that they go to, told by name before the look-up fails.

On the CPU torch raises an IndexError without a name, on a GPU a device-side assert ends the process. An id beyond the
share of its codebook in a joint embedding raises nothing: it reads another codebook's row.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.contracts import IGNORE
from rawloop.watch.entries import Entry, Look, config_value, first_place
from rawloop.watch.findings import Finding

MOST_CODEBOOKS = 64
CLASS_NAMES = ("y", "class", "classes", "cls", "category")  # other integers, such as indices of samples, are no labels
EXPLAINS = ("id_outside_embedding", "label_outside_head", "sequence_too_long")  # an IndexError, or a RuntimeError
TOKENIZER = "use the tokenizer or codec that belongs to the model, or resize the model's embeddings"
OUTSIDE = "an id is outside the embedding"
PART = "the look at ids"


class Codebook(NamedTuple):
    """The ids at one place of a dimension of a tensor; the whole tensor without a dimension."""

    dim: int | None = None
    number: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """Return these ids of a tensor."""
        return tensor if self.dim is None else tensor.select(self.dim, self.number)


class Table(NamedTuple):
    """An embedding that ids go to: its module, and the number of rows that they may choose."""

    module: str
    size: int


class Ids:
    """Learns where ids go, by hooks on embeddings and on the model's output, and compares batches with their sizes."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[Codebook, Table]] = {}  # by the path of a tensor
        self._heads: dict[str, int] = {}  # the classes of logits whose shape fits; 0 if they are none
        self._known_heads: dict[str, int] = {}  # the classes of a transformers model; 0 for other labels
        self._hooks = ExitStack()
        self._look: Look | None = None
        self._seen: list[Finding] = []
        self._doubtful: list[Finding] = []

    def find(self, look: Look) -> Iterator[Finding]:
        """Compare a batch, before its forward pass, with what is known; on full looks, prepare to learn."""
        for entry in look.readable("ids", "positions", "labels", "other"):
            if not entry.is_float:
                yield from self._compare(look, entry)
        self.close()
        self._look = look
        if look.full:
            yield from _find_long(look)
            self._learn(look)

    def found(self) -> Iterator[Finding]:
        """Yield what the hooks have found."""
        seen, self._seen = self._seen, []
        yield from seen

    def failed(self) -> Iterator[Finding]:
        """Yield what explains a step that did not come to its end."""
        if self._look is not None and not self._look.full:
            yield from _find_long(self._look)
        self._seen += self._doubtful
        self._doubtful = []
        yield from self.found()

    def ended(self) -> Iterator[Finding]:
        """Yield what the hooks have found in a step that has come to its end."""
        for finding in self._doubtful:  # its label was no class, and nothing failed: as for a contrastive loss
            self._heads[finding.cause.place.tensor] = 0
        self._doubtful = []
        self.close()
        yield from self.found()

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()
        self._look = None

    def _learn(self, look: Look) -> None:
        model, shield = look.subject.model, look.subject.guard.shield
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                hook = shield(PART, partial(self._on_embedding, name))
                self._hooks.callback(module.register_forward_pre_hook(hook).remove)
        self._hooks.callback(model.register_forward_hook(shield(PART, self._on_output)).remove)

    @torch.no_grad()
    def _on_embedding(self, name: str, module: nn.Embedding, given: tuple[Any, ...]) -> None:
        ids = given[0] if given else None
        if self._look is not None and isinstance(ids, Tensor) and ids.numel() and not ids.is_floating_point():
            with torch._C.DisableTorchFunction():  # a loop that calls the embedding itself has its operations recorded
                self._learn_table(self._look, ids, Table(name, module.num_embeddings))

    def _learn_table(self, look: Look, ids: Tensor, table: Table) -> None:
        for entry in look.entries:
            if entry.kind in ("ids", "positions", "other") and not entry.is_float and _tells(entry.tensor, ids):
                known = self._tables.get(entry.path, {})
                if found := _fed(entry.tensor.cpu(), ids.cpu(), table, known):
                    self._tables[entry.path] = known | found
                    self._seen += self._compare(look, entry)
                    return
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= table.size:
            bad = low if low < 0 else high
            what = f"the embedding '{table.module}' is given the id {bad}, and has rows 0 to {table.size - 1}"
            advice = f"shorten the sequence if these are positions; otherwise {TOKENIZER}"
            first = ((ids < 0) | (ids >= table.size)).nonzero()[0].tolist()
            row, position = first[0] if len(first) > 1 else None, first[-1] if first else None
            place = look.place(Entry("", "", "ids", False, ids), row, position, table.module)
            evidence = {"least": low, "most": high}
            self._seen.append(look.finding("id_outside_embedding", what, place, evidence, advice, why=OUTSIDE))

    def _on_output(self, model: nn.Module, given: Any, output: Any) -> None:
        look, logits = self._look, _logits(output)
        if look is None or logits is None:
            return
        labels = [entry for entry in look.entries if entry.kind == "labels"]
        unfed = [entry for entry in look.entries if entry.kind == "ids" and entry.path not in self._tables]
        labels = labels or [entry for entry in unfed if entry.name in CLASS_NAMES or entry.name.isdigit()][:1]
        for entry in labels:
            if size := _classes(model, logits, entry.tensor):
                self._doubtful += _outside_head(look, entry, self._heads.setdefault(entry.path, size), strict=False)

    def _compare(self, look: Look, entry: Entry) -> Iterator[Finding]:
        tables = self._tables.get(entry.path)
        if tables is not None:
            yield from _outside(look, entry, tables)
        elif entry.kind in ("labels", "ids"):
            if entry.path not in self._known_heads:
                self._known_heads[entry.path] = _head_of(look.subject.model, entry)
            if size := self._known_heads[entry.path]:
                yield from _outside_head(look, entry, size, strict=True)
            else:
                self._doubtful += _outside_head(look, entry, self._heads.get(entry.path, 0), strict=False)


def _tells(tensor: Tensor, ids: Tensor) -> bool:
    """Whether equal values mean the same tensor: constant ones, such as types that are all 0, are alike by chance."""
    if not tensor.numel():
        return False
    shared = tensor.device == ids.device and tensor.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()
    return shared or bool((tensor != tensor.flatten()[0]).any())


def _fed(there: Tensor, here: Tensor, table: Table, known: dict[Codebook, Table]) -> dict[Codebook, Table]:
    """Return which part of a tensor an embedding is given: all (or the first positions), or codebooks; or nothing."""
    same = there.shape[:-1] == here.shape[:-1] and here.shape[-1:] <= there.shape[-1:] and here.dim() > 0
    if same and torch.equal(there[..., : here.shape[-1]].to(here.dtype), here):
        return {Codebook(): min(table, known.get(Codebook(), table), key=lambda one: one.size)}
    for dim in reversed(range(1, there.dim())):
        count = there.shape[dim]
        codebooks = [Codebook(dim, number) for number in range(count)] if 1 < count <= MOST_CODEBOOKS else []
        if codebooks and there.shape == here.shape:
            offsets = (here - there).movedim(dim, -1).reshape(-1, count)
            step = int(offsets[0, 1] - offsets[0, 0])
            joint = step > 1 and count * step <= table.size <= (count + 1) * step
            if joint and bool((offsets == torch.arange(count) * step).all()):
                return dict.fromkeys(codebooks, Table(table.module, step))
        # two codebooks may be equal by chance: first those that are not known to go to another embedding
        for one in sorted(codebooks, key=lambda one: known.get(one, table).module != table.module):
            if one.of(there).shape == here.shape and torch.equal(one.of(there).to(here.dtype), here):
                return {one: table}
    return {}


def _outside(look: Look, entry: Entry, tables: dict[Codebook, Table]) -> Iterator[Finding]:
    low, high = look.extremes(entry)
    if low >= 0 and high < min(table.size for table in tables.values()):
        return
    for codebook, (module, size) in tables.items():
        ids = codebook.of(entry.tensor)
        bad = (ids < 0) | (ids >= size)
        if not bool(bad.any()):
            continue
        row, position = first_place(bad)
        value, wrong = int(ids[bad][0]), int(bad.sum())
        evidence: dict[str, float | int | str] = {"id": value, "valid ids": size, "wrong ids": wrong}
        of = "" if codebook.dim is None else f" of codebook {codebook.number}"
        evidence |= {} if codebook.dim is None else {"codebook": codebook.number}
        where = f"row {row}" if position is None else f"row {row}, position {position}"
        what = f"'{entry.shown}' has the id {value}{of} at {where}, and the embedding '{module}' has {size} rows for it"
        place = look.place(entry, row, position, module)
        yield look.finding("id_outside_embedding", what, place, evidence, TOKENIZER, why=OUTSIDE)
        return


def _outside_head(look: Look, entry: Entry, size: int, strict: bool) -> Iterator[Finding]:
    """Find labels that are no class. A loss of the user's own may ignore -1; `strict` is a loss that ignores -100."""
    low, high = look.extremes(entry)
    if not size or (high < size and (low >= 0 or low == IGNORE or (low == -1 and not strict))):
        return
    if low < 0 and high < size and "CTC" in type(look.subject.model).__name__:  # these ignore every negative label
        return
    wrong = (entry.tensor >= size) | ((entry.tensor < 0) & (entry.tensor != IGNORE))
    row, position = first_place(wrong)
    value = int(entry.tensor[wrong][0])
    what = f"'{entry.shown}' has the label {value} at row {row}, and the model's head has the classes 0 to {size - 1}"
    evidence = {"label": value, "classes": size, "wrong labels": int(wrong.sum())}
    advice = f"label positions without a target {IGNORE}; otherwise {TOKENIZER}"
    place, why = look.place(entry, row, position), "a label is no class of the head"
    yield look.finding("label_outside_head", what, place, evidence, advice, why=why)


def _find_long(look: Look) -> Iterator[Finding]:
    most = config_value(look.subject.model, "max_position_embeddings")
    if not isinstance(most, int) or most <= 0 or any(entry.name == "position_ids" for entry in look.entries):
        return
    for entry in look.entries:
        if entry.name == "input_ids" and entry.kind == "ids" and entry.tensor.dim() == 2:
            length = entry.tensor.shape[1]
            if length <= most:
                continue
            what = f"'{entry.shown}' has {length} positions, and the model's config knows {most}"
            advice = "shorten the samples, or extend the model's positions"
            place, evidence = look.place(entry, position=most), {"positions": length, "max_position_embeddings": most}
            yield look.finding("sequence_too_long", what, place, evidence, advice)


def _head_of(model: nn.Module, entry: Entry) -> int:
    """Return the classes of the `labels` of a transformers model, whose own loss ignores -100 alone; 0 for others."""
    name, classes = type(model).__name__, config_value(model, "num_labels")
    if entry.name == "labels" and entry.tensor.dim() == 1 and name.endswith("ForSequenceClassification"):
        return classes if isinstance(classes, int) and classes > 1 else 0
    if entry.name == "labels" and entry.tensor.dim() == 2 and name.endswith("ForCausalLM"):
        head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
        return len(head) if isinstance(head, Tensor) and head.dim() == 2 else 0
    return 0


def _logits(output: Any) -> Tensor | None:
    logits = output.get("logits") if hasattr(output, "get") else getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 1 else None


def _classes(model: nn.Module, logits: Tensor, labels: Tensor) -> int:
    """Return the classes of logits that score these labels, if their number is that of a layer's outputs; or 0."""
    if labels.is_floating_point() or labels.dim() != logits.dim() - 1:
        return 0
    lengths = [abs(a - b) for a, b in zip(logits.shape[:-1], labels.shape, strict=True)]
    if lengths[0] or sum(lengths) > 1 or logits.shape[-1] in labels.shape:
        return 0
    outputs = {module.out_features for module in model.modules() if isinstance(module, nn.Linear)}
    return logits.shape[-1] if logits.shape[-1] in outputs else 0
