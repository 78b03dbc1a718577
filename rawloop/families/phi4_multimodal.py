"""Phi-4-multimodal as a family with audio in and text out; images are left out.

Two things differ from transformers' own code. Its processor needs torchvision, for images, so tokenizer and feature
extractor are used without it. And it runs the clips of a batch together, where padding changes what a shorter clip
sounds like (the mask is added to the attention's scores as 0 or 1): here each clip is encoded as if it were alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, Phi4MultimodalFeatureExtractor

from rawloop.contracts import Batch, Sample
from rawloop.families.audio_chat import AudioChat
from rawloop.families.chat_template import Messages
from rawloop.families.generating import generate_text
from rawloop.family_protocols import Generated
from rawloop.losses import without_adapter
from rawloop.settings import SamplingConfig

SOUND, FRAMES = "audio_input_features", "audio_attention_mask"  # (clips, frames, mels) float32, (clips, frames) bool
SIZES = "audio_embed_sizes"  # (clips,) int64, positions of each clip


class Phi4Processor:
    """Tokenizer, chat template and feature extractor. It writes what transformers' processor writes without images."""

    def __init__(self, tokenizer: Any, feature_extractor: Any) -> None:
        self.tokenizer, self.feature_extractor = tokenizer, feature_extractor
        self.chat_template = tokenizer.chat_template
        self.audio_token_id: int | None = getattr(tokenizer, "audio_token_id", None)
        self.max_audio_len = 0.0  # seconds; set by the family

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> "Phi4Processor":
        """Load both parts from a folder or the hub, with the options of `from_pretrained`."""
        extractor = Phi4MultimodalFeatureExtractor.from_pretrained(path, **options)
        return cls(AutoTokenizer.from_pretrained(path, **options), extractor)

    def apply_chat_template(
        self, messages: Messages, *, tokenize: bool = False, add_generation_prompt: bool = False, **_: Any
    ) -> Any:
        """Return a conversation as text; or as `input_ids` (1, sequence), mask and features, if asked to `tokenize`."""
        options = {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        if not tokenize:
            return text
        parts = [part for message in messages for part in message["content"]]
        features = self._features([torch.as_tensor(part["audio"]) for part in parts if "audio" in part])
        token = self.tokenizer.convert_ids_to_tokens(self.audio_token_id)
        first, *rest = text.split(token)
        sizes: list[int] = features[SIZES].tolist() if features else []
        if len(rest) != len(sizes):
            raise ValueError(f"it writes {len(rest)} audio token(s) for {len(sizes)} clip(s)")
        whole = first + "".join(token * size + after for size, after in zip(sizes, rest, strict=True))
        return {**self.tokenizer(whole, return_tensors="pt"), **features}

    def _features(self, clips: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the features of clips, each made alone, padded with zeros."""
        if not clips:
            return {}
        options = {"sampling_rate": self.feature_extractor.sampling_rate, "return_tensors": "pt"}
        made = [self.feature_extractor(clip.numpy(), **options) for clip in clips]
        sounds = [one[SOUND][0] for one in made]
        lengths = torch.tensor([len(sound) for sound in sounds])
        return {
            SOUND: nn.utils.rnn.pad_sequence(sounds, batch_first=True),
            SIZES: torch.cat([one[SIZES] for one in made]),
            FRAMES: torch.arange(int(lengths.max())) < lengths[:, None],
        }


class Phi4Multimodal(AudioChat):
    """The family of Phi-4-multimodal in the format of transformers."""

    processor_class = Phi4Processor

    def _audio_token(self) -> int:
        token: int = self.settings.audio_config.audio_token_id
        if self.processor.audio_token_id not in (None, token):
            raise self._other_token(token, self.processor.audio_token_id)
        self.processor.audio_token_id = token
        extractor = self.processor.feature_extractor
        position = extractor.hop_length * extractor.audio_compression_rate / extractor.sampling_rate  # seconds
        self.processor.max_audio_len = self.settings.max_position_embeddings * position
        return token

    def model_inputs(self, base: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the keyword arguments of the model's forward: embeddings in place of tokens and features."""
        return self._heard(base, batch.inputs)

    def _heard(self, base: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs with embeddings in place of tokens and features. Waits for the device: lengths of clips."""
        if SOUND not in inputs:
            return dict(inputs)
        body = base.model
        ears = body.embed_tokens_extend.audio_embed
        sounds = inputs[SOUND].to(base.dtype)
        by_length: dict[int, list[int]] = {}
        for place, length in enumerate(inputs[FRAMES].sum(1).tolist()):
            by_length.setdefault(length, []).append(place)
        encoded: dict[int, Tensor] = {}
        # Its mean and variance are buffers, which a mode does not cast.
        with ears.encoder.encoder_embedding.register_forward_hook(partial(_cast_for, ears.encoder.embed)):
            for length, alike in by_length.items():
                encoded |= zip(alike, ears.encoder(sounds[alike, :length], None), strict=True)
        sound = torch.cat([encoded[place] for place in range(len(sounds))])
        sound = ears.down_proj_for_speech(F.gelu(ears.up_proj_for_speech(sound)))
        words = body.embed_tokens(inputs["input_ids"])
        places = torch.nonzero(inputs["input_ids"] == self.clip_token, as_tuple=True)
        rest = {name: value for name, value in inputs.items() if name not in (SOUND, SIZES, FRAMES, "input_ids")}
        return {**rest, "inputs_embeds": ears.drop(words.index_put(places, sound.to(words.dtype)))}

    def generate(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        codes: Callable[[Path], Tensor],
        limits: Sequence[int],
        sampling: SamplingConfig,
    ) -> list[Generated]:
        """Generate the last trained answer of each sample; see `GeneratingFamily.generate`. `codes` is not used."""
        encoder, tokenizer = self.encoder, self.processor.tokenizer
        prompt = partial(self._prompt, without_adapter(model))
        stops = [encoder.end_of_turn]
        return generate_text(model, samples, prompt, tokenizer, stops, encoder.max_positions, limits, sampling)

    @torch.no_grad()
    def _prompt(self, base: Any, sample: Sample) -> dict[str, Tensor]:
        inputs = {name: value.to(base.device) for name, value in self.encoder.prompt(sample).items()}
        return {"input_ids": inputs["input_ids"], **self._heard(base, inputs)}


def _cast_for(layer: nn.Module, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Cast the output of a module to the dtype of the next layer's weights."""
    return output.to(next(layer.parameters()).dtype)
