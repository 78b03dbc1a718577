"""The bundled speech is what the quickstart promises: four languages, 24 kHz mono, small, and well described."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from rawloop.demo import SPEECH

SPLITS = ("train", "eval")
Samples = list[dict[str, Any]]


def samples(split: str) -> Samples:
    found: Samples = json.loads((SPEECH / split / "metadata.json").read_text(encoding="utf-8"))["samples"]
    return found


def transcript(split: str, sample: dict[str, Any]) -> str:
    if "transcript_file" in sample:
        return Path(SPEECH / split / sample["transcript_file"]).read_text(encoding="utf-8").strip()
    return str(sample["transcript"])


def named_files(sample: dict[str, Any]) -> list[str]:
    records = [sample, *sample.get("ref_speakers", [])]
    return [record[key] for record in records for key in record if key.endswith("_file")]


def test_there_are_enough_sentences_voices_and_languages() -> None:
    train, held_out = samples("train"), samples("eval")
    assert len(train) >= 32
    assert len(held_out) >= 12
    for split in (train, held_out):
        assert {sample["language"] for sample in split} == {"en", "vi", "ar", "cmn"}
    assert len({sample["speaker_id"] for sample in train if "+" not in sample["speaker_id"]}) >= 8


def test_everything_together_is_under_two_megabytes() -> None:
    assert sum(path.stat().st_size for path in SPEECH.rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.parametrize("split", SPLITS)
def test_clips_are_flac_24_khz_mono_of_the_stated_duration(split: str) -> None:
    for sample in samples(split):
        info = soundfile.info(SPEECH / split / sample["audio_file"])
        assert (info.format, info.samplerate, info.channels) == ("FLAC", 24_000, 1)
        assert info.duration == pytest.approx(sample["duration"], abs=1e-3)
        assert 1.0 < info.duration < 4.0


@pytest.mark.parametrize("split", SPLITS)
def test_clips_are_loud_and_do_not_clip(split: str) -> None:
    for sample in samples(split):
        wave, _ = soundfile.read(SPEECH / split / sample["audio_file"], dtype="float32")
        assert 0.6 < abs(wave).max() < 0.8
        assert (wave**2).mean() ** 0.5 > 0.02


@pytest.mark.parametrize("split", SPLITS)
def test_files_exist_inside_the_split_and_none_is_left_over(split: str) -> None:
    folder = SPEECH / split
    named = {name for sample in samples(split) for name in named_files(sample)}
    assert all(Path(name).name == name for name in named)
    assert {path.name for path in folder.iterdir()} == named | {"metadata.json"}


@pytest.mark.parametrize("split", SPLITS)
def test_dataset_info_sums_the_samples_up(split: str) -> None:
    info = json.loads((SPEECH / split / "metadata.json").read_text(encoding="utf-8"))["dataset_info"]
    assert info["total_samples"] == len(samples(split))
    assert info["total_duration"] == pytest.approx(sum(sample["duration"] for sample in samples(split)))


def test_ids_and_transcripts_occur_once_over_both_splits() -> None:
    everything = [(split, sample) for split in SPLITS for sample in samples(split)]
    ids = [sample["id"] for _, sample in everything]
    texts = [transcript(split, sample) for split, sample in everything]
    assert all(texts)
    assert len(set(ids)) == len(ids)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", SPLITS)
def test_transcripts_come_both_inline_and_as_files(split: str) -> None:
    for sample in samples(split):
        assert ("transcript" in sample) != ("transcript_file" in sample)
    assert any("transcript" in sample for sample in samples(split))
    assert any("transcript_file" in sample for sample in samples(split))


@pytest.mark.parametrize("split", SPLITS)
def test_references_are_other_clips_of_the_same_speaker_with_their_words(split: str) -> None:
    by_file = {sample["audio_file"]: sample for sample in samples(split)}
    pairs = []
    for sample in samples(split):
        speakers = sample["speaker_id"].split("+")
        records = [sample] if "ref_audio_file" in sample else sample.get("ref_speakers", [])
        pairs += [(sample, record, speaker) for record, speaker in zip(records, speakers, strict=False)]
    assert pairs
    for sample, record, speaker in pairs:
        reference = by_file[record["ref_audio_file"]]
        assert reference is not sample
        assert reference["speaker_id"] == speaker
        assert transcript(split, reference) == record["ref_transcript"]


@pytest.mark.parametrize("split", SPLITS)
def test_all_four_tasks_occur_and_most_samples_have_one_speaker(split: str) -> None:
    shapes = [
        ("[SPEAKER1]" in transcript(split, sample), "ref_audio_file" in sample or "ref_speakers" in sample)
        for sample in samples(split)
    ]
    assert {(several, cloned) for several in (False, True) for cloned in (False, True)} == set(shapes)
    assert shapes.count((False, False)) >= len(shapes) / 2


def test_the_licence_note_is_there() -> None:
    text = (SPEECH / "LICENSE.md").read_text(encoding="utf-8")
    assert "Apache License 2.0" in text
    assert "espeak-ng" in text
