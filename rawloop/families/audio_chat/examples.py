"""Conversations with audio as tensors: inputs are the processor's own, labels stand on what the assistant says.

The processor does not say which tokens a trained turn has, and it truncates clips and drops audio without a word.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.audio import BadAudio, load_audio
from rawloop.contracts import IGNORE, Piece, Sample
from rawloop.errors import BadSample, UserError
from rawloop.families.chat_template import ChatTemplate, Messages, content_of
from rawloop.families.sample_checks import (
    Letters,
    check_control,
    check_conversation,
    check_length,
    check_no_tools,
    control_pattern,
)

SHORTEST = 0.1  # seconds: below this a clip takes no position at all, or so few that models take them for unexpanded
ROLES = ("system", "user", "assistant")
QUESTION = {"role": "user", "content": [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "one"}]}


@dataclass(frozen=True)
class Example:
    """One encoded sample; a label stands at the position of its own token and is predicted from the one before.

    `features` are the other inputs of the model's forward, (windows, ...) each, empty without audio. `messages` is the
    conversation as the chat template sees it, for people to look at.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    features: dict[str, Tensor]
    messages: Messages


class ChatEncoder:
    """Turns samples into examples; `audio_token` is the id of the token that stands for a clip, once per position."""

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
        # A longer clip would be cut: after so many windows of features, or after the only one.
        self.longest: float = getattr(processor, "max_audio_len", None) or processor.feature_extractor.chunk_length

    def _control(self) -> re.Pattern[str]:
        """Match the tokens that the template writes itself. Others, such as times in a transcript, may be spelt."""
        tokenizer = self.processor.tokenizer
        answer = {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
        ids = {*self.template.ids(self.template.render([QUESTION, answer])), self.audio_token}
        names = [name for name, token in tokenizer.get_added_vocab().items() if token in ids]
        return control_pattern([*names, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token])

    def check(self, sample: Sample, samples_of: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained, without decoding its clips.

        `samples_of` gives the length of a clip at `sample_rate`, if it is known.
        """
        with sample.named_in_errors():
            check_no_tools(sample)
            check_conversation(sample, ROLES, hears=True)
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
            if samples_of is not None:
                self._measure(len(ids), {path: samples_of(path) for path in sample.audio_paths()}, sample)

    def _measure(self, text: int, lengths: dict[Path, int], sample: Sample) -> None:
        """Refuse a sample that is too long; in its `text` positions each clip has one."""
        for path, length in lengths.items():
            self._check_seconds(length, path)
        clips = [lengths[path] for path in sample.audio_paths()]
        second = self.sample_rate
        most = min(-(-max(clips, default=0) // second) * second, int(self.longest * second))
        if text + len(clips) * (self._positions(most) if clips else 0) > self.max_positions:
            check_length(text - len(clips) + sum(map(self._positions, clips)), self.max_positions)

    def _positions(self, length: int) -> int:
        """Return how many positions a clip of so many samples takes."""
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

    def example(self, sample: Sample) -> Example:
        """Decode the clips of a sample that `check` has passed, and encode it."""
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
        ids: list[int] = encoded.pop("input_ids")[0].tolist()
        check_length(len(ids), self.max_positions)
        encoded.pop("attention_mask")
        labels = [IGNORE] * len(ids)
        for index, turn in enumerate(sample.turns):
            if turn.trained:
                start, end = self.template.span(messages, index, ids)
                labels[start:end] = ids[start:end]
        return Example(sample.id, torch.tensor(ids), torch.tensor(labels), encoded, messages)

    def _encoded(self, messages: Messages, waveforms: Sequence[Tensor]) -> dict[str, Any]:
        """Return the processor's `input_ids` (1, sequence), masks and features of a conversation."""
        clips = iter(waveforms)
        heard = [
            {**m, "content": [{**p, "audio": next(clips).numpy()} if "audio" in p else p for p in m["content"]]}
            for m in messages
        ]
        return dict(self.template.run(heard, tokenize=True, return_dict=True, return_tensors="pt"))

    def pieces(self, example: Example) -> Iterator[Piece]:
        """Yield runs of positions of one turn that are audio, learnt text or other text."""
        ids, labels, start = example.input_ids.tolist(), example.labels.tolist(), 0
        for count, message in enumerate(example.messages, 1):
            last = count == len(example.messages)
            end = len(ids) if last else self.template.length(ids, example.messages[:count])
            kinds = groupby(range(start, end), key=lambda i: (ids[i] == self.audio_token, labels[i] != IGNORE))
            for (audio, learnt), run in kinds:
                places = list(run)
                words = self.processor.tokenizer.decode(ids[places[0] : places[-1] + 1])
                text = f"(audio, {len(places)} positions)" if audio else words
                yield Piece(message["role"], "text", text, len(places), len(places) if learnt else 0)
            start = end


def _messages(sample: Sample) -> Messages:
    return [{"role": turn.role, "content": content_of(turn.parts, "audio")} for turn in sample.turns]
