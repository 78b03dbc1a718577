"""What families have in common: loading without surprises, recomputed activations, exact logits, labels, other inputs.

A family of your own may use all of it.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from rawloop.contracts import IGNORE, Batch, Context, Labels, Perturbed, Sample, Text, Turn
from rawloop.errors import LibraryError, UserError
from rawloop.families import ModelConfig
from rawloop.families.clock import stop_clock
from rawloop.families.door import check_sizes, door

# Where a target's own token may stand, seen from the position that predicts it. One further is right; 0 is a label that
# was never shifted, -1 one that was shifted to the wrong side, 2 one that was shifted twice.
OFFSETS = (1, 0, -1, 2)


def load_settings(config: ModelConfig) -> tuple[Any, Any]:
    """Return the checkpoint's config and tokenizer.

    Raises:
        UserError: they cannot be read.
    """
    settings, tokenizer = load_parts(config, AutoTokenizer, "tokenizer.json or tokenizer_config.json")
    stop_clock(tokenizer, config.template_date)
    return settings, tokenizer


def load_parts(config: ModelConfig, owner: Any, file: str) -> tuple[Any, Any]:
    """Return the checkpoint's config, and its tokenizer or processor.

    Args:
        config: where they lie.
        owner: AutoTokenizer or AutoProcessor.
        file: what `owner` reads, for messages.

    Raises:
        UserError: they cannot be read, or the folder has no tokenizer_config.json.
    """
    check_tokenizer(config.path)
    with door(config.path, "config.json"):
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    with door(config.path, file):
        part = owner.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    return settings, part


def check_tokenizer(path: str) -> None:
    """Refuse a folder whose tokenizer transformers would make up: without special tokens, or of another class."""
    folder = Path(path)
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        raise UserError(
            f"model.path is '{path}', which has tokenizer.json and no tokenizer_config.json: without it the tokenizer "
            "has no special tokens; copy it from where the model is from"
        )


def load_weights(model_class: Any, config: ModelConfig, path: str | None, **options: Any) -> tuple[Any, list[str]]:
    """Load a model in its stored dtype on the CPU.

    Args:
        model_class: a model class of transformers, or an AutoModel.
        config: where it lies, and how it attends.
        path: another folder than the configured one, for the weights of a checkpoint.
        options: further keywords of `from_pretrained`.

    Returns:
        the model, and the names of the weights that the checkpoint lacks, sorted.

    Raises:
        UserError: the checkpoint cannot be read, or its weights have other shapes than its config says.
    """
    options |= {"dtype": "auto", "attn_implementation": config.attention}
    try:
        return load_from(model_class, path or config.path, None if path else config.revision, **options)
    except LibraryError as error:
        if "attention" in str(error.__cause__).lower():
            error.args = (f"{error} (model.attention is '{config.attention}')",)
        raise


def load_from(
    model_class: Any, source: str, revision: str | None, key: str = "model.path", **options: Any
) -> tuple[Any, list[str]]:
    """Load a model through the door; see `load_weights` and `door`."""
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
    return model, sorted(info["missing_keys"])


def empty(model_class: Any, settings: Any) -> Any:
    """A model without its weights, of a class or an AutoModel."""
    made = model_class._from_config if issubclass(model_class, PreTrainedModel) else model_class.from_config
    return made(settings)


def refuse_missing(missing: list[str], source: str) -> None:
    """Refuse a checkpoint that lacks weights: they would be trained from random numbers."""
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights, first {missing[0]}: fetch it again")


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, non-reentrant (reentrant breaks under DDP with unused parameters)."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def exact(logits: Tensor) -> Tensor:
    """In float32 at least: 16 bits are too few for a log-softmax over a vocabulary. Float64 stays, for proofs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def shifted(labels: Tensor) -> Labels:
    """Targets with the positions that predict them: one to the left, in the flattened (batch, sequence)."""
    flat = labels.flatten()
    positions = torch.nonzero(torch.ne(flat, IGNORE)).squeeze(1)
    return Labels(positions - 1, flat[positions])


def perturbed(
    batch: Batch,
    tokens: Mapping[str, Tensor],
    documents: Tensor,
    what: str,
    change: Callable[[Tensor], dict[str, Tensor]],
) -> Perturbed:
    """Change a batch from the middle of each document's targets on, or before it; documents take turns among streams.

    The middle goes by where a target's own token stands, found by what it is: a label that was not shifted is predicted
    from a position that sees the token itself, which the first changed one tells.

    Args:
        batch: with `Labels` whose positions index the flattened (batch, sequence).
        tokens: what stands at each position, by stream: (positions,), or (positions, codebooks).
        documents: (positions,) int64, the number of each position's document from 0 on, not falling; see `rows_of`.
        what: what `change` changes, in words.
        change: gives the inputs that are others where the (positions,) bool is true; all others stay.
    """
    own = {stream: _own_places(tokens[stream], labels) for stream, labels in batch.labels.items()}
    cuts = _cuts(own, documents)
    behind = torch.arange(len(documents), device=documents.device) >= cuts[documents]
    later = {stream: behind[labels.positions] for stream, labels in batch.labels.items()}
    return Perturbed(
        with_inputs(batch, change(behind)),
        {stream: places <= cuts[documents[places]] for stream, places in own.items()},
        {what: Context(with_inputs(batch, change(~behind)), later)},
    )


def rows_of(ids: Tensor) -> Tensor:
    """The number of each position's row in the flattened (batch, sequence): a document a row."""
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


def with_inputs(batch: Batch, inputs: Mapping[str, Tensor]) -> Batch:
    """The batch with some inputs exchanged."""
    return Batch({**batch.inputs, **inputs}, batch.labels, batch.targets, batch.ids)


def _own_places(tokens: Tensor, labels: Labels) -> Tensor:
    """Where the targets' own tokens stand: one further than what predicts them if the inputs hold them nowhere near."""
    rows, last = tokens.view(len(tokens), -1), len(tokens) - 1
    targets = labels.targets.view(len(labels.positions), rows.shape[1])
    for offset in OFFSETS:
        places = (labels.positions + offset).clamp(0, last)
        if bool(((rows[places] == targets) | (targets == IGNORE)).all()):
            return places
    return (labels.positions + 1).clamp(0, last)


def _cuts(own: Mapping[str, Tensor], documents: Tensor) -> Tensor:
    """The position from which on each document changes: the middle target's of the stream whose turn it is."""
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


def forged_token(turn: Turn, control: re.Pattern[str]) -> str | None:
    """Return a control token that a turn's texts spell, also from the end of one part and the beginning of the next.

    Chat templates put parts one behind the other, some without the blanks around each.
    """
    texts = [part.text for part in turn.parts if isinstance(part, Text)]
    spelt = (*texts, "".join(texts), "".join(text.strip() for text in texts))
    return next((found.group() for text in spelt if (found := control.search(text)) is not None), None)


def refuse_tools(sample: Sample) -> None:
    """Refuse tools, calls and thoughts where a family has no place for them."""
    named = ["tools"] if sample.tools else []
    named += ["a tool turn" for turn in sample.turns if turn.role == "tool"]
    named += [key for turn in sample.turns for key in turn.fields if key not in ("name", "tool_call_id")]
    if named:
        raise UserError(
            f"sample '{sample.id}' ({sample.source}) has {named[0]}, for which this family of models has no place: "
            "take it out, or train a text model (model.family causal_lm)"
        )


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT wrapper; adapters stay in its layers."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model
