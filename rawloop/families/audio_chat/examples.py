"""Conversations with audio as tensors: inputs are the processor's own, labels stand on what the assistant says.

The processor renders its chat template, extracts features and gives each clip its positions. Nothing of that is done
again here. What it has no notion of is added: which tokens a trained turn says, and refusals where it would truncate a
clip, let a text forge a turn, or drop audio.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.audio import BadAudio, load_audio
from rawloop.contracts import IGNORE, Audio, Piece, Sample, Text, Turn
from rawloop.errors import BadSample, UserError
from rawloop.families.audio_chat.template import QUESTION, ChatTemplate, Messages
from rawloop.families.letters import Letters
from rawloop.families.shared import forged_token, refuse_tools

SHORTEST = 0.1  # seconds: below this a clip takes no position at all, or so few that models take them for unexpanded


@dataclass(frozen=True)
class Example:
    """One encoded sample.

    `input_ids` and `labels` are (sequence,) int64; a label stands at the position of its own token and is predicted
    from the one before. `features` are what else the model's forward takes of the clips, (windows, ...) each, empty
    without audio. `messages` is the conversation as the chat template sees it, for people to look at.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    features: dict[str, Tensor]
    messages: Messages


class ChatEncoder:
    """Turns samples into examples.

    Args:
        processor: the checkpoint's processor: tokenizer, feature extractor and chat template.
        audio_token: id of the token that stands for a clip, once per position.
        max_positions: of the language model.
    """

    def __init__(self, processor: Any, audio_token: int, max_positions: int) -> None:
        self.processor, self.audio_token, self.max_positions = processor, audio_token, max_positions
        self.template = ChatTemplate(processor, audio_token)
        self.letters = Letters(processor.tokenizer, processor.tokenizer.name_or_path)
        self._known: dict[int, int] = {}  # positions of a clip, by its length
        self.sample_rate: int = processor.feature_extractor.sampling_rate
        # A longer clip would be cut: after so many windows of features, or after the only one.
        self.longest: float = getattr(processor, "max_audio_len", None) or processor.feature_extractor.chunk_length

    def check(self, sample: Sample, samples_of: Callable[[Path], int] | None = None) -> None:
        """Refuse what can be seen without decoding: cheap enough for every sample of a data set before it is trained.

        Args:
            sample: the conversation.
            samples_of: gives the length of a clip at `sample_rate`, if it is known.

        Raises:
            UserError: no turn is trained, audio stands in another turn than a user's, a text holds a control token, or
                the chat template refuses the conversation, drops words or cannot be split at its turns.
            BadSample: a clip is shorter or longer than what the model hears, or the whole is longer than the model.
        """
        refuse_tools(sample)
        for index, turn in enumerate(sample.turns):
            self._check_turn(turn, index, sample)
        if not any(turn.trained for turn in sample.turns):
            raise UserError(f"{_where(sample)} has nothing to learn: no assistant turn is trained")
        messages = _messages(sample)
        with _refusing(sample):
            self.template.check_words(messages)
        if samples_of is not None:
            self._measure(sample, [(path, samples_of(path)) for path in sample.audio_paths()], messages)

    def _measure(self, sample: Sample, clips: list[tuple[Path, int]], messages: Messages) -> None:
        for path, length in clips:
            self._check_seconds(length / self.sample_rate, path, sample)
        with _refusing(sample):
            ids = self.template.ids(messages)
            self._labels(sample, ids, messages)
        without = len(ids) - len(clips)  # where each clip has one position
        second = self.sample_rate
        most = min(-(-max((n for _, n in clips), default=0) // second) * second, int(self.longest * second))
        if without + (len(clips) and len(clips) * self._positions(most)) > self.max_positions:
            self._check_length(sample, without + sum(self._positions(length) for _, length in clips))

    def _positions(self, length: int) -> int:
        """Return how many positions a clip of so many samples takes."""
        if length not in self._known:
            encoded = self.template.encode([QUESTION], [torch.zeros(length)])
            self._known[length] = int((encoded["input_ids"] == self.audio_token).sum())
        return self._known[length]

    def _check_length(self, sample: Sample, positions: int) -> None:
        if positions > self.max_positions:
            raise BadSample(
                f"{_where(sample)}: it takes {positions} positions, the model has {self.max_positions}: shorten its "
                "text, or leave clips out"
            )

    def _check_turn(self, turn: Turn, index: int, sample: Sample) -> None:
        if turn.role not in ("system", "user", "assistant"):
            raise UserError(
                f"{_where(sample)} has a {turn.role} turn, which a chat template does not know: take it out"
            )
        if turn.role != "user" and any(isinstance(part, Audio) for part in turn.parts):
            raise UserError(
                f"{_where(sample)}: audio in a {turn.role} turn; this model hears audio and answers in text: "
                "clips belong into user turns"
            )
        if turn.trained and index == 0:
            raise UserError(f"{_where(sample)} begins with its trained turn: there is nothing to answer to")
        if turn.trained and not "".join(part.text for part in turn.parts if isinstance(part, Text)).strip():
            raise UserError(f"{_where(sample)}: its trained {turn.role} turn says nothing: write it, or leave it out")
        if forged := forged_token(turn, self.template.control):
            raise UserError(f"{_where(sample)}: its text contains the control token {forged}: take it out")
        self.letters.check("".join(part.text for part in turn.parts if isinstance(part, Text)), sample)

    def _check_seconds(self, seconds: float, path: Path, sample: Sample) -> None:
        if not SHORTEST <= seconds <= self.longest:
            raise BadSample(
                f"{_where(sample)}: {path} lasts {seconds:.2f} s, the model hears clips of {SHORTEST} to "
                f"{self.longest:g} s: cut it into several samples, or leave it out; it is never truncated"
            )

    def example(self, sample: Sample) -> Example:
        """Decode a sample's clips and encode it.

        Raises:
            UserError: see `check` and `encode`.
            BadSample: likewise; a clip cannot be decoded, or is silent.
        """
        self.check(sample)
        return self.encode(sample, [self._waveform(path, sample) for path in sample.audio_paths()])

    def _waveform(self, path: Path, sample: Sample) -> Tensor:
        try:
            waveform = load_audio(path, self.sample_rate)
        except BadAudio as reason:
            raise BadSample(f"{_where(sample)}: {path} {reason}") from reason
        self._check_seconds(len(waveform) / self.sample_rate, path, sample)
        return waveform

    def encode(self, sample: Sample, waveforms: Sequence[Tensor]) -> Example:
        """Encode one sample from its clips' waveforms.

        Args:
            sample: the conversation; exactly its `trained` turns get targets.
            waveforms: (samples,) float32 at `sample_rate`, in order of appearance.

        Raises:
            UserError: the chat template refuses the conversation or cannot be split at its turns.
            BadSample: the sample is longer than the model.
        """
        messages = _messages(sample)
        with _refusing(sample):
            encoded = self.template.encode(messages, waveforms)
            ids: list[int] = encoded.pop("input_ids")[0].tolist()
            labels = self._labels(sample, ids, messages)
        self._check_length(sample, len(ids))
        encoded.pop("attention_mask")
        return Example(sample.id, torch.tensor(ids), torch.tensor(labels), dict(encoded), messages)

    def _labels(self, sample: Sample, ids: list[int], messages: Messages) -> list[int]:
        """What each trained turn says, from behind its header up to and with its end of turn."""
        labels = [IGNORE] * len(ids)
        for index, turn in enumerate(sample.turns):
            if turn.trained:
                start = self.template.length(ids, messages[:index], header=True)
                end = self.template.end(ids, start)
                labels[start:end] = ids[start:end]
        return labels

    def pieces(self, example: Example) -> Iterator[Piece]:
        """Yield runs of positions of one turn that are audio, learnt text or other text.

        Raises:
            UserError: the chat template cannot be split at this conversation's turns.
        """
        ids, labels, start = example.input_ids.tolist(), example.labels.tolist(), 0
        for count, message in enumerate(example.messages, 1):
            last = count == len(example.messages)
            end = len(ids) if last else self.template.length(ids, example.messages[:count], header=False)
            kinds = groupby(range(start, end), key=lambda i: (ids[i] == self.audio_token, labels[i] != IGNORE))
            for (audio, learnt), run in kinds:
                places = list(run)
                text = (
                    f"(audio, {len(places)} positions)"
                    if audio
                    else self.processor.tokenizer.decode(ids[places[0] : places[-1] + 1])
                )
                yield Piece(message["role"], "text", text, len(places), len(places) if learnt else 0)
            start = end


def _where(sample: Sample) -> str:
    return f"sample '{sample.id}' ({sample.source})"


@contextmanager
def _refusing(sample: Sample) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{_where(sample)}: its chat template or processor refuses it: {error}") from error


def _messages(sample: Sample) -> Messages:
    return [{"role": turn.role, "content": [_content(part) for part in turn.parts]} for turn in sample.turns]


def _content(part: Text | Audio) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "audio", "audio": str(part.path)}
