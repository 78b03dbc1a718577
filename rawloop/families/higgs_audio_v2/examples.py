"""Conversations of Higgs Audio v2 as tensors: inputs equal to the processor's token for token, and right labels.

The model's own processor encodes audio on every call, cannot take codes, masks the stop token out of the labels and
trains reference audio and prompts. Here labels are built from cached codes, per codebook `[-100 (BOS) | codes | EOS]`
under the delay pattern: one EOS target per codebook, reference turns and prompts masked.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rawloop.contracts import IGNORE, Audio, Sample, Text, Turn
from rawloop.errors import BadSample, UserError
from rawloop.families.door import rendered
from rawloop.families.letters import Letters
from rawloop.families.shared import forged_token, refuse_tools

SYSTEM = "Generate audio following instruction."
# The wording the model was trained with for dialogues without reference voices.
SYSTEM_DIALOGUE = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following "
    "text, using the specified voice.\nIf no speaker tag is present, select a suitable voice on your own."
)


@dataclass(frozen=True)
class Example:
    """One encoded sample.

    `input_ids` and `labels` are (sequence,) int64, `audio_input_ids` and `audio_labels` (frames, codebooks) int64 with
    the delay pattern applied. Labels stand at the position of their own token, as transformers has them: position t is
    predicted from t - 1.
    """

    id: str
    input_ids: Tensor
    audio_input_ids: Tensor
    labels: Tensor
    audio_labels: Tensor


class HiggsEncoder:
    """Turns samples into examples, and examples into padded tensors.

    Args:
        settings: the model's config.
        tokenizer: the checkpoint's tokenizer, with its chat template.
    """

    def __init__(self, settings: Any, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.end_of_turn: int = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        self._structural = self._structural_tokens()
        self.letters = Letters(tokenizer, tokenizer.name_or_path)
        self._rendered: dict[tuple[Any, ...], int] = {}  # bytes of the first sample of each shape, with its template

    def _structural_tokens(self) -> re.Pattern[str]:
        """Tokens that give a conversation its shape; inside a transcript they would forge turns or audio."""
        ids = (self.settings.audio_token_id, self.settings.audio_delay_token_id, self.settings.audio_bos_token_id)
        names = {self.tokenizer.convert_ids_to_tokens(i) for i in ids}
        names |= {self.tokenizer.eos_token, self.tokenizer.bos_token, "<|eot_id|>", "<|audio_eos|>"}
        names |= {"<|start_header_id|>", "<|end_header_id|>"}
        return re.compile("|".join(re.escape(name) for name in sorted(names) if name))

    def conversation(self, sample: Sample) -> list[dict[str, Any]]:
        """Return the sample as messages for a chat template, with the system message that the task wants.

        Raises:
            UserError: an assistant turn is not exactly one clip, audio stands in a turn that the template drops it
                from, or a text contains a token that would forge the conversation's shape.
        """
        self.check(sample)
        turns = list(sample.turns)
        if not turns or turns[0].role != "system":
            system = SYSTEM_DIALOGUE if sample.task == "multi_speaker_smart_voice" else SYSTEM
            turns.insert(0, Turn("system", (Text(system),)))
        return [{"role": turn.role, "content": [_content(part) for part in _joined(turn)]} for turn in turns]

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse what can be seen without encoding: cheap enough for every sample of a data set before it is trained.

        Args:
            sample: the conversation.
            frames: gives the length of a clip in frames, if its codes are there.

        Raises:
            UserError: no turn is trained, a turn has another shape than the model knows, a text holds a control token.
            BadSample: with all that it has, prompt, references and clips in their delay pattern, it is too long.
        """
        refuse_tools(sample)
        words = False
        for index, turn in enumerate(sample.turns):
            self._check_turn(turn, index, sample)
            if turn.trained and not words:
                raise UserError(
                    f"sample '{sample.id}' ({sample.source}) has a clip to learn and no words that it speaks: put them "
                    "into a user turn before it, or behind its <audio>"
                )
            words = (words and turn.role != "assistant") or (turn.role == "user" and bool(_words(turn)))
        if not any(turn.trained for turn in sample.turns):
            raise UserError(
                f"sample '{sample.id}' ({sample.source}) has no clip to learn: no assistant turn is trained"
            )
        if frames is not None:
            paths, ramp = sample.audio_paths(), self.settings.num_codebooks + 1
            clips = sum(frames(path) + ramp for path in paths)
            most = clips + self._most_text(sample)
            if most > self.settings.max_position_embeddings or self.tokenizer.unk_token_id is not None:
                text = self.render(sample)
                ids = self._ids(text)
                self.letters.check_tokens(ids, text, sample)
                self._check_length(sample, clips + len(ids) - len(paths))

    def _most_text(self, sample: Sample) -> int:
        """Return more positions than a sample's text takes, without rendering it: a token takes a byte at least.

        What the chat template adds is less than all of another sample of the same turns.
        """
        shape = (sample.task, *((turn.role, *map(type, turn.parts)) for turn in sample.turns))
        if shape not in self._rendered:
            self._rendered[shape] = len(self.render(sample).encode())
        texts = (part.text for turn in sample.turns for part in turn.parts if isinstance(part, Text))
        return self._rendered[shape] + sum(len(text.encode()) for text in texts)

    def _check_length(self, sample: Sample, positions: int) -> None:
        limit = self.settings.max_position_embeddings
        if positions > limit:
            raise BadSample(
                f"sample '{sample.id}' ({sample.source}): it takes {positions} positions, the model has {limit}: "
                "shorten its text, clip or references, or leave the sample out"
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _check_turn(self, turn: Turn, index: int, sample: Sample) -> None:
        clips = sum(isinstance(part, Audio) for part in turn.parts)
        where = f"sample '{sample.id}' ({sample.source})"
        if turn.role == "text":
            raise UserError(f"{where} is plain text and has no clip: give it 'audio_file' or 'messages'")
        if turn.role == "assistant" and (clips != 1 or len(turn.parts) != 1):
            raise UserError(
                f"{where}: an assistant turn must be exactly one clip; this one has {len(turn.parts)} parts, "
                f"{clips} of them audio: put the words that it speaks into a user turn before it"
            )
        if clips and turn.role not in ("assistant", "scene"):
            raise UserError(
                f"{where}: audio in a {turn.role} turn, where Higgs Audio v2's chat template drops it: put a reference "
                "clip into an assistant turn after its transcript, or into the scene, as --data.refs_in_scene true "
                "does; a clip whose words the assistant writes is learnt with --data.task single_speaker_smart_voice"
            )
        if turn.role == "scene" and index != (sample.turns[0].role == "system"):
            raise UserError(f"{where}: a scene turn in place {index}: it belongs behind the system turn, or in front")
        if forged := forged_token(turn, self._structural):
            raise UserError(f"{where}: its text contains the control token {forged}: take it out")
        self.letters.check(_words(turn), sample)

    def example(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Example:
        """Encode one sample from cached codes.

        Args:
            sample: the conversation; exactly its `trained` turns get targets.
            codes: gives a clip's (frames, codebooks) int64 codes.

        Raises:
            UserError: no turn is trained, or a clip's codes do not fit the model.
            BadSample: the sample is too long for the model.
        """
        text = self.render(sample)
        ids = self._ids(text)
        self.letters.check_tokens(ids, text, sample)
        clips = [codes(path) for path in sample.audio_paths()]
        trained = [turn.trained for turn in sample.turns for part in turn.parts if isinstance(part, Audio)]
        self._check_clips(sample, clips, trained, ids)
        blocks = [self.delayed(clip, learn) for clip, learn in zip(clips, trained, strict=True)]
        pieces, labels = self._expand(ids, [len(inputs) for inputs, _ in blocks], trained)
        self._check_length(sample, len(pieces))
        inputs, audio_labels = (torch.cat(rows) for rows in zip(*blocks, strict=True))
        return Example(sample.id, torch.tensor(pieces), inputs, torch.tensor(labels), audio_labels)

    def render(self, sample: Sample) -> str:
        """Return the conversation as the chat template writes it, a placeholder for each clip.

        Raises:
            UserError: see `conversation`; the template leaves out or changes words.
        """
        text: str = rendered(self.tokenizer, self.tokenizer.name_or_path, self.conversation(sample), tokenize=False)
        said = "".join(text.split())
        for turn in sample.turns:
            for part in turn.parts:
                if isinstance(part, Text) and "".join(part.text.split()) not in said:
                    raise UserError(
                        f"sample '{sample.id}' ({sample.source}): the chat template of {self.tokenizer.name_or_path} "
                        f"drops or changes the words of its {turn.role} turn: use the one that belongs to the model"
                    )
        return text

    def _expand(self, ids: list[int], lengths: list[int], trained: list[bool]) -> tuple[list[int], list[int]]:
        """Give each audio placeholder as many positions as its clip has frames, and label the text to be learnt.

        What follows a trained clip (end of audio, end of turn) is the model's to say; then its turn is over.
        """
        ramp = self.settings.num_codebooks - 1
        pieces: list[int] = []
        labels: list[int] = []
        clip, learn = 0, False
        for token in ids:
            if token == self.settings.audio_token_id:
                pieces += [token] * (lengths[clip] - ramp) + [self.settings.audio_delay_token_id] * ramp
                labels += [IGNORE] * lengths[clip]
                learn = trained[clip]
                clip += 1
            else:
                pieces.append(token)
                labels.append(token if learn else IGNORE)
                learn = learn and token != self.end_of_turn
        return pieces, labels

    def _check_clips(self, sample: Sample, clips: list[Tensor], trained: list[bool], ids: list[int]) -> None:
        where = f"sample '{sample.id}' ({sample.source})"
        places = ids.count(self.settings.audio_token_id)
        if places != len(clips):
            raise UserError(f"{where}: the chat template has {places} places for its {len(clips)} clips")
        for path, clip in zip(sample.audio_paths(), clips, strict=True):
            if clip.shape[1] != self.settings.num_codebooks or int(clip.max()) >= self.settings.audio_stream_bos_id:
                raise UserError(
                    f"the codes of {path} are {tuple(clip.shape)} with a largest value of {int(clip.max())}: the model "
                    f"takes {self.settings.num_codebooks} codebooks of {self.settings.audio_stream_bos_id} codes; "
                    "prepare the data with this model's codec"
                )

    def delayed(self, codes: Tensor, trained: bool) -> tuple[Tensor, Tensor]:
        """Apply the delay pattern: codebook k runs k frames late.

        Args:
            codes: (frames, codebooks) int64.
            trained: whether the clip has targets.

        Returns:
            inputs and labels, both (frames + 2 + codebooks - 1, codebooks): BOS before and EOS after each codebook's
            stream; as labels the codes and one EOS per codebook, -100 elsewhere.
        """
        frames, codebooks = codes.shape
        length = frames + 2 + codebooks - 1
        inputs = codes.new_full((length, codebooks), self.settings.audio_stream_eos_id)
        labels = codes.new_full((length, codebooks), IGNORE)
        for k in range(codebooks):
            inputs[: k + 1, k] = self.settings.audio_stream_bos_id
            inputs[k + 1 : k + 1 + frames, k] = codes[:, k]
            if trained:
                labels[k + 1 : k + 2 + frames, k] = inputs[k + 1 : k + 2 + frames, k]
        return inputs, labels

    def pad(self, examples: list[Example], side: str = "right") -> dict[str, Tensor]:
        """Pad examples into the tensors that the processor returns: text on `side`, audio always on the right.

        Returns:
            `input_ids`, `attention_mask`, `labels` (batch, sequence); `audio_input_ids`, `audio_labels` (batch,
            frames, codebooks); `audio_input_ids_mask` (batch, frames) bool.
        """

        def text(rows: list[Tensor], value: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        def audio(rows: list[Tensor], value: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value)

        ones = [torch.ones(len(e.input_ids), dtype=torch.int64) for e in examples]
        frames = [torch.ones(len(e.audio_input_ids), dtype=torch.bool) for e in examples]
        return {
            "input_ids": text([e.input_ids for e in examples], self.tokenizer.pad_token_id),
            "attention_mask": text(ones, 0),
            "labels": text([e.labels for e in examples], IGNORE),
            "audio_input_ids": audio([e.audio_input_ids for e in examples], self.settings.audio_stream_eos_id),
            "audio_input_ids_mask": audio(frames, 0),
            "audio_labels": audio([e.audio_labels for e in examples], IGNORE),
        }


def _words(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts if isinstance(part, Text)).strip()


def _joined(turn: Turn) -> Sequence[Text | Audio]:
    """A system turn's texts as one: chat templates read the first item only and would drop the rest."""
    if turn.role != "system":
        return turn.parts
    return (Text("".join(part.text for part in turn.parts if isinstance(part, Text))),)


def _content(part: Text | Audio) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "audio", "path": str(part.path)}
