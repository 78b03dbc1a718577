"""Padding that is a target: labels at positions that the attention mask hides, or at a run of padding tokens."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rawloop.buffers import untouched
from rawloop.seed import preserved_rng, restore_rng
from rawloop.watch.entries import Entry, Look
from rawloop.watch.findings import Cause, Finding
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
        if self._done or not look.full or look.ours or _config(look.subject.model, "is_encoder_decoder"):
            return
        for labels in (entry for entry in look.entries if entry.kind == "labels" and entry.tensor.dim() == 2):
            alike = {e.name: e for e in look.entries if e.part == labels.part and e.tensor.shape == labels.tensor.shape}
            if "input_ids" in alike and not labels.tensor.is_floating_point():
                self._suspects += _suspects(look, labels, alike["input_ids"].tensor, alike.get("attention_mask"))

    def found(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Yield findings for suspects that the loss scores."""
        suspects, self._suspects = self._suspects, []
        for suspect in suspects:
            own = next((one for one in record.passes if _number_of(one, suspect.labels) is not None), None)
            if not self._done and own is not None and _scores(subject, own, suspect):
                self._done = True
                yield suspect.finding


def _suspects(look: Look, labels: Entry, ids: Tensor, mask: Entry | None) -> Iterator[Suspect]:
    scored = labels.tensor >= 0
    pad = _config(look.subject.model, "pad_token_id")
    stops = torch.tensor(_stops(look.subject.model), device=ids.device, dtype=ids.dtype)
    if mask is not None:
        hidden, said = mask.tensor == 0, f"'{mask.shown}' is 0"
        single = _begins(hidden, ids, stops)
    elif isinstance(pad, int):
        hidden, said = _runs(ids == pad), f"the input is the padding token {pad}, to the end of the row"
        single = _begins(hidden, ids, stops)
    else:
        return
    where = hidden & scored & ~single
    rows = where.any(1).nonzero().flatten().tolist()
    if not rows:
        return
    wrong, targets = int(where.sum()), int(scored.sum())
    position = int(where[rows[0]].nonzero()[0])
    evidence: dict[str, float | int | str] = {"padding among targets": wrong, "targets": targets}
    evidence |= {"share": wrong / targets, "rows": len(rows), "label there": int(labels.tensor[rows[0], position])}
    advice = "label padding -100: mask the labels by the attention mask, not by an id"
    place = look.place(labels, rows[0], position)
    cause = Cause("data", f"labels are scored at padding, where {said}", place, evidence, advice)
    what = f"padding is a target: {wrong / targets:.1%} of the targets in '{labels.shown}'"
    yield Suspect(look.finding("padding_scored", what, cause), labels.tensor, where)


def _begins(hidden: Tensor, ids: Tensor, stops: Tensor) -> Tensor:
    """Return where a hidden run begins with the stop token that ends a text, which is a right target."""
    stop = torch.isin(ids, stops)
    begins = hidden & stop
    begins[:, 1:] &= ~hidden[:, :-1] & ~stop[:, :-1]
    begins[:, 0] = False
    return begins


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
    tensors = [tensor for _, tensor in tensors_in(one.inputs)]
    alike = [n for n, t in enumerate(tensors) if t.shape == labels.shape and t.dtype == labels.dtype]
    return next((n for n in alike if torch.equal(tensors[n].to(labels.device), labels)), None)


def _config(model: Any, name: str) -> Any:
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _stops(model: Any) -> tuple[int, ...]:
    stops = _config(model, "eos_token_id")
    return tuple(stops) if isinstance(stops, list | tuple) else () if stops is None else (int(stops),)
