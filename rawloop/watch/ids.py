"""Ids outside the embedding or the head that they go to, told by name before the look-up fails.

On the CPU torch raises an IndexError without a name, on a GPU a device-side assert ends the process. An id beyond the
share of its codebook in a joint embedding raises nothing: it reads another codebook's row.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rawloop.contracts import IGNORE
from rawloop.inputs import looks_up
from rawloop.watch.calls import find_swallowed
from rawloop.watch.entries import Entry, Look, config_value, first_place
from rawloop.watch.findings import Finding

MOST_CODEBOOKS = 64
CLASS_NAMES = ("y", "class", "classes", "cls", "category")  # other integers, such as indices of samples, are no labels
EXPLAINS = ("id_outside_embedding", "label_outside_head")  # an IndexError, or a RuntimeError
TOKENIZER = "use the tokenizer or codec that belongs to the model, or resize the model's embeddings"


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
    """Learns where ids go, by hooks on embeddings and on the model, and compares batches with their sizes."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[Codebook, Table]] = {}  # by the path of a tensor
        self._heads: dict[str, tuple[int, bool]] = {}  # classes (0: none); whether -100 alone is ignored
        self._hooks = ExitStack()
        self._seen: list[Finding] = []
        self._doubtful: list[Finding] = []

    def find(self, look: Look) -> Iterator[Finding]:
        """Compare a batch, before its forward pass, with what is known; on full looks, prepare to learn."""
        for entry in look.readable("ids", "positions", "labels", "other"):
            if not entry.is_float:
                yield from self._compare(look, entry)
        self._hooks.close()
        if look.full:
            self._learn(look)

    def found(self) -> Iterator[Finding]:
        """Yield what the hooks have found."""
        seen, self._seen = self._seen, []
        yield from seen

    def failed(self) -> Iterator[Finding]:
        """Yield what explains a step that did not come to its end."""
        self._seen, self._doubtful = self._seen + self._doubtful, []
        yield from self.found()

    def ended(self) -> Iterator[Finding]:
        """Yield what the hooks have found in a step that has come to its end."""
        for finding in self._doubtful:  # its label was no class, and nothing failed: as for a contrastive loss
            self._heads[finding.cause.place.tensor] = 0, False
        self._doubtful = []
        self._hooks.close()
        yield from self.found()

    def _learn(self, look: Look) -> None:
        model = look.subject.model

        def hook(register: Callable[..., RemovableHandle], function: Callable[..., None], **options: bool) -> None:
            shielded = look.subject.guard.shield("the look at calls of the model", function)
            self._hooks.callback(register(shielded, **options).remove)

        for name, module in model.named_modules():
            if looks_up(module):
                hook(module.register_forward_pre_hook, partial(self._on_embedding, look, name))
        hook(model.register_forward_pre_hook, partial(self._on_call, look), with_kwargs=True)
        hook(model.register_forward_hook, partial(self._on_output, look))

    def _on_call(self, look: Look, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._seen += find_swallowed(look, model, kwargs)

    @torch.no_grad()
    def _on_embedding(self, look: Look, name: str, module: nn.Embedding, given: tuple[Any, ...]) -> None:
        ids = given[0] if given else None
        if isinstance(ids, Tensor) and ids.numel() and not ids.is_floating_point():
            with torch._C.DisableTorchFunction():  # a loop that calls the embedding itself has its operations recorded
                self._learn_table(look, ids, Table(name, module.num_embeddings))

    def _learn_table(self, look: Look, ids: Tensor, table: Table) -> None:
        for entry in look.entries:
            if entry.kind in ("ids", "positions", "other") and not entry.is_float and _tells(entry.tensor, ids):
                known = self._tables.get(entry.path, {})
                if found := _fed(entry.tensor.cpu(), ids.cpu(), table, known):
                    self._tables[entry.path] = known | found
                    self._seen += self._compare(look, entry)
                    return
        computed = Entry("", "", "ids", False, ids[None] if ids.dim() < 2 else ids)
        self._seen += _outside(look, computed, {Codebook(): table})

    def _on_output(self, look: Look, model: nn.Module, given: Any, output: Any) -> None:
        labels = [entry for entry in look.entries if entry.kind == "labels"]
        unfed = [entry for entry in look.entries if entry.kind == "ids" and entry.path not in self._tables]
        labels = labels or [entry for entry in unfed if entry.name in CLASS_NAMES or entry.name.isdigit()][:1]
        for entry in labels:
            if not entry.is_float and (size := _classes(model, output, entry.tensor)):
                self._heads.setdefault(entry.path, (size, False))
                self._doubtful += _outside_head(look, entry, *self._heads[entry.path])

    def _compare(self, look: Look, entry: Entry) -> Iterator[Finding]:
        tables = self._tables.get(entry.path)
        if tables is not None:
            low, high = look.extremes(entry)
            if low < 0 or high >= min(table.size for table in tables.values()):
                yield from _outside(look, entry, tables)
        elif entry.kind in ("labels", "ids"):
            if entry.path not in self._heads and (size := _head_of(look.subject.model, entry)):
                self._heads[entry.path] = size, True
            size, strict = self._heads.get(entry.path, (0, False))
            found = _outside_head(look, entry, size, strict)
            if strict:
                yield from found
            else:
                self._doubtful += found


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
    """Find the first id that its embedding has no row for. A tensor without a path is not in the batch."""
    for codebook, (module, size) in tables.items():
        ids = codebook.of(entry.tensor)
        bad = (ids < 0) | (ids >= size)
        if not bool(bad.any()):
            continue
        row, position = first_place(bad)
        evidence = {"id": int(ids[bad][0]), "valid ids": size, "wrong ids": int(bad.sum())}
        evidence |= {} if codebook.dim is None else {"codebook": codebook.number}
        who = f"'{entry.shown}' has" if entry.path else "the model computes"
        of = "" if codebook.dim is None else f" of codebook {codebook.number}"
        at = f"row {row}" if position is None else f"row {row}, position {position}"
        what = f"{who} the id {evidence['id']}{of} at {at}, and the embedding '{module}' has {size} rows for it"
        advice = TOKENIZER if entry.path else f"shorten the sequence if these are positions; otherwise {TOKENIZER}"
        place = look.place(entry, row, position, module)
        yield look.finding("id_outside_embedding", what, place, evidence, advice)
        return


def _outside_head(look: Look, entry: Entry, size: int, strict: bool) -> Iterator[Finding]:
    """Find labels that are no class. A loss of the user's own may ignore -1; `strict` is a loss that ignores -100."""
    if not size:
        return
    low, high = look.extremes(entry)
    ignores = "CTC" in type(look.subject.model).__name__  # every negative label
    if high < size and (ignores or low >= 0 or low == IGNORE or (low == -1 and not strict)):
        return
    wrong = (entry.tensor >= size) | ((entry.tensor < 0) & (entry.tensor != IGNORE))
    row, position = first_place(wrong)
    value = int(entry.tensor[wrong][0])
    what = f"'{entry.shown}' has the label {value} at row {row}, and the model's head has the classes 0 to {size - 1}"
    evidence = {"label": value, "classes": size, "wrong labels": int(wrong.sum())}
    advice = f"label positions without a target {IGNORE}; otherwise {TOKENIZER}"
    yield look.finding("label_outside_head", what, look.place(entry, row, position), evidence, advice)


def _head_of(model: nn.Module, entry: Entry) -> int:
    """Return the classes of the `labels` of a transformers model, whose own loss ignores -100 alone; 0 for others."""
    name, dim = type(model).__name__, entry.tensor.dim() if entry.name == "labels" else 0
    if dim == 1 and name.endswith("ForSequenceClassification"):
        classes = config_value(model, "num_labels")
        return classes if isinstance(classes, int) and classes > 1 else 0
    if dim == 2 and name.endswith("ForCausalLM"):
        head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
        return len(head) if isinstance(head, Tensor) and head.dim() == 2 else 0
    return 0


def _classes(model: nn.Module, output: Any, labels: Tensor) -> int:
    """Return the classes of logits that score these labels, if their number is that of a layer's outputs; or 0."""
    logits = output.get("logits") if hasattr(output, "get") else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or labels.dim() != logits.dim() - 1:
        return 0
    lengths = [abs(a - b) for a, b in zip(logits.shape[:-1], labels.shape, strict=True)] or [1]
    if lengths[0] or sum(lengths) > 1 or logits.shape[-1] in labels.shape:
        return 0
    outputs = {module.out_features for module in model.modules() if isinstance(module, nn.Linear)}
    return logits.shape[-1] if logits.shape[-1] in outputs else 0
