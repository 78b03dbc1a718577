"""Stop tokens that are never a target: a model that is trained so never stops."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rawloop.watch.entries import Entry, Look
from rawloop.watch.findings import Cause, Finding, Place

STEPS = 20  # that are counted
ROWS = 16  # at least, before anything is said


class Stops:
    """Counts stop tokens among inputs and labels of the first steps; the counts are read from the device once."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []  # (stop tokens in inputs, stop tokens in labels, targets, padded rows)
        self._rows = 0
        self._steps = 0
        self._done = False
        self._paths = ("", "")
        self._stops: tuple[int, ...] = ()

    def find(self, look: Look) -> Iterator[Finding]:
        """Count a batch, and judge after the last one that is counted."""
        if self._done:
            return
        self._stops = self._stops or _stop_ids(look.subject.model)
        self._done = look.ours or not self._stops  # rawloop's own runs count their special tokens before step 0
        if not self._done:
            self._count(look)
            self._steps += 1
        if self._steps == STEPS:
            yield from self.judge(look.record.step, look.subject.world.rank)

    def _count(self, look: Look) -> None:
        for labels in (entry for entry in look.entries if entry.kind == "labels"):
            ids = next((e for e in look.entries if e.name == "input_ids" and e.part == labels.part), None)
            if ids is None or ids.tensor.shape != labels.tensor.shape or labels.tensor.dim() != 2:
                continue
            mask = next((e for e in look.entries if e.name == "attention_mask" and e.part == labels.part), None)
            self._counts.append(_counted(ids, labels, mask, self._stops))
            self._rows += len(labels.tensor)
            self._paths = ids.path, labels.path

    def judge(self, step: int, rank: int) -> Iterator[Finding]:
        """Say once what the counts show."""
        if self._done or self._rows < ROWS:
            return
        self._done = True
        inputs, labels, targets, padded = (int(n) for n in torch.stack([c.cpu() for c in self._counts]).sum(0))
        if labels or not targets:
            return
        ids = ", ".join(map(str, self._stops))
        evidence = {"stop tokens in inputs": inputs, "as targets": 0, "targets": targets, "samples": self._rows}
        place_of = self._paths[1]
        causes = _causes(inputs, padded, place_of, evidence)
        what = f"the stop token ({ids}) is never a target in the first {self._rows} samples"
        yield Finding("stop_never_target", what, causes, step, rank, ordinary=not inputs)


def _causes(inputs: int, padded: int, path: str, evidence: dict[str, int]) -> tuple[Cause, ...]:
    place = Place("data", tensor=path)
    if inputs:
        what = "the stop token is in the inputs and masked out of the labels, as when it is also the padding token"
        advice = "mask padding by the attention mask, not by its id, or give padding a token of its own"
        return (Cause("data", what, place, evidence, advice),)
    if padded:
        advice = "let the template or the tokenizer end each sample with the stop token"
        return (Cause("data", "no sample ends with a stop token", place, evidence, advice),)
    what = "every row is full to the last position: the samples are cut, or are pieces of longer text"
    return (Cause("data", what, place, evidence, "raise the maximum length if the ends of samples are to be learnt"),)


def _counted(ids: Entry, labels: Entry, mask: Entry | None, stops: tuple[int, ...]) -> Tensor:
    wanted = torch.tensor(stops, device=ids.tensor.device)
    in_labels = torch.isin(labels.tensor, wanted.to(labels.tensor.device)).sum()
    in_inputs = torch.isin(ids.tensor, wanted).sum()
    targets = (labels.tensor >= 0).sum()
    padded = (mask.tensor == 0).any(1).sum() if mask is not None and mask.tensor.dim() == 2 else targets * 0
    return torch.stack([n.to(ids.tensor.device) for n in (in_inputs, in_labels, targets, padded)])


def _stop_ids(model: Any) -> tuple[int, ...]:
    """Return the stop tokens of a transformers model that generates; empty if there are none."""
    if not callable(getattr(model, "generate", None)):
        return ()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        stops = getattr(config, "eos_token_id", None)
        if stops is not None:
            return tuple(stops) if isinstance(stops, list | tuple) else (int(stops),)
    return ()
