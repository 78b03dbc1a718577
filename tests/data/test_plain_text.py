"""Plain text records: one trained turn, kept letter by letter, beside the other formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.contracts import Sample, Text, Turn
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

Write = Callable[..., Path]
CHAT = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}


def test_text_is_one_trained_turn_and_kept_as_it_is(jsonl: Write) -> None:
    text = "  def f():\n\treturn '<audio>'\n"
    (sample,) = read_samples(jsonl({"id": 7, "text": text, "language": "en"}))
    turns = (Turn("text", (Text(text),), trained=True),)
    assert sample == Sample("7", turns, None, "train.jsonl line 1", {"language": "en"})


def test_one_file_may_hold_text_chats_and_clips(jsonl: Write, tone: Callable[..., Path]) -> None:
    tone("a.wav")
    clip = {"audio_file": "a.wav", "text": "The words of a clip."}
    samples = read_samples(jsonl({"text": "One."}, CHAT, clip, {**CHAT, "text": "not read"}))
    assert [sample.turns[0].role for sample in samples] == ["text", "user", "scene", "user"]
    assert samples[3].extra == {"text": "not read"}


def test_a_metadata_json_with_a_text_about_itself_is_still_one(tone: Callable[..., Path], tmp_path: Path) -> None:
    tone("a.wav")
    content = {"text": "About this data.", "samples": [{"audio_file": "a.wav", "transcript": "Hi."}]}
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    assert [sample.task for sample in read_samples(tmp_path)] == ["single_speaker_smart_voice"]


@pytest.mark.parametrize("text", ["", " \n\t", None, 5, ["a"], {"a": 1}])
def test_a_text_with_nothing_in_it_is_refused(text: Any, jsonl: Write) -> None:
    with pytest.raises(UserError, match=r"train.jsonl line 2: 'text' is .* it must be a string with something in it"):
        read_samples(jsonl({"text": "One."}, {"text": text}))


@pytest.mark.parametrize(
    "record",
    [
        {"text": "half \ud83d"},
        {**CHAT, "tools": [{"name": "\ud83d"}]},
        {"messages": [CHAT["messages"][0], {**CHAT["messages"][1], "reasoning_content": "\ud83d"}]},
    ],
)
def test_half_a_character(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"line 1: .* half a character \(a lone surrogate\) at \d+"):
        read_samples(tmp_path)
