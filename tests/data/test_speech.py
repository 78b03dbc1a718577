"""Speech samples as train-higgs-audio and its like write them: they are read as they are, or with one option."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data import DataConfig
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

Write = Callable[..., Path]
SYSTEM = "Generate audio following instruction."
ROOM = "Audio is recorded from a quiet room."
WRITTEN = f"{SYSTEM}\n\n<|scene_desc_start|>\n{ROOM}\n<|scene_desc_end|>"
SCENE = Turn("scene", (Text(ROOM),))
ABOUT = {  # as its tools write it into every sample
    "duration": 0.4,
    "speaker_id": "my_speaker",
    "speaker_name": "My",
    "emotion": "neutral",
    "language": "vi",
    "gender": "unknown",
    "quality_score": 1.0,
    "original_audio_path": "raw/x.wav",
    "user_instruction": "<audio> /translate",
    "task_type": "audio_generation",
}


@pytest.fixture(autouse=True)
def clip(tone: Callable[..., Path]) -> Path:
    return tone("a.wav").resolve()


@pytest.fixture
def voice(tone: Callable[..., Path]) -> Path:
    return tone("voice.wav", hertz=330).resolve()


def spoken(clip: Path) -> tuple[Turn, ...]:
    return Turn("user", (Text("Hello."),)), Turn("assistant", (Audio(clip),), trained=True)


def one(path: Path, lines: list[str] | None = None, **options: Any) -> Sample:
    (sample,) = read_samples(path, DataConfig(**options), notice=None if lines is None else lines.append)
    return sample


def told(clip: Path) -> dict[str, Any]:
    return {"role": "assistant", "content": {"type": "audio", "audio_url": str(clip), "raw_audio": None, "row_id": 1}}


@pytest.mark.parametrize("scene", ["unknown", "quiet_room", "Unknown", None])
def test_the_metadata_that_its_tools_write(scene: str | None, metadata: Write, clip: Path) -> None:
    lines: list[str] = []
    (clip.parent / "a.txt").write_text("Hello.")
    sample = one(metadata({"audio_file": "a.wav", "transcript_file": "a.txt", "scene": scene, **ABOUT}), lines)
    assert (sample.task, sample.turns) == ("single_speaker_smart_voice", (SCENE, *spoken(clip)))
    assert lines == []


def test_a_transcript_that_begins_with_the_mark_of_its_clip(metadata: Write, clip: Path) -> None:
    lines: list[str] = []
    (clip.parent / "a.txt").write_text("<audio>Hello.")
    folder = metadata({"audio_file": "a.wav", "transcript_file": "a.txt", **ABOUT})
    assert one(folder, lines).turns == (SCENE, *spoken(clip))
    assert lines == [
        f"{folder}/metadata.json: 1 transcripts start with <audio>, the marker of a clip, which is left out"
    ]
    (clip.parent / "a.txt").write_text("<audio>")
    with pytest.raises(UserError, match=r"the transcript '<audio>' .* has the marker <audio> among or without words"):
        one(folder)


def test_a_task_that_is_none_is_named_as_it_is_written(metadata: Write) -> None:
    folder = metadata({"audio_file": "a.wav", "transcript": "Hi.", "task_type": "speech_translation"})
    with pytest.raises(
        UserError, match=r"'task_type' is 'speech_translation', which is no task.*--data.task must name"
    ):
        one(folder)
    assert one(folder, task="single_speaker_smart_voice").task == "single_speaker_smart_voice"


def test_a_task_without_references_and_a_reference_contradict_each_other(metadata: Write) -> None:
    sample = {"audio_file": "a.wav", "transcript": "Hi.", "ref_audio_file": "a.wav", "ref_transcript": "Ho."}
    with pytest.raises(UserError, match="'task' is 'single_speaker_smart_voice', which takes no reference clip"):
        one(metadata({**sample, "task": "single_speaker_smart_voice"}))


def test_a_reference_without_words_stands_in_the_scene(metadata: Write, clip: Path, voice: Path) -> None:
    folder = metadata({"audio_file": "a.wav", "transcript": "Hello.", "ref_audio_file": "voice.wav", **ABOUT})
    with pytest.raises(UserError, match=r"'ref_transcript' is missing or empty: .* --data.refs_in_scene true"):
        one(folder)
    scene = Turn("scene", (Text(ROOM), Text("SPEAKER0:"), Audio(voice)))
    assert one(folder, refs_in_scene=True).turns == (scene, *spoken(clip))


@pytest.mark.parametrize("system", [WRITTEN, SYSTEM, None])
def test_a_reference_clip_in_the_user_turn_goes_into_the_scene(
    system: str | None, jsonl: Write, clip: Path, voice: Path
) -> None:
    ask = {"role": "user", "content": [{"type": "audio", "audio_url": "voice.wav", "offset": None}, "Hello."]}
    before = [] if system is None else [{"role": "system", "content": system}]
    path = jsonl({"messages": [*before, ask, told(clip)], "start_index": None, "misc": None, "speaker": "x"})
    assert one(path).turns[-2] == Turn("user", (Audio(voice), Text("Hello.")))  # kept: a model that hears may take it
    scene = Turn("scene", (Text(ROOM), Text("SPEAKER0:"), Audio(voice)))
    turns = one(path, refs_in_scene=True).turns
    assert turns == ((Turn("system", (Text(SYSTEM),)),) if before else ()) + (scene, *spoken(clip))


def test_voices_are_numbered_on_from_those_that_the_scene_has(jsonl: Write, clip: Path, voice: Path) -> None:
    scene = {"role": "scene", "content": ["SPEAKER0:", {"type": "audio", "path": "a.wav"}]}
    ask = {"role": "user", "content": [{"type": "audio", "path": "voice.wav"}, {"type": "text", "text": "Hello."}]}
    turns = one(jsonl({"messages": [scene, ask, told(clip)]}), refs_in_scene=True).turns
    assert turns[0].parts == (Text("SPEAKER0:"), Audio(clip), Text("SPEAKER1:"), Audio(voice))


def test_a_reference_clip_in_a_written_scene(jsonl: Write, clip: Path, voice: Path) -> None:
    begin, end = WRITTEN.split("\n<|scene_desc_end|>")
    parts = [f"{begin}\n\nSPEAKER0: ", {"type": "audio", "audio_url": "voice.wav"}, f"{end}\n<|scene_desc_end|>"]
    path = jsonl(
        {"messages": [{"role": "system", "content": parts}, {"role": "user", "content": "Hello."}, told(clip)]}
    )
    scene = Turn("scene", (Text(ROOM), Text("SPEAKER0:"), Audio(voice)))
    assert one(path).turns == (Turn("system", (Text(SYSTEM),)), scene, *spoken(clip))


def test_a_written_scene_with_the_character_zero_stays_as_it_is(jsonl: Write, clip: Path, voice: Path) -> None:
    begin, end = WRITTEN.split("\n<|scene_desc_end|>")
    parts = [f"{begin}\0", {"type": "audio", "audio_url": "voice.wav"}, f"{end}\n<|scene_desc_end|>"]
    path = jsonl(
        {"messages": [{"role": "system", "content": parts}, {"role": "user", "content": "Hello."}, told(clip)]}
    )
    assert one(path).turns[0].clips == [Audio(voice)]


def test_a_recognition_sample_is_turned_round_when_asked_to(jsonl: Write, clip: Path) -> None:
    ask, answer = {"role": "user", "content": "<audio> /translate"}, {"role": "assistant", "content": "Hello."}
    path = jsonl({"messages": [ask, answer], "audios": ["a.wav"]})
    assert [turn.role for turn in one(path).turns] == ["user", "assistant"]
    assert one(path).turns[1].parts == (Text("Hello."),)
    assert one(path, task="single_speaker_smart_voice").turns == (SCENE, *spoken(clip))


def test_what_has_no_words_or_other_turns_stays_as_it_is(jsonl: Write, clip: Path) -> None:
    ask = {"role": "user", "content": "Say it."}
    alone = one(
        jsonl({"messages": [{"role": "assistant", "content": "<audio>"}], "audios": ["a.wav"]}), default_scene=None
    )
    assert alone.turns == (Turn("assistant", (Audio(clip),), trained=True),)
    answer = {"role": "assistant", "content": "<audio>Hi."}
    asked = one(jsonl({"messages": [ask, answer], "audios": ["a.wav"]}), default_scene=None)
    assert asked.turns[1].parts == (Audio(clip), Text("Hi."))
