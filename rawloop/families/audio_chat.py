"""The family of models that hear audio and answer in text: Qwen2-Audio, and similar classes of transformers.

Such a class needs a processor whose `apply_chat_template` gives `input_ids` and features, with one token repeated for a
clip's positions, and a causal language model that `AutoModelForMultimodalLM` loads.

Inputs are the processor's own. Labels are ours, since the processor does not say which tokens belong to a trained turn;
so is the check of clips, since it truncates or drops them silently.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, AutoProcessor

from rawloop.audio import BadAudio, load_audio
from rawloop.contracts import IGNORE, Batch, Context, Perturbed, Piece, Sample, Special
from rawloop.errors import BadSample, UserError
from rawloop.families import ModelConfig, shared
from rawloop.families.chat_template import ChatTemplate, Messages, content_of
from rawloop.families.generating import generate_text
from rawloop.families.loading import load_weights
from rawloop.families.made_up import heard, heard_in
from rawloop.families.packing import check_packing, joined, packed
from rawloop.families.sample_checks import Letters, check_control, check_conversation, check_no_tools, control_pattern
from rawloop.families.shared import TextFamily, check_length, documents, labels_of, load_parts, padded, text_batch
from rawloop.family_protocols import Generated
from rawloop.inputs import outside_autocast
from rawloop.settings import SamplingConfig

SHORTEST = 0.1  # seconds: a shorter clip takes no position, or so few that models take them for unexpanded ones
ROLES = ("system", "user", "assistant")
QUESTION = {"role": "user", "content": [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "one"}]}


@dataclass(frozen=True)
class Example(shared.Example):
    """One encoded sample.

    `features` are the other inputs of the model's forward, (windows, ...) each, empty without audio. `messages` is the
    conversation as the chat template gets it, for display.
    """

    features: dict[str, Tensor]
    messages: Messages
    seconds: float

    @property
    def audio(self) -> float:
        """How long its clips are, in seconds."""
        return self.seconds


class ChatEncoder:
    """Turns samples into examples. `audio_token` is the id of the token that is repeated for a clip's positions."""

    def __init__(self, processor: Any, audio_token: int, max_positions: int) -> None:
        self.processor, self.audio_token, self.max_positions = processor, audio_token, max_positions
        tokenizer = processor.tokenizer
        if processor.chat_template is None:
            raise UserError("the checkpoint's processor has no chat template: prompts cannot be built as in generation")
        self.template = ChatTemplate(processor, tokenizer.name_or_path, QUESTION, audio_token)
        self.end_of_turn = self.template.end_of_turn
        self.letters = Letters(tokenizer, tokenizer.name_or_path)
        self.control = self._control()
        self._known: dict[int, int] = {}  # positions of a clip, by its length
        self.sample_rate: int = processor.feature_extractor.sampling_rate
        # A longer clip would be truncated: after this many windows of features, or after the only one.
        self.longest: float = getattr(processor, "max_audio_len", None) or processor.feature_extractor.chunk_length

    def _control(self) -> re.Pattern[str]:
        """Match the tokens that the template writes. A text may spell other tokens, such as times in a transcript."""
        tokenizer = self.processor.tokenizer
        answer = {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
        ids = {*self.template.ids(self.template.render([QUESTION, answer])), self.audio_token}
        names = [name for name, token in tokenizer.get_added_vocab().items() if token in ids]
        return control_pattern([*names, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token])

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained, without decoding its clips.

        `frames` gives the length of a clip in samples at `sample_rate`, if it is known.
        """
        with sample.named_in_errors():
            check_no_tools(sample)
            check_conversation(sample, ROLES)
            for turn in sample.turns:
                check_control(turn, self.control)
                self.letters.check(turn.words)
            trained = [index for index, turn in enumerate(sample.turns) if turn.trained]
            messages = _messages(sample)
            text = self.template.render(messages)
            self.template.check_words(text, messages, trained)
            ids = self.template.ids(text)
            for index in trained:
                self.template.check_span(messages, index, ids)
            if frames is not None:
                self._measure(len(ids), [(path, frames(path)) for path in sample.audio_paths()])

    def _measure(self, text: int, clips: list[tuple[Path, int]]) -> None:
        """Refuse a sample that is too long. `text` counts its positions with one position per clip."""
        for path, length in clips:
            self._check_seconds(length, path)
        second = self.sample_rate
        longest = max((length for _, length in clips), default=0)
        most = min(-(-longest // second) * second, int(self.longest * second))  # round up: few lengths are measured
        if text + len(clips) * (self._positions(most) if clips else 0) > self.max_positions:
            exact = text - len(clips) + sum(self._positions(length) for _, length in clips)
            check_length(exact, self.max_positions)

    def length(self, sample: Sample, frames: Callable[[Path], int]) -> int:
        """Return how many positions a sample takes. Clips are rounded up to 0.04 s: then few lengths are measured."""
        text = len(self.template.ids(self.template.render(_messages(sample))))
        unit, most = self.sample_rate // 25, int(self.longest * self.sample_rate)
        lengths = [frames(path) for path in sample.audio_paths()]
        return text + sum(self._positions(min(-(-length // unit) * unit, most)) - 1 for length in lengths)

    def _positions(self, length: int) -> int:
        """Return how many positions a clip of `length` samples takes."""
        if length not in self._known:
            ids = self._encoded([QUESTION], [torch.zeros(length)])["input_ids"]
            self._known[length] = int((ids == self.audio_token).sum())
        return self._known[length]

    def _check_seconds(self, length: int, path: Path) -> None:
        seconds = length / self.sample_rate
        if not SHORTEST <= seconds <= self.longest:
            raise BadSample(
                f"{path} lasts {seconds:.2f} s, the model hears clips of {SHORTEST} to {self.longest:g} s: cut it into "
                "several samples, or leave it out; it is never truncated"
            )

    def example(self, sample: Sample, codes: Callable[[Path], Tensor] | None = None) -> Example:
        """Decode the clips of a sample that `check` has passed, and encode it. `codes` is not used."""
        with sample.named_in_errors():
            return self.encode(sample, [self._waveform(path) for path in sample.audio_paths()])

    def _waveform(self, path: Path) -> Tensor:
        try:
            waveform = load_audio(path, self.sample_rate)
        except BadAudio as reason:
            raise BadSample(f"{path} {reason}") from reason
        self._check_seconds(len(waveform), path)
        return waveform

    def encode(self, sample: Sample, waveforms: Sequence[Tensor]) -> Example:
        """Encode one sample from its clips' waveforms, (samples,) float32 at `sample_rate`, in order of appearance."""
        messages = _messages(sample)
        encoded = self._encoded(messages, waveforms)
        inputs: Tensor = encoded.pop("input_ids")[0]
        encoded.pop("attention_mask")
        check_length(len(inputs), self.max_positions)
        ids, trained = inputs.tolist(), [index for index, turn in enumerate(sample.turns) if turn.trained]
        labels = labels_of(inputs, [self.template.span(messages, index, ids) for index in trained])
        seconds = sum(map(len, waveforms)) / self.sample_rate
        return Example(sample.id, inputs, labels, encoded, messages, seconds)

    def prompt(self, sample: Sample) -> dict[str, Tensor]:
        """Encode what comes before the last trained answer; its tokens are those that `example` has there."""
        last = max(index for index, turn in enumerate(sample.turns) if turn.trained)
        turns = sample.turns[:last]
        with outside_autocast():  # a model generates under its mode's
            waveforms = [self._waveform(clip.path) for turn in turns for clip in turn.clips]
            return self._encoded(_messages(replace(sample, turns=turns)), waveforms, add_generation_prompt=True)

    def _encoded(self, messages: Messages, waveforms: Sequence[Tensor], **options: Any) -> dict[str, Any]:
        """Return the processor's `input_ids` (1, sequence), masks and features of a conversation."""
        clips = iter(waveforms)
        heard = [
            {**m, "content": [{**p, "audio": next(clips).numpy()} if "audio" in p else p for p in m["content"]]}
            for m in messages
        ]
        return dict(self.template.run(heard, tokenize=True, return_dict=True, return_tensors="pt", **options))


def _messages(sample: Sample) -> Messages:
    return [{"role": turn.role, "content": content_of(turn.parts, "audio")} for turn in sample.turns]


class AudioChat(TextFamily):
    """The family of models with audio in and text out: one stream, `text`."""

    processor_class: Any = AutoProcessor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.packing = False
        files = "processor_config.json or tokenizer.json"
        self.settings, self.processor = load_parts(config, self.processor_class, files)
        text_settings: Any = self.settings.get_text_config()
        self.vocabulary = text_settings.vocab_size
        self.encoder = ChatEncoder(self.processor, self._audio_token(), text_settings.max_position_embeddings)
        self.clip_token, self.sample_rate = self.encoder.audio_token, self.encoder.sample_rate

    def _audio_token(self) -> int:
        token: int | None = getattr(self.settings, "audio_token_id", None)
        written = getattr(self.processor, "audio_token_id", None)
        if token is None or token != written:
            raise self._other_token(token, written)
        return token

    def _other_token(self, token: int | None, written: int | None) -> UserError:
        return UserError(
            f"{self.config.path}: the model's config has the audio token {token}, the processor writes {written}: "
            "audio would not reach the model; fetch config and processor of one checkpoint"
        )

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model in its stored dtype; see `load_weights`."""
        model = load_weights(AutoModelForMultimodalLM, self.config, path)
        if self.packing:
            check_packing(self, model, lambda: self._probe(2), self.config)
        return model

    def collate(self, examples: list[Example]) -> Batch:
        """Make a micro-batch, padded on the right with the end of turn, or packed. Clips are in the order of examples.

        Clips have their own mask among the features. A batch without audio has no features, and the model runs its
        language model alone.
        """
        heard = [e.features for e in examples if e.features]
        features = {name: joined([clips[name] for clips in heard]) for name in (heard[0] if heard else ())}
        rows, labels = [e.input_ids for e in examples], [e.labels for e in examples]
        if self.packing:
            return text_batch({**packed(rows), **features}, torch.cat(labels)[None], examples)
        # Checkpoints may have no padding token, or use the audio token for it. Any other token will do.
        input_ids = padded(rows, self.encoder.end_of_turn)
        return text_batch({"input_ids": input_ids, **features}, padded(labels, IGNORE), examples)

    def probe(self) -> Batch:
        """Return a fixed small batch, a second of noise and some words, to compare two versions of a model."""
        return self._probe(1)

    def _probe(self, count: int) -> Batch:
        return self.collate([heard(self.encoder, self.encoder.sample_rate)] * count)

    def sized(self, positions: int, samples: int) -> Batch:
        """Return a batch of so many samples with about so many positions each; see `SizedFamily`."""
        return self.collate([heard_in(self.encoder, positions)] * samples)

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
        stops = [encoder.end_of_turn]
        return generate_text(model, samples, encoder.prompt, tokenizer, stops, encoder.max_positions, limits, sampling)

    def special_targets(self) -> Sequence[Special]:
        """The token that ends a turn. Without it as a target, a model forgets how to stop."""
        token = self.encoder.end_of_turn
        name = self.processor.tokenizer.convert_ids_to_tokens(token)
        return (Special("text", name, token, required=True, roles=("assistant",)),)

    def pieces(self, example: Example) -> Sequence[Piece]:
        """Split each turn of an example into audio, learnt text and other text."""
        ids, learnt = example.input_ids.tolist(), (example.labels != IGNORE).tolist()
        found, start = [], 0
        for count, message in enumerate(example.messages, 1):
            last = count == len(example.messages)
            end = len(ids) if last else self.encoder.template.length(ids, example.messages[:count])
            for (audio, is_learnt), run in groupby(
                range(start, end), key=lambda i: (ids[i] == self.encoder.audio_token, learnt[i])
            ):
                places = list(run)
                text = f"(audio, {len(places)} positions)"
                text = text if audio else self.processor.tokenizer.decode(ids[places[0] : places[-1] + 1])
                found.append(Piece(message["role"], "text", text, len(places), len(places) if is_learnt else 0))
            start = end
        return found

    def perturb(self, batch: Batch) -> Perturbed:
        """Change every token from the middle target of each row on, or before it; clips are unchanged.

        Another batch changes the sound of the clips, loud into quiet: predictions after a clip must notice.
        """
        changed = super().perturb(batch)
        quiet = {n: 1 - x for n, x in batch.inputs.items() if x.is_floating_point() and "mask" not in n}
        if not quiet:
            return changed
        clips, document = (batch.inputs["input_ids"] == self.clip_token).flatten(), documents(batch)
        # counted from the first position of each document
        heard = clips.cumsum(0) - (clips.cumsum(0) - clips.long())[torch.searchsorted(document, document)]
        after_clip = {"text": heard[batch.labels["text"].positions] > 0}
        only_clips = Context(replace(batch, inputs=batch.inputs | quiet), after_clip)
        return changed._replace(contexts={**changed.contexts, "clips": only_clips})
