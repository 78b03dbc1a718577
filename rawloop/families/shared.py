"""Tools for families: loading transformers' models, stream weights, logits at the targets, changed inputs.

A family of your own may use all of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedModel

from rawloop.contracts import IGNORE, Batch, Context, Labels, Perturbed, StreamLoss
from rawloop.errors import LibraryError, UserError
from rawloop.families import ModelConfig
from rawloop.families.chat_template import stop_clock
from rawloop.families.door import check_sizes, door
from rawloop.inputs import check_inputs
from rawloop.losses import exact, without_adapter

# Where a target's own token may stand, seen from the position that predicts it. 1 is right. 0 is a label that was not
# shifted, -1 one that was shifted to the wrong side, 2 one that was shifted twice.
OFFSETS = (1, 0, -1, 2)


class TextFamily:
    """The base of families that answer in text, in one stream, `text`. Right padding needs no attention mask.

    Under a causal mask nothing looks to its right, so padding changes no result and attention keeps its fast path.
    """

    vocabulary: int

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.stream_weights: Mapping[str, float] = weights_of(config, ("text",))
        self.streams: Sequence[str] = ("text",)
        self._checked: set[tuple[str, ...]] = set()

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once and return the logits of every target, (targets, vocabulary) float32."""
        base = without_adapter(model)
        if tuple(batch.inputs) not in self._checked:
            check_inputs(base, batch.inputs)
            self._checked.add(tuple(batch.inputs))
        # Features come in float32, and not every class casts them to its encoder's dtype.
        inputs = {name: x.to(base.dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}
        return {"text": target_logits(base, inputs, batch.labels["text"].positions)}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Score all targets, in nats."""
        total = F.cross_entropy(self.logits(model, batch)["text"], batch.labels["text"].targets, reduction="sum")
        return {"text": StreamLoss(total, batch.targets["text"])}

    def chance(self) -> Mapping[str, float]:
        """Loss of uniform guesses over the vocabulary, nats per target."""
        return {"text": math.log(self.vocabulary)}


def padded(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    """Return sequences as (batch, longest, ...)."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def text_batch(inputs: dict[str, Tensor], labels: Tensor, examples: Sequence[Any]) -> Batch:
    """Return a batch of the stream `text` from (batch, sequence) labels that stand at their own tokens."""
    shifted = Labels.shifted(labels)
    return Batch(inputs, {"text": shifted}, {"text": len(shifted.targets)}, [example.id for example in examples])


def weights_of(config: ModelConfig, streams: Sequence[str]) -> dict[str, float]:
    """Return the weight of each stream, without those whose weight is 0. The first one must have a weight."""
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
    """Return the checkpoint's config, and its tokenizer or processor, whose chat templates are told one date.

    `owner` is AutoTokenizer or AutoProcessor, and `file` names what it reads in messages.
    """
    folder = Path(config.path)
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        # transformers would make up a tokenizer: without special tokens, or of another class
        raise UserError(
            f"model.path is '{config.path}', which has tokenizer.json and no tokenizer_config.json: without it the "
            "tokenizer has no special tokens; copy it from where the model is from"
        )
    with door(config.path, "config.json"):
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    with door(config.path, file):
        part = owner.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    for holder in (part, getattr(part, "tokenizer", None)):
        stop_clock(holder, config.template_date)
    return settings, part


def load_weights(
    model_class: Any, config: ModelConfig, path: str | None, hints: Mapping[str, str] | None = None, **options: Any
) -> Any:
    """Load a model in its stored dtype on the CPU. It recomputes activations if the config says so.

    Args:
        model_class: a model class of transformers, or an AutoModel.
        config: where the model lies, and how it attends.
        path: another folder than the configured one, for the weights of a checkpoint.
        hints: what to do about a weight that the checkpoint lacks, by its name.
        options: further keywords of `from_pretrained`.
    """
    source, revision = path or config.path, None if path else config.revision
    options |= {"dtype": "auto", "attn_implementation": config.attention}
    try:
        model = load_from(model_class, source, revision, hints=hints, **options)
    except LibraryError as error:
        if "attention" in str(error.__cause__).lower():
            error.args = (f"{error} (model.attention is '{config.attention}')",)
        raise
    if config.activation_checkpointing:
        enable_activation_checkpointing(model)
    return model


def load_from(
    model_class: Any,
    source: str,
    revision: str | None,
    key: str = "model.path",
    hints: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """Load a model; `key` is the setting that names its folder. Missing or misshapen weights are refused."""
    with door(source, "model", key):
        settings = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        check_sizes(Path(source), settings, lambda: empty(model_class, settings))
        model, info = model_class.from_pretrained(
            source,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,
            **options,
        )
    for name, stored, wanted in sorted(info["mismatched_keys"])[:1]:
        raise UserError(
            f"{source}: {name} is stored as {tuple(stored)}, its config.json makes it {tuple(wanted)}: fetch it again"
        )
    missing = sorted(info["missing_keys"])
    if missing:  # they would be trained from random numbers
        hint = (hints or {}).get(missing[0], "fetch it again")
        raise UserError(f"{source} lacks {len(missing)} weights, first {missing[0]}: {hint}")
    return model


def empty(model_class: Any, settings: Any) -> Any:
    """Build a model with random weights, of a class or an AutoModel."""
    build = model_class._from_config if issubclass(model_class, PreTrainedModel) else model_class.from_config
    return build(settings)


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, non-reentrant (reentrant breaks under DDP with unused parameters)."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def target_logits(model: Any, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """Run a language model of transformers with its head applied at some positions only; return (targets, vocabulary).

    A vocabulary of 150,000 over every position would take more memory than the rest of the head's work. The model's own
    forward is called, so it may scale or cap its logits. `positions` are those of the flattened (batch, sequence).
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no output embeddings: it is no language model that is known here")
    cut = head.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1).index_select(0, positions)[None],))
    widen = head.register_forward_hook(lambda _, __, made: exact(made))
    try:
        logits: Tensor = model(**inputs, use_cache=False, return_dict=True).logits
    finally:
        cut.remove()
        widen.remove()
    if logits.shape[:2] != (1, len(positions)):
        raise UserError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for {len(positions)} targets: it does "
            "not make them with its output embeddings; it needs a family of its own (model.family package.module:Class)"
        )
    return exact(logits[0])


