"""Ids outside the embedding or the head that they go to, told by name before the look-up fails.

On the CPU torch raises an IndexError without a name, on a GPU a device-side assert ends the process. An id beyond the
share of its codebook in a joint embedding raises nothing: it reads another codebook's row.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.contracts import IGNORE
from rawloop.watch.entries import Entry, Look
from rawloop.watch.findings import Cause, Finding

MOST_CODEBOOKS = 64
CLASS_NAMES = ("y", "class", "classes", "cls", "category")  # other integers, such as indices of samples, are no labels
EXPLAINS = ("id_outside_embedding", "label_outside_head", "sequence_too_long")  # an IndexError, or a RuntimeError
TOKENIZER = "use the tokenizer or codec that belongs to the model, or resize the model's embeddings"


class Table(NamedTuple):
    """Where the ids of a tensor go: module and number of rows; one of each for each index of `dim` (codebook)."""

    modules: tuple[str, ...]
    sizes: tuple[int, ...]  # 0 where it is not known yet
    dim: int | None = None


class Ids:
    """Learns where ids go, by hooks on embeddings and on the model's output, and compares batches with their sizes."""

    def __init__(self) -> None:
        self._tables: dict[str, Table] = {}
        self._heads: dict[str, int] = {}
        self._known_heads: dict[str, int | None] = {}
        self._hooks = ExitStack()
        self._look: Look | None = None
        self._seen: list[Finding] = []
        self._doubtful: list[Finding] = []

    def find(self, look: Look) -> Iterator[Finding]:
        """Compare a batch, before its forward pass, with what is known; on full looks, prepare to learn."""
        for entry in look.readable("ids", "positions", "labels", "other"):
            if not entry.tensor.is_floating_point():
                yield from self._compare(look, entry)
        yield from _find_long(look)
        self.close()
        if look.full:
            self._look = look
            self._learn(look.subject.model)

    def found(self) -> Iterator[Finding]:
        """Yield what the hooks have found."""
        seen, self._seen = self._seen, []
        yield from seen

    def failed(self) -> Iterator[Finding]:
        """Yield what explains a step that did not come to its end."""
        yield from self.found()
        doubtful, self._doubtful = self._doubtful, []
        yield from doubtful

    def ended(self) -> None:
        """Forget heads of which a label was no class, and nothing failed: they embed, as for a contrastive loss."""
        for finding in self._doubtful:
            self._heads[finding.cause.place.tensor] = 0
        self._doubtful.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()
        self._look = None

    def _learn(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                self._hooks.callback(module.register_forward_pre_hook(partial(self._on_embedding, name)).remove)
        self._hooks.callback(model.register_forward_hook(self._on_output).remove)

    @torch.no_grad()
    def _on_embedding(self, name: str, module: nn.Embedding, given: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or self._look is None or not given or not isinstance(given[0], Tensor):
            return
        ids, size = given[0], module.num_embeddings
        if not ids.numel() or ids.is_floating_point():
            return
        with torch._C.DisableTorchFunction():  # a loop that calls the embedding itself has its operations recorded
            self._learn_table(self._look, name, ids, size)

    def _learn_table(self, look: Look, name: str, ids: Tensor, size: int) -> None:
        matched = _match(look.entries, ids, size, name, self._tables)
        if matched is not None:
            entry, table = matched
            self._tables[entry.path] = table
            self._seen += self._compare(look, entry)
            return
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= size:
            first = ((ids < 0) | (ids >= size)).nonzero()[0].tolist()
            what = f"the embedding '{name}' is given the id {low if low < 0 else high}, and has rows 0 to {size - 1}"
            source = Entry("", "", "ids", ids)
            place = look.place(source, first[0] if len(first) > 1 else None, first[-1], name)
            advice = f"shorten the sequence if these are positions; otherwise {TOKENIZER}"
            cause = Cause("data", "an id is outside the embedding", place, {"least": low, "most": high}, advice)
            self._seen.append(look.finding("id_outside_embedding", what, cause))

    def _on_output(self, model: nn.Module, given: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._look is None or (logits := _logits(output)) is None:
            return
        look = self._look
        unfed = [entry for entry in look.entries if entry.kind == "ids" and entry.path not in self._tables]
        named = [entry for entry in look.entries if entry.kind == "labels"]
        named = named or [entry for entry in unfed if entry.name in CLASS_NAMES or entry.name.isdigit()][:1]
        for entry in named:
            if size := _classes(model, logits, entry.tensor):
                self._heads.setdefault(entry.path, size)
                self._doubtful += self._doubt(look, entry)

    def _compare(self, look: Look, entry: Entry) -> Iterator[Finding]:
        table = self._tables.get(entry.path)
        if table is not None and entry.kind != "labels":
            yield from _outside(look, entry, table)
        elif entry.kind in ("labels", "ids"):
            if entry.path not in self._known_heads:
                self._known_heads[entry.path] = _head_of(look.subject.model, entry)
            if size := self._known_heads[entry.path]:
                yield from _outside_head(look, entry, size, strict=True)
            else:
                self._doubtful += self._doubt(look, entry)
        elif entry.name == "position_ids":
            most, used = _most_positions(look.subject.model), int(entry.tensor.amax()) + 1
            if 0 < most < used:
                yield _too_long(look, entry, used, most)

    def _doubt(self, look: Look, entry: Entry) -> Iterator[Finding]:
        size = self._heads.get(entry.path)
        if size:
            yield from _outside_head(look, entry, size, strict=False)


def _match(
    entries: Sequence[Entry], ids: Tensor, size: int, module: str, known: dict[str, Table]
) -> tuple[Entry, Table] | None:
    """Find the tensor of the batch that an embedding is given: whole, a slice, one codebook, or with offsets."""
    here = ids.cpu()
    for entry in entries:
        if entry.kind not in ("ids", "positions", "other") or not _tells(entry.tensor, ids):
            continue
        there = entry.tensor.cpu()
        same = there.shape[:-1] == here.shape[:-1] and here.shape[-1:] <= there.shape[-1:] and here.dim() > 0
        if same and torch.equal(there[..., : here.shape[-1]].to(here.dtype), here):
            return entry, _smallest(Table((module,), (size,)), known.get(entry.path))
        dims = [dim for dim in range(1, there.dim()) if 1 < there.shape[dim] <= MOST_CODEBOOKS]
        for dim in reversed(dims):
            table = _codebook(there, here, dim, size, module, known.get(entry.path))
            if table is not None:
                return entry, table
    return None


def _tells(tensor: Tensor, ids: Tensor) -> bool:
    """Whether equal values mean the same tensor: constant ones, such as types that are all 0, are alike by chance."""
    if tensor.is_floating_point() or not tensor.numel():
        return False
    shared = tensor.device == ids.device and tensor.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()
    return shared or bool((tensor != tensor.flatten()[0]).any())


def _smallest(table: Table, known: Table | None) -> Table:
    return table if known is None or known.dim is not None or table.sizes[0] < known.sizes[0] else known


def _codebook(there: Tensor, here: Tensor, dim: int, size: int, module: str, known: Table | None) -> Table | None:
    count = there.shape[dim]
    if there.shape == here.shape:
        offsets = (here - there).movedim(dim, -1).reshape(-1, count)
        step = int(offsets[0, 1] - offsets[0, 0])
        joint = step > 1 and count * step <= size <= (count + 1) * step
        regular = joint and bool((offsets == torch.arange(count) * step).all())
        return Table((module,) * count, (step,) * count, dim) if regular else None
    if known is None or known.dim != dim or len(known.sizes) != count:
        known = Table(("",) * count, (0,) * count, dim)
    modules, sizes = list(known.modules), list(known.sizes)
    for index in sorted(range(count), key=lambda index: modules[index] not in ("", module)):
        one = there.select(dim, index)
        if one.shape == here.shape and torch.equal(one.to(here.dtype), here):
            modules[index], sizes[index] = module, size
            return Table(tuple(modules), tuple(sizes), dim)
    return None


def _outside(look: Look, entry: Entry, table: Table) -> Iterator[Finding]:
    low, high = (int(value) for value in torch.aminmax(entry.tensor))
    limits = [size for size in table.sizes if size]
    if low >= 0 and high < min(limits):
        return
    tensor, sizes = entry.tensor, torch.tensor([size or 1 << 60 for size in table.sizes], device=entry.tensor.device)
    if table.dim is not None:
        sizes = sizes.view([-1 if dim == table.dim else 1 for dim in range(tensor.dim())])
    bad = ((tensor < 0) | (tensor >= sizes)).nonzero()
    if not len(bad):
        return
    first = bad[0].tolist()
    index = 0 if table.dim is None else first[table.dim]
    value, size, module = int(tensor[tuple(first)]), table.sizes[index], table.modules[index]
    codebook = f" of codebook {index}" if table.dim is not None else ""
    position = next((first[dim] for dim in reversed(range(1, len(first))) if dim != table.dim), None)
    what = f"'{entry.shown}' has the id {value}{codebook} at row {first[0]}"
    what += f", position {position}" if position is not None else ""
    what += f", and the embedding '{module}' has {size} rows for it"
    evidence: dict[str, float | int | str] = {"id": value, "valid ids": size, "wrong ids": len(bad)}
    if table.dim is not None:
        evidence["codebook"] = index
    place = look.place(entry, first[0], position, module)
    yield look.finding(
        "id_outside_embedding", what, Cause("data", "an id is outside the embedding", place, evidence, TOKENIZER)
    )


def _outside_head(look: Look, entry: Entry, size: int, strict: bool) -> Iterator[Finding]:
    """Find labels that are no class. A loss of the user's own may ignore -1; `strict` is a loss that ignores -100."""
    low, high = (int(value) for value in torch.aminmax(entry.tensor))
    if high < size and (low >= 0 or low == IGNORE or (low == -1 and not strict)):
        return
    if low < 0 and high < size and "CTC" in type(look.subject.model).__name__:  # these ignore every negative label
        return
    wrong = (entry.tensor >= size) | ((entry.tensor < 0) & (entry.tensor != IGNORE))
    first = wrong.nonzero()[0].tolist()
    value = int(entry.tensor[tuple(first)])
    what = (
        f"'{entry.shown}' has the label {value} at row {first[0]}, and the model's head has the classes 0 to {size - 1}"
    )
    place = look.place(entry, first[0], first[-1] if len(first) > 1 else None)
    evidence = {"label": value, "classes": size, "wrong labels": int(wrong.sum())}
    advice = f"label positions without a target {IGNORE}; otherwise {TOKENIZER}"
    cause = Cause("data", "a label is no class of the head", place, evidence, advice)
    yield look.finding("label_outside_head", what, cause)


def _find_long(look: Look) -> Iterator[Finding]:
    if any(entry.name == "position_ids" for entry in look.entries):
        return
    most = _most_positions(look.subject.model)
    for entry in look.entries if most else ():
        if (
            entry.name == "input_ids"
            and entry.tensor.dim() == 2
            and entry.tensor.shape[1] > most
            and entry.kind == "ids"
        ):
            yield _too_long(look, entry, entry.tensor.shape[1], most)


def _too_long(look: Look, entry: Entry, length: int, most: int) -> Finding:
    what = f"'{entry.shown}' has {length} positions, and the model's config knows {most}"
    advice = "shorten the samples, or extend the model's positions"
    evidence = {"positions": length, "max_position_embeddings": most}
    cause = Cause(
        "data", "a sequence is longer than the model knows", look.place(entry, position=most), evidence, advice
    )
    return look.finding("sequence_too_long", what, cause)


def _most_positions(model: nn.Module) -> int:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 0


def _head_of(model: nn.Module, entry: Entry) -> int | None:
    """Return the classes of the `labels` of a transformers model, whose own loss ignores -100 alone."""
    config, name = getattr(model, "config", None), type(model).__name__
    if entry.name != "labels" or config is None:
        return None
    if entry.tensor.dim() == 1 and name.endswith("ForSequenceClassification"):
        classes = getattr(config, "num_labels", 0)
        return classes if isinstance(classes, int) and classes > 1 else None
    if entry.tensor.dim() == 2 and name.endswith("ForCausalLM"):
        head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
        return len(head) if isinstance(head, Tensor) and head.dim() == 2 and head.numel() else None
    return None


def _logits(output: Any) -> Tensor | None:
    logits = output.get("logits") if hasattr(output, "get") else getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 1 else None


def _classes(model: nn.Module, logits: Tensor, labels: Tensor) -> int | None:
    """Return the classes of logits that score these labels, if their number is that of a layer's outputs."""
    if labels.is_floating_point() or labels.dim() != logits.dim() - 1:
        return None
    lengths = [abs(a - b) for a, b in zip(logits.shape[:-1], labels.shape, strict=True)]
    if lengths[0] or sum(lengths) > 1 or logits.shape[-1] in labels.shape:
        return None
    outputs = {module.out_features for module in model.modules() if isinstance(module, nn.Linear)}
    return logits.shape[-1] if logits.shape[-1] in outputs else None
