"""Checks the values of a batch on the CPU when it is made, to name the sample of a wrong value.

Otherwise a token or target out of range is an IndexError without a sample on the CPU, and a device-side assert that
kills the process on a GPU. A NaN in features makes every epoch skip a step. The check costs one pass over the values.
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
from rawloop.inputs import looks_up
from rawloop.losses import LossModule

Autocast = Callable[[], AbstractContextManager[Any]]
TOKENIZER = "use the tokenizer and codec that belong to the model"
MASKS = ("mask", "bias")  # names of inputs in which minus infinity hides a position


@dataclass
class Limits:
    """The values that a model accepts.

    `ids` has the number of valid ids of each input, by name; other inputs are not checked. `classes` has the number of
    classes of each stream's targets, or None if the family does not give it.
    """

    ids: dict[str, int]
    classes: Mapping[str, int | None]
    probe: Batch | None = None  # of the family, for `learn`

    @classmethod
    def of(cls, family: Family, model: nn.Module) -> "Limits":
        """Return the ids in the model's embedding, and the classes of the family's heads.

        Tokens of the family's probe are allowed even if they are not in the embedding: some models replace them by
        audio first.
        """
        chance = family.chance() if has(family, "chance") else {}
        classes = {stream: round(math.exp(chance[stream])) if chance else None for stream in family.streams}
        ids = dict(family.num_ids) if isinstance(family, IdsFamily) else {}
        probe = family.probe() if has(family, "probe", "logits") else None
        table, tokens = _embedding(model), probe.inputs.get("input_ids") if probe else None
        if table is not None:
            ids["input_ids"] = max(len(table), int(tokens.max()) + 1 if tokens is not None else 0)
        return cls(ids, classes, probe)

    def learn(self, family: Family, module: LossModule, device: torch.device, autocast: Autocast) -> None:
        """Run the probe on the prepared model, and find the other inputs that go into an embedding unchanged.

        Tokens of the probe are allowed even if they are not in the embedding; see `of`.
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

        with untouched(module, training=False, weights=True), torch.no_grad(), autocast(), ExitStack() as hooks:
            for part in module.modules():
                if looks_up(part):
                    hooks.callback(part.register_forward_pre_hook(record).remove)
            module(probe, family.logits)
        self.ids = ids | self.ids

    def fault(self, batch: Batch) -> str | None:
        """Return the first fault of a batch on the CPU, or None."""
        faults = [self._fault_of_input(name, values) for name, values in batch.inputs.items()]
        faults += [self._fault_of_stream(stream, batch) for stream in self.classes]
        return next((fault for fault in faults if fault is not None), None)

    def _fault_of_input(self, name: str, values: Tensor) -> str | None:
        if not values.numel():
            return None
        if values.is_floating_point():
            return _fault_of_numbers(name, values)
        size = self.ids.get(name)
        wrong = _outside(values, size)
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
        if not count:
            return None
        size = self.classes[stream]
        wrong = _outside(labels.targets.where(scored, 0), size)
        if size is not None and wrong is not None:
            (row, *codebook), found = wrong
            where = f"{f' of codebook {codebook[0]}' if codebook else ''} at position {int(labels.positions[row]) + 1}"
            return (
                f"a target of the stream '{stream}'{where} is {found}, and the model has the classes 0 to "
                f"{size - 1}: {TOKENIZER}; label other positions {IGNORE}"
            )
        if int(labels.positions.min()) < 0:
            return f"a target of the stream '{stream}' is at the very first position, which no position predicts"
        return None


def _embedding(model: nn.Module) -> Tensor | None:
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return weight if isinstance(weight, Tensor) else None


def _fault_of_numbers(name: str, values: Tensor) -> str | None:
    least, most = (float(value) for value in torch.aminmax(values))  # with a NaN, both are NaN
    masks = any(word in name for word in MASKS)
    if most < math.inf and (least > -math.inf or masks):
        return None
    allowed = "NaN or plus infinity" if masks else "numbers that are not finite"
    return f"its '{name}' has {allowed}: correct their source, or leave the sample out"


def _outside(values: Tensor, size: int | None) -> tuple[list[int], int] | None:
    """Return the first place with a value outside 0 to `size` - 1, and that value. Without a size, return None."""
    if size is None:
        return None
    least, most = torch.aminmax(values)
    if least >= 0 and most < size:  # nonzero() is slower, and rarely needed
        return None
    place: list[int] = torch.nonzero((values < 0) | (values >= size))[0].tolist()
    return place, int(values[tuple(place)])


def _place(place: list[int]) -> str:
    return f" in codebook {place[2]} at frame {place[1]}" if len(place) == 3 else f" at position {place[-1]}"
