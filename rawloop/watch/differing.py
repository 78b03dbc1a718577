"""Weights that differ between ranks, which data-parallel training keeps equal."""

from collections import Counter
from collections.abc import Iterator

from rawloop.errors import first_few
from rawloop.watch.digests import Digests
from rawloop.watch.findings import Finding
from rawloop.watch.held import Evidence, place_of, told, weights_of
from rawloop.watch.subject import Detector, StepRecord, Subject


class RankWeights(Detector):
    """Compares digests of the weights over the ranks: at the first two steps, and when `WatchConfig.is_due`.

    All ranks call `batch` equally often. `end` would not do: a rank that skips an update alone does not come there.

    A detector that fails is off from then on, and if it is so on one rank alone, the others wait for it without end.
    So this one has nothing that can fail on one rank alone: an error of the digests is raised on all ranks.

    Kind: `weights_differ_across_ranks`.
    """

    def __init__(self) -> None:
        self._digests = Digests()
        self._calls = 0
        self._equal: int | None = None  # the step before which the weights were equal last

    def batch(self, subject: Subject, record: StepRecord) -> Iterator[Finding]:
        """Compare the weights before the forward pass, on all ranks together. Each rank gets the finding."""
        world, due = subject.world, self._calls == 1 or subject.config.is_due(self._calls)
        self._calls += 1
        if world.size == 1 or not due:
            return
        digests = world.on_all_ranks(lambda: self._digests.of(weights_of(subject)))
        shares = world.gather({name: str(digest) for name, digest in (digests or {}).items()})
        if any(share.keys() != shares[0].keys() for share in shares):
            return  # other parts of a model on other ranks: not data-parallel
        odd = {name: ranks for name in shares[0] if (ranks := odd_ranks([share[name] for share in shares]))}
        if odd:
            yield self._differ(subject, odd, len(shares[0]), record.step)
        else:
            self._equal = record.step

    def _differ(self, subject: Subject, odd: dict[str, list[int]], total: int, step: int) -> Finding:
        name, ranks = next(iter(odd.items()))
        evidence: Evidence = {"differing": len(odd), "of": total}
        evidence |= {"ranks that differ from the others": first_few(ranks), "ranks": subject.world.size}
        why = "the ranks began with different weights, and nothing has made them equal"
        advice = "Wrap the model in DistributedDataParallel, load the same file on all ranks, or seed them alike"
        if self._equal is not None:
            why = f"they were equal before step {self._equal}; since then the ranks got different gradients or "
            why += "updates, or code outside the optimizer wrote to weights on one rank"
            advice = "Call the wrapped model, not model.module, so that gradients are averaged; let no rank skip alone"
        what = f"rank {first_few(ranks)} has other weights before step {step} ({first_few(odd)}): {why}"
        kind, place = "weights_differ_across_ranks", place_of(name, rank=ranks[0])
        return told(subject, step, kind, "distributed", what, place, evidence, advice, since=self._equal)


def odd_ranks(values: list[str]) -> list[int]:
    """Return the ranks whose value is not the most common one; of equally common ones, rank 0's or the lowest's."""
    usual = Counter(values).most_common(1)[0][0]
    return [rank for rank, value in enumerate(values) if value != usual]
