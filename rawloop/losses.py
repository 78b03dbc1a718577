"""Model and loss as one module, which DDP wraps; checking losses; the training loss, and its means for the log."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rawloop.contracts import Batch, Losses, StreamLoss
from rawloop.dist import World
from rawloop.errors import UserError, nearest


class LossModule(nn.Module):
    """A model together with its loss: called with a batch, it returns every stream's `StreamLoss`.

    DDP wraps this module. It finds the parameters that a step uses from the result of forward, so heads that are
    applied in the loss must be inside.
    """

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model = model
        self.losses = losses

    def forward(self, batch: Batch, compute: Callable[[nn.Module, Batch], Any] | None = None) -> Any:
        """Return the losses of a micro-batch that is on the model's device, a `StreamLoss` for each stream.

        `compute(model, batch)` is returned in their place if it is given, such as logits: the weights of a sharded
        model are whole only inside of this module's pass.

        Raises:
            UserError: a stream with targets has no loss, or one that is not a `StreamLoss`.
        """
        if compute is not None:
            return compute(self.model, batch)
        losses = self.losses(self.model, batch)
        for stream, count in batch.targets.items():
            scored = losses.get(stream) if isinstance(losses, Mapping) else None
            total = getattr(scored, "total", scored)
            if count and not isinstance(total, torch.Tensor):
                given = f"losses for {list(losses)}" if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
                raise UserError(
                    f"there is no loss for the {count} targets of the stream '{stream}': the family's `losses` gave "
                    f"{given if scored is None else f'a total that is a {type(total).__name__}'}; it must return a "
                    "StreamLoss with a tensor for each stream. A model that ignores labels under an unknown name "
                    "returns a loss of None"
                )
        return as_stream_losses(losses)


def as_stream_losses(result: Any, name: str = "loss") -> dict[str, StreamLoss]:
    """Convert the result of a loss function to one `StreamLoss` per stream.

    Args:
        result: a `StreamLoss`, such as `StreamLoss.of_mean(mean, targets)`, or a pair (sum, targets); or a mapping from
            stream names to these.
        name: the stream's name if `result` is not a mapping.

    Raises:
        UserError: it is something else, the sum is not one number, or the counts are not whole numbers.
    """
    items = result.items() if isinstance(result, Mapping) else [(name, result)]
    return {stream: _stream_loss(stream, loss) for stream, loss in items}


def _stream_loss(stream: Any, loss: Any) -> StreamLoss:
    if type(loss) is tuple and len(loss) == 2:
        loss = StreamLoss(*loss)
    wrong = _fault_of(loss)
    if wrong:
        raise UserError(f"the loss function gave {wrong} for the stream '{stream}'")
    if not isinstance(stream, str) or "/" in stream:
        raise UserError(f"a stream is called '{stream}': names with a / are for parts, such as audio/0")
    checked: StreamLoss = loss
    return checked


def _fault_of(loss: Any) -> str | None:
    """Return what is wrong with the loss of a stream, or None."""
    if not isinstance(loss, StreamLoss):
        advice = "return (sum, targets), or StreamLoss.of_mean(mean, targets): batches differ in their targets"
        return f"a {type(loss).__name__}, not a StreamLoss(total, targets), ({advice})"
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
    """Yield the name, sum and number of targets of every stream and part: `loss/audio`, `loss/audio/0`."""
    for stream, loss in losses.items():
        yield f"{prefix}/{stream}", (loss.total, loss.targets)
        if loss.parts is not None:
            for part, (total, count) in enumerate(zip(loss.parts, loss.part_targets, strict=True)):
                yield f"{prefix}/{stream}/{part}", (total, count)


def joined(shares: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Add sums and counts by name, in float64. Batches and ranks may have different names."""
    sums: dict[str, tuple[float, int]] = {}
    for share in shares:
        for name, (total, count) in share.items():
            before, counted = sums.get(name, (0.0, 0))
            sums[name] = before + total, counted + count
    return sums


