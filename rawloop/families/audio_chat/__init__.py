"""The family of models that hear audio and answer in text: Qwen2-Audio, and classes of transformers built like it.

Such a class needs a processor whose `apply_chat_template` gives `input_ids` and features, with one token repeated
for a clip's positions, and a causal language model behind `AutoModelForMultimodalLM`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, AutoProcessor

from rawloop.contracts import IGNORE, Audio, Batch, Context, Perturbed, Piece, Sample, Special, Text, Turn
from rawloop.errors import UserError
from rawloop.families import ModelConfig
from rawloop.families.audio_chat.examples import ChatEncoder, Example
from rawloop.families.shared import (
    TextFamily,
    load_parts,
    load_weights,
    padded,
    perturbed,
    rows_of,
    text_batch,
)


class AudioChat(TextFamily):
    """The family of models with audio in and text out: one stream, `text`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.settings, self.processor = load_parts(config, AutoProcessor, "processor_config.json or tokenizer.json")
        text_settings: Any = self.settings.get_text_config()
        self.vocabulary = text_settings.vocab_size
        self.encoder = ChatEncoder(self.processor, self._audio_token(), text_settings.max_position_embeddings)
        self.sample_rate = self.encoder.sample_rate

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
        """Load the model in its stored dtype; see `load_weights`."""
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

        Clips have a mask of their own among the features. A batch without audio has no features: the model then runs
        its language model alone.
        """
        # Any token but the audio's would do as padding; checkpoints may have none, or use the audio token.
        filler = self.encoder.end_of_turn
        input_ids = padded([e.input_ids for e in examples], filler)
        heard = [e.features for e in examples if e.features]
        features = {name: torch.cat([clips[name] for clips in heard]) for name in (heard[0] if heard else ())}
        labels = padded([e.labels for e in examples], IGNORE)
        return text_batch({"input_ids": input_ids, **features}, labels, examples)

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
        return (Special("text", name, token, required=True, roles=("assistant",)),)

    def pieces(self, example: Example) -> Sequence[Piece]:
        """An example as people read it; see `ChatEncoder.pieces`."""
        return tuple(self.encoder.pieces(example))

    def perturb(self, batch: Batch) -> Perturbed:
        """Change every token from the middle target of each row on, or before it; clips stay as they are.

        In a batch of its own the sound of the clips is changed, loud into quiet: predictions behind a clip must notice.
        """
        ids, size = batch.inputs["input_ids"], self.vocabulary
        clips = ids == self.encoder.audio_token
        other = (ids + 1) % size
        other = torch.where(other == self.encoder.audio_token, (ids + 2) % size, other)

        def change(where: Tensor) -> dict[str, Tensor]:
            return {"input_ids": torch.where(where.view_as(ids) & ~clips, other, ids)}

        changed = perturbed(batch, {"text": ids.flatten()}, rows_of(ids), "tokens", change)
        quiet = {n: 1 - x for n, x in batch.inputs.items() if x.is_floating_point() and "mask" not in n}
        if not quiet:
            return changed
        heard = {"text": clips.cumsum(1).flatten()[batch.labels["text"].positions] > 0}
        clips_alone = Context(replace(batch, inputs=batch.inputs | quiet), heard)
        return changed._replace(contexts={**changed.contexts, "clips": clips_alone})
