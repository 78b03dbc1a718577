"""The evaluator: a true eval_loss for any loss function and any batches.

Losses are summed in float64, over every sample exactly once on any number of ranks, and divided once. A value that
cannot be measured is an error. If the loss of a batch is not finite, the evaluation is invalid and never the best.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rawloop.buffers import untouched
from rawloop.contracts import Batch
from rawloop.dist import World, unwrap_ddp
from rawloop.errors import Preempted, UserError, happening, nearest
from rawloop.inputs import moved
from rawloop.losses import as_stream_losses, joined, not_weighable, sums_by_name
from rawloop.preempt import first_reason
from rawloop.progress import slow_bar
from rawloop.settings import EvaluationConfig as EvaluationConfig
from rawloop.sharding import is_sharded

Pairs = dict[str, tuple[Any, int]]  # name -> sum and count
LOSS = "eval_loss/"
FEWER = "make its batches smaller (evaluation.batch_size, or train.max_frames), or leave out its longest samples"
AGAIN = "pass a list, a DataLoader, or a function that returns new batches"


def check_best_metric(metric: str, streams: Iterable[str]) -> None:
    """Raise a UserError if an evaluation of these streams does not measure a metric; parts of streams have numbers."""
    losses = [f"eval_loss/{stream}" for stream in streams]
    known = ["eval_loss", *losses, *(f"eval_targets/{stream}" for stream in streams), "eval_seconds"]
    whole, _, part = metric.rpartition("/")
    if metric.startswith("listen/"):
        return  # `build_listener` checks it
    if metric not in known and not (whole in losses and part.isdecimal()):
        raise UserError(
            f"evaluation.best_metric is '{metric}', which the evaluation does not measure{nearest(metric, known)}: it "
            f"measures {', '.join(known)}, and parts such as {losses[0]}/0"
        )


class Evaluation(NamedTuple):
    """The result of an evaluation: `metrics` for metrics.jsonl, and whether the loss of every batch was finite."""

    metrics: dict[str, float]
    valid: bool
    bad_ids: list[str]


class Share(NamedTuple):
    """One rank's part of an evaluation: (sum, count) by name (`eval_loss/audio`, `eval_loss/audio/0`, `accuracy`).

    `values` are gathered for metrics. `bad_ids` are the samples of batches that are not finite. `stopped` is the reason
    for an early stop, or None.
    """

    sums: dict[str, tuple[float, int]]
    values: dict[str, list[Any]]
    num_batches: int
    bad_ids: list[str]
    stopped: str | None = None


class Evaluator:
    """Computes the losses of this rank's batches, and reduces them over the ranks once, at the end.

    `loss_fn(model, batch)` returns `(sum, count)`, `StreamLoss.of_mean(mean, count)`, or a dict of these by stream. It
    may return a pair `(losses, more)`, where `more` is a dict of metrics: `(sum, count)` is averaged over all batches,
    and tensors or lists are gathered for `metrics`.

    Args:
        loss_fn: computes the loss of a batch on the model's device.
        batches: this rank's batches, iterated in each evaluation: a list, a DataLoader, or a function that returns an
            iterable. A batch can be a tensor, list, dict, or object with attributes.
        policy: a `PrecisionPolicy`, for the autocast of training; None means float32.
        world: the ranks; `World.current()` by default.
        weights: weight of each stream's mean in eval_loss, 1 by default. 0 reports the mean and leaves it out.
        model: run in evaluation mode, without DDP, so ranks may have different numbers of batches. By default the
            model that the policy has prepared. If it is sharded, ranks with fewer batches repeat one, and drop it.
        metrics: called on rank 0 with the gathered values of all ranks, a list for each name; returns more metrics.
        every: steps between two evaluations, for `due`.
        bar: show a bar on a terminal if the evaluation takes long, on rank 0.

    Raises:
        UserError: there is no model, the batches can be iterated only once, a weight is negative or not finite, or all
            weights are 0.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Any],
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        policy: Any = None,
        world: World | None = None,
        weights: Mapping[str, float] | None = None,
        model: nn.Module | None = None,
        metrics: Callable[[dict[str, list[Any]]], Mapping[str, float]] | None = None,
        every: int = 500,
        bar: bool = False,
    ) -> None:
        model = model if model is not None else getattr(policy, "model", None)
        self.loss_fn, self.batches, self.policy = loss_fn, batches, policy
        self.world: World = world or getattr(policy, "world", None) or World.current()
        self.weights, self.metrics, self.every = weights, metrics, every
        self.bar = bar and self.world.is_main
        self._num_batches = 0  # in this rank's last evaluation
        if not isinstance(model, nn.Module):
            raise UserError(
                f"the evaluator's model is {model!r}: pass model=..., or a policy after policy.prepare(model)"
            )
        self.model = unwrap_ddp(model)
        if any(unwrap_ddp(module) is not module for module in self.model.modules()):
            raise UserError("a module inside the evaluator's model is wrapped in DDP: pass the model without wrappers")
        if isinstance(batches, Iterator):
            raise UserError(
                f"the evaluation's batches are a {type(batches).__name__}, which is empty the second time: {AGAIN}"
            )
        wrong = [f"{stream} {weight}" for stream, weight in (weights or {}).items() if not 0 <= weight < math.inf]
        if weights is not None and (wrong or not any(weights.values())):
            raise UserError(
                f"the evaluation's weights are {dict(weights)}: eval_loss is a sum over streams of weight x mean, so "
                "every weight must be a number of 0 or more, and at least one above 0"
            )

    def due(self, step: int, last: bool = False) -> bool:
        """Return whether to evaluate at this step: at the start, every `every` steps, and at the end."""
        return last or step % self.every == 0

    def run(self, wanted: Callable[[], str | None] = lambda: None) -> Evaluation:
        """Evaluate on all ranks together. Modes, buffers, gradients and random streams do not change.

        Args:
            wanted: called before each batch; if it returns a reason on any rank, the evaluation stops.

        Returns:
            metrics: `eval_loss` (the weighted sum of the streams' means), `eval_loss/<stream>`,
            `eval_loss/<stream>/<part>`, `eval_targets/<stream>`, `eval_seconds`, and your own metrics.

        Raises:
            UserError: there are no batches, or a stream has no targets or no weight.
            Preempted: the evaluation was stopped; raised on every rank, with the reason as its message.
            RawloopError: a sample is unusable on some rank; raised on every rank.
        """
        start = time.perf_counter()
        measure = partial(self._evaluate_batches, wanted)
        with untouched(self.model, training=False), torch.no_grad():
            # The passes of a sharded model wait for all ranks: the rank that fails says so and ends, as in training.
            share = measure() if self._is_paced else self.world.on_all_ranks(measure)
        assert share is not None
        shares = self.world.gather(share)
        stopped = first_reason([share.stopped for share in shares])
        if stopped is not None:
            raise Preempted(stopped)
        if not any(share.num_batches for share in shares):
            raise self.world.raised_on_all(UserError("the evaluation set is empty: no rank has a batch"))
        metrics = self._means(shares) | self._gathered_metrics(shares)
        bad = sorted(name for share in shares for name in share.bad_ids)
        metrics["eval_seconds"] = self.world.from_main(time.perf_counter() - start)  # equal on all ranks
        return Evaluation(metrics, valid=not bad, bad_ids=bad)

    @property
    def _is_paced(self) -> bool:
        return self.world.size > 1 and is_sharded(self.model)

    def _evaluate_batches(self, wanted: Callable[[], str | None]) -> Share:
        device = next((weight.device for weight in self.model.parameters()), self.world.device)
        autocast = self.policy.autocast if self.policy is not None else nullcontext
        measured: list[tuple[Pairs, list[str]]] = []
        values: dict[str, list[Any]] = {}
        batches = slow_bar(self.batches() if callable(self.batches) else self.batches, "evaluating", self.bar)
        pace = _together if self._is_paced else _alone
        for number, (batch, counts, stopped) in enumerate(pace(batches, wanted, self.world)):
            if stopped is not None:
                return Share({}, {}, number, [], stopped)
            ids = batch.ids if isinstance(batch, Batch) else []
            place = f"the batch of the samples {', '.join(ids)}" if ids else f"batch {number}"
            where = f"in the evaluation, on rank {self.world.rank}, in {place}"
            with happening(where, name_own=True, less=lambda: FEWER):
                with autocast():
                    result = self.loss_fn(self.model, moved(batch, device))
                if counts:
                    measured.append((self._pairs(result, values), ids or [f"batch {number} of rank {self.world.rank}"]))
        if not measured and self._num_batches:
            raise UserError(f"the evaluation has no batches now, and had {self._num_batches} the last time; {AGAIN}")
        self._num_batches = len(measured)
        return _share(measured, {name: list(chain.from_iterable(map(_items, v))) for name, v in values.items()})

    def _pairs(self, result: Any, values: dict[str, list[Any]]) -> Pairs:
        """Return sums and counts of one batch by name, and add values to gather to `values`.

        The sums stay on the device, so nothing waits for it until the end.
        """
        more: Mapping[str, Any] = {}
        if type(result) is tuple and len(result) == 2 and isinstance(result[1], Mapping):
            result, more = result
        pairs: Pairs = dict(sums_by_name(as_stream_losses(result), "eval_loss"))
        for name, value in more.items():
            if name.startswith("eval_"):
                raise UserError(f"a metric is called '{name}': names that start with eval_ are reserved")
            if type(value) is tuple and len(value) == 2 and isinstance(value[1], int):
                pairs[name] = value
            elif self.metrics is not None:
                values.setdefault(name, []).append(value)
            else:
                raise UserError(
                    f"the metric '{name}' is a {type(value).__name__}: return (sum, count) to average it, or pass a "
                    "function of the gathered values as `metrics`"
                )
        return pairs

    def _gathered_metrics(self, shares: Sequence[Share]) -> dict[str, float]:
        """Return the metrics of the gathered values, which rank 0 computes for all ranks."""
        if self.metrics is None:
            return {}
        names, function = dict.fromkeys(name for share in shares for name in share.values), self.metrics
        values = {name: [item for share in shares for item in share.values.get(name, [])] for name in names}
        computed = self.world.on_all_ranks(
            lambda: {name: float(value) for name, value in function(values).items()}, only_main=True
        )
        return self.world.from_main(computed) or {}

    def _means(self, shares: Sequence[Share]) -> dict[str, float]:
        sums = joined(share.sums for share in shares)
        targets = {name.removeprefix(LOSS): count for name, (_, count) in sums.items() if name.startswith(LOSS)}
        targets = {stream: count for stream, count in targets.items() if "/" not in stream}
        weights = self.weights or dict.fromkeys(targets, 1.0)
        problem = not_weighable(targets, weights)
        if problem:
            raise self.world.raised_on_all(UserError(problem))
        means = {name: total / count for name, (total, count) in sums.items() if count}
        metrics = {"eval_loss": sum(weight * means[LOSS + stream] for stream, weight in weights.items() if weight)}
        metrics |= means
        return metrics | {f"eval_targets/{name}": float(targets[name]) for name in weights if name in targets}


