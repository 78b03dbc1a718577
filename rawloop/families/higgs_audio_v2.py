"""The family of Higgs Audio v2: loading model and codec, batches, and the losses of both streams."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from rawloop.contracts import (
    IGNORE,
    Audio,
    Batch,
    CodecInfo,
    Labels,
    Perturbed,
    Piece,
    Sample,
    Special,
    StreamLoss,
    Text,
    Turn,
)
from rawloop.errors import UserError
from rawloop.families import ModelConfig, higgs_views
from rawloop.families.higgs_codec import codec_hash, load_codec
from rawloop.families.higgs_examples import Example, HiggsEncoder
from rawloop.families.inputs import check_inputs

STREAMS = ("audio", "text")


class HiggsAudioV2:
    """The family of `HiggsAudioV2ForConditionalGeneration`: two streams, `audio` (per codebook) and `text`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        unknown = set(config.stream_weights) - set(STREAMS)
        if unknown:
            raise UserError(
                f"model.stream_weights has {sorted(unknown)}: Higgs Audio v2 has the streams audio and text"
            )
        weights = {stream: float(config.stream_weights.get(stream, 1.0)) for stream in STREAMS}
        self.stream_weights: Mapping[str, float] = {
            stream: weight for stream, weight in weights.items() if weight != 0.0
        }
        self.streams: Sequence[str] = tuple(self.stream_weights)
        if "audio" not in self.streams:
            raise UserError("model.stream_weights sets audio to 0: nothing would be learnt of speech; give it a weight")
        try:
            self.settings: Any = AutoConfig.from_pretrained(config.path, revision=config.revision)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(config.path, revision=config.revision)
        except (OSError, ValueError, TypeError, AttributeError) as error:  # what transformers makes of a damaged folder
            raise UserError(f"config or tokenizer of {config.path} cannot be read: {_line(error)}") from error
        self._check_settings()
        self.encoder = HiggsEncoder(self.settings, self.tokenizer)
        self._checked: set[tuple[str, ...]] = set()

    def _check_settings(self) -> None:
        if self.settings.audio_stream_eos_id >= self.settings.codebook_size:
            raise UserError(
                f"{self.config.path}/config.json has codebook_size {self.settings.codebook_size}, which leaves no room "
                f"for the stream's stop token {self.settings.audio_stream_eos_id}: real checkpoints have 1026 "
                "(1024 codes + BOS + EOS); set codebook_size to that"
            )
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.config.path} has no chat_template.jinja: prompts cannot be built as in generation")

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model in its stored dtype, with the text head when the text stream has a weight.

        Args:
            path: another folder than the configured one, for the weights of a checkpoint.

        Raises:
            UserError: the checkpoint cannot be read, or lacks weights that would be trained from random numbers.
        """
        source = path or self.config.path
        try:
            model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
                source,
                revision=None if path else self.config.revision,
                use_text_head="text" in self.streams,
                dtype="auto",
                attn_implementation=self.config.attention,
                output_loading_info=True,
            )
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"model.path is '{source}', which cannot be loaded: {_line(error)}") from error
        missing = sorted(info["missing_keys"])
        if missing == ["text_lm_head.weight"]:
            raise UserError(
                f"{source} has no text head (text_lm_head.weight): set model.stream_weights to "
                "{text: 0} to train on audio alone"
            )
        if missing:
            raise UserError(f"{source} lacks {len(missing)} weights, first {missing[0]}: fetch it again")
        if self.config.activation_checkpointing:
            enable_activation_checkpointing(model)
        return cast(nn.Module, model)

    def load_codec(self, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
        """Load the codec for `rawloop prepare`; see `rawloop.families.higgs_codec.load_codec`."""
        return load_codec(self.config, device)

    def codec_hash(self) -> str:
        """Content hash of the codec that the checkpoint goes with."""
        return codec_hash(self.config)

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained; see `HiggsEncoder.check`."""
        self.encoder.check(sample, frames)

    def example(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Example:
        """Encode one sample from cached codes; see `HiggsEncoder.example`."""
        return self.encoder.example(sample, codes)

    def collate(self, examples: list[Example]) -> Batch:
        """Make a micro-batch, padded on the right.

        Under a causal mask nothing looks to its right, so right padding needs no attention mask: padding changes no
        result, and attention keeps its fast causal path.
        """
        padded = self.encoder.pad(examples)
        labels = {"audio": self._audio_labels(padded), "text": _shifted(padded["labels"])}
        labels = {stream: labels[stream] for stream in self.streams}
        names = ("input_ids", "audio_input_ids", "audio_input_ids_mask")
        targets = {stream: int((pair.targets != IGNORE).sum()) for stream, pair in labels.items()}
        return Batch({name: padded[name] for name in names}, labels, targets, [e.id for e in examples])

    def _audio_labels(self, padded: dict[str, Tensor]) -> Labels:
        ids = padded["input_ids"]
        places = (ids == self.settings.audio_token_id) | (ids == self.settings.audio_delay_token_id)
        positions = places.flatten().nonzero().squeeze(1)  # row by row, the order in which the model fills them
        targets = padded["audio_labels"][padded["audio_input_ids_mask"]]
        scored = (targets != IGNORE).any(1)
        return Labels(positions[scored] - 1, targets[scored])

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once and return the logits of every target, float32 (float64 of a float64 model).

        Logits are computed only where there are targets: a vocabulary of 128,256 over every position would take more
        memory than the rest of the head's work.

        Returns:
            `audio`: (targets, codebooks, codebook_size); `text`: (targets, vocabulary).
        """
        unwrap: Any = getattr(model, "get_base_model", None)  # a PEFT wrapper has it; adapters stay in the layers
        base: Any = unwrap() if unwrap else model
        if tuple(batch.inputs) not in self._checked:
            check_inputs(base.model.forward, batch.inputs, type(base.model).__name__)
            self._checked.add(tuple(batch.inputs))
        hidden = base.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        heads = {"audio": base.audio_lm_head, "text": base.text_lm_head}
        rows = {s: _exact(heads[s](hidden.index_select(0, batch.labels[s].positions))) for s in self.streams}
        rows["audio"] = rows["audio"].view(len(rows["audio"]), self.settings.num_codebooks, -1)
        return rows

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Score each stream's targets, in nats; audio also per codebook."""
        logits = self.logits(model, batch)
        codebooks, count = self.settings.num_codebooks, batch.targets["audio"]
        wanted = batch.labels["audio"].targets.flatten()
        nats = F.cross_entropy(logits["audio"].flatten(0, 1), wanted, ignore_index=IGNORE, reduction="none")
        parts = nats.view(-1, codebooks).sum(0)
        # Every trained clip has frames + 1 targets in each codebook, so the count splits evenly.
        result = {"audio": StreamLoss(parts.sum(), count, parts.detach(), (count // codebooks,) * codebooks)}
        if "text" in self.streams:
            total = F.cross_entropy(logits["text"], batch.labels["text"].targets, reduction="sum")
            result["text"] = StreamLoss(total, batch.targets["text"])
        return result

    def probe(self) -> Batch:
        """A fixed little batch with random codes, for comparing two versions of a model by their logits."""
        turns = (Turn("user", (Text("One two three."),)), Turn("assistant", (Audio(Path("probe")),), trained=True))
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(self.settings.audio_stream_bos_id, (25, self.settings.num_codebooks), generator=generator)
        return self.collate([self.example(Sample("probe", turns), lambda _: codes)])

    def special_targets(self) -> Sequence[Special]:
        """The stop tokens of the streams, and those beside them that are nobody's to say."""
        return higgs_views.special_targets(self.settings, self.tokenizer, self.streams)

    def pieces(self, example: Example) -> Sequence[Piece]:
        """An example as people read it; a clip takes two positions and the delay more than it has frames."""
        return higgs_views.pieces(example, self.settings, self.tokenizer, self.streams)

    def chance(self) -> Mapping[str, float]:
        """Loss of uniform guesses, nats per target."""
        sizes = {"audio": self.settings.codebook_size, "text": self.settings.vocab_size}
        return {stream: math.log(sizes[stream]) for stream in self.streams}

    def perturb(self, batch: Batch) -> Perturbed:
        """Change all inputs from the middle of each row's targets on; see `rawloop.families.higgs_views.perturb`."""
        return higgs_views.perturb(batch, self.settings, self.streams)


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, non-reentrant (reentrant breaks under DDP with unused parameters)."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _exact(logits: Tensor) -> Tensor:
    """In float32 at least: 16 bits are too few for a log-softmax over a vocabulary. Float64 stays, for proofs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _shifted(labels: Tensor) -> Labels:
    """Text targets with the positions that predict them: one to the left, in the flattened batch."""
    flat = labels.flatten()
    positions = torch.nonzero(torch.ne(flat, IGNORE)).squeeze(1)
    return Labels(positions - 1, flat[positions])


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
