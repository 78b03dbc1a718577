"""The causality probe: what comes later must not move a prediction, and what comes before must.

A leak makes a loss look splendid and a model useless: labels that were not shifted, a mask that shows the future. Both
move a prediction when inputs change that it is not to see.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch, Family
from rawloop.diagnose.table import table
from rawloop.diagnose.undisturbed import undisturbed
from rawloop.diagnose.verdict import Autocast

Outcome = Literal["PASS", "LEAK", "BLIND", "UNSEEN"]
WHY = {
    "PASS": "",
    "LEAK": "a prediction moves with its own target or what follows it: labels not shifted, or a mask not causal",
    "BLIND": "no prediction moves when what stands before it changes: the model does not see its inputs",
    "UNSEEN": "no target stands before the change or none after it, or logits are not finite: nothing was shown",
}


class Movement(NamedTuple):
    """How far logits moved at most, as a share of the largest logit, when the inputs changed from some position on.

    `earlier` and `later` count the targets that must stay and that must move. Up to `tolerance` is rounding.
    """

    earlier: int
    later: int
    moved_earlier: float
    moved_later: float
    tolerance: float

    def join(self, other: "Movement") -> "Movement":
        """Both together, as those of two ranks."""
        return Movement(
            self.earlier + other.earlier,
            self.later + other.later,
            max(self.moved_earlier, other.moved_earlier),
            max(self.moved_later, other.moved_later),
            max(self.tolerance, other.tolerance),
        )

    def outcome(self) -> Outcome:
        """What it shows."""
        if self.moved_earlier > self.tolerance:
            return "LEAK"
        if self.later and self.moved_later <= self.tolerance:
            return "BLIND"
        return "PASS" if self.earlier and self.later else "UNSEEN"


def probe(family: Family, model: nn.Module, batch: Batch, autocast: Autocast) -> dict[str, Movement]:
    """Compare the logits of a batch before and after `family.perturb`, with dropout off; nothing else is changed.

    The tolerance is the rounding of the coarsest dtype that the model computes in, of the largest logit. Shapes stay
    the same, so that what does not see the change is computed alike, and in practice to the bit.

    Args:
        family: knows which targets stand before the change.
        model: any model of the family, training or not.
        batch: on the model's device; with a row per stream, each stream gets its turn.
        autocast: gives the context that training runs its forward passes in.
    """
    perturbed = family.perturb(batch)
    with undisturbed(model, training=False), torch.no_grad():
        with autocast():
            before = family.logits(model, batch)
        with autocast():
            after = family.logits(model, perturbed.batch)
    tolerance = _rounding(model, autocast)
    return {
        stream: _movement(before[stream], after[stream], perturbed.earlier[stream], tolerance)
        for stream in family.streams
    }


def _movement(before: Tensor, after: Tensor, earlier: Tensor, tolerance: float) -> Movement:
    if not len(before) or not bool(before.isfinite().all() & after.isfinite().all()):
        return Movement(0, 0, 0.0, 0.0, tolerance)
    size = max(float(before.abs().amax()), torch.finfo(torch.float32).tiny)
    moved = (after - before).abs().flatten(1).amax(1) / size
    stay, move = moved[earlier], moved[~earlier]
    moved_earlier, moved_later = (float(part.amax()) if len(part) else 0.0 for part in (stay, move))
    return Movement(len(stay), len(move), moved_earlier, moved_later, tolerance)


def _rounding(model: nn.Module, autocast: Autocast) -> float:
    """The unit of rounding of the coarsest dtype in which the model computes."""
    weight = next(model.parameters())
    one = torch.ones(1, 1, device=weight.device)
    with autocast():
        dtypes = {(one @ one).dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def lines(movements: dict[str, Movement]) -> list[str]:
    """The probe's results as a table."""
    rows: list[list[object]] = [["stream", "must stay", "moved by", "must move", "moved by", "result"]]
    for stream, m in movements.items():
        why = WHY[m.outcome()]
        result = f"{m.outcome()}: {why}" if why else m.outcome()
        rows.append([stream, m.earlier, f"{m.moved_earlier:.1e}", m.later, f"{m.moved_later:.1e}", result])
    head = "causality probe: predictions when later inputs change, moved by a share of the largest logit"
    return [head, *table("lrrrrl", rows)]
