"""Weights and buffers that differ between ranks, which data-parallel training keeps equal."""

from collections import Counter
from collections.abc import Iterator, Mapping

from rawloop.errors import first_few
from rawloop.watch.digests import Digests
from rawloop.watch.findings import Cause, Finding, Place
from rawloop.watch.held import Evidence, measurable, module_of
from rawloop.watch.subject import Subject

MASTER = "master of "  # before a weight's name: the optimizer's float32 parameter in its place


class Ranks:
    """Compares the digests of weights and buffers over the ranks. A single process compares nothing."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        self._equal: tuple[str, int] | None = None  # when the weights were equal last

    def compare(self, subject: Subject, weights: Mapping[str, object], step: int, moment: str) -> Iterator[Finding]:
        """Yield findings for weights and buffers that differ. All ranks call this together, and each gets them."""
        if subject.world.size == 1:
            return
        named = {f"buffer {name}": b for name, b in subject.model.named_buffers() if measurable(b)}
        buffers = dict(zip(named, self._digests.of(list(named.values())), strict=True))
        shares = subject.world.gather({name: str(value) for name, value in {**weights, **buffers}.items()})
        if any(share.keys() != shares[0].keys() for share in shares):
            return  # other parts of a model on other ranks: not data-parallel
        odd = {name: ranks for name in shares[0] if (ranks := odd_ranks([share[name] for share in shares]))}
        differing = [name for name in odd if name in weights]
        if differing:
            yield self._weights(subject, differing, odd[differing[0]], len(weights), step, moment)
        else:
            self._equal = moment, step
        moving = [name.removeprefix("buffer ") for name in odd if name not in weights]
        if moving:
            yield buffers_differ(subject, moving, odd[f"buffer {moving[0]}"], len(named), step)

    def _weights(
        self, subject: Subject, differing: list[str], ranks: list[int], total: int, step: int, moment: str
    ) -> Finding:
        name = differing[0].removeprefix(MASTER)
        place = Place(phase="update", module=module_of(name), parameter=name, rank=ranks[0])
        evidence: Evidence = {"differing": len(differing), "of": total}
        evidence |= {"ranks that differ from the others": first_few(ranks), "ranks": subject.world.size}
        if self._equal is None:
            what = "the ranks began with different weights, and nothing has made them equal"
            advice = "Wrap the model in DistributedDataParallel, load the same file on all ranks, or seed them alike"
        else:
            what = f"the weights were equal {self._equal[0]}: since then the ranks got different gradients or updates"
            advice = (
                "Call the wrapped model, not model.module, so that gradients are averaged; let no rank skip, clip or "
                "write weights alone"
            )
        cause = Cause("distributed", what, place, evidence, advice)
        what = f"rank {first_few(ranks)} has other weights {moment}: {first_few(differing)}"
        since = None if self._equal is None else self._equal[1]
        return Finding("weights_differ_across_ranks", what, (cause,), step, subject.world.rank, since=since)


def odd_ranks(values: list[str]) -> list[int]:
    """Return the ranks whose value is not the most common one; of equally common ones, rank 0's or the lowest's."""
    usual = Counter(values).most_common(1)[0][0]
    return [rank for rank, value in enumerate(values) if value != usual]


def buffers_differ(subject: Subject, moving: list[str], ranks: list[int], total: int, step: int) -> Finding:
    """Return the finding for buffers that differ, as statistics of a batch do."""
    place = Place(module=module_of(moving[0]), tensor=moving[0], rank=ranks[0])
    evidence: Evidence = {"differing": len(moving), "of": total, "ranks that differ from the others": first_few(ranks)}
    what = "each rank computes statistics of its own batches, and saved or evaluated are those of one rank"
    cause = Cause("distributed", what, place, evidence, "SyncBatchNorm or world.make_equal keeps them equal")
    what = f"buffers differ between ranks: {first_few(moving)}"
    return Finding("buffers_differ_across_ranks", what, (cause,), step, subject.world.rank, ordinary=True)
