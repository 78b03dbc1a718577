"""Tools for families: base classes, loading transformers' models, stream weights, logits at the targets.

Your own family may use them.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from rawloop.contracts import IGNORE, Batch, Context, Labels, Perturbed, Sample, StreamLoss
from rawloop.errors import BadSample, UserError
from rawloop.families import ModelConfig, head
from rawloop.families.chat_template import stop_clock
from rawloop.families.loading import library_errors
from rawloop.inputs import check_inputs
from rawloop.losses import exact, without_adapter

# The place of a target's token relative to the position that predicts it: 1 is right. With 0 labels were not shifted,
# with -1 they were shifted to the wrong side, with 2 they were shifted twice.
OFFSETS = (1, 0, -1, 2)


@dataclass(frozen=True)
class Example:
    """One encoded sample: `input_ids` and `labels` are (sequence,) int64; labels are not shifted."""

    id: str
    input_ids: Tensor
    labels: Tensor

    @property
    def audio(self) -> float:
        """How long its clips are, in seconds or frames of codes."""
        return 0.0


class BaseFamily:
    """The base of the families of transformers' models. `encoder` checks and encodes samples."""

    encoder: Any

    def __init__(self, config: ModelConfig, streams: Sequence[str]) -> None:
        self.config = config
        self.stream_weights: Mapping[str, float] = weights_of(config, streams)
        self.streams: Sequence[str] = tuple(self.stream_weights)
        self._checked: set[tuple[str, ...]] = set()

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained; see `check` of the encoder."""
        self.encoder.check(sample, frames)

    def example(self, sample: Sample, codes: Callable[[Path], Tensor] | None = None) -> Any:
        """Encode one sample; see `example` of the encoder."""
        return self.encoder.example(sample, codes)

    def length(self, sample: Sample, frames: Callable[[Path], int]) -> int:
        """Return how many positions a sample takes; see `length` of the encoder."""
        length: int = self.encoder.length(sample, frames)
        return length

    def check_forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Refuse inputs that are no parameters of the model's forward. Each set of names is checked once."""
        if tuple(inputs) not in self._checked:
            check_inputs(model, inputs)
            self._checked.add(tuple(inputs))


