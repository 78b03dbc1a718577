"""Stop tokens that are never a target: a model that is trained so never stops."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rawloop.watch.entries import Look, stop_tokens
from rawloop.watch.findings import Cause, Finding, Place

STEPS = 20  # that are counted
ROWS = 16  # at least, before anything is said


class Stops:
    """Counts stop tokens among inputs and labels of the first steps; the counts are read from the device once."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []  # (stop tokens in inputs, stop tokens in labels, targets)
        self._rows = self._steps = 0
        self._done = False
        self._path = ""
        self._stops: tuple[int, ...] = ()

    def find(self, look: Look) -> Iterator[Finding]:
        """Count a batch, and judge after the last one that is counted."""
        if self._done:
            return
        model = look.subject.model
        self._stops = self._stops or (stop_tokens(model) if callable(getattr(model, "generate", None)) else ())
        self._done = look.ours or not self._stops  # rawloop's own runs count their special tokens before step 0
        if not self._done:
            self._count(look)
            self._steps += 1
        if self._steps == STEPS:
            yield from self.judge(look.record.step, look.subject.world.rank)

    def _count(self, look: Look) -> None:
        for labels in (entry for entry in look.entries if entry.kind == "labels"):
            ids = next((e.tensor for e in look.entries if e.name == "input_ids" and e.part == labels.part), None)
            if ids is None or ids.shape != labels.tensor.shape or ids.dim() != 2:
                continue
            targets = labels.tensor.to(ids.device)
            stops = torch.tensor(self._stops, device=ids.device)
            self._counts.append(
                torch.stack([torch.isin(ids, stops).sum(), torch.isin(targets, stops).sum(), (targets >= 0).sum()])
            )
            self._rows += len(ids)
            self._path = labels.path

    def judge(self, step: int, rank: int) -> Iterator[Finding]:
        """Say once what the counts show."""
        if self._done or self._rows < ROWS:
            return
        self._done = True
        inputs, labels, targets = (int(n) for n in torch.stack([counts.cpu() for counts in self._counts]).sum(0))
        if labels or not targets:
            return
        if inputs:
            why = "the stop token is in the inputs and masked out of the labels, as when it is also the padding token"
            advice = "mask padding by the attention mask, not by its id, or give padding a token of its own"
        else:
            why = "no sample ends with a stop token: the template leaves it out, or the samples are cut"
            advice = (
                "let the template or the tokenizer end each sample with the stop token, and raise the maximum length"
            )
        what = f"the stop token ({', '.join(map(str, self._stops))}) is never a target in {self._rows} samples"
        evidence = {"stop tokens in inputs": inputs, "as targets": 0, "targets": targets, "samples": self._rows}
        cause = Cause("data", why, Place("data", tensor=self._path), evidence, advice)
        yield Finding("stop_never_target", what, (cause,), step, rank, ordinary=not inputs)
