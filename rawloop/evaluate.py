"""The evaluator: always a true eval_loss.

Sums are kept in float64 over every sample exactly once, on any number of ranks, and divided once. A number that cannot
be measured is an error before training starts; a batch that gives no finite loss is named and makes the evaluation
invalid, never best.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rawloop.buffers import untouched
from rawloop.contracts import Batch, StreamLoss
from rawloop.dist import World
from rawloop.errors import Preempted, UserError, happening, nearest
from rawloop.losses import LossModule
from rawloop.preempt import agreed


@dataclass
class EvaluationConfig:
    """Evaluation during training. Its cadence is independent of saving.

    Args:
        enabled: whether to evaluate at all. Off, there is no best model, and nothing else changes.
        every: evaluate after this many steps, besides at step 0 and at the end.
        batch_size: samples per batch and process. The result does not depend on it beyond rounding.
        best_metric: the metric whose best value makes the best model, such as eval_loss/audio.
        best_mode: whether the best value is the smallest (min) or the largest (max).
        patience: stop after this many evaluations in a row that were not the best; 0 never stops early.
    """

    enabled: bool = True
    every: int = 500
    batch_size: int = 4
    best_metric: str = "eval_loss"
    best_mode: Literal["min", "max"] = "min"
    patience: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.batch_size < 1:
            raise UserError(
                f"evaluation.every ({self.every}) and evaluation.batch_size ({self.batch_size}) must be 1 or more"
            )
        if self.patience < 0:
            raise UserError(f"evaluation.patience is {self.patience}: it must be 0 (never stop early) or more")
        if self.best_mode not in ("min", "max"):
            raise UserError(f"evaluation.best_mode is '{self.best_mode}': it must be min or max")


def check_best_metric(metric: str, streams: Iterable[str]) -> None:
    """Refuse a metric that no evaluation of these streams measures; their parts have numbers.

    Raises:
        UserError: it is none, with the nearest that there is.
    """
    losses = [f"eval_loss/{stream}" for stream in streams]
    known = ["eval_loss", *losses, *(f"eval_targets/{stream}" for stream in streams), "eval_seconds"]
    whole, _, part = metric.rpartition("/")
    if metric not in known and not (whole in losses and part.isdecimal()):
        raise UserError(
            f"evaluation.best_metric is '{metric}', which the evaluation does not measure{nearest(metric, known)}: it "
            f"measures {', '.join(known)}, and parts such as {losses[0]}/0"
        )


class Evaluation(NamedTuple):
    """One evaluation: `metrics` as they go into metrics.jsonl, and whether every batch was finite."""

    metrics: dict[str, float]
    valid: bool
    bad_ids: list[str]


class Share(NamedTuple):
    """One rank's part of an evaluation: sums and target counts by name (`audio`, `audio/0`, ...).

    `bad_ids` are of batches that are not finite; `stopped` says by what the share was cut short, if it was.
    """

    sums: dict[str, float]
    counts: dict[str, int]
    bad_ids: list[str]
    stopped: str | None = None


class Policy(Protocol):
    """What evaluation needs of a precision policy."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which training runs its forward passes."""
        ...


