"""Checks the values of a batch on the CPU, where the sample of a wrong value is still known.

A token or target beyond the model's tables is an IndexError without a sample on the CPU, and on a GPU it kills the
whole process with a device-side assert. A NaN among features makes the step be skipped in every epoch. Both are found
here, where the batch is made, at the cost of one pass over its values.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.buffers import untouched
from rawloop.contracts import IGNORE, Batch, Family, has
from rawloop.family_protocols import IdsFamily

Autocast = Callable[[], AbstractContextManager[Any]]
TOKENIZER = "use the tokenizer and codec that belong to the model"
MASKS = ("mask", "bias")  # in the name of an input: minus infinity hides a position


@dataclass
class Limits:
    """The values that a model can take.

    `ids` has the number of ids that each input may hold, by name; other inputs are not checked. `classes` has the
    number of classes of each stream's targets, None if the family does not say it.
    """

    ids: dict[str, int]
    classes: Mapping[str, int | None]
    probe: Batch | None = None  # the family's, which `learn` runs

    @classmethod
    def of(cls, family: Family, model: nn.Module) -> "Limits":
        """Return the ids that a model has an embedding for, and the targets that the family's heads can name.

        A token beyond the embedding is allowed where the family's probe has it: some models put audio in its
        place before they look anything up.
        """
        chance = family.chance() if has(family, "chance") else {}
        classes = {stream: round(math.exp(chance[stream])) if chance else None for stream in family.streams}
        ids = dict(family.num_ids) if isinstance(family, IdsFamily) else {}
        probe = family.probe() if has(family, "probe", "logits") else None
        table, tokens = _embedding(model), probe.inputs.get("input_ids") if probe else None
        if table is not None:
            ids["input_ids"] = max(len(table), int(tokens.max()) + 1 if tokens is not None else 0)
        return cls(ids, classes, probe)

    def learn(self, family: Family, model: nn.Module, device: torch.device, autocast: Autocast) -> None:
        """Run the probe on the prepared model, to see which further inputs an embedding is given unchanged.

        Ids of the probe that are beyond the embedding are allowed: the model replaces them before.
        """
        if self.probe is None:
            return
        ids: dict[str, int] = {}
        probe = self.probe.to(device)
        whole = {name: x for name, x in probe.inputs.items() if x.numel() and not x.is_floating_point()}
        names = {(x.data_ptr(), x.numel()): name for name, x in whole.items()}

        def record(embedding: Any, given: tuple[Tensor, ...]) -> None:
            name = names.get((given[0].data_ptr(), given[0].numel())) if given else None
            if name is not None:
                rows = max(embedding.num_embeddings, int(whole[name].max()) + 1)
                ids[name] = min(ids.get(name, rows), rows)

        with untouched(model, training=False), torch.no_grad(), autocast(), ExitStack() as hooks:
            for part in model.modules():
                if isinstance(part, nn.Embedding):
                    hooks.callback(part.register_forward_pre_hook(record).remove)
            family.logits(model, probe)
        self.ids = ids | self.ids

    def fault(self, batch: Batch) -> str | None:
        """Return what is wrong with a batch, which is on the CPU, or None."""
        faults = [self._fault_of_input(name, values) for name, values in batch.inputs.items()]
        faults += [self._fault_of_stream(stream, batch) for stream in self.classes]
        return next((fault for fault in faults if fault is not None), None)

    def _fault_of_input(self, name: str, values: Tensor) -> str | None:
        if not values.numel():
            return None
        if values.is_floating_point():
            return _fault_of_numbers(name, values)
        size = self.ids.get(name)
        wrong = _outside(values, size) if size is not None else None
        if size is None or wrong is None:
            return None
        place, found = wrong
        return f"its '{name}' has the id {found}{_place(place)}, and the model knows 0 to {size - 1} there: {TOKENIZER}"

    def _fault_of_stream(self, stream: str, batch: Batch) -> str | None:
        labels = batch.labels.get(stream)
        if labels is None or stream not in batch.targets:
            return f"it has no labels or no count of targets for the stream '{stream}': collate must give both"
        scored = labels.targets != IGNORE
        count = int(scored.sum())
        if count != batch.targets[stream]:
            return (
                f"it counts {batch.targets[stream]} targets of the stream '{stream}', and {count} of its labels "
                f"are not {IGNORE}: collate must count what is scored"
            )
        size = self.classes[stream]
        wrong = _outside(labels.targets.where(scored, 0), size) if count and size is not None else None
        if size is not None and wrong is not None:
            (row, *codebook), found = wrong
            where = f"{f' of codebook {codebook[0]}' if codebook else ''} at position {int(labels.positions[row]) + 1}"
            return (
                f"a target of the stream '{stream}'{where} is {found}, and the model can say 0 to "
                f"{size - 1}: {TOKENIZER}; what is no target is {IGNORE}"
            )
        if count and int(labels.positions.min()) < 0:
            return f"a target of the stream '{stream}' is the first of all: nothing stands before it to predict it from"
        return None


def _embedding(model: nn.Module) -> Tensor | None:
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return weight if isinstance(weight, Tensor) else None


def _fault_of_numbers(name: str, values: Tensor) -> str | None:
    least, most = (float(value) for value in torch.aminmax(values))  # a NaN is both the least and the most
    masks = any(word in name for word in MASKS)
    if most < math.inf and (least > -math.inf or masks):
        return None
    allowed = "NaN or plus infinity" if masks else "numbers that are not finite"
    return f"its '{name}' has {allowed}: mend what they are made of, or leave the sample out"


def _outside(values: Tensor, size: int) -> tuple[list[int], int] | None:
    """Return the first place whose value is below 0, or `size` or more, and that value."""
    least, most = torch.aminmax(values)
    if least >= 0 and most < size:  # nonzero() is slower, and no batch of a healthy data set needs it
        return None
    place: list[int] = torch.nonzero((values < 0) | (values >= size))[0].tolist()
    return place, int(values[tuple(place)])


def _place(place: list[int]) -> str:
    return f" in codebook {place[2]} at frame {place[1]}" if len(place) == 3 else f" at position {place[-1]}"


def no_fault(batch: Batch) -> str | None:
    """Find no fault, where no limits are known."""
    return None
