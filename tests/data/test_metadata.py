"""The layout of train-higgs-audio: four tasks, scenes, speakers, and every way in which a sample can be wrong."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data import DataConfig
from rawloop.data.metadata import scene_sentence
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

Tone = Callable[..., Path]
Write = Callable[..., Path]
SCENE = Turn("scene", (Text("Audio is recorded from a quiet room."),))
DIALOGUE = "[SPEAKER0] Good morning.\n[SPEAKER1] Is it?"


def one(folder: Path, **options: Any) -> Sample:
    samples = read_samples(folder, DataConfig(**options))
    assert len(samples) == 1
    return samples[0]


def spoken(path: Path) -> Turn:
    return Turn("assistant", (Audio(path),), trained=True)


@pytest.fixture
def clip(tone: Tone) -> Path:
    return tone("a.wav").resolve()


@pytest.fixture
def reference(tone: Tone) -> Path:
    return tone("ref.wav", hertz=330).resolve()


def test_single_speaker(clip: Path, metadata: Write) -> None:
    sample = one(metadata({"audio_file": "a.wav", "transcript": " Hello. ", "language": "en", "mood": [1]}))
    assert sample.turns == (SCENE, Turn("user", (Text("Hello."),)), spoken(clip))
    assert sample.task == "single_speaker_smart_voice"
    assert sample.id == "a.wav"
    assert sample.source == "metadata.json samples[0]"
    assert sample.extra == {"language": "en", "mood": [1]}


def test_transcript_file(clip: Path, metadata: Write, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffXin chào các bạn.\n", encoding="utf-8")
    sample = one(metadata({"audio_file": "a.wav", "transcript_file": "a.txt", "id": 7}))
    assert sample.turns[1].parts == (Text("Xin chào các bạn."),)
    assert sample.id == "7"


def test_text_is_another_name_for_transcript(clip: Path, metadata: Write) -> None:
    assert one(metadata({"audio_file": "a.wav", "text": "Hi.", "transcript": None})).turns[1].parts == (Text("Hi."),)


def test_voice_cloning(clip: Path, reference: Path, metadata: Write) -> None:
    sample = one(
        metadata({"audio_file": "a.wav", "text": "Hi.", "ref_audio_file": "ref.wav", "ref_transcript": "Words."})
    )
    assert sample.task == "zero_shot_voice_cloning"
    assert sample.turns == (
        SCENE,
        Turn("user", (Text("Words."),)),
        Turn("assistant", (Audio(reference),), trained=False),
        Turn("user", (Text("Hi."),)),
        spoken(clip),
    )
    assert sample.audio_paths() == [reference, clip]


def test_multi_speaker(clip: Path, metadata: Write) -> None:
    sample = one(
        metadata({"audio_file": "a.wav", "text": DIALOGUE, "speakers": {"SPEAKER0": "feminine", "[SPEAKER1]": "old"}})
    )
    assert sample.task == "multi_speaker_smart_voice"
    assert sample.turns[0].parts == (*SCENE.parts, Text("SPEAKER0: feminine"), Text("SPEAKER1: old"))
    assert sample.turns[1:] == (Turn("user", (Text(DIALOGUE),)), spoken(clip))


def test_no_speaker_is_made_up(clip: Path, metadata: Write) -> None:
    assert one(metadata({"audio_file": "a.wav", "text": DIALOGUE})).turns[0] == SCENE


@pytest.fixture
def dialogue(clip: Path, reference: Path, tone: Tone, metadata: Write) -> Path:
    tone("other.wav", hertz=110)
    references = [
        {"speaker_tag": "[SPEAKER0]", "ref_audio_file": "ref.wav", "ref_transcript": "One."},
        {"speaker_tag": "SPEAKER1", "ref_audio_file": "other.wav", "ref_transcript": "[SPEAKER1] Two."},
    ]
    return metadata({"audio_file": "a.wav", "text": DIALOGUE, "ref_speakers": references, "speakers": {}})


def test_multi_speaker_cloning(dialogue: Path, clip: Path, reference: Path) -> None:
    sample = one(dialogue)
    assert sample.task == "multi_speaker_voice_cloning"
    assert sample.turns == (
        SCENE,
        Turn("user", (Text("[SPEAKER0] One."),)),
        Turn("assistant", (Audio(reference),)),
        Turn("user", (Text("[SPEAKER1] Two."),)),
        Turn("assistant", (Audio(clip.with_name("other.wav")),)),
        Turn("user", (Text(DIALOGUE),)),
        spoken(clip),
    )


def test_references_in_the_scene(dialogue: Path, clip: Path, reference: Path) -> None:
    sample = one(dialogue, refs_in_scene=True)
    other = clip.with_name("other.wav")
    parts = (*SCENE.parts, Text("SPEAKER0:"), Audio(reference), Text("SPEAKER1:"), Audio(other))
    assert sample.turns == (Turn("scene", parts), Turn("user", (Text(DIALOGUE),)), spoken(clip))


def test_task_of_the_config_wins(dialogue: Path) -> None:
    sample = one(dialogue, task="single_speaker_smart_voice")
    assert sample.task == "single_speaker_smart_voice"
    assert len(sample.audio_paths()) == 1


@pytest.mark.parametrize(
    ("scene", "sentence"),
    [
        ("quiet_room", "Audio is recorded from a quiet room."),
        ("noisy_street", "Audio is recorded from noisy street."),
        ("a_moving_car", "Audio is recorded from a moving car."),
        ("outdoors", "Audio is recorded from outdoors."),
        ("A phone call on a bad line.", "A phone call on a bad line."),
    ],
)
def test_scene(scene: str, sentence: str, clip: Path, metadata: Write) -> None:
    assert scene_sentence(scene) == sentence
    assert one(metadata({"audio_file": "a.wav", "text": "Hi.", "scene": scene})).turns[0].parts == (Text(sentence),)


def test_each_sample_has_its_own_scene(clip: Path, metadata: Write) -> None:
    scenes = ["quiet_room", "a_hall", None, "quiet_room"]
    samples = read_samples(metadata(*({"audio_file": "a.wav", "text": "Hi.", "scene": scene} for scene in scenes)))
    assert [sample.turns[0].parts[0] for sample in samples] == [
        Text("Audio is recorded from a quiet room."),
        Text("Audio is recorded from a hall."),
        Text("Audio is recorded from a quiet room."),
        Text("Audio is recorded from a quiet room."),
    ]


@pytest.mark.parametrize("scene", [None, ""])
def test_no_scene(scene: str | None, clip: Path, metadata: Write) -> None:
    folder = metadata({"audio_file": "a.wav", "text": "Hi.", "scene": scene})
    assert one(folder, default_scene=None).turns[0].role == "user"
    assert one(folder, default_scene="In a hall.").turns[0].parts == (Text("In a hall."),)


BASE = {"audio_file": "a.wav", "text": "Hi."}
REF = {"speaker_tag": "[SPEAKER0]", "ref_audio_file": "ref.wav", "ref_transcript": "One."}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"audio_file": "", "text": "Hi."}, "'audio_file' is missing or empty"),
        ({"audio_file": 3, "text": "Hi."}, r"'audio_file' is 3 \(int\): it must be a string"),
        ({"audio_file": "a.wav"}, "the transcript is missing or empty"),
        ({"audio_file": "a.wav", "text": " \n"}, "the transcript is missing or empty"),
        ({"audio_file": "a.wav", "transcript": ["Hi."]}, r"'transcript' is \['Hi.'\] \(list\)"),
        ({"audio_file": "a.wav", "transcript_file": "no.txt"}, "transcript_file 'no.txt' cannot be read: No such file"),
        ({"audio_file": "a.wav", "transcript_file": "empty.txt"}, "transcript_file 'empty.txt' is empty"),
        ({"audio_file": "a.wav", "transcript_file": "latin.txt"}, r"'latin.txt' is not UTF-8 \(byte 1\)"),
        ({"audio_file": "a.wav", "transcript_file": "../x.txt"}, "'../x.txt' leaves the data folder"),
        ({**BASE, "id": "é", "ref_audio_file": "ref.wav"}, r"\(id 'é'\): 'ref_transcript' is missing or empty"),
        ({**BASE, "ref_transcript": "One."}, "'ref_transcript' is given without 'ref_audio_file'"),
        ({**BASE, "task": "zero_shot_voice_cloning"}, "'ref_audio_file' is missing or empty"),
        ({**BASE, "task": "multi_speaker_smart_voice"}, r"two or more \[SPEAKERn\] tags: 'Hi.'"),
        ({**BASE, "task_type": "multi_speaker_voice_cloning"}, "needs 'ref_speakers', a list of references: got None"),
        ({**BASE, "task": "zero_shot_cloning"}, r"no task \(did you mean 'zero_shot_voice_cloning'\?\)"),
        ({**BASE, "ref_speakers": ["x"]}, r"ref_speakers\[0\] is 'x' \(str\): it must be an object"),
        ({**BASE, "ref_speakers": {"a": 1}}, "needs 'ref_speakers', a list of references"),
        ({**BASE, "ref_speakers": [REF, REF]}, r"ref_speakers\[1\]: 'speaker_tag' is \[SPEAKER0\] a second time"),
        ({**BASE, "ref_speakers": [{**REF, "speaker_tag": "anna"}]}, "'speaker_tag' has 'anna' .* SPEAKER0"),
        ({**BASE, "ref_speakers": [{**REF, "ref_transcript": ""}]}, r"ref_speakers\[0\]: 'ref_transcript' is missing"),
        (
            {**BASE, "text": DIALOGUE, "ref_speakers": [REF]},
            r"speaks as \[SPEAKER1\], which 'ref_speakers' has no",
        ),
        ({**BASE, "speakers": ["feminine"]}, "'speakers' is .* it must be an object"),
        ({**BASE, "speakers": {"SPEAKER0": 5}}, r"describes SPEAKER0 as 5 \(int\)"),
        ({**BASE, "speakers": {"anna": "feminine"}}, "'speakers' has 'anna'"),
        ({**BASE, "scene": 5}, r"'scene' is 5 \(int\)"),
    ],
)
def test_bad_sample(
    sample: dict[str, Any], message: str, clip: Path, reference: Path, metadata: Write, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        read_samples(metadata(sample))
    assert str(caught.value).startswith(f"{tmp_path / 'metadata.json'} samples[0]")
    assert "\n" not in str(caught.value)


def test_unknown_task_in_the_config(clip: Path, metadata: Write) -> None:
    with pytest.raises(UserError, match=r"data.task is 'single', which is no task"):
        read_samples(metadata(BASE), DataConfig(task="single"))


def test_a_pipe_in_the_place_of_a_transcript_is_not_waited_for(metadata: Callable[..., Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    folder = metadata({"audio_file": "a.wav", "transcript_file": "a.txt"})
    with pytest.raises(UserError, match=r"transcript_file 'a.txt' cannot be read: Not a regular file"):
        read_samples(folder)
    (folder / "metadata.json").unlink()
    os.mkfifo(folder / "train.jsonl")
    with pytest.raises(UserError, match=r"train.jsonl cannot be read: Not a regular file"):
        read_samples(folder)
