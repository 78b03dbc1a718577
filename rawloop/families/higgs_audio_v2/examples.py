"""Conversations of Higgs Audio v2 as tensors: the processor's inputs, token for token, and our own labels.

The processor encodes audio on every call, masks the stop token out of the labels, and trains reference audio and
prompts. Our labels come from cached codes, with one EOS target per codebook, and mask references and prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.contracts import IGNORE, Audio, Sample, Text, Turn
from rawloop.errors import UserError
from rawloop.families import shared
from rawloop.families.chat_template import ChatTemplate, Messages, content_of
from rawloop.families.packing import packed
from rawloop.families.sample_checks import Letters, check_control, check_no_tools, control_pattern
from rawloop.families.shared import check_length, padded

SYSTEM = "Generate audio following instruction."
# The model was trained with this text for dialogues without reference voices.
SYSTEM_DIALOGUE = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following "
    "text, using the specified voice.\nIf no speaker tag is present, select a suitable voice on your own."
)

STRUCTURE = ("<|eot_id|>", "<|audio_eos|>", "<|start_header_id|>", "<|end_header_id|>")


@dataclass(frozen=True)
class Example(shared.Example):
    """One encoded sample; `audio_input_ids` and `audio_labels` are (frames, codebooks) int64, delay pattern applied."""

    audio_input_ids: Tensor
    audio_labels: Tensor

    @property
    def audio(self) -> float:
        """How long its clips are, in frames of codes: without the rows of BOS, EOS and the delay."""
        if not len(self.audio_input_ids):
            return 0.0
        clips = int((self.audio_input_ids == self.audio_input_ids[0, 0]).all(1).sum())  # each starts with a row of BOS
        return len(self.audio_input_ids) - clips * (1 + self.audio_input_ids.shape[1])


class HiggsEncoder:
    """Turns samples into examples, and examples into padded tensors."""

    def __init__(self, settings: Any, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.template = ChatTemplate(tokenizer, tokenizer.name_or_path)
        self.end_of_turn: int = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        ids = (settings.audio_token_id, settings.audio_delay_token_id, settings.audio_bos_token_id)
        names = [*map(tokenizer.convert_ids_to_tokens, ids), tokenizer.eos_token, tokenizer.bos_token]
        # Inside a transcript these would forge turns or audio. Other control tokens, such as a scene's, are allowed.
        self.control = control_pattern([*names, *STRUCTURE])
        self.letters = Letters(tokenizer, tokenizer.name_or_path)
        self._rendered: dict[tuple[Any, ...], int] = {}  # bytes of the first sample of each shape, as rendered

    def conversation(self, sample: Sample) -> Messages:
        """Return the sample as messages for a chat template, with the system message of its task."""
        turns = list(sample.turns)
        if not turns or turns[0].role != "system":
            system = SYSTEM_DIALOGUE if sample.task == "multi_speaker_smart_voice" else SYSTEM
            turns.insert(0, Turn("system", (Text(system),)))
        # Chat templates read only the first item of a system turn.
        joined = [(Text(turn.words),) if turn.role == "system" else turn.parts for turn in turns]
        return [
            {"role": turn.role, "content": content_of(parts, "path")} for turn, parts in zip(turns, joined, strict=True)
        ]

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained; `frames` gives the length of a clip, if it is encoded."""
        with sample.named_in_errors():
            check_no_tools(sample)
            words = False
            for index, turn in enumerate(sample.turns):
                self._check_turn(turn, index, sample)
                if turn.trained and not words:
                    raise UserError(
                        "it has a clip to learn and no words that it speaks: put them into a user turn before it, or "
                        "after its <audio>"
                    )
                words = (words and turn.role != "assistant") or (turn.role == "user" and bool(turn.words.strip()))
            if not any(turn.trained for turn in sample.turns):
                raise UserError("it has no clip to learn: no assistant turn is trained")
            if frames is not None:
                self._measure(sample, frames)

    def _measure(self, sample: Sample, frames: Callable[[Path], int]) -> None:
        """Refuse a sample that is too long. A token has at least one byte, so most samples need not be rendered."""
        clips = self._clips(sample, frames)
        fits = clips + self._most_text(sample) <= self.settings.max_position_embeddings
        if fits and self.tokenizer.unk_token_id is None:
            return
        text = self._text(sample)
        ids = self.template.ids(text)
        self.letters.check_tokens(ids, text)
        check_length(clips + len(ids) - len(sample.audio_paths()), self.settings.max_position_embeddings)

    def length(self, sample: Sample, frames: Callable[[Path], int]) -> int:
        """Return how many positions a sample takes, from the frames of its clips and the tokens of its text."""
        tokens = len(self.template.ids(self.template.render(self.conversation(sample))))
        return self._clips(sample, frames) + tokens - len(sample.audio_paths())

    def _clips(self, sample: Sample, frames: Callable[[Path], int]) -> int:
        return sum(frames(path) + self.settings.num_codebooks + 1 for path in sample.audio_paths())

    def _most_text(self, sample: Sample) -> int:
        """Return an upper bound of the positions of a sample's text.

        The chat template adds less than the rendered text of another sample with the same turns.
        """
        shape = (sample.task, *((turn.role, *map(type, turn.parts)) for turn in sample.turns))
        if shape not in self._rendered:
            self._rendered[shape] = len(self._text(sample).encode())
        return self._rendered[shape] + sum(len(turn.words.encode()) for turn in sample.turns)

    def _text(self, sample: Sample) -> str:
        messages = self.conversation(sample)
        text = self.template.render(messages)
        self.template.check_words(text, messages)
        return text

    def _check_turn(self, turn: Turn, index: int, sample: Sample) -> None:
        clips = sum(isinstance(part, Audio) for part in turn.parts)
        if turn.role == "text":
            raise UserError("it is plain text and has no clip: give it 'audio_file' or 'messages'")
        if turn.role == "assistant" and (clips != 1 or len(turn.parts) != 1):
            raise UserError(
                f"an assistant turn must be exactly one clip; this one has {len(turn.parts)} parts, {clips} of them "
                "audio: put the words that it speaks into a user turn before it"
            )
        if clips and turn.role not in ("assistant", "scene"):
            raise UserError(
                f"it has audio in a {turn.role} turn, where Higgs Audio v2's chat template drops it: put a reference "
                "clip into an assistant turn after its transcript, or into the scene, as --data.refs_in_scene true "
                "does; a clip whose words the assistant writes is learnt with --data.task single_speaker_smart_voice"
            )
        if turn.role == "scene" and index != (sample.turns[0].role == "system"):
            raise UserError(f"it has a scene turn in place {index}: it belongs after the system turn, or first")
        check_control(turn, self.control)
        self.letters.check(turn.words)

    def example(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Example:
        """Encode one sample that `check` has passed; `codes` gives a clip's (frames, codebooks) int64 codes."""
        clips = [codes(path) for path in sample.audio_paths()]
        trained = [turn.trained for turn in sample.turns for part in turn.parts if isinstance(part, Audio)]
        with sample.named_in_errors():
            ids = self.template.ids(self._text(sample))
            self._check_clips(sample, clips, ids)
            blocks = [self.delayed(clip, learn) for clip, learn in zip(clips, trained, strict=True)]
            pieces, labels = self._expand(ids, [len(inputs) for inputs, _ in blocks], trained)
            check_length(len(pieces), self.settings.max_position_embeddings)
        inputs, audio_labels = (torch.cat(rows) for rows in zip(*blocks, strict=True))
        return Example(sample.id, torch.tensor(pieces), torch.tensor(labels), inputs, audio_labels)

    def prompt(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Example:
        """Encode what comes before the last trained clip of a sample; its tokens are those that `example` has there."""
        last = max(index for index, turn in enumerate(sample.turns) if turn.trained)
        sample = replace(sample, turns=sample.turns[: last + 1])
        clips = [codes(path) for path in sample.audio_paths()[:-1]]
        ids = self.template.ids(self._text(sample))
        blank = torch.zeros(1, self.settings.num_codebooks, dtype=torch.int64)
        self._check_clips(sample, [*clips, blank], ids)
        ids = ids[: max(place for place, token in enumerate(ids) if token == self.settings.audio_token_id)]
        blocks = [self.delayed(clip, trained=False)[0] for clip in clips]
        pieces, labels = self._expand(ids, [len(block) for block in blocks], [False] * len(blocks))
        frames = torch.cat([*blocks, blank[:0]])
        return Example(sample.id, torch.tensor(pieces), torch.tensor(labels), frames, torch.full_like(frames, IGNORE))

    def _expand(self, ids: list[int], lengths: list[int], trained: list[bool]) -> tuple[list[int], list[int]]:
        """Repeat each audio placeholder for the frames of its clip, and label the text to be learnt.

        The model must learn the tokens between a trained clip and the end of its turn, inclusive.
        """
        ramp = self.settings.num_codebooks - 1
        audio, delay = self.settings.audio_token_id, self.settings.audio_delay_token_id
        pieces: list[int] = []
        labels: list[int] = []
        clip, learn = 0, False
        for token in ids:
            if token == audio:
                pieces += [audio] * (lengths[clip] - ramp) + [delay] * ramp
                labels += [IGNORE] * lengths[clip]
                learn = trained[clip]
                clip += 1
            else:
                pieces.append(token)
                labels.append(token if learn else IGNORE)
                learn = learn and token != self.end_of_turn
        return pieces, labels

    def _check_clips(self, sample: Sample, clips: list[Tensor], ids: list[int]) -> None:
        places = ids.count(self.settings.audio_token_id)
        if places != len(clips):
            raise UserError(f"the chat template has {places} places for its {len(clips)} clips")
        for path, clip in zip(sample.audio_paths(), clips, strict=True):
            if clip.shape[1] != self.settings.num_codebooks or int(clip.max()) >= self.settings.audio_stream_bos_id:
                raise UserError(
                    f"the codes of {path} are {tuple(clip.shape)} with a largest value of {int(clip.max())}: the model "
                    f"takes {self.settings.num_codebooks} codebooks of {self.settings.audio_stream_bos_id} codes; "
                    "prepare the data with this model's codec"
                )

    def delayed(self, codes: Tensor, trained: bool) -> tuple[Tensor, Tensor]:
        """Apply the delay pattern to (frames, codebooks) codes: codebook k is k frames late.

        Returns:
            inputs and labels, both (frames + 2 + codebooks - 1, codebooks). Inputs have BOS before and EOS after each
            codebook's stream. Labels are the codes and one EOS per codebook if `trained`, else -100.
        """
        frames, codebooks = codes.shape
        edge = codes.new_ones(1, codebooks)
        stream = torch.cat([edge * self.settings.audio_stream_bos_id, codes, edge * self.settings.audio_stream_eos_id])
        place = torch.arange(frames + 1 + codebooks)[:, None] - torch.arange(codebooks)  # in each codebook's stream
        inputs = stream.gather(0, place.clamp(0, frames + 1))
        learnt = (place > 0) & (place < frames + 2) & trained
        return inputs, torch.where(learnt, inputs, IGNORE)

    def pack(self, examples: list[Example]) -> dict[str, Tensor]:
        """Concatenate examples into one row of text and one of audio. Returns tensors as `pad` does, and positions."""
        frames = torch.cat([e.audio_input_ids for e in examples])
        return {
            **packed([e.input_ids for e in examples]),
            "labels": torch.cat([e.labels for e in examples])[None],
            "audio_input_ids": frames[None],
            "audio_input_ids_mask": torch.ones(1, len(frames), dtype=torch.bool),
            "audio_labels": torch.cat([e.audio_labels for e in examples])[None],
        }

    def pad(self, examples: list[Example], side: str = "right") -> dict[str, Tensor]:
        """Pad examples into the tensors that the processor returns: text on `side`, audio always on the right.

        Returns:
            `input_ids`, `attention_mask`, `labels` (batch, sequence); `audio_input_ids`, `audio_labels` (batch,
            frames, codebooks); `audio_input_ids_mask` (batch, frames) bool.
        """
        ones = [torch.ones(len(e.input_ids), dtype=torch.int64) for e in examples]
        frames = [torch.ones(len(e.audio_input_ids), dtype=torch.bool) for e in examples]
        return {
            "input_ids": padded([e.input_ids for e in examples], self.tokenizer.pad_token_id, side),
            "attention_mask": padded(ones, 0, side),
            "labels": padded([e.labels for e in examples], IGNORE, side),
            "audio_input_ids": padded([e.audio_input_ids for e in examples], self.settings.audio_stream_eos_id),
            "audio_input_ids_mask": padded(frames, 0),
            "audio_labels": padded([e.audio_labels for e in examples], IGNORE),
        }


def roles_of(ids: list[int], tokenizer: Any) -> list[str]:
    """Return the role of every position. A scene is inside the system turn."""
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|scene_desc_start|>", "<|scene_desc_end|>")
    head, head_end, scene, scene_end = (tokenizer.convert_tokens_to_ids(name) for name in names)
    turn, role = "", ""
    roles: list[str] = []
    for place, token in enumerate(ids):
        if token == head:
            turn = role = tokenizer.decode(ids[place + 1 : ids.index(head_end, place)]).strip()
        elif token == scene:
            role = "scene"
        roles.append(role)
        if token == scene_end:
            role = turn
    first = next(filter(None, roles), "")
    return [role or first for role in roles]  # the begin-of-text token is before the first header
