"""The checks that families make of every sample once, before training, so that a step need not repeat them.

Samples stay in memory after the check, so `example` may rely on it. Files that are read again are digested.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers.utils import chat_template_utils

from rawloop.contracts import Audio, Batch, Sample, Text, Turn
from rawloop.errors import BadSample, UserError
from rawloop.families.chat_template import CALLS

SILENT = ("Cc", "Cf")  # control and format characters, which many tokenizers drop by design
LATER = timedelta(days=400, hours=13, minutes=37, seconds=11)  # another year, month, weekday, day and hour
LEAVE = "or leave the sample out"


def check_conversation(sample: Sample, roles: Iterable[str], *, hears: bool) -> None:
    """Refuse turns that a model which answers in text cannot take. If it `hears`, user turns may have clips."""
    for index, turn in enumerate(sample.turns):
        if turn.role not in roles:
            raise UserError(f"it has a {turn.role} turn: turns of this model are {', '.join(roles)}; take it out")
        clip = next((part.path for part in turn.parts if isinstance(part, Audio)), None)
        if clip and not hears:
            raise UserError(f"its {turn.role} turn has the clip {clip}, and the model reads text only")
        if clip and turn.role != "user":
            raise UserError(
                f"it has audio in a {turn.role} turn: this model hears audio and answers in text, so clips belong into "
                "user turns"
            )
        if turn.trained:
            _check_trained(turn, index)
    if not any(turn.trained for turn in sample.turns):
        raise UserError("it has nothing to learn: no assistant turn is trained")


def _check_trained(turn: Turn, index: int) -> None:
    if turn.role not in ("assistant", "text"):
        raise UserError(f"its {turn.role} turn is trained: only assistant turns can be")
    if turn.role == "assistant" and index == 0:
        raise UserError("its first message is a trained assistant turn: nothing asks for it; put a user turn before it")
    if not turn.words.strip() and CALLS not in turn.fields:
        raise UserError(f"its trained {turn.role} turn says nothing: write it, or remove the sample")


def check_no_tools(sample: Sample) -> None:
    """Refuse tools, calls and thoughts, for a family that has no place for them."""
    named = ["tools"] if sample.tools else []
    named += ["a tool turn" for turn in sample.turns if turn.role == "tool"]
    named += [key for turn in sample.turns for key in turn.fields if key not in ("name", "tool_call_id")]
    if named:
        raise UserError(
            f"it has {named[0]}, for which this family of models has no place: take it out, or train a text model "
            "(model.family causal_lm)"
        )


def control_pattern(names: Iterable[str | None]) -> re.Pattern[str]:
    """Return a pattern that finds control tokens by their names, the longest first. It finds nothing without names."""
    ordered = sorted({name for name in names if name}, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def check_length(positions: int, limit: int | None) -> None:
    """Refuse a sample that takes more positions than the model has."""
    if limit is not None and positions > limit:
        raise BadSample(
            f"it takes {positions} positions, the model has {limit}: shorten its text, clips or references, {LEAVE}"
        )


def check_control(turn: Turn, control: re.Pattern[str], *more: str) -> None:
    """Refuse a turn whose texts, or `more`, spell a control token, which would forge the conversation's shape.

    Chat templates put parts one behind the other, some without the blanks around each.
    """
    texts = [part.text for part in turn.parts if isinstance(part, Text)]
    for text in (*texts, "".join(texts), "".join(text.strip() for text in texts), *more):
        if found := control.search(text):
            raise BadSample(f"its text contains the control token {found.group()}: take it out")


class Letters:
    """Finds letters that a tokenizer does not have: they vanish from a text, or become the unknown token.

    A model that is trained on such a text learns to leave them out, or to say `<unk>`. The tokenizer is asked once for
    each letter. Changes by the tokenizer's own normaliser (case, accents, compatibility forms, blanks) are no loss.
    """

    def __init__(self, tokenizer: Any, path: str) -> None:
        self.tokenizer, self.path = tokenizer, path
        self._fine: set[str] = set()
        self._suspect: set[str] = set()

    def check(self, text: str) -> None:
        """Refuse a text with letters that the tokenizer loses."""
        if lost := self.lost(text):
            named = ", ".join(_shown(letter) for letter in lost[:10]) + (" and more" if len(lost) > 10 else "")
            fate = f"become {self.tokenizer.unk_token}" if self._unknown(lost[0]) else "vanish"
            raise BadSample(
                f"its text has letters that the tokenizer of {self.path} does not know, {named}, which {fate}: use a "
                f"tokenizer that knows them, write them otherwise, {LEAVE}"
            )

    def check_tokens(self, ids: list[int], text: str) -> None:
        """Refuse a text with words of known letters that have become the unknown token."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in ids or self.tokenizer.unk_token in text:
            return
        ids = self._ids(text)  # a tokenizer that puts BOS before each text may use that for unknown words, too (OPT)
        if unknown not in ids:
            return
        named = ""
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            places = zip(found["input_ids"], found["offset_mapping"], strict=True)
            words = [text[start:end] for token, (start, end) in places if token == unknown]
            named = f" ({', '.join(repr(word[:40]) for word in words[:5])})"
        raise BadSample(
            f"{ids.count(unknown)} words of its text{named} become {self.tokenizer.unk_token} in the tokenizer of "
            f"{self.path}: write them otherwise, {LEAVE}"
        )

    def lost(self, text: str) -> list[str]:
        """Return the letters of a text that its tokens lack, in order of appearance."""
        if self._fine.issuperset(text):
            return []
        letters = dict.fromkeys(text)
        for letter in letters.keys() - self._fine - self._suspect:
            (self._suspect if self._is_suspect(letter) else self._fine).add(letter)
        suspects = [letter for letter in letters if letter in self._suspect]
        if not suspects:
            return []
        # A tokenizer may know a whole word and none of its letters, so the whole text decides.
        ids = [token for token in self._ids(text) if token != self.tokenizer.unk_token_id]
        told, meant = self._told(ids), self._normal(text)
        forms = {letter: self._normal(letter) for letter in suspects}
        return [letter for letter, form in forms.items() if told.count(form) < meant.count(form)]

    def _is_suspect(self, letter: str) -> bool:
        """Whether a letter alone is lost, or a part of it."""
        if self._unknown(letter):
            return True
        wanted = "".join(self._normal(letter).split())
        if not wanted or unicodedata.category(letter) in SILENT:
            return False
        return not set(wanted) <= set(self._told(self._ids(letter)))

    def _unknown(self, letter: str) -> bool:
        return self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in self._ids(letter)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _told(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self._normal(text)

    def _normal(self, text: str) -> str:
        """Return a text as the tokenizer sees it. One without a normaliser that can be asked gives the text itself."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _shown(letter: str) -> str:
    """Return a letter in quotes, or its number if it cannot be seen alone."""
    visible = letter.isprintable() and not letter.isspace() and not unicodedata.combining(letter)
    return f"'{letter}'" if visible else f"U+{ord(letter):04X}"


def check_repeatable(make: Callable[[], Batch]) -> None:
    """Make a batch twice, the second time at another time of day and date, and refuse what differs."""
    first = make()
    one = _tensors(first)
    with _later():
        two = _tensors(make())
    if one.keys() != two.keys() or not all(t.shape == two[n].shape and torch.equal(t, two[n]) for n, t in one.items()):
        raise UserError(
            f"the samples {', '.join(first.ids)} become other numbers each time they are made: the chat template or "
            "the family reads the clock, or draws at random in a way that no seed reaches; stop the clock of templates "
            "with rawloop.families.chat_template.stop_clock, and draw from a global generator of torch, Python or numpy"
        )


@contextmanager
def _later() -> Iterator[None]:
    """While this is open, chat templates are told another time; the process's own time goes on as it does."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + LATER

    before = chat_template_utils.datetime
    chat_template_utils.datetime = Later
    try:
        yield
    finally:
        chat_template_utils.datetime = before


def _tensors(batch: Batch) -> dict[str, Tensor]:
    labels = ((f"{stream} {i}", t) for stream, pair in batch.labels.items() for i, t in enumerate(pair))
    return dict(chain(((f"input {name}", tensor) for name, tensor in batch.inputs.items()), labels))
