"""A processor's chat template in token space: how many tokens a part of a conversation takes, and what ends a turn.

No name of a token is assumed. The end of a turn is what the template puts behind an assistant's words, and control
tokens are those that the template writes itself.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rawloop.errors import UserError
from rawloop.families.door import rendered

Messages = list[dict[str, Any]]
WORDS = "two"
QUESTION = {"role": "user", "content": [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "one"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": WORDS}]}


class ChatTemplate:
    """The chat template of a processor.

    Attributes:
        end_of_turn: id of the token that ends an assistant's turn.
        control: matches the tokens that give a conversation its shape; inside a text they would forge turns or audio.

    Raises:
        UserError: there is no template, or it cannot be run, cannot be split at an assistant's words, or ends them
            without a token of its own.
    """

    def __init__(self, processor: Any, audio_token: int) -> None:
        self.processor, self.tokenizer, self.audio_token = processor, processor.tokenizer, audio_token
        if processor.chat_template is None:
            raise UserError("the checkpoint's processor has no chat template: prompts cannot be built as in generation")
        self.end_of_turn = self._end_of_turn()
        self.control = self._control_tokens()

    def _end_of_turn(self) -> int:
        prompt, whole = self.render([QUESTION], header=True), self.render([QUESTION, ANSWER], header=False)
        if not whole.startswith(prompt + WORDS):
            raise UserError(
                f"the chat template cannot be split into prompt and answer: it writes {whole!r}, and {prompt!r} before "
                "an answer"
            )
        rest = whole.removeprefix(prompt + WORDS)
        after = self.tokenizer(rest, add_special_tokens=False)["input_ids"]
        if not after or after[0] not in self.tokenizer.get_added_vocab().values():
            raise UserError(
                f"the chat template writes {rest!r} behind an assistant's words, and no special token: the model could "
                "not learn to stop"
            )
        return int(after[0])

    def _control_tokens(self) -> re.Pattern[str]:
        written = self.tokenizer(self.render([QUESTION, ANSWER], header=False))["input_ids"]
        added: dict[str, int] = self.tokenizer.get_added_vocab()
        ids = {*written, self.audio_token}
        names = {name for name, token in added.items() if token in ids}
        names |= {self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token}
        return re.compile("|".join(re.escape(name) for name in sorted(names - {None})))

    def render(self, messages: Messages, *, header: bool) -> str:
        """Return a conversation as text, one placeholder a clip; with `header`, up to where the assistant begins."""
        text: str = rendered(
            self.processor, self.tokenizer.name_or_path, messages, tokenize=False, add_generation_prompt=header
        )
        return text

    def check_words(self, messages: Messages) -> None:
        """Refuse a conversation of which the template leaves words out, or changes them.

        Raises:
            ValueError: it does.
        """
        said = "".join(self.render(messages, header=False).split())
        for index, message in enumerate(messages):
            for part in message["content"]:
                if part["type"] == "text" and "".join(part["text"].split()) not in said:
                    raise ValueError(f"it drops or changes the words of messages[{index}] ({message['role']})")

    def ids(self, messages: Messages, *, header: bool = False) -> list[int]:
        """Return the tokens of a conversation as the template has it, where each clip has its placeholder alone."""
        text = self.render(messages, header=header)
        bos = self.tokenizer.bos_token
        own_bos = bos is not None and text.startswith(bos)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not own_bos, verbose=False)["input_ids"]
        return ids

    def encode(self, messages: Messages, waveforms: Sequence[Tensor]) -> dict[str, Any]:
        """Return what the processor makes of a conversation: `input_ids` (1, sequence), masks and features.

        Raises:
            ValueError: the template has not one place for each clip.
        """
        clips = iter(waveforms)
        heard = [
            {
                **message,
                "content": [{**p, "audio": next(clips).numpy()} if "audio" in p else p for p in message["content"]],
            }
            for message in messages
        ]
        encoded = rendered(
            self.processor, self.tokenizer.name_or_path, heard, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(encoded)

    def end(self, ids: list[int], start: int) -> int:
        """Return where the turn ends whose words begin at `start`: behind its end of turn.

        Raises:
            ValueError: it does not end.
        """
        if self.end_of_turn not in ids[start:]:
            raise ValueError("it writes no end of turn behind a trained turn")
        return ids.index(self.end_of_turn, start) + 1

    def length(self, ids: list[int], messages: Messages, *, header: bool) -> int:
        """Return how many of `ids` the first messages of their conversation take, clips at their full length.

        Args:
            ids: of the whole conversation.
            messages: its first ones.
            header: with the header of the assistant's turn that follows.

        Raises:
            ValueError: the template writes the beginning otherwise when more follows, or its tokens merge with the
                first of what follows.
        """
        prompt = self.ids(messages, header=header)
        prompt = [prompt[place] for place in self._places(prompt)]
        places = [*self._places(ids), len(ids)]
        if [ids[place] for place in places[: len(prompt)] if place < len(ids)] != prompt:
            raise ValueError(
                f"the first {len(messages)} turns alone are not how the whole conversation begins (a text that begins "
                "with blanks or line breaks may merge with what stands before it: strip it)"
            )
        return places[len(prompt)]

    def _places(self, ids: list[int]) -> list[int]:
        """Positions of `ids` without the repetitions of the audio token: clips count once, as in a rendered text."""
        audio = self.audio_token
        return [i for i, token in enumerate(ids) if token != audio or i == 0 or ids[i - 1] != audio]
