"""The causality probe: what comes later must not move a prediction, and what comes before must.

Labels that were not shifted and a mask that shows the future make a loss look splendid and a model useless. A model
without attention learns, too, so inputs before a prediction are changed as well, its own input left as it was.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.buffers import untouched
from rawloop.contracts import Batch, Family
from rawloop.diagnose.shared import coarsest_eps, looking_at, table
from rawloop.diagnose.verdict import Autocast
from rawloop.seed import preserved_rng

Outcome = Literal["PASS", "LEAK", "BLIND", "UNSEEN"]

# Roundings of float32 per layer that a prediction may notice of inputs that it does not see: experts, who take the
# tokens of all positions at once, moved it by 3.2 eps in 24 layers. Leaks of a single layer moved it by 20,000.
ROUNDINGS, LAYERS = 4, 16  # as if there were 16 layers at least
# Share of the largest logit by which a model may differ from itself and still be judged: context moves it by 0.024.
NOISY = 0.02


class Movement(NamedTuple):
    """How far logits moved at most, as a share of the largest logit.

    `earlier` targets must stay when inputs behind them change, and moved by `moved_earlier`. `later` says of each kind
    of context (tokens, clips) how many targets must move when it changes, and how far they did.
    """

    earlier: int
    moved_earlier: float
    later: dict[str, tuple[int, float]]
    tolerance: float  # of rounding, and of noise: the model's difference from itself

    def join(self, other: "Movement") -> "Movement":
        """Join the movements of two ranks."""
        pairs = {what: (self.later.get(what, NONE), other.later.get(what, NONE)) for what in self.later | other.later}
        return Movement(
            self.earlier + other.earlier,
            max(self.moved_earlier, other.moved_earlier),
            {what: (one[0] + two[0], max(one[1], two[1])) for what, (one, two) in pairs.items()},
            max(self.tolerance, other.tolerance),
        )

    def outcome(self) -> Outcome:
        """Return the first of LEAK, BLIND, PASS that fits, or UNSEEN if the batch shows nothing."""
        if self.moved_earlier > self.tolerance:
            return "LEAK"
        if self.tolerance > NOISY:
            return "UNSEEN"
        if self._unnoticed():
            return "BLIND"
        return "PASS" if self.earlier and any(count for count, _ in self.later.values()) else "UNSEEN"

    def why(self) -> str:
        """The outcome in words, empty for a pass."""
        return {
            "PASS": "",
            "LEAK": "a prediction moves with its own target or what follows it: labels not shifted, or a mask not "
            "causal",
            "BLIND": f"no prediction moves when the {' or the '.join(self._unnoticed())} before its own input change: "
            "nothing of them reaches it, through embeddings, encoder or attention",
            "UNSEEN": "the same batch gives other logits each time"
            if self.tolerance > NOISY
            else "no target stands before the change or none after it, or logits are not finite: nothing was shown",
        }[self.outcome()]

    def _unnoticed(self) -> list[str]:
        return [what for what, (count, moved) in self.later.items() if count and moved <= self.tolerance]


NONE = (0, 0.0)


def probe(family: Family, model: nn.Module, batch: Batch, autocast: Autocast) -> dict[str, Movement]:
    """Compare the logits of a batch before and after `family.perturb`, with dropout off; nothing else is changed.

    The tolerance is the larger of two: rounding (see `_rounding`), and noise, which is twice what moves when the same
    batch is run again with the same random numbers. A batch with a row per stream gives each stream its turn.
    """
    with looking_at(batch.ids):
        perturbed = family.perturb(batch)

    def logits(one: Batch) -> dict[str, Tensor]:
        with looking_at(one.ids), preserved_rng(), autocast():
            return family.logits(model, one)

    with untouched(model, training=False), torch.no_grad():
        before, again, after = logits(batch), logits(batch), logits(perturbed.batch)
        others = {what: logits(context.batch) for what, context in perturbed.contexts.items()}
    rounding = _rounding(model, autocast)
    movements = {}
    for stream in family.streams:
        earlier = _moved(before[stream], after[stream], perturbed.earlier[stream])
        later = {
            what: _moved(before[stream], others[what][stream], context.later[stream])
            for what, context in perturbed.contexts.items()
        }
        noise = _moved(before[stream], again[stream], torch.ones_like(perturbed.earlier[stream]))[1]
        movements[stream] = Movement(*earlier, later, max(rounding, 2 * noise))
    return movements


def _moved(before: Tensor, after: Tensor, chosen: Tensor) -> tuple[int, float]:
    """Return the number of chosen targets, and how far their logits moved; 0 if there is nothing to compare."""
    count = int(chosen.sum())
    if not count or not bool(before.isfinite().all() & after.isfinite().all()):
        return NONE
    size = max(float(before.abs().amax()), torch.finfo(torch.float32).tiny)
    return count, float((after - before)[chosen].abs().amax()) / size


def _rounding(model: nn.Module, autocast: Autocast) -> float:
    """Return how far rounding may move logits: by each layer in float32, as sums are; once in the coarsest dtype."""
    layers = max((len(part) for part in model.modules() if isinstance(part, nn.ModuleList)), default=0)
    # A 16-bit dtype is not counted by layers: 64 units of bfloat16 are half the largest logit.
    summing = torch.finfo(torch.float32).eps * ROUNDINGS * max(LAYERS, layers)
    return max(summing, coarsest_eps(model, autocast))


def lines(movements: dict[str, Movement]) -> list[str]:
    """Return the results as a table: a row per stream, and one more per further context."""
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
