"""Letters that a tokenizer loses are found, and nothing that it only writes in its own way is taken for lost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.samples import usable
from rawloop.errors import BadSample, UserError
from rawloop.families import ModelConfig, load_family
from rawloop.families.causal_lm import TextEncoder
from rawloop.families.sample_checks import Letters

LETTERS = "abcdefghijklmnopqrstuvwxyz ABC.\n"


def letters(tokenizer: Tokenizer, unknown: str | None = None) -> Letters:
    return Letters(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown), "models/tiny")


def alphabet(unknown: str | None = None, byte_fallback: bool = False, normalizer: Any = None) -> Letters:
    """A tokenizer with a token for each letter of `LETTERS`, and for each byte if asked to."""
    names = [*LETTERS, *([unknown] if unknown else [])]
    names += [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown, byte_fallback=byte_fallback))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return letters(tokenizer, unknown)


def bytes_of(known: int) -> Letters:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())[:known]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return letters(tokenizer)


def pieces(unknown: bool) -> Letters:
    """A tokenizer as SentencePiece makes them, with a blank before each word."""
    if unknown:
        tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((letter, -2.0) for letter in "▁abc")], unk_id=0))
    else:
        tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate("▁abc")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return letters(tokenizer, "<unk>" if unknown else None)


def words() -> Letters:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "<unk>": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return letters(tokenizer, "<unk>")


def word_pieces() -> Letters:
    vocabulary = {name: index for index, name in enumerate(["[UNK]", "he", "##llo", "h", "e", "l", "o"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return letters(tokenizer, "[UNK]")


STRIP = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])


@pytest.mark.parametrize(
    ("make", "text", "lost"),
    [
        (alphabet, "mai trà đá, ma\tmà", "àđá,"),
        (lambda: alphabet("<unk>"), "mai trà\tmai", "à\t"),
        (lambda: alphabet(normalizer=normalizers.NFD()), "trà", "à"),  # the letter is known, its accent is not
        (lambda: alphabet("<unk>", normalizer=STRIP), "trà đá", "đ"),
        (lambda: bytes_of(150), "abc trà 漢", "à漢"),
        (lambda: pieces(unknown=True), "a ể b", "ể"),
        (lambda: pieces(unknown=False), "a ể b", "ể"),
        (words, "hello wux", "wux"),
        (word_pieces, "hello x", "x"),
    ],
)
def test_letters_that_are_lost(make: Callable[[], Letters], text: str, lost: str) -> None:
    by = make()
    assert by.lost(text) == list(lost)
    assert by.lost(text) == list(lost), "asked again, of letters that are known by now"
    with pytest.raises(BadSample, match=r"^its text has letters that the tokenizer of models/tiny"):
        by.check(text)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (alphabet, "abc ABC.\n\t\u200b"),  # control and format characters are no letters
        (lambda: alphabet("<unk>", byte_fallback=True), "trà 漢 \U0001f600\t"),
        (lambda: alphabet("<unk>", normalizer=STRIP), "trà e\u0301"),
        (lambda: alphabet("<unk>", normalizer=normalizers.NFKC()), "ﬁ a\u00a0b"),
        (lambda: alphabet("<unk>", normalizer=normalizers.Lowercase()), "XYZ"),
        (lambda: bytes_of(256), "trà 漢 \U0001f600\u200d\n\t"),
        (lambda: pieces(unknown=True), "a b  c"),
        (lambda: pieces(unknown=False), "a\nb"),
        (words, "hello\nworld"),
        (word_pieces, "Hello  HÉLLO"),
    ],
)
def test_what_a_tokenizer_writes_in_its_own_way_is_not_lost(make: Callable[[], Letters], text: str) -> None:
    by = make()
    assert by.lost(text) == []
    by.check(text)


def test_the_message_names_the_letters_and_what_becomes_of_them() -> None:
    known = r"'à', U\+0301, 'đ', which"
    with pytest.raises(BadSample, match=f"{known} vanish: use a tokenizer that knows them"):
        alphabet().check("trà e\u0301đ")
    with pytest.raises(BadSample, match=f"{known} become <unk>: "):
        alphabet("<unk>").check("trà e\u0301đ")


def test_words_of_known_letters_that_become_unknown() -> None:
    by = word_pieces()
    ids = by.tokenizer("hello eho hello", add_special_tokens=False)["input_ids"]
    with pytest.raises(BadSample, match=r"^1 words of its text \('eho'\) become \[UNK\] in the tokenizer"):
        by.check_tokens(ids, "hello eho hello")
    by.check_tokens(ids[:1], "hello")


def chat(question: str, answer: str) -> Sample:
    turns = (Turn("user", (Text(question),)), Turn("assistant", (Text(answer),), trained=True))
    return Sample("s1", turns, source="x.jsonl line 3")


def test_text_models_refuse_such_samples(text_checkpoint: Path) -> None:
    tokenizer = alphabet().tokenizer
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<s>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    by = TextEncoder(AutoConfig.from_pretrained(text_checkpoint), tokenizer, "models/tiny")
    by.check(chat("a", "b"))
    for bad in (chat("à", "b"), chat("a", "à"), Sample("s1", (Turn("text", (Text("à"),), trained=True),))):
        with pytest.raises(
            BadSample, match=r"sample 's1' .*letters that the tokenizer of models/tiny does not know, 'à', which van"
        ):
            by.check(bad)
    found = usable([chat("a", "b"), bad, chat("à", "b")], by.check, skip=True)
    assert found[0] == [chat("a", "b")]
    assert next(iter(found[1].values())).endswith("or leave the sample out")
    with pytest.raises(UserError, match=r"2 of 3 samples cannot be used: .*'à', .*--data.on_bad_sample skip"):
        usable([chat("a", "b"), replace(bad, id="s2"), chat("à", "b")], by.check, skip=False)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.role }} ", "m.role }}_")
    with pytest.raises(BadSample, match="does not know, '_', which vanish"):
        by.check(chat("a", "b"))


def test_speech_models_refuse_such_transcripts(demo_checkpoint: Path) -> None:
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    turns = (Turn("user", (Text("Ngày mai trời mưa."),)), Turn("assistant", (Audio(Path("a.wav")),), trained=True))
    family.check(Sample("s1", turns))
    family.encoder.letters = alphabet()
    with pytest.raises(BadSample, match=r"sample 's1' .*'N', 'à', 'ờ', 'ư', which vanish"):
        family.check(Sample("s1", turns))