def weighted_mean(
    losses: Mapping[str, StreamLoss], weights: Mapping[str, float], targets: Mapping[str, int], ranks: int
) -> Tensor:
    """Return the training loss of a micro-batch: the sum over streams of weight x (nats / targets of the window).

    `targets` counts over all micro-batches and ranks, so batch size, accumulation and world size change the gradient
    only by rounding. DDP averages gradients over `ranks`, so the loss is multiplied by their number. A stream without
    targets adds zero: its weights then get gradients of zero, which DDP needs.
    """
    without = [stream for stream in losses if stream not in weights]
    if without:
        raise UserError(
            f"the model's losses have the stream '{without[0]}', which has no weight{nearest(without[0], weights)}: "
            f"stream_weights are for {', '.join(weights)}; add a weight, or remove the stream from the losses"
        )
    factors = {stream: ranks * weights[stream] / (targets[stream] or 1) for stream in losses}
    terms = [losses[stream].total * factor for stream, factor in factors.items()]
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def not_weighable(targets: Mapping[str, int], weights: Mapping[str, float]) -> str | None:
    """Return why eval_loss cannot be computed from these numbers of targets by stream, or None."""
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
                f"the evaluation set has no target in the stream '{stream}': its loss does not exist; correct "
                "data.eval, or set evaluation.enabled to false"
            )
    unknown = [stream for stream in targets if stream not in weights]
    if unknown:
        return (
            f"the evaluation measures the stream '{unknown[0]}', which has no weight (weights are for "
            f"{', '.join(weights)}): add a weight; 0 reports its mean and leaves it out of eval_loss"
        )
    return None


def exact(logits: Tensor) -> Tensor:
    """Return logits in at least float32: 16 bits are too few for a log-softmax over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def without_adapter(model: Any) -> Any:
    """Return the model inside a PEFT wrapper; its layers keep their adapters."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


class Meter:
    """Sums this rank's losses since the last line of the log.

    The sums stay on the device until a line is written. A checkpoint contains them (`per_rank`: one for each rank), so
    a resumed run writes the same next line as an uninterrupted one.
    """

    per_rank = True

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # nats, by stream
        self.parts: dict[str, Tensor] = {}  # nats by part, such as codebooks
        self.targets: dict[str, list[int]] = {}  # those of the stream, then of each part

    def add(self, losses: Mapping[str, StreamLoss]) -> None:
        """Add one micro-batch. Its streams and parts may differ from those of other micro-batches."""
        for stream, loss in losses.items():
            total, counts = loss.total.detach(), [loss.targets, *loss.part_targets]
            if stream in self.totals:
                total = self.totals[stream].to(total.device) + total
            self.totals[stream] = total
            self.targets[stream] = list(map(sum, zip_longest(self.targets.get(stream, []), counts, fillvalue=0)))
            if loss.parts is not None:
                rows = [loss.parts, *([self.parts[stream].to(loss.parts.device)] if stream in self.parts else [])]
                self.parts[stream] = pad_sequence(rows).sum(1)  # the number of parts may differ

    def take(self, world: World) -> dict[str, float]:
        """Return the mean nats per target of every stream and part, over all ranks, and reset the sums.

        Ranks may have different streams: sums are joined by name, in float64.
        """
        share: dict[str, tuple[float, int]] = {}
        for stream, total in self.totals.items():
            sums = [total.item(), *(self.parts[stream].tolist() if stream in self.parts else [])]
            names = [f"loss/{stream}", *(f"loss/{stream}/{part}" for part in range(len(sums) - 1))]
            share |= dict(zip(names, zip(sums, self.targets[stream], strict=True), strict=True))
        self.start_afresh()
        means = joined(world.gather(share)).items()
        return {name: total / count for name, (total, count) in means if count}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts since the last line."""
        return {"totals": dict(self.totals), "parts": dict(self.parts), "targets": dict(self.targets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums. The next micro-batch moves them to its device."""
        self.totals, self.parts, self.targets = dict(state["totals"]), dict(state["parts"]), dict(state["targets"])

    def start_afresh(self, step: int = 0) -> None:
        """Reset the sums."""
        self.totals, self.parts, self.targets = {}, {}, {}
