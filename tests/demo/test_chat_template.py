"""The chat template writes the prompt format of Higgs Audio v2, to the letter."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer, HiggsAudioV2Processor

CLIP = {"type": "audio", "audio": "any.flac"}
BEGIN = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"


def turn(role: str, *items: str | dict[str, str]) -> dict[str, Any]:
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return {"role": role, "content": content}


def said(text: str) -> str:
    return f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint / "model")
    tokenizer.chat_template = (demo_checkpoint / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def render(tokenizer: Any, *turns: dict[str, Any], prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))


def test_single_speaker(tokenizer: Any) -> None:
    turns = [
        turn("system", " Generate audio following instruction. "),
        turn("scene", "Audio is recorded from a quiet room."),
        turn("user", " Good morning. "),
        turn("assistant", CLIP),
    ]
    assert render(tokenizer, *turns) == (
        BEGIN + "Generate audio following instruction.\n\n"
        "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|><|eot_id|>"
        + said("Good morning.")
        + ANSWER
    )


def test_voice_cloning(tokenizer: Any) -> None:
    turns = [turn("system", "S"), turn("user", "before"), turn("assistant", CLIP), turn("user", "now")]
    expected = BEGIN + "S<|eot_id|>" + said("before") + ANSWER + said("now")
    assert render(tokenizer, *turns) == expected
    prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
    assert render(tokenizer, *turns, prompt=True) == expected + prompt


def test_several_speakers(tokenizer: Any) -> None:
    turns = [
        turn("system", "S"),
        turn("scene", "A quiet room.", "SPEAKER0: feminine", "SPEAKER1: masculine"),
        turn("user", "[SPEAKER0] Hello.\n[SPEAKER1] Hi."),
        turn("assistant", CLIP),
    ]
    scene = "\n\n<|scene_desc_start|>\nA quiet room.\n\nSPEAKER0: feminine\nSPEAKER1: masculine\n<|scene_desc_end|>"
    assert (
        render(tokenizer, *turns)
        == BEGIN + "S" + scene + "<|eot_id|>" + said("[SPEAKER0] Hello.\n[SPEAKER1] Hi.") + ANSWER
    )


def test_several_cloned_speakers_in_the_scene(tokenizer: Any) -> None:
    scene = turn("scene", "A quiet room.", "SPEAKER0:", CLIP, "SPEAKER1:", CLIP)
    clip = " <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>"
    assert render(tokenizer, turn("system", "S"), scene, turn("user", "[SPEAKER0] Hello.")) == (
        BEGIN + "S\n\n<|scene_desc_start|>\nA quiet room.\n\n"
        f"SPEAKER0:{clip}\nSPEAKER1:{clip}\n<|scene_desc_end|><|eot_id|>" + said("[SPEAKER0] Hello.")
    )


def test_a_scene_that_begins_with_a_speaker_keeps_the_blank_line(tokenizer: Any) -> None:
    text = render(tokenizer, turn("system", "S"), turn("scene", "SPEAKER0:", CLIP))
    assert "<|scene_desc_start|>\nSPEAKER0:\n\n <|audio_out_bos|>" in text


def test_plain_strings_are_taken_as_content(tokenizer: Any) -> None:
    turns = [{"role": role, "content": f" {role} text "} for role in ("system", "scene", "user")]
    scene = "\n\n<|scene_desc_start|>\nscene text\n<|scene_desc_end|><|eot_id|>"
    assert render(tokenizer, *turns) == BEGIN + "system text" + scene + said("user text")


def test_text_items_of_a_user_are_joined_and_its_audio_is_left_out(tokenizer: Any) -> None:
    assert render(tokenizer, turn("system", "S"), turn("user", "a ", CLIP, " b")).endswith(said("ab"))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([turn("user", "Hello.")], "begin with a system message"),
        ([turn("system", CLIP)], "system message must be a string"),
        ([turn("system", "S"), turn("assistant", "text")], "one audio item and nothing else"),
        ([turn("system", "S"), turn("assistant", CLIP, "text")], "one audio item and nothing else"),
        ([turn("system", "S"), {"role": "assistant", "content": "text"}], "one audio item and nothing else"),
    ],
)
def test_what_the_model_has_no_format_for_is_refused(tokenizer: Any, turns: list[Any], message: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=message):
        render(tokenizer, *turns)


def test_the_processor_carries_the_same_template(demo_checkpoint: Path, tokenizer: Any) -> None:
    assert HiggsAudioV2Processor.from_pretrained(demo_checkpoint / "model").chat_template == tokenizer.chat_template