class TextFamily(BaseFamily):
    """The base of families with one stream, `text`.

    Batches are padded on the right without an attention mask: under a causal mask no token attends to the padding.
    """

    vocabulary: int
    clip_token = -1  # `perturb` neither changes nor writes it

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, ("text",))
        self._in_full: bool | None = None  # whether the model's logits cannot be made in chunks

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once and return the logits of every target, (targets, vocabulary) float32."""
        base = without_adapter(model)
        self.check_forward(base, batch.inputs)
        return {"text": target_logits(base, self.model_inputs(base, batch), batch.labels["text"].positions)}

    def model_inputs(self, base: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the keyword arguments of the model's forward."""
        # Features are float32, and not every class casts them to its encoder's dtype.
        return {name: x.to(base.dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Return the cross-entropy of all targets, in nats. Where there are many, their logits are made in chunks."""
        total = self._chunked(model, batch)
        if total is None:
            total = F.cross_entropy(self.logits(model, batch)["text"], batch.labels["text"].targets, reduction="sum")
        return {"text": StreamLoss(total, batch.targets["text"])}

    def _chunked(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Return the loss in chunks; None if the logits are few, a subclass has its own, or the model cannot do so."""
        labels, own = batch.labels["text"], type(self).logits is not TextFamily.logits
        if own or self._in_full or len(labels.targets) * self.vocabulary <= head.WHOLE:
            return None
        base = without_adapter(model)
        self.check_forward(base, batch.inputs)
        traced = head.trace(base, self.model_inputs(base, batch), labels.positions, check=self._in_full is None)
        self._in_full = isinstance(traced, str)
        if isinstance(traced, str):
            warnings.warn(f"{traced}: its logits are computed all at once, which takes more memory", stacklevel=2)
            return None
        nats = head.cross_entropy(traced.head, traced.finish, traced.rows, labels.targets, self.vocabulary)
        return nats.sum()

    def chance(self) -> Mapping[str, float]:
        """Return the loss of uniform guesses over the vocabulary, nats per target."""
        return {"text": math.log(self.vocabulary)}

    def perturb(self, batch: Batch) -> Perturbed:
        """Change every token from the middle target of each document on, or before it; see `perturbed`."""
        ids = batch.inputs["input_ids"]
        other = (ids + 1) % self.vocabulary
        other = torch.where(other == self.clip_token, (ids + 2) % self.vocabulary, other)

        def change(where: Tensor) -> dict[str, Tensor]:
            return {"input_ids": torch.where(where.view_as(ids) & (ids != self.clip_token), other, ids)}

        return perturbed(batch, {"text": ids.flatten()}, documents(batch), "tokens", change)


def padded(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    """Return sequences as (batch, longest, ...)."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def labels_of(ids: Tensor, spans: Iterable[tuple[int, int]]) -> Tensor:
    """Return the labels of a sequence in which the tokens of `spans` (start, end) are learnt."""
    labels = torch.full_like(ids, IGNORE)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    labels[0] = IGNORE  # no position before it can predict it
    return labels


def text_batch(inputs: dict[str, Tensor], labels: Tensor, examples: Sequence[Example]) -> Batch:
    """Return a batch of the stream `text` from (batch, sequence) labels that are not shifted."""
    shifted = Labels.shifted(labels)
    ids, work = [example.id for example in examples], work_of(examples, labels)
    return Batch(inputs, {"text": shifted}, {"text": len(shifted.targets)}, ids, work)


def work_of(examples: Sequence[Example], positions: Tensor) -> dict[str, float]:
    """Return the `work` of a batch whose (batch, sequence) has these positions."""
    tokens, audio = sum(len(one.input_ids) for one in examples), sum(one.audio for one in examples)
    return {"positions": positions.numel(), "tokens": tokens} | ({"audio": audio} if audio else {})


def check_length(positions: int, limit: int | None) -> None:
    """Refuse a sample that takes more positions than the model has."""
    if limit is not None and positions > limit:
        raise BadSample(
            f"it takes {positions} positions, the model has {limit}: shorten its text, clips or references, or leave "
            "the sample out"
        )


def weights_of(config: ModelConfig, streams: Sequence[str]) -> dict[str, float]:
    """Return the weight of each stream whose weight is not 0. The first stream must have a weight."""
    unknown = sorted(set(config.stream_weights) - set(streams))
    if unknown:
        raise UserError(f"model.stream_weights has {unknown}: this model has the streams {', '.join(streams)}")
    weights = {stream: float(config.stream_weights.get(stream, 1.0)) for stream in streams}
    if not weights[streams[0]]:
        raise UserError(
            f"model.stream_weights sets {streams[0]} to 0: the model would not learn its main stream; give it a weight"
        )
    return {stream: weight for stream, weight in weights.items() if weight}


def load_parts(config: ModelConfig, owner: Any, file: str) -> tuple[Any, Any]:
    """Return the checkpoint's config, and its tokenizer or processor. Their chat templates get a fixed date.

    `owner` is AutoTokenizer or AutoProcessor; messages call the file that it reads `file`.
    """
    folder = Path(config.path)
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        # transformers would build another tokenizer: without special tokens, or of another class.
        raise UserError(
            f"model.path is '{config.path}', which has tokenizer.json and no tokenizer_config.json: without it the "
            "tokenizer has no special tokens; copy it from the original checkpoint"
        )
    with library_errors(config.path, "config.json"):
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    with library_errors(config.path, file):
        part = owner.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    for holder in (part, getattr(part, "tokenizer", None)):
        stop_clock(holder, config.template_date)
    return settings, part


def target_logits(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """Run a language model of transformers, its head at `positions` only; return logits (targets, vocabulary) float32.

    Logits of a vocabulary of 150,000 at every position would take too much memory. Hooks limit the input of the head,
    so the model's own forward may scale or cap its logits. `positions` index the flattened (batch, sequence).
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output embeddings: rawloop does not know this kind of model")
    cut = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1).index_select(0, positions)[None],))
    widen = head.register_forward_hook(lambda _, __, output: exact(output))
    try:
        logits: Tensor = model(**inputs, use_cache=False, return_dict=True).logits
    finally:
        cut.remove()
        widen.remove()
    if logits.shape[:2] != (1, len(positions)):
        raise UserError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for {len(positions)} targets: its "
            "logits do not come from its output embeddings; write a family for it (model.family package.module:Class)"
        )
    return exact(logits[0])


