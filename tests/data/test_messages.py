"""Chat messages: HF content lists, boson's samples and ms-swift's markers, and which turns are trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

Write = Callable[..., Path]
ASK: dict[str, Any] = {"role": "user", "content": "Say it."}
TOLD: dict[str, Any] = {"role": "assistant", "content": [{"type": "audio", "path": "a.wav"}]}


@pytest.fixture(autouse=True)
def clip(tone: Callable[..., Path]) -> Path:
    tone("b c.wav", hertz=330)
    return tone("a.wav").resolve()


def one(path: Path) -> Sample:
    samples = read_samples(path)
    assert len(samples) == 1
    return samples[0]


def trained(sample: Sample) -> list[bool]:
    """Which turns of the conversation are trained; a scene before it is not counted."""
    return [turn.trained for turn in sample.turns if turn.role != "scene"]


SCENE = Turn("scene", (Text("Audio is recorded from a quiet room."),))


def test_chat(jsonl: Write, clip: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    scene = {"role": "scene", "content": [{"type": "text", "text": "In a hall."}]}
    sample = one(jsonl({"id": "x", "messages": [system, scene, ASK, TOLD], "mood": "calm"}))
    assert sample.turns == (
        Turn("system", (Text("Be kind."),)),
        Turn("scene", (Text("In a hall."),)),
        Turn("user", (Text("Say it."),)),
        Turn("assistant", (Audio(clip),), trained=True),
    )
    assert (sample.id, sample.task, sample.extra) == ("x", None, {"mood": "calm"})
    assert sample.source == "train.jsonl line 1"


@pytest.mark.parametrize("key", ["path", "audio", "url", "audio_url"])
def test_names_of_an_audio_path(key: str, jsonl: Write, clip: Path) -> None:
    told = {"role": "assistant", "content": {"type": "audio", key: clip.as_uri()}}
    assert one(jsonl({"messages": [ASK, told]})).audio_paths() == [clip]


def test_file_url_with_a_space(jsonl: Write, clip: Path) -> None:
    told = {"role": "assistant", "content": [{"type": "audio", "url": clip.with_name("b c.wav").as_uri()}]}
    assert one(jsonl({"messages": [ASK, told]})).audio_paths() == [clip.with_name("b c.wav")]


def test_swift(jsonl: Write, clip: Path) -> None:
    ask = {"role": "user", "content": "First <audio> then\n<audio>"}
    sample = one(jsonl({"messages": [ask, {"role": "assistant", "content": "Two."}], "audios": ["a.wav", "b c.wav"]}))
    parts = (Text("First "), Audio(clip), Text(" then\n"), Audio(clip.with_name("b c.wav")))
    assert sample.turns == (Turn("user", parts), Turn("assistant", (Text("Two."),), trained=True))


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Be kind."}]])
def test_an_answer_of_a_clip_and_its_words_is_asked_for_by_the_words(
    before: list[dict[str, Any]], jsonl: Write, clip: Path
) -> None:
    told = {"role": "assistant", "content": "<audio> Hello. "}
    sample = one(jsonl({"messages": [*before, told], "audios": "a.wav"}))
    first = Turn("system", (Text("Be kind."),)) if before else SCENE
    assert sample.turns == (first, Turn("user", (Text("Hello."),)), Turn("assistant", (Audio(clip),), trained=True))


def test_json_list(tmp_path: Path, jsonl: Write) -> None:
    line = jsonl({"messages": [ASK, TOLD]}).read_text()
    path = tmp_path / "chat.json"
    path.write_text(f"[{line},\n{line}]")
    samples = read_samples(path)
    assert [sample.id for sample in samples] == ["chat.json record[0]", "chat.json record[1]"]


def test_last_assistant_turn_is_trained(jsonl: Write) -> None:
    assert trained(one(jsonl({"messages": [ASK, TOLD, ASK, TOLD, ASK]}))) == [False, False, False, True, False]


def test_all_assistant_turns_are_trained_if_asked_for(jsonl: Write) -> None:
    messages = [ASK, TOLD, ASK, {**TOLD, "loss": False}, ASK, TOLD]
    path, config = jsonl({"messages": messages}), DataConfig(train_turns="all")
    assert [trained(sample) for sample in read_samples(path, config)] == [[False, True, False, False, False, True]]
    path = jsonl({"messages": messages, "start_index": 4})
    assert [trained(sample) for sample in read_samples(path, config)] == [[False] * 5 + [True]]


def test_the_same_clip_has_the_same_prompt_in_all_formats(tmp_path: Path, clip: Path) -> None:
    records: list[dict[str, Any]] = [
        {"audio_file": "a.wav", "transcript": "Hello."},
        {"messages": [{"role": "user", "content": "Hello."}, TOLD]},
        {"messages": [{"role": "assistant", "content": "<audio>Hello."}], "audios": ["a.wav"]},
        {"messages": [{"role": "user", "content": "Write: <audio>"}, {"role": "assistant", "content": "Hello."}],
         "audios": ["a.wav"]},
    ]  # fmt: skip
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"id": n, **record}) + "\n" for n, record in enumerate(records)))
    for scene in ("Audio is recorded from a quiet room.", None):
        config = DataConfig(task="single_speaker_smart_voice", default_scene=scene)
        first, *others = [sample.turns for sample in read_samples(path, config)]
        assert first[-1].clips == [Audio(clip)]
        assert [turn.role for turn in first] == [*(["scene"] if scene else []), "user", "assistant"]
        assert all(turns == first for turns in others)
    heard = {"messages": [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "Hello."}]}
    path.write_text(json.dumps({**heard, "audios": ["a.wav"]}) + "\n")
    assert [turn.role for turn in read_samples(path)[0].turns] == ["user", "assistant"]  # no voice is asked for


def test_start_index(jsonl: Write) -> None:
    messages = [ASK, TOLD, ASK, TOLD, ASK, TOLD]
    assert trained(one(jsonl({"messages": messages, "start_index": 3}))) == [False, False, False, True, False, True]


def test_loss_overrides(jsonl: Write) -> None:
    messages = [{**ASK, "loss": False}, {**TOLD, "loss": True}, ASK, {**TOLD, "loss": False}, ASK, TOLD]
    assert trained(one(jsonl({"messages": messages}))) == [False, True, False, False, False, True]


def test_empty_system_turn_is_kept(jsonl: Write) -> None:
    assert one(jsonl({"messages": [{"role": "system", "content": ""}, ASK, TOLD]})).turns[0] == Turn("system", ())


def told(**part: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", "content": [part]}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, r"'messages' is \[\] \(list\): it must be a list of messages"),
        ({"messages": "hello"}, r"'messages' is 'hello' \(str\)"),
        ({"messages": ["hello"]}, r"messages\[0\] is 'hello' \(str\): it must be an object"),
        ({"messages": [{"role": "assistent", "content": "x"}]}, r"did you mean 'assistant'\?.*system, scene, user"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has role None"),
        ({"messages": [{**ASK, "content": ""}, TOLD]}, r"messages\[0\] \(user\) has empty content"),
        ({"messages": [{**ASK, "content": None}, TOLD]}, r"messages\[0\] has content None"),
        ({"messages": [{**ASK, "content": []}, TOLD]}, r"messages\[0\] has content \[\]"),
        ({"messages": [ASK]}, "no turn is trained"),
        ({"messages": [ASK, {**TOLD, "loss": False}]}, "no turn is trained"),
        ({"messages": [ASK, TOLD], "start_index": 2}, "no turn is trained"),
        ({"messages": [ASK, TOLD], "start_index": "1"}, r"'start_index' is '1' \(str\)"),
        ({"messages": [{**ASK, "loss": True}, TOLD]}, "only assistant turns can be"),
        ({"messages": [ASK, {**TOLD, "loss": 0.5}]}, r"messages\[1\]: 'loss' is 0.5 \(float\): it must be true"),
        ({"messages": [ASK, TOLD], "audios": ["a.wav"]}, r"0 <audio> marker\(s\) for 1 file\(s\)"),
        ({"messages": [{**ASK, "content": "<audio>"}, TOLD]}, r"1 <audio> marker\(s\) for 0 file\(s\)"),
        ({"messages": [ASK, TOLD], "audios": [1]}, r"'audios' is \[1\] \(list\): it must be a list of paths"),
        (told(type="image", path="x.png"), r"messages\[1\] has the part .*parts are"),
        (told(type="text", text=5), r"messages\[1\] has the part"),
        (told(type="audio"), "an audio part without a path"),
        (told(type="audio", path=5), "an audio part without a path"),
        (told(type="audio", url="https://x.org/a.wav"), "'https://x.org/a.wav' is a remote file: download it first"),
        (told(type="audio", url="s3://bucket/a.wav"), "is a remote file: download it first"),
        (told(type="audio", url="file://server/a.wav"), "is on another machine"),
        (told(type="audio", url="data:audio/wav;base64,AAAA"), "audio inside the data file"),
        (told(type="audio", url="gone.wav"), r"1 audio file is missing: 'gone.wav' of .*line 1"),
        (told(type="audio", path="/etc/hostname"), "leaves the data folder .*--data.allow_outside true"),
    ],
)
def test_bad_record(record: dict[str, Any], message: str, jsonl: Write) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_samples(jsonl(record))
    assert "train.jsonl line 1" in str(caught.value)
    assert "\n" not in str(caught.value)
