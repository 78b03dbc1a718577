"""Tokens that are wrongly among the targets of a text, or wrongly not: padding, and the token that ends it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rawloop.buffers import untouched
from rawloop.seed import preserved_rng, restore_rng
from rawloop.watch.entries import Entry, Look, config_value, first_place
from rawloop.watch.findings import Finding
from rawloop.watch.nest import map_tensors, tensors_in
from rawloop.watch.subject import Pass, StepRecord, Subject

STEPS = 20  # whose stop tokens are counted
ROWS = 16  # at least, before anything is said
NOISE = 4  # times the difference of two equal passes


class Stops:
    """Counts stop tokens among inputs and labels of the first steps; the counts are read from the device once."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []  # (stop tokens in inputs, stop tokens in labels, targets)
        self._rows = self._steps = 0
        self._last: tuple[Look, Entry] | None = None

    def find(self, look: Look) -> Iterator[Finding]:
        """Count a batch, and judge after the last one that is counted."""
        if self._steps == STEPS:
            return
        stops = _stop_tokens(look) if callable(getattr(look.subject.model, "generate", None)) else ()
        if look.ours or not stops:  # rawloop's own runs count their special tokens before step 0
            self._steps = STEPS
            return
        self._steps += 1
        for labels, ids, _ in _texts(look):
            wanted = torch.tensor(stops, device=ids.device)
            counts = torch.isin(ids, wanted), torch.isin(labels.tensor, wanted), labels.tensor >= 0
            self._counts.append(torch.stack([count.sum() for count in counts]))
            self._rows += len(ids)
            self._last = look, labels
        if self._steps == STEPS:
            yield from self.judge()

    def judge(self) -> Iterator[Finding]:
        """Say once what the counts show."""
        last, self._last = self._last, None
        if last is None or self._rows < ROWS:
            return
        look, entry = last
        inputs, labels, targets = torch.stack([counts.cpu() for counts in self._counts]).sum(0).tolist()
        if labels or not targets:
            return
        if inputs:
            why = "the stop token is in the inputs and masked out of the labels, as when it is also the padding token"
            advice = "mask padding by the attention mask, not by its id, or give padding a token of its own"
        else:
            why = "no sample ends with a stop token: the template leaves it out, or the samples are cut"
            advice = "let the template or the tokenizer end each sample with it, and raise the maximum length"
        what = f"the stop token ({', '.join(map(str, _stop_tokens(look)))}) is never a target in {self._rows} samples"
        evidence = {"stop tokens in inputs": inputs, "as targets": 0, "targets": targets, "samples": self._rows}
        place = look.place(entry)
        yield look.finding("stop_never_target", what, place, evidence, advice, why=why, ordinary=not inputs)


class Padding:
    """Finds labels at padding, and asks the loss itself: it runs a pass again with other labels there.

    A loss of the user's own may leave them out by the mask. Of passes that cannot be run again, nothing is said.
    """

    def __init__(self) -> None:
        self._suspects: list[tuple[Finding, Tensor, Tensor]] = []  # the finding, should it be so; labels; where
        self._done = False

    def find(self, look: Look) -> None:
        """Keep suspects of a batch that is looked at in full."""
        self._suspects = []
        if self._done or not look.full or look.ours or config_value(look.subject.model, "is_encoder_decoder"):
            return
        for labels, ids, mask in _texts(look):
            if mask is None:
                continue
            hidden, scored = mask.tensor == 0, labels.tensor >= 0
            where = hidden & scored & ~_ends(hidden, ids, _stop_tokens(look))
            if bool(where.any()):
                self._suspects.append((_padding_scored(look, labels, mask, where, scored), labels.tensor, where))

    def found(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Yield a finding if the loss scores suspects."""
        suspects, self._suspects = self._suspects, []
        for finding, labels, where in suspects:
            own = next((one for one in record.passes if _number_of(one, labels) is not None), None)
            if not self._done and own is not None and _scores(subject, own, labels, where):
                self._done = True
                yield finding


def _texts(look: Look) -> Iterator[tuple[Entry, Tensor, Entry | None]]:
    """Yield the labels of texts (rows, positions), their input ids, and their attention mask."""
    for labels in look.entries:
        if labels.kind == "labels" and not labels.is_float and labels.tensor.dim() == 2:
            alike = {e.name: e for e in look.entries if e.part == labels.part and e.tensor.shape == labels.tensor.shape}
            if "input_ids" in alike:
                yield labels, alike["input_ids"].tensor, alike.get("attention_mask")


def _stop_tokens(look: Look) -> tuple[int, ...]:
    """Return the tokens that end a text of a transformers model; empty if none is known."""
    own = getattr(getattr(look.subject.model, "generation_config", None), "eos_token_id", None)
    stops = config_value(look.subject.model, "eos_token_id") if own is None else own
    return tuple(stops) if isinstance(stops, list | tuple) else () if stops is None else (int(stops),)


def _padding_scored(look: Look, labels: Entry, mask: Entry, where: Tensor, scored: Tensor) -> Finding:
    row, position = first_place(where)
    wrong, targets = int(where.sum()), int(scored.sum())
    what = f"padding is a target: {wrong / targets:.1%} of the targets in '{labels.shown}'"
    why, advice = f"labels are scored where '{mask.shown}' is 0", "label padding -100, by the attention mask"
    evidence = {"padding among targets": wrong, "targets": targets, "label there": int(labels.tensor[where][0])}
    return look.finding("padding_scored", what, look.place(labels, row, position), evidence, advice, why=why)


def _ends(hidden: Tensor, ids: Tensor, stops: tuple[int, ...]) -> Tensor:
    """Return where a hidden run begins with the stop token that ends a text, which is a right target."""
    stop = torch.isin(ids, torch.tensor(stops, device=ids.device, dtype=ids.dtype))
    ends = hidden & stop
    ends[:, 1:] &= ~hidden[:, :-1] & ~stop[:, :-1]
    ends[:, 0] = False
    return ends


def _scores(subject: Subject, one: Pass, labels: Tensor, where: Tensor) -> bool:
    """Whether the loss of a pass moves with the labels at these positions alone."""
    number, places = _number_of(one, labels), iter(range(1 << 30))
    changed = labels.clone()
    changed[where] = (changed[where] == 0).to(changed.dtype)  # another class, which every head has
    inputs = map_tensors(lambda tensor: changed if next(places) == number else tensor, one.inputs)
    with untouched(subject.model, weights=True), torch.no_grad(), preserved_rng():
        first, again, other = (_loss(one, given) for given in (one.inputs, one.inputs, inputs))
    return abs(other - first) > NOISE * abs(again - first)


def _loss(one: Pass, inputs: Any) -> float:
    if one.rng:
        restore_rng(one.rng)
    return float(one.forward(inputs).detach().float().sum())


def _number_of(one: Pass, labels: Tensor) -> int | None:
    """Return which tensor of a pass's inputs are these labels."""
    for number, (_, tensor) in enumerate(tensors_in(one.inputs)):
        same = tensor.shape == labels.shape and tensor.dtype == labels.dtype
        if same and torch.equal(tensor.to(labels.device), labels):
            return number
    return None
