"""The checks that families make once for every sample, before training, so that a step need not repeat them."""

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

from rawloop.contracts import Batch, Sample, Text, Turn
from rawloop.errors import BadSample, UserError, first_few
from rawloop.families.chat_template import CALLS
from rawloop.families.unknown import TRAINED, WRITE

SILENT = ("Cc", "Cf")  # Unicode categories of control and format characters, which many tokenizers drop by design
LATER = timedelta(days=400, hours=13, minutes=37, seconds=11)  # another year, month, weekday, day and hour


def check_conversation(sample: Sample, roles: Iterable[str], *, deaf: str = "") -> None:
    """Refuse turns that do not fit a model with text answers.

    User turns may have clips, unless the model is deaf: `deaf` is its type.
    """
    for index, turn in enumerate(sample.turns):
        if turn.role not in roles:
            raise UserError(f"it has a {turn.role} turn: turns of this model are {', '.join(roles)}; take it out")
        if turn.clips and deaf:
            raise UserError(
                f"its {turn.role} turn has the clip {turn.clips[0].path}, and models of type '{deaf}' are trained on "
                f"text alone. {TRAINED}; {WRITE}"
            )
        if turn.clips and turn.role != "user":
            raise UserError(
                f"it has audio in a {turn.role} turn: this model hears audio and answers in text, so clips belong in "
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
    """Refuse tools, tool calls and reasoning, for a family without a place for them."""
    named = ["tools"] if sample.tools else []
    named += ["a tool turn" for turn in sample.turns if turn.role == "tool"]
    named += [key for turn in sample.turns for key in turn.fields if key not in ("name", "tool_call_id")]
    if named:
        raise UserError(
            f"it has {named[0]}, for which this family of models has no place: take it out, or train a text model "
            "(model.family causal_lm)"
        )


def control_pattern(names: Iterable[str | None]) -> re.Pattern[str]:
    """Return a pattern that finds control tokens by name, the longest first. Without names it matches nothing."""
    ordered = sorted({name for name in names if name}, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def check_control(turn: Turn, control: re.Pattern[str], *more: str) -> None:
    """Refuse a turn whose texts, or `more`, contain a control token, which would start or end a turn.

    Chat templates concatenate the parts of a turn, some of them without the blanks around each part.
    """
    texts = [part.text for part in turn.parts if isinstance(part, Text)]
    for text in (*texts, "".join(texts), "".join(text.strip() for text in texts), *more):
        if found := control.search(text):
            raise BadSample(f"its text contains the control token {found.group()}: take it out")


class Letters:
    """Finds letters that a tokenizer does not have: they vanish from a text, or become the unknown token.

    A model trained on such a text learns to leave them out, or to say `<unk>`. Each letter is tokenized once. Changes
    by the tokenizer's normalizer (case, accents, compatibility forms, blanks) are allowed.
    """

    def __init__(self, tokenizer: Any, path: str) -> None:
        self.tokenizer, self.path = tokenizer, path
        self._fine: set[str] = set()
        self._suspect: set[str] = set()

    def check(self, text: str) -> None:
        """Refuse a text with letters that the tokenizer loses."""
        if lost := self.lost(text):
            fate = f"become {self.tokenizer.unk_token}" if self._unknown(lost[0]) else "vanish"
            raise BadSample(
                f"its text has letters that the tokenizer of {self.path} does not know, "
                f"{first_few(map(_visible, lost), most=10)}, which {fate}: use a tokenizer that knows them, write them "
                "otherwise, or leave the sample out"
            )

    def check_tokens(self, ids: list[int], text: str) -> None:
        """Refuse a text with words of known letters that became the unknown token."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in ids or self.tokenizer.unk_token in text:
            return
        ids = self._ids(text)  # without BOS, which is also the unknown token in some tokenizers (OPT)
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
            f"{self.path}: write them otherwise, or leave the sample out"
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
        # A tokenizer may know a whole word but none of its letters, so the whole text decides.
        ids = [token for token in self._ids(text) if token != self.tokenizer.unk_token_id]
        decoded, normal = self._decoded(ids), self._normal(text)
        forms = {letter: self._normal(letter) for letter in suspects}
        return [letter for letter, form in forms.items() if decoded.count(form) < normal.count(form)]

    def _is_suspect(self, letter: str) -> bool:
        """Whether the tokenizer loses a letter, or a part of it, when it is alone."""
        if self._unknown(letter):
            return True
        wanted = "".join(self._normal(letter).split())
        if not wanted or unicodedata.category(letter) in SILENT:
            return False
        return not set(wanted) <= set(self._decoded(self._ids(letter)))

    def _unknown(self, letter: str) -> bool:
        return self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in self._ids(letter)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self._normal(text)

    def _normal(self, text: str) -> str:
        """Return the output of the tokenizer's normalizer, or the text itself if there is none."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _visible(letter: str) -> str:
    """Return a letter in quotes, or its code point if it is invisible alone."""
    visible = letter.isprintable() and not letter.isspace() and not unicodedata.combining(letter)
    return f"'{letter}'" if visible else f"U+{ord(letter):04X}"


def check_repeatable(make: Callable[[], Batch]) -> None:
    """Make a batch twice, the second time with another date and time for chat templates. Refuse differences."""
    first = make()
    one = _tensors(first)
    with _later():
        two = _tensors(make())
    if one.keys() != two.keys() or not all(t.shape == two[n].shape and torch.equal(t, two[n]) for n, t in one.items()):
        raise UserError(
            f"the samples {', '.join(first.ids)} become other numbers each time they are made: the chat template or "
            "the family reads the clock, or draws from a generator that rawloop does not seed; fix the time of "
            "templates with rawloop.families.chat_template.stop_clock, and draw from the global generator of torch, "
            "Python or numpy"
        )


@contextmanager
def _later() -> Iterator[None]:
    """Give chat templates another time. The time of the process is unchanged."""

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