class Evaluator:
    """Scores this rank's share of the evaluation set and reduces over ranks once, at the end.

    Args:
        config: when to evaluate.
        module: the raw model with its loss, not wrapped in DDP: shards may be uneven.
        batches: this rank's batches, re-iterable; over all ranks each sample stands in exactly one.
        policy: gives the autocast context of training.
        world: the ranks.
        weights: weight of each stream's mean in eval_loss, as in the training loss. Every stream that is measured has
            one; 0 reports its mean and leaves it out of eval_loss.

    Raises:
        UserError: there are no weights, or one of them is not a number of 0 or more, or all are 0.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        module: LossModule,
        batches: Iterable[Batch],
        policy: Policy,
        world: World,
        weights: Mapping[str, float],
    ) -> None:
        self.config, self.module, self.batches = config, module, batches
        self.policy, self.world, self.weights = policy, world, weights
        wrong = [f"{stream} {weight}" for stream, weight in weights.items() if not 0 <= weight < math.inf]
        if wrong or not any(weights.values()):
            raise UserError(
                f"the evaluation's weights are {dict(weights)}: eval_loss is a sum over streams of weight x mean, so "
                "every weight must be a number of 0 or more, and one at least above 0"
            )

    def due(self, step: int, last: bool) -> bool:
        """Whether to evaluate at this step: at the start, every `every` steps, and at the end."""
        return last or step % self.config.every == 0

    def run(self, wanted: Callable[[], str | None] = lambda: None) -> Evaluation:
        """Evaluate now, on all ranks together. Modes, buffers and random streams are left as they were.

        Args:
            wanted: says before each batch by what the run is to be stopped; not None on any rank ends the evaluation.

        Returns:
            metrics: `eval_loss` (the weighted sum of the streams' means, nats), `eval_loss/<stream>`,
            `eval_loss/<stream>/<part>`, `eval_targets/<stream>`, `eval_seconds`.

        Raises:
            UserError: a stream has no target in the whole evaluation set, or no weight.
            Preempted: it was cut short; raised on every rank, with the reason as its message.
            RawloopError: a sample is unusable on some rank; raised on every rank.
        """
        start = time.perf_counter()
        with untouched(self.module, training=False), torch.no_grad():
            share = self.world.on_all_ranks(lambda: self._own_share(wanted))
        assert share is not None
        shares = self.world.gather(share)
        stopped = agreed([share.stopped for share in shares])
        if stopped is not None:
            raise Preempted(stopped)
        metrics = self._means([(share.sums, share.counts) for share in shares])
        bad = sorted(name for share in shares for name in share.bad_ids)
        metrics["eval_seconds"] = self.world.from_main(time.perf_counter() - start)  # one number on all ranks
        return Evaluation(metrics, valid=not bad, bad_ids=bad)

    def _own_share(self, wanted: Callable[[], str | None]) -> Share:
        rows: list[Tensor] = []
        measured: list[tuple[list[str], list[str]]] = []  # of each batch, the names of its sums, and its samples
        counts: dict[str, int] = {}
        for batch in self.batches:
            stopped = wanted()
            if stopped is not None:
                return Share({}, {}, [], stopped)
            place = f"in the evaluation, on rank {self.world.rank}, in the batch of the samples {', '.join(batch.ids)}"
            with happening(place, name_own=True), self.policy.autocast():
                losses = self.module(batch.to(self.world.device))
            named = dict(_named(losses))
            # A few numbers per batch stay on the device; logits are never kept and nothing is synced until the end.
            rows += [total for total, _ in named.values()]
            measured.append((list(named), batch.ids))
            for name, (_, count) in named.items():
                counts[name] = counts.get(name, 0) + count
        numbers = iter(torch.stack(rows).cpu().tolist() if rows else [])
        terms: dict[str, list[float]] = {name: [] for name in counts}
        bad: list[str] = []
        for names, ids in measured:
            values = {name: next(numbers) for name in names}
            bad += [] if all(map(math.isfinite, values.values())) else ids
            for name, value in values.items():
                terms[name].append(value)
        return Share({name: sum(values) for name, values in terms.items()}, counts, bad)

    def _means(self, shares: Sequence[tuple[dict[str, float], dict[str, int]]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for share_sums, share_counts in shares:
            for name, value in share_sums.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + share_counts[name]
        problem = self._not_weighable(counts)
        if problem:
            raise self.world.raised_on_all(UserError(problem))
        means = {name: sums[name] / counts[name] for name in sums if counts[name]}
        metrics = {"eval_loss": sum(weight * means[stream] for stream, weight in self.weights.items() if weight)}
        metrics |= {f"eval_loss/{name}": mean for name, mean in means.items()}
        metrics |= {f"eval_targets/{stream}": float(counts[stream]) for stream in self.weights if stream in counts}
        return metrics

    def _not_weighable(self, counts: Mapping[str, int]) -> str | None:
        """Why eval_loss does not exist, by the target counts of all that was measured, if it does not."""
        streams = [name for name in counts if name.partition("/")[0] == name]
        for stream in (stream for stream, weight in self.weights.items() if weight):
            if stream not in counts:
                return (
                    f"the weights have the stream '{stream}', which no batch measures{nearest(stream, streams)}: its "
                    f"loss does not exist; measured are {', '.join(streams) or 'none'}"
                )
            if not counts[stream]:
                return (
                    f"the evaluation set has no target in the stream '{stream}': its loss does not exist; mend "
                    "data.eval, or set evaluation.enabled to false"
                )
        unknown = [stream for stream in streams if stream not in self.weights]
        if unknown:
            return (
                f"the evaluation measures the stream '{unknown[0]}', which has no weight (weights are for "
                f"{', '.join(self.weights)}): give it one; 0 reports its mean and leaves it out of eval_loss"
            )
        return None


def _named(losses: dict[str, StreamLoss]) -> Iterable[tuple[str, tuple[Tensor, int]]]:
    for stream, loss in losses.items():
        yield stream, (loss.total.float(), loss.targets)
        if loss.parts is not None:  # as many as there are part_targets: LossModule has looked
            for part, (total, count) in enumerate(zip(loss.parts.float(), loss.part_targets, strict=True)):
                yield f"{stream}/{part}", (total, count)
