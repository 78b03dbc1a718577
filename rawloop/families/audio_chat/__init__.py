"""The family of models that hear audio and answer in text: Qwen2-Audio, and classes of transformers built like it.

Such a class needs a processor whose `apply_chat_template` gives `input_ids` and features, with one token repeated
for a clip's positions, and a causal language model behind `AutoModelForMultimodalLM`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMultimodalLM, AutoProcessor

from rawloop.contracts import (
    IGNORE,
    Audio,
    Batch,
    Context,
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
from rawloop.families import ModelConfig
from rawloop.families.audio_chat.examples import ChatEncoder, Example
from rawloop.families.shared import (
    load_parts,
    load_weights,
    perturbed,
    rows_of,
    target_logits,
    weights_of,
    with_inputs,
)
from rawloop.inputs import check_inputs
from rawloop.losses import without_adapter

STREAM = "text"


class AudioChat:
    """The family of models with audio in and text out: one stream, `text`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.stream_weights: Mapping[str, float] = weights_of(config, (STREAM,))
        self.streams: Sequence[str] = (STREAM,)
        self.settings, self.processor = load_parts(config, AutoProcessor, "processor_config.json or tokenizer.json")
        self.text_settings: Any = self.settings.get_text_config()
        self.encoder = ChatEncoder(self.processor, self._audio_token(), self.text_settings.max_position_embeddings)
        self.sample_rate = self.encoder.sample_rate
        self._checked: set[tuple[str, ...]] = set()

    def _audio_token(self) -> int:
        token: int | None = getattr(self.settings, "audio_token_id", None)
        written = getattr(self.processor, "audio_token_id", None)
        if token is None or token != written:
            raise UserError(
                f"{self.config.path}: the model's config has the audio token {token}, the processor writes {written}: "
                "audio would not reach the model; fetch config and processor of one checkpoint"
            )
        return token

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model in its stored dtype.

        Args:
            path: another folder than the configured one, for the weights of a checkpoint.

        Raises:
            UserError: the checkpoint cannot be read, or lacks weights that would be trained from random numbers.
        """
        model: nn.Module = load_weights(AutoModelForMultimodalLM, self.config, path)
        return model

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained; `frames` are samples at `sample_rate`. See `ChatEncoder.check`."""
        self.encoder.check(sample, frames)

    def example(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Example:
        """Encode one sample, its clips decoded now: `codes` is not used. See `ChatEncoder.example`."""
        return self.encoder.example(sample)

    def collate(self, examples: list[Example]) -> Batch:
        """Make a micro-batch, padded on the right with the end of turn; clips stand in order of the rows.

        Under a causal mask nothing looks to its right, so right padding needs no attention mask: padding changes no
        result, and attention keeps its fast causal path. Clips have a mask of their own among the features. A batch
        without audio has no features: the model then runs its language model alone.
        """
        # Any token but the audio's would do as padding; checkpoints may have none, or use the audio token.
        filler = self.encoder.end_of_turn
        input_ids = pad_sequence([e.input_ids for e in examples], batch_first=True, padding_value=filler)
        labels = Labels.shifted(pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE))
        heard = [e.features for e in examples if e.features]
        features = {name: torch.cat([clips[name] for clips in heard]) for name in (heard[0] if heard else ())}
        return Batch(
            {"input_ids": input_ids, **features},
            {STREAM: labels},
            {STREAM: len(labels.targets)},
            [e.id for e in examples],
        )

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once and return the logits of every target, float32 (float64 of a float64 model).

        Returns:
            `text`: (targets, vocabulary).
        """
        base = without_adapter(model)
        if tuple(batch.inputs) not in self._checked:
            check_inputs(base, batch.inputs)
            self._checked.add(tuple(batch.inputs))
        # Features come in float32, and not every class casts them to its encoder's dtype.
        inputs = {name: x.to(base.dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}
        return {STREAM: target_logits(base, inputs, batch.labels[STREAM].positions)}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Score the targets, in nats."""
        logits = self.logits(model, batch)[STREAM]
        total = F.cross_entropy(logits, batch.labels[STREAM].targets, reduction="sum")
        return {STREAM: StreamLoss(total, batch.targets[STREAM])}

    def probe(self) -> Batch:
        """A fixed little batch, a second of noise and words about it, for comparing two versions of a model."""
        question = Turn("user", (Audio(Path("noise")), Text("One two three?")))
        sample = Sample("probe", (question, Turn("assistant", (Text("Four five six."),), trained=True)))
        noise = 0.1 * torch.randn(self.encoder.sample_rate, generator=torch.Generator().manual_seed(0))
        return self.collate([self.encoder.encode(sample, [noise])])

    def special_targets(self) -> Sequence[Special]:
        """The token that ends a turn: without it as a target a model forgets how to stop."""
        token = self.encoder.end_of_turn
        name = self.processor.tokenizer.convert_ids_to_tokens(token)
        return (Special(STREAM, name, token, required=True, roles=("assistant",)),)

    def pieces(self, example: Example) -> Sequence[Piece]:
        """An example as people read it; see `ChatEncoder.pieces`."""
        return tuple(self.encoder.pieces(example))

    def chance(self) -> Mapping[str, float]:
        """Loss of uniform guesses over the model's vocabulary."""
        return {STREAM: math.log(self.text_settings.vocab_size)}

    def perturb(self, batch: Batch) -> Perturbed:
        """Change every token from the middle target of each row on, or before it; see `shared.perturbed`.

        Clips stay as they are in these. In a batch of its own the sound of the clips is changed, loud into quiet:
        predictions behind a clip must notice, also where all text reaches them.
        """
        ids, size = batch.inputs["input_ids"], self.text_settings.vocab_size
        clips = ids == self.encoder.audio_token
        other = (ids + 1) % size
        other = torch.where(other == self.encoder.audio_token, (ids + 2) % size, other)

        def change(where: Tensor) -> dict[str, Tensor]:
            return {"input_ids": torch.where(where.view_as(ids) & ~clips, other, ids)}

        changed = perturbed(batch, {STREAM: ids.flatten()}, rows_of(ids), "tokens", change)
        quiet = {n: 1 - x for n, x in batch.inputs.items() if x.is_floating_point() and "mask" not in n}
        if not quiet:
            return changed
        heard = {STREAM: clips.cumsum(1).flatten()[batch.labels[STREAM].positions] > 0}
        return changed._replace(contexts={**changed.contexts, "clips": Context(with_inputs(batch, quiet), heard)})
