"""Letters that a tokenizer does not have: they vanish from a text, or become a token that stands for anything unknown.

Trained, a model learns to leave them out, or to say `<unk>`. Which letters these are is asked of the tokenizer once for
each; a text without any costs one pass over it. What the tokenizer's own normaliser does (case, accents, compatibility
forms, blanks) is no loss.
"""

import unicodedata
from typing import Any

from rawloop.contracts import Sample
from rawloop.errors import BadSample

SILENT = ("Cc", "Cf")  # control and format characters, which many tokenizers drop by design


class Letters:
    """What a tokenizer makes of single letters.

    Args:
        tokenizer: of a checkpoint.
        path: the checkpoint, for messages.
    """

    def __init__(self, tokenizer: Any, path: str) -> None:
        self.tokenizer, self.path = tokenizer, path
        self._fine: set[str] = set()
        self._suspect: set[str] = set()

    def check(self, text: str, sample: Sample) -> None:
        """Refuse a text with letters that the tokenizer loses.

        Raises:
            BadSample: it has such letters; they are named.
        """
        if lost := self.lost(text):
            named = ", ".join(_shown(letter) for letter in lost[:10]) + (" and more" if len(lost) > 10 else "")
            fate = f"become {self.tokenizer.unk_token}" if self._unknown(lost[0]) else "vanish"
            raise BadSample(
                f"sample '{sample.id}' ({sample.source}): its text has letters that the tokenizer of {self.path} does "
                f"not know, {named}, which {fate}: use a tokenizer that knows them, write them otherwise, or leave the "
                "sample out"
            )

    def check_tokens(self, ids: list[int], text: str, sample: Sample) -> None:
        """Refuse a text of whose words, though their letters are known, some have become the unknown token.

        Raises:
            BadSample: it has such words; the first ones are named.
        """
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
            f"sample '{sample.id}' ({sample.source}): {ids.count(unknown)} words of its text{named} become "
            f"{self.tokenizer.unk_token} in the tokenizer of {self.path}: write them otherwise, or leave the sample out"
        )

    def lost(self, text: str) -> list[str]:
        """Return the letters of a text that its tokens do not tell, in order of appearance."""
        if self._fine.issuperset(text):
            return []
        letters = dict.fromkeys(text)
        for letter in letters.keys() - self._fine - self._suspect:
            (self._suspect if self._is_suspect(letter) else self._fine).add(letter)
        suspects = [letter for letter in letters if letter in self._suspect]
        return self._missing(text, suspects) if suspects else []

    def _missing(self, text: str, suspects: list[str]) -> list[str]:
        """Return those that are missing in the whole text, too: a tokenizer may know a word and none of its letters."""
        unknown = self.tokenizer.unk_token_id
        ids = [token for token in self._ids(text) if token != unknown]
        told, meant = self._normal(self._told(ids)), self._normal(text)
        forms = {letter: self._normal(letter) for letter in suspects}
        return [letter for letter, form in forms.items() if told.count(form) < meant.count(form)]

    def _is_suspect(self, letter: str) -> bool:
        """Whether a letter alone is lost, or a part of it."""
        if self._unknown(letter):
            return True
        wanted = "".join(self._normal(letter).split())
        if not wanted or unicodedata.category(letter) in SILENT:
            return False
        return not set(wanted) <= set(self._normal(self._told(self._ids(letter))))

    def _unknown(self, letter: str) -> bool:
        return self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in self._ids(letter)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _told(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _normal(self, text: str) -> str:
        """Return a text as the tokenizer sees it. One without a normaliser that can be asked gives the text itself."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = getattr(backend, "normalizer", None)
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _shown(letter: str) -> str:
    """Return a letter in quotes, or its number if it cannot be seen alone."""
    visible = letter.isprintable() and not letter.isspace() and not unicodedata.combining(letter)
    return f"'{letter}'" if visible else f"U+{ord(letter):04X}"