def perturbed(
    batch: Batch,
    tokens: Mapping[str, Tensor],
    documents: Tensor,
    what: str,
    change: Callable[[Tensor], dict[str, Tensor]],
) -> Perturbed:
    """Change a batch from the middle of each document's targets on, or before it; documents take turns among streams.

    The middle is counted by where the targets' own tokens stand. These are found by their values: by position,
    unshifted labels would go unnoticed.

    Args:
        batch: its labels' positions index the flattened (batch, sequence).
        tokens: the token at each position, by stream: (positions,), or (positions, codebooks).
        documents: (positions,) int64, the number of each position's document from 0 on, not falling; see `rows_of`.
        what: names the inputs that `change` changes, for messages.
        change: returns inputs that are changed where the (positions,) bool is true, and only there.
    """
    own = {stream: _own_places(tokens[stream], labels) for stream, labels in batch.labels.items()}
    cuts = _cuts(own, documents)
    behind = torch.arange(len(documents), device=documents.device) >= cuts[documents]
    later = {stream: behind[labels.positions] for stream, labels in batch.labels.items()}
    return Perturbed(
        replace(batch, inputs=batch.inputs | change(behind)),
        {stream: places <= cuts[documents[places]] for stream, places in own.items()},
        {what: Context(replace(batch, inputs=batch.inputs | change(~behind)), later)},
    )


def rows_of(ids: Tensor) -> Tensor:
    """Return the number of each position's row in the flattened (batch, sequence), for batches of a document a row."""
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


def _own_places(tokens: Tensor, labels: Labels) -> Tensor:
    """Return where the targets' own tokens stand; if they are not found nearby, one behind the prediction."""
    rows, last = tokens.view(len(tokens), -1), len(tokens) - 1
    targets = labels.targets.view(len(labels.positions), rows.shape[1])
    for offset in OFFSETS:
        places = (labels.positions + offset).clamp(0, last)
        if bool(((rows[places] == targets) | (targets == IGNORE)).all()):
            return places
    return (labels.positions + 1).clamp(0, last)


def _cuts(own: Mapping[str, Tensor], documents: Tensor) -> Tensor:
    """Return the position from which on each document changes: that of a stream's middle target, streams in turn."""
    streams = tuple(own)
    cuts = [len(documents)] * (int(documents.max()) + 1)
    for number in range(len(cuts)):
        turn = number % len(streams)
        for stream in (*streams[turn:], *streams[:turn]):
            places = own[stream][documents[own[stream]] == number]
            if len(places):
                cuts[number] = int(places[(len(places) - 1) // 2])
                break
    return torch.tensor(cuts, device=documents.device)
