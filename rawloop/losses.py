"""Model and loss as one module, which DDP wraps; the check of what a loss function returns; the training loss."""

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rawloop.contracts import Batch, Losses, StreamLoss
from rawloop.dist import World
from rawloop.errors import UserError, nearest


class LossModule(nn.Module):
    """A model together with its loss: calling it with a batch gives every stream's `StreamLoss`.

    DDP wraps this module. DDP learns from the result of forward which parameters a step uses, so heads that are applied
    while scoring must be inside.
    """

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model = model
        self.losses = losses

    def forward(self, batch: Batch) -> dict[str, StreamLoss]:
        """Score one micro-batch that is on the model's device.

        Raises:
            UserError: a stream that has targets got no loss, or something that is no `StreamLoss`.
        """
        losses = self.losses(self.model, batch)
        for stream, count in batch.targets.items():
            scored = losses.get(stream) if isinstance(losses, Mapping) else None
            total = getattr(scored, "total", scored)
            if count and not isinstance(total, torch.Tensor):
                given = f"losses for {list(losses)}" if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
                raise UserError(
                    f"there is no loss for the {count} targets of the stream '{stream}': the family's `losses` gave "
                    f"{given if scored is None else f'a total that is a {type(total).__name__}'}; it must return a "
                    "StreamLoss with a tensor for each stream. A model that swallows labels under a name that it does "
                    "not know returns a loss of None"
                )
        return as_stream_losses(losses)


def as_stream_losses(result: Any, name: str = "loss") -> dict[str, StreamLoss]:
    """Return what a loss function has returned as one `StreamLoss` per stream.

    Args:
        result: a `StreamLoss`, such as `StreamLoss.of_mean(mean, targets)`, or a pair (sum, targets); or a mapping from
            names of streams to these.
        name: of the stream, where `result` is no mapping.

    Raises:
        UserError: it is something else; or the sum is not one number, or the counts are not whole numbers.
    """
    return {stream: _stream_loss(stream, loss) for stream, loss in _streams(result, name)}


def _streams(result: Any, name: str) -> Iterable[tuple[Any, Any]]:
    return result.items() if isinstance(result, Mapping) else [(name, result)]


def _stream_loss(stream: Any, loss: Any) -> StreamLoss:
    if type(loss) is tuple and len(loss) == 2:
        loss = StreamLoss(*loss)
    wrong = _fault_of(loss)
    if wrong:
        raise UserError(f"the loss function gave {wrong} for the stream '{stream}'")
    if not isinstance(stream, str) or "/" in stream:
        raise UserError(f"a stream is called '{stream}': names with a / are those of parts, such as audio/0")
    checked: StreamLoss = loss
    return checked


def _fault_of(loss: Any) -> str | None:
    """Say what is wrong with the loss of a stream, if anything is."""
    if not isinstance(loss, StreamLoss):
        advice = "return (sum, targets), or StreamLoss.of_mean(mean, targets): batches differ in their targets"
        return f"a {type(loss).__name__}, and no StreamLoss(total, targets), ({advice})"
    total: Any = loss.total
    if total is not None and not isinstance(total, Tensor):
        return f"a total that is a {type(total).__name__}, where a tensor is needed,"
    if total is not None and total.numel() != 1:
        return f"a total of shape {tuple(total.shape)}, where one number is needed,"
    counts = [loss.targets, *loss.part_targets]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return f"the target counts {counts}, which must be Python ints of 0 or more (count on the CPU, or int(count)),"
    parts = 0 if loss.parts is None else len(loss.parts)
    if parts != len(loss.part_targets):
        return f"{parts} parts and {len(loss.part_targets)} part_targets"
    return None


def sums_by_name(losses: Mapping[str, StreamLoss], prefix: str) -> Iterator[tuple[str, tuple[Tensor, int]]]:
    """Yield name, sum and number of targets of every stream and part: `loss/audio`, `loss/audio/0`."""
    for stream, loss in losses.items():
        yield f"{prefix}/{stream}", (loss.total, loss.targets)
        if loss.parts is not None:
            for part, (total, count) in enumerate(zip(loss.parts, loss.part_targets, strict=True)):
                yield f"{prefix}/{stream}/{part}", (total, count)