def perturbed(
    batch: Batch,
    tokens: Mapping[str, Tensor],
    documents: Tensor,
    what: str,
    change: Callable[[Tensor], dict[str, Tensor]],
) -> Perturbed:
    """Change a batch from the middle of each document's targets on, or before it.

    The streams take turns: in the first document it is the middle of the first stream's targets, in the second document
    that of the second stream's.

    The targets' tokens are located by their values: by position, unshifted labels would go unnoticed.

    Args:
        batch: the positions of its labels index the flattened (batch, sequence).
        tokens: the token at each position, by stream: (positions,), or (positions, codebooks).
        documents: (positions,) int64, the number of each position's document, ascending from 0; see `rows_of`.
        what: what `change` changes, for messages.
        change: returns inputs that are changed where the (positions,) bool is true, and only there.
    """
    places = {stream: _token_places(tokens[stream], labels) for stream, labels in batch.labels.items()}
    cuts = _cuts(places, documents)
    behind = torch.arange(len(documents), device=documents.device) >= cuts[documents]
    later = {stream: behind[labels.positions] for stream, labels in batch.labels.items()}
    return Perturbed(
        replace(batch, inputs=batch.inputs | change(behind)),
        {stream: place <= cuts[documents[place]] for stream, place in places.items()},
        {what: Context(replace(batch, inputs=batch.inputs | change(~behind)), later)},
    )


def rows_of(ids: Tensor) -> Tensor:
    """Return the row of each position of the flattened (batch, sequence), for batches with one document per row."""
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


def documents(batch: Batch) -> Tensor:
    """Return the number of each position's document in the flattened (batch, sequence), also of packed documents."""
    if "position_ids" in batch.inputs:
        return (batch.inputs["position_ids"].flatten() == 0).cumsum(0) - 1
    return rows_of(batch.inputs["input_ids"])


def _token_places(tokens: Tensor, labels: Labels) -> Tensor:
    """Return the positions of the targets' tokens: at the first of `OFFSETS` where all values match, else at 1."""
    rows, last = tokens.view(len(tokens), -1), len(tokens) - 1
    targets = labels.targets.view(len(labels.positions), rows.shape[1])
    for offset in OFFSETS:
        places = (labels.positions + offset).clamp(0, last)
        if bool(((rows[places] == targets) | (targets == IGNORE)).all()):
            return places
    return (labels.positions + 1).clamp(0, last)


def _cuts(places: Mapping[str, Tensor], documents: Tensor) -> Tensor:
    """Return the first position that changes in each document: that of a stream's middle target, streams in turn."""
    streams = tuple(places)
    cuts = [len(documents)] * (int(documents.max()) + 1)
    for number in range(len(cuts)):
        turn = number % len(streams)
        here = [places[s][documents[places[s]] == number] for s in (*streams[turn:], *streams[:turn])]
        found = next((place for place in here if len(place)), None)
        if found is not None:
            cuts[number] = int(found[(len(found) - 1) // 2])
    return torch.tensor(cuts, device=documents.device)
