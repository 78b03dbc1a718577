"""The causality probe: later inputs must not change a prediction, and earlier inputs must.

Unshifted labels, or a mask that shows the future, give a low loss and a useless model. A model without attention learns
too, so the probe also changes inputs before a prediction, but not the input at its position.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.buffers import untouched
from rawloop.contracts import Batch, Family
from rawloop.diagnose.shared import Autocast, coarsest_eps, looking_at, table
from rawloop.seed import preserved_rng

Outcome = Literal["PASS", "LEAK", "BLIND", "UNSEEN"]

# Tolerance in units of float32's eps per layer, for at least 16 layers. Experts, which process the tokens of all
# positions together, changed predictions by 3.2 eps in 24 layers; a leak in a single layer by 20,000 eps.
ROUNDINGS, LAYERS = 4, 16
NOISY = 0.02  # with a larger tolerance nothing is judged: context moves logits by 0.024 of the largest


class Movement(NamedTuple):
    """The largest changes of logits, as a share of the largest logit.

    When later inputs change, `earlier` targets must not move; they moved by `moved_earlier`. `later` has, for each kind
    of context (tokens, clips), how many targets must move when it changes, and by how much they moved.
    """

    earlier: int
    moved_earlier: float
    later: dict[str, tuple[int, float]]
    tolerance: float  # for rounding and for noise, the difference between two equal passes
    least: float  # the tolerance without the rounding of 16 bits: what moves by no more is not reached at all

    def join(self, other: "Movement") -> "Movement":
        """Join the movements of two ranks."""
        pairs = {what: (self.later.get(what, NONE), other.later.get(what, NONE)) for what in self.later | other.later}
        return Movement(
            self.earlier + other.earlier,
            max(self.moved_earlier, other.moved_earlier),
            {what: (one[0] + two[0], max(one[1], two[1])) for what, (one, two) in pairs.items()},
            max(self.tolerance, other.tolerance),
            max(self.least, other.least),
        )

    def outcome(self) -> Outcome:
        """Return LEAK, BLIND or PASS, or UNSEEN if the batch shows nothing."""
        if self.moved_earlier > self.tolerance:
            return "LEAK"
        if self.tolerance > NOISY:
            return "UNSEEN"
        if self._unnoticed(self.least):
            return "BLIND"
        if self._unnoticed(self.tolerance):
            return "UNSEEN"
        return "PASS" if self.earlier and any(count for count, _ in self.later.values()) else "UNSEEN"

    def why(self) -> str:
        """Return the reason for the outcome; empty for a pass."""
        rounded = " and ".join(self._unnoticed(self.tolerance))
        return {
            "PASS": "",
            "LEAK": "a prediction moves with its own target or later inputs: labels not shifted, or a mask not causal",
            "BLIND": f"no prediction moves when earlier {' or '.join(self._unnoticed(self.least))} change: they do not "
            "reach it through embeddings, encoder or attention",
            "UNSEEN": "the same batch gives other logits each time"
            if self.tolerance > NOISY
            else f"other {rounded} move predictions by no more than this mode rounds: --precision.mode fp32 would tell"
            if rounded
            else "no target is before the change or none is after it, or logits are not finite",
        }[self.outcome()]

    def _unnoticed(self, tolerance: float) -> list[str]:
        return [what for what, (count, moved) in self.later.items() if count and moved <= tolerance]


NONE = (0, 0.0)


def probe(
    family: Family,
    model: nn.Module,
    batch: Batch,
    autocast: Autocast,
    logits_of: Callable[[Batch], dict[str, Tensor]] | None = None,
) -> dict[str, Movement]:
    """Compare the logits of a batch before and after `family.perturb`, with dropout off. The model does not change.

    The tolerance is the larger of rounding (of float32 in each layer, and once of the coarsest dtype) and twice the
    difference between two passes over the same batch with the same random numbers. The batch needs one row per stream.
    `logits_of` computes logits through the module that was sharded, if one was.
    """
    logits_of = logits_of or partial(family.logits, model)
    with looking_at(batch.ids):
        perturbed = family.perturb(batch)

    def logits(one: Batch) -> dict[str, Tensor]:
        with looking_at(one.ids), preserved_rng(), autocast():
            return logits_of(one)

    with untouched(model, training=False, weights=True), torch.no_grad():
        before, again, after = logits(batch), logits(batch), logits(perturbed.batch)
        others = {what: logits(context.batch) for what, context in perturbed.contexts.items()}
    summing, coarsest = _summing(model), coarsest_eps(model, autocast)
    movements = {}
    for stream in family.streams:
        earlier = _moved(before[stream], after[stream], perturbed.earlier[stream])
        later = {
            what: _moved(before[stream], others[what][stream], context.later[stream])
            for what, context in perturbed.contexts.items()
        }
        noise = _moved(before[stream], again[stream], torch.ones_like(perturbed.earlier[stream]))[1]
        least = max(summing, 2 * noise)
        # The eps of a 16-bit dtype is not multiplied by layers: 64 times bfloat16's is half the largest logit.
        movements[stream] = Movement(*earlier, later, max(least, coarsest), least)
    return movements


def _moved(before: Tensor, after: Tensor, chosen: Tensor) -> tuple[int, float]:
    """Return the number of chosen targets, and how far their logits moved; zeros if they cannot be compared."""
    count = int(chosen.sum())
    if not count or not bool(before.isfinite().all() & after.isfinite().all()):
        return NONE
    size = max(float(before.abs().amax()), torch.finfo(torch.float32).tiny)
    return count, float((after - before)[chosen].abs().amax()) / size


def _summing(model: nn.Module) -> float:
    """Return how far other orders of summation in float32 may move logits, as a share of the largest."""
    layers = max((len(part) for part in model.modules() if isinstance(part, nn.ModuleList)), default=0)
    return torch.finfo(torch.float32).eps * ROUNDINGS * max(LAYERS, layers)


def lines(movements: dict[str, Movement]) -> list[str]:
    """Return the results as a table, with a row per stream and kind of context."""
    rows: list[list[object]] = [["stream", "must stay", "moved by", "must move", "with", "moved by", "result"]]
    for stream, m in movements.items():
        result = f"{m.outcome()}: {m.why()}" if m.why() else m.outcome()
        head: list[object] = [stream, m.earlier, f"{m.moved_earlier:.1e}"]
        for what, (count, moved) in m.later.items():
            rows.append([*head, count, what, f"{moved:.1e}", result])
            head, result = ["", "", ""], ""
    if not movements:
        return []
    tolerance = max(m.tolerance for m in movements.values())
    title = "causality probe: predictions when other inputs change, moved by a share of the largest logit"
    title += f" (tolerance {tolerance:.1e})"
    return [title, *table("lrrrlrl", rows)]
