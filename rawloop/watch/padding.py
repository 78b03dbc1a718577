"""Padding that is a target: labels at positions that the attention mask hides, or at a run of padding tokens."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rawloop.buffers import untouched
from rawloop.seed import preserved_rng, restore_rng
from rawloop.watch.entries import Entry, Look, config_value, first_place, stop_tokens
from rawloop.watch.findings import Finding
from rawloop.watch.nest import map_tensors, tensors_in
from rawloop.watch.subject import Pass, StepRecord, Subject

NOISE = 4  # times the difference of two equal passes


class Suspect(NamedTuple):
    """Labels at padding: the finding, should they be scored, the labels, and where (rows, positions)."""

    finding: Finding
    labels: Tensor
    where: Tensor


class Padding:
    """Finds labels at padding, and asks the loss itself: it runs a pass again with other labels there.

    A loss of the user's own may leave them out by the mask. Of passes that cannot be run again, nothing is said.
    """

    def __init__(self) -> None:
        self._suspects: list[Suspect] = []
        self._done = False

    def find(self, look: Look) -> None:
        """Keep suspects of a batch that is looked at in full."""
        self._suspects = []
        if self._done or not look.full or look.ours or config_value(look.subject.model, "is_encoder_decoder"):
            return
        for labels in look.readable("labels"):
            alike = {e.name: e for e in look.entries if e.part == labels.part and e.tensor.shape == labels.tensor.shape}
            if "input_ids" in alike and labels.tensor.dim() == 2 and not labels.is_float:
                self._suspects += _suspects(look, labels, alike["input_ids"].tensor, alike.get("attention_mask"))

    def found(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Yield a finding if the loss scores suspects."""
        suspects, self._suspects = self._suspects, []
        for suspect in suspects:
            own = next((one for one in record.passes if _number_of(one, suspect.labels) is not None), None)
            if not self._done and own is not None and _scores(subject, own, suspect):
                self._done = True
                yield suspect.finding


def _suspects(look: Look, labels: Entry, ids: Tensor, mask: Entry | None) -> Iterator[Suspect]:
    pad = config_value(look.subject.model, "pad_token_id")
    if mask is not None:
        hidden, said = mask.tensor == 0, f"'{mask.shown}' is 0"
    elif isinstance(pad, int):
        hidden, said = _runs(ids == pad), f"the input is the padding token {pad}, to the end of the row"
    else:
        return
    scored = labels.tensor >= 0
    where = hidden & scored & ~_ends(hidden, ids, stop_tokens(look.subject.model))
    if not bool(where.any()):
        return
    (row, position), wrong, targets = first_place(where), int(where.sum()), int(scored.sum())
    evidence = {"padding among targets": wrong, "targets": targets, "label there": int(labels.tensor[where][0])}
    what = f"padding is a target: {wrong / targets:.1%} of the targets in '{labels.shown}'"
    why, advice = f"labels are scored at padding, where {said}", "label padding -100, by the attention mask"
    place = look.place(labels, row, position)
    yield Suspect(look.finding("padding_scored", what, place, evidence, advice, why=why), labels.tensor, where)


def _ends(hidden: Tensor, ids: Tensor, stops: tuple[int, ...]) -> Tensor:
    """Return where a hidden run begins with the stop token that ends a text, which is a right target."""
    stop = torch.isin(ids, torch.tensor(stops, device=ids.device, dtype=ids.dtype))
    ends = hidden & stop
    ends[:, 1:] &= ~hidden[:, :-1] & ~stop[:, :-1]
    ends[:, 0] = False
    return ends


def _runs(flags: Tensor) -> Tensor:
    """Return the runs of at least two true values that reach the end of their row."""
    to_end = flags.flip(1).long().cumprod(1).flip(1).bool()
    return to_end & (to_end.sum(1, keepdim=True) > 1)


def _scores(subject: Subject, one: Pass, suspect: Suspect) -> bool:
    """Whether the loss of a pass moves with the labels at these positions alone."""
    number = _number_of(one, suspect.labels)
    changed = suspect.labels.clone()
    changed[suspect.where] = (changed[suspect.where] == 0).to(changed.dtype)  # another class, which every head has
    places = iter(range(1 << 30))
    inputs = map_tensors(lambda tensor: changed if next(places) == number else tensor, one.inputs)
    with untouched(subject.model), torch.no_grad(), preserved_rng():
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