# a batch; whether it counts, or is run because other ranks still have batches; and why to stop before it, or None
Paced = Iterator[tuple[Any, bool, str | None]]


def _alone(batches: Iterable[Any], wanted: Callable[[], str | None], world: World) -> Paced:
    """Yield this rank's batches."""
    for batch in batches:
        yield batch, True, wanted()


def _together(batches: Iterable[Any], wanted: Callable[[], str | None], world: World) -> Paced:
    """Yield as many batches on each rank, as a sharded model needs all ranks in each pass. One agreement per batch."""
    left, spare = iter(batches), None
    while True:
        batch, stop = world.on_all_ranks(lambda: next(left, None)), wanted()
        spare = spare if batch is None else batch
        more, stopping, without = world.any([batch is not None, stop is not None, spare is None])
        if stopping:
            yield None, False, first_reason(world.gather(stop))
        if not more:
            return
        if without:  # a rank without any batch takes that of another
            spare = next(given for given in [spare, *world.gather(spare)] if given is not None)
        yield spare, batch is not None, None


def _share(measured: list[tuple[Pairs, list[str]]], values: dict[str, list[Any]]) -> Share:
    """Copy all sums from the device at once, and add them in float64."""
    totals = [total for pairs, _ in measured for total, _ in pairs.values()]
    rows = [total.detach().float().reshape(()) for total in totals if isinstance(total, Tensor)]
    read = iter(torch.stack(rows).cpu().tolist() if rows else [])
    shares: list[dict[str, tuple[float, int]]] = []
    bad: list[str] = []
    for pairs, ids in measured:
        shares.append(
            {n: (next(read) if isinstance(t, Tensor) else float(t), count) for n, (t, count) in pairs.items()}
        )
        bad += [] if all(math.isfinite(total) for total, _ in shares[-1].values()) else ids
    return Share(joined(shares), values, len(measured), bad)


def _items(value: Any) -> list[Any]:
    """Return a gathered value as a list: the rows of a tensor as Python numbers or lists, or the items of a list."""
    if isinstance(value, Tensor):
        rows: list[Any] = value.detach().reshape(len(value) if value.ndim else 1, *value.shape[1:]).tolist()
        return rows
    return list(value) if isinstance(value, list | tuple) else [value]