def joined(shares: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Add up sums and counts by name, in float64. Batches and ranks may have different names."""
    sums: dict[str, tuple[float, int]] = {}
    for share in shares:
        for name, (total, count) in share.items():
            before, counted = sums.get(name, (0.0, 0))
            sums[name] = before + total, counted + count
    return sums


def weighted_mean(
    losses: Mapping[str, StreamLoss], weights: Mapping[str, float], targets: Mapping[str, int], ranks: int
) -> Tensor:
    """The training loss of a micro-batch: sum over streams of weight x (sum of nats / targets of the whole window).

    `targets` counts over all micro-batches and ranks, so batch size, accumulation and world size do not change the
    gradient beyond rounding. DDP averages gradients over `ranks`, so their number is multiplied back. A stream without
    any target in the window adds nothing; it stays in the sum, so that its weights get gradients of zero, as DDP needs.
    """
    without = [stream for stream in losses if stream not in weights]
    if without:
        raise UserError(
            f"the model's losses have the stream '{without[0]}', which has no weight{nearest(without[0], weights)}: "
            f"stream_weights are for {', '.join(weights)}; give it one, or leave it out of the losses"
        )
    factors = {stream: ranks * weights[stream] / (targets[stream] or 1) for stream in losses}
    terms = [losses[stream].total * factor for stream, factor in factors.items()]
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def not_weighable(targets: Mapping[str, int], weights: Mapping[str, float]) -> str | None:
    """Say why eval_loss does not exist, by the number of targets of each stream, if it does not."""
    if not targets:
        return "the evaluation's loss function has returned no loss: it must return (sum, count), or a dict of these"
    for stream in (stream for stream, weight in weights.items() if weight):
        if stream not in targets:
            return (
                f"the weights have the stream '{stream}', which no batch measures{nearest(stream, targets)}: its "
                f"loss does not exist; measured are {', '.join(targets)}"
            )
        if not targets[stream]:
            return (
                f"the evaluation set has no target in the stream '{stream}': its loss does not exist; mend "
                "data.eval, or set evaluation.enabled to false"
            )
    unknown = [stream for stream in targets if stream not in weights]
    if unknown:
        return (
            f"the evaluation measures the stream '{unknown[0]}', which has no weight (weights are for "
            f"{', '.join(weights)}): give it one; 0 reports its mean and leaves it out of eval_loss"
        )
    return None


def exact(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: 16 bits are too few for a log-softmax over a vocabulary. Float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def without_adapter(model: Any) -> Any:
    """Return the model inside a PEFT wrapper; adapters stay in its layers."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


class Meter:
    """Sums this rank's losses since the last line, and measures the speed.

    As a part of a checkpoint it lets a run that was stopped between two lines write the second one as if it had not
    been. `per_rank` tells the checkpoint manager to store one for every rank.
    """

    per_rank = True

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # nats, by stream
        self.parts: dict[str, Tensor] = {}  # nats of each of its parts, such as codebooks
        self.targets: dict[str, list[int]] = {}  # of the stream, then of each part
        self.restart_clock(0)

    def restart_clock(self, samples: int) -> None:
        """Leave out of the speed what has passed since the last line: an evaluation, a save."""
        self.since, self.samples = time.perf_counter(), samples

    def speed(self, samples: int) -> float:
        """Samples per second since the clock was restarted."""
        return (samples - self.samples) / (time.perf_counter() - self.since)

    def add(self, losses: Mapping[str, StreamLoss]) -> None:
        """Add one micro-batch, whose streams, and the parts of these, need not be those of the others."""
        for stream, loss in losses.items():
            total, counts = loss.total.detach(), [loss.targets, *loss.part_targets]
            if stream in self.totals:
                total = self.totals[stream].to(total.device) + total
            self.totals[stream] = total
            self.targets[stream] = list(map(sum, zip_longest(self.targets.get(stream, []), counts, fillvalue=0)))
            if loss.parts is not None:
                self.parts[stream] = _added(self.parts.get(stream), loss.parts)

    def take(self, world: World) -> dict[str, float]:
        """Return the mean nats per target of every stream and part that had any, over all ranks, and start over.

        Ranks may have met other streams: sums are joined by name, in float64.
        """
        own: dict[str, tuple[float, int]] = {}
        for stream, total in self.totals.items():
            sums = [total.item(), *(self.parts[stream].tolist() if stream in self.parts else [])]
            names = [f"loss/{stream}", *(f"loss/{stream}/{part}" for part in range(len(sums) - 1))]
            own |= dict(zip(names, zip(sums, self.targets[stream], strict=True), strict=True))
        self.start_afresh()
        means = joined(world.gather(own)).items()
        return {name: total / count for name, (total, count) in means if count}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts since the last line."""
        return {"totals": dict(self.totals), "parts": dict(self.parts), "targets": dict(self.targets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing from there; the first micro-batch takes the sums to its device."""
        self.totals, self.parts, self.targets = dict(state["totals"]), dict(state["parts"]), dict(state["targets"])

    def start_afresh(self, step: int = 0) -> None:
        """Forget the sums."""
        self.totals, self.parts, self.targets = {}, {}, {}


def _added(known: Tensor | None, parts: Tensor) -> Tensor:
    """Sums of parts, by their number; the shorter row has zeros for what it lacks."""
    if known is None:
        return parts
    longer = max(len(known), len(parts))
    return pad(known.to(parts.device), (0, longer - len(known))) + pad(parts, (0, longer - len(parts)))
