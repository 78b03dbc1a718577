"""Plain text and chats as token ids, with the tokens that are to be learnt.

Of plain text that is everything after the first token, and the end of text. Of a chat it is what the trained assistant
turns say and the token that ends a turn, found with the checkpoint's own chat template: the tokens of the conversation
before a turn, with the header that asks for it, must begin the tokens of the whole. So a prompt in training is, token
for token, the prompt that generation will see, and a template for which that does not hold is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NoReturn

import torch
from torch import Tensor

from rawloop.contracts import IGNORE, Audio, Sample, Text, Turn
from rawloop.errors import BadSample, UserError
from rawloop.families.causal_lm.tool_calls import CALLS, Messages, Tools, arguments_as_text, unwritten
from rawloop.families.door import rendered
from rawloop.families.letters import Letters

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
ANSWERS = ("One two.", "Three.")  # two answers whose common ending is the template's
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
    """Turns samples into examples.

    Args:
        settings: the config of the text model.
        tokenizer: the checkpoint's tokenizer, with its chat template if it has one.
        path: the checkpoint, for messages.
    """

    def __init__(self, settings: Any, tokenizer: Any, path: str) -> None:
        self.tokenizer, self.path = tokenizer, path
        self.vocabulary: int = settings.vocab_size
        self.limit: int | None = getattr(settings, "max_position_embeddings", None)
        self.control = control_tokens(tokenizer)
        self.letters = Letters(tokenizer, path)
        self._forged = control_pattern(self.control)
        # Whether every token that the tokenizer can give is one to be learnt.
        self._any_token = tokenizer.unk_token_id is None and len(tokenizer) <= self.vocabulary

    def check(self, sample: Sample) -> None:
        """Refuse a sample that cannot be trained. A text that is surely short enough is only tokenized where its tokens
        may be no good.

        Raises:
            UserError: see `example`.
            BadSample: likewise.
        """
        if self.is_text(sample) and self.limit is not None and self._any_token:
            length = sum(len(part.text.encode()) for part in sample.turns[0].parts if isinstance(part, Text))
            if length + EXTRA <= self.limit:  # a token takes a byte at least
                self._check_turns(sample)
                return
        self.example(sample)

    def example(self, sample: Sample) -> Example:
        """Encode one sample.

        Raises:
            UserError: audio, a control token in its text, nothing to learn, or a chat template that is missing, refuses
                the conversation, or cannot be split into prompt and answer.
            BadSample: it is too long for the model.
        """
        self._check_turns(sample)
        ids, spans = self._text(sample) if self.is_text(sample) else self._chat(sample)
        if self.limit is not None and len(ids) > self.limit:
            raise BadSample(
                f"{_where(sample)}: it takes {len(ids)} positions, the model has {self.limit}: shorten it, or leave "
                "the sample out"
            )
        if max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            _fail(
                sample,
                f"its token {token} has the id {max(ids)}, and the vocabulary of {self.path} ends at "
                f"{self.vocabulary}: use the tokenizer that belongs to the model",
            )
        labels = torch.full((len(ids),), IGNORE)
        inputs = torch.tensor(ids)
        for start, end in spans:
            labels[start:end] = inputs[start:end]
        labels[0] = IGNORE  # nothing stands before it that could predict it
        return Example(sample.id, inputs, labels, _runs(sample, spans, len(ids)))

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an assistant turn: the first control token of what the template puts after an answer.

        Raises:
            UserError: there is no template, it takes no plain conversation, or it ends a turn without such a token.
        """
        user, where = {"role": "user", "content": "Hello."}, "a user and an assistant turn"
        first, second = (self._render([user, {"role": "assistant", "content": a}], where) for a in ANSWERS)
        self._check_header(first, self._render([user], where, asks=True), self._render([user], where))
        pairs = zip(reversed(self._ids(first)), reversed(self._ids(second)), strict=False)
        ending = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)][::-1]
        found = [token for token in ending if token in self.control]
        if not found:
            raise UserError(
                f"the chat template of {self.path} cannot be split into turns: it ends an assistant turn with "
                f"{self.tokenizer.decode(ending)!r}, in which there is no control token: the model could not learn to "
                "stop; use a template whose turns end with one"
            )
        return found[0]

    def _check_header(self, answered: str, asked: str, plain: str) -> None:
        """Refuse a template that writes an answer's header only with the answer: the header would be learnt.

        What one that does write a header puts between it and the answer, such as a channel, is the model's to say.
        """
        between = answered[len(asked) :].partition(ANSWERS[0])[0]
        if not answered.startswith(asked) or (asked == plain and between.strip()):
            raise UserError(
                f"the chat template of {self.path} cannot be split into prompt and answer: asked for an answer it ends "
                f"with {asked[-40:]!r}, with the answer it goes on {answered[-80:]!r}: use a template whose "
                "{% if add_generation_prompt %} writes all that stands before an answer"
            )

    def is_text(self, sample: Sample) -> bool:
        """Whether a sample is plain text; else it is a chat."""
        return [turn.role for turn in sample.turns] == ["text"]

    def _check_turns(self, sample: Sample) -> None:
        text = self.is_text(sample)
        if sample.tools:
            self._check_forged(_spelt(sample.tools), sample)
        for turn in sample.turns:
            if turn.role not in ROLES and not text:
                _fail(sample, f"it has a {turn.role} turn: chats of a text model have {', '.join(ROLES)}")
            self._check_turn(turn, sample)
        if not any(turn.trained for turn in sample.turns):
            _fail(sample, "it has nothing to learn: no assistant turn is trained")
        if text and self.tokenizer.eos_token_id is None:
            _fail(sample, f"it is plain text, and the tokenizer of {self.path} has no eos_token to end it: set one")
        if not text and self.tokenizer.chat_template is None:
            _fail(
                sample,
                f"it is a chat, and {self.path} has no chat template: add the chat_template.jinja that the model was "
                "trained with, or give plain 'text'",
            )

    def _check_turn(self, turn: Turn, sample: Sample) -> None:
        for part in turn.parts:
            if isinstance(part, Audio):
                _fail(sample, f"its {turn.role} turn has the clip {part.path}, and the model reads text only")
        content = _content(turn)
        self._check_forged(content, sample)
        for value in turn.fields.values():
            self._check_forged(_spelt(value), sample)
        if turn.trained and turn.role not in ("assistant", "text"):
            _fail(sample, f"its {turn.role} turn is trained: only assistant turns can be")
        if turn.trained and not content.strip() and CALLS not in turn.fields:
            _fail(sample, f"its trained {turn.role} turn says nothing: write it, or remove the sample")
        self.letters.check(content, sample)

    def _check_forged(self, text: str, sample: Sample) -> None:
        if (forged := self._forged.search(text)) is not None:
            _fail(sample, f"its text contains the control token {forged.group()}: take it out")

    def _text(self, sample: Sample) -> tuple[list[int], list[tuple[int, int]]]:
        text = _content(sample.turns[0])
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        self.letters.check_tokens(ids, text, sample)
        if ids[-1:] != [self.tokenizer.eos_token_id]:  # some tokenizers add it themselves
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids, [(0, len(ids))]

    def _chat(self, sample: Sample) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode up to the last trained turn: what follows it changes nothing."""
        trained = [index for index, turn in enumerate(sample.turns) if turn.trained]
        messages: Messages = [
            {"role": turn.role, "content": _content(turn), **turn.fields} for turn in sample.turns[: trained[-1] + 1]
        ]
        if trained[0] == 0:
            _fail(
                sample, "its first message is a trained assistant turn: nothing asks for it; put a user turn before it"
            )
        end_of_turn = self.end_of_turn  # first: a template that splits no chat at all is no fault of the sample's
        where = _where(sample)
        messages, whole = self._rendered(messages, where, sample.tools)
        left_out = unwritten(
            whole, messages, sample.tools, lambda other, tools: self._render(other, where, tools=tools)
        )
        if left_out is not None:
            _fail(
                sample,
                f"it has {left_out}, which the chat template of {self.path} does not write: use a template that does, "
                "or take it out",
            )
        self._check_words(sample, whole, messages)
        self.letters.check(whole, sample)  # also what tools and the template itself write
        ids = self._ids(whole)
        self.letters.check_tokens(ids, whole, sample)
        return ids, [self._span(messages, index, ids, end_of_turn, sample) for index in trained]

    def _span(
        self, messages: Messages, index: int, ids: list[int], end_of_turn: int, sample: Sample
    ) -> tuple[int, int]:
        """Return where the answer `messages[index]` begins in `ids`, and where its end-of-turn token ends."""
        prompt = self._ids(self._render(messages[:index], _where(sample), asks=True, tools=sample.tools))
        start = len(prompt)
        if ids[:start] != prompt or end_of_turn not in ids[start:]:
            self._cannot_split(sample, index, _parting(prompt, ids))
        end = ids.index(end_of_turn, start) + 1
        last = index == len(messages) - 1
        answered = ids if last else self._ids(self._render(messages[: index + 1], _where(sample), tools=sample.tools))
        if answered[:end] != ids[:end]:
            self._cannot_split(sample, index, _parting(answered, ids))
        return start, end

    def _cannot_split(self, sample: Sample, index: int, place: int) -> NoReturn:
        _fail(
            sample,
            f"the chat template of {self.path} cannot be split at messages[{index}]: the conversation up to there has "
            f"other tokens (from {place} on) than it has in the whole. Train the last assistant turn only, take blanks "
            "from the beginning of the answer, or use a template with {% if add_generation_prompt %} that keeps "
            "earlier turns as they were",
        )

    def _check_words(self, sample: Sample, whole: str, messages: Messages) -> None:
        """Refuse what a template drops. Assistant turns that are context are its own business: some drop reasoning."""
        said = "".join(whole.split())
        for index, (turn, message) in enumerate(zip(sample.turns, messages, strict=False)):
            if turn.role == "assistant" and not turn.trained:
                continue
            reasoning = [(key, message[key]) for key in REASONING if turn.trained and isinstance(message.get(key), str)]
            for key, words in (("content", message["content"]), *reasoning):
                # Llama 3's template writes the result of a tool as JSON text.
                quoted = json.dumps(words, ensure_ascii=False)[1:-1] if turn.role == "tool" else words
                if not any("".join(form.split()) in said for form in (words, quoted)):
                    _fail(
                        sample,
                        f"the chat template of {self.path} drops or changes the words of messages[{index}] "
                        f"({turn.role if key == 'content' else key}): write it as the template has it, or leave it out",
                    )

    def _rendered(self, messages: Messages, where: str, tools: Tools) -> tuple[Messages, str]:
        """Return messages as the template takes them, and what it makes of them."""
        try:
            return messages, self._render(messages, where, tools=tools)
        except UserError:
            texts = arguments_as_text(messages)
            if texts == messages:
                raise
            with suppress(UserError):  # of the two complaints the first one is about what the record means
                return texts, self._render(texts, where, tools=tools)
            raise

    def _render(self, messages: Messages, where: str, *, asks: bool = False, tools: Tools = ()) -> str:
        """Write messages as the template has them; `asks` adds the header of the answer that is to come."""
        try:
            options = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": asks}
            text: str = rendered(self.tokenizer, self.path, messages, **options)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return id and name of every special token: they give a conversation its shape, and no text may spell them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens))
    return {tokenizer.convert_tokens_to_ids(name): name for name in names}


def control_pattern(control: Mapping[int, str]) -> re.Pattern[str]:
    """Return a pattern that finds control tokens, the longest first; it finds nothing where there are none."""
    names = sorted(control.values(), key=lambda name: (-len(name), name))
    return re.compile("|".join(re.escape(name) for name in names if name) or r"(?!)")


def _spelt(value: Any) -> str:
    """Return a value of a message, or tools, as a template may write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _content(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts if isinstance(part, Text))


def _parting(first: Sequence[int], second: Sequence[int]) -> int:
    """The first position in which two sequences differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _runs(sample: Sample, spans: list[tuple[int, int]], length: int) -> tuple[tuple[str, int], ...]:
    """Split a sequence into answers and what stands between them, which belongs to the turns before each answer."""
    runs: list[tuple[str, int]] = []
    turns = iter(sample.turns)
    for start, end in spans:
        before = list(dict.fromkeys(turn.role for turn in takewhile(lambda turn: not turn.trained, turns)))
        role = sample.turns[0].role if len(sample.turns) == 1 else "assistant"
        runs += [("+".join(before), start)] * bool(start) + [(role, end)]
    return (*runs, *([("template", length)] if runs[-1][1] < length else []))


def _where(sample: Sample) -> str:
    return f"sample '{sample.id}' ({sample.source})"


def _fail(sample: Sample, message: str) -> NoReturn:
    raise UserError(f"{_where(sample)}: {message}")
