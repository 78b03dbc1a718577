"""Plain text and chats as token ids, with the tokens that are to be learnt.

In plain text that is everything after the first token, and the end of text. In a chat it is what the trained assistant
turns say, and the token that ends a turn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from rawloop.contracts import IGNORE, Sample
from rawloop.errors import UserError
from rawloop.families.chat_template import ChatTemplate, Messages, control_tokens
from rawloop.families.sample_checks import (
    Letters,
    check_control,
    check_conversation,
    check_length,
    control_pattern,
)

ROLES = ("system", "user", "assistant", "tool")
EXTRA = 8  # more tokens than a tokenizer puts around a text


@dataclass(frozen=True)
class Example:
    """One encoded sample.

    `input_ids` and `labels` are (sequence,) int64; a label stands at the position of its own token, and the first
    token has none. `runs` splits the sequence for people: who says it, and the position after its last token.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    runs: tuple[tuple[str, int], ...]


class TextEncoder:
    """Turns samples into examples; `settings` is the config of the text model, `path` names it in messages."""

    def __init__(self, settings: Any, tokenizer: Any, path: str) -> None:
        self.tokenizer, self.path = tokenizer, path
        self.vocabulary: int = settings.vocab_size
        self.limit: int | None = getattr(settings, "max_position_embeddings", None)
        self.template = ChatTemplate(tokenizer, path)
        self.letters = Letters(tokenizer, path)
        self.control = control_pattern(control_tokens(tokenizer).values())
        # Whether every token that the tokenizer can give is one to be learnt.
        self._any_token = tokenizer.unk_token_id is None and len(tokenizer) <= self.vocabulary

    def check(self, sample: Sample) -> None:
        """Refuse a sample that cannot be trained: its turns, its letters, its chat template or its length."""
        text = sample.is_text
        if not text and self.tokenizer.chat_template is not None:
            _ = self.template.end_of_turn  # a template that splits no chat at all is no fault of the sample's
        with sample.named_in_errors():
            check_conversation(sample, ("text",) if text else ROLES, hears=False)
            for turn in sample.turns:
                check_control(turn, self.control, *map(_spelt, (*turn.fields.values(), sample.tools)))
                self.letters.check(turn.words)
            if text:
                self._check_text(sample.turns[0].words)
            else:
                self._check_chat(sample)

    def _check_text(self, text: str) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"it is plain text, and the tokenizer of {self.path} has no eos_token to end it: set one")
        # A token takes a byte at least, so a short text need not be tokenized, unless it may have tokens that are bad.
        if self._any_token and self.limit is not None and len(text.encode()) + EXTRA <= self.limit:
            return
        ids = self._text_ids(text)
        self.letters.check_tokens(ids, text)
        self._check_ids(ids)

    def _check_chat(self, sample: Sample) -> None:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"it is a chat, and {self.path} has no chat template: add the chat_template.jinja that the model was "
                "trained with, or give plain 'text'"
            )
        messages, text, trained = self._chat(sample)
        self.template.check_tools(text, messages, sample.tools)
        self.template.check_words(text, messages, trained)
        self.letters.check(text)  # also what tools and the template itself write
        ids = self.template.ids(text)
        self.letters.check_tokens(ids, text)
        for index in trained:
            self.template.check_span(messages, index, ids, sample.tools)
        self._check_ids(ids)

    def _check_ids(self, ids: list[int]) -> None:
        check_length(len(ids), self.limit)
        if max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"its token {token} has the id {max(ids)}, and the vocabulary of {self.path} ends at "
                f"{self.vocabulary}: use the tokenizer that belongs to the model"
            )

    def example(self, sample: Sample) -> Example:
        """Encode one sample that `check` has passed."""
        if sample.is_text:
            ids = self._text_ids(sample.turns[0].words)
            spans = [(0, len(ids))]
        else:
            messages, text, trained = self._chat(sample)
            ids = self.template.ids(text)
            spans = [self.template.span(messages, index, ids, sample.tools) for index in trained]
        inputs = torch.tensor(ids)
        labels = torch.full((len(ids),), IGNORE)
        for start, end in spans:
            labels[start:end] = inputs[start:end]
        labels[0] = IGNORE  # nothing stands before it that could predict it
        return Example(sample.id, inputs, labels, _runs(sample, spans, len(ids)))

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]  # some tokenizers add it themselves

    def _chat(self, sample: Sample) -> tuple[Messages, str, list[int]]:
        """Return the messages up to the last trained one, their text, and the indices of the trained ones."""
        trained = [index for index, turn in enumerate(sample.turns) if turn.trained]
        turns = sample.turns[: trained[-1] + 1]
        messages = [{"role": turn.role, "content": turn.words, **turn.fields} for turn in turns]
        return *self.template.taken(messages, sample.tools), trained


def _spelt(value: Any) -> str:
    """Return a value of a message, or tools, as a template may write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _runs(sample: Sample, spans: Sequence[tuple[int, int]], length: int) -> tuple[tuple[str, int], ...]:
    """Split a sequence into answers and what stands between them, which belongs to the turns before each answer."""
    runs: list[tuple[str, int]] = []
    turns = iter(sample.turns)
    for start, end in spans:
        before = list(dict.fromkeys(turn.role for turn in takewhile(lambda turn: not turn.trained, turns)))
        role = sample.turns[0].role if len(sample.turns) == 1 else "assistant"
        runs += [("+".join(before), start)] * bool(start) + [(role, end)]
    return (*runs, *([("template", length)] if runs[-1][1] < length else []))
