"""Data files that are something else are told what they are and what to do; keys that stand twice are refused."""

import gzip
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rawloop.data.digests import content_hash, shared
from rawloop.data.record import Record
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

CLIP = {"audio_file": "a.wav", "transcript": "Hi."}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.jsonl.gz", "is compressed: unpack it first"),
        ("train.csv", "is a table: write a line of JSON for each of its rows"),
        ("train.tsv", "is a table"),
        ("train.parquet", r"is a table of .*`Dataset.to_json\('train.jsonl'\)`"),
        ("train.txt", "is plain text"),
    ],
)
def test_a_file_of_another_kind(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("audio_file,transcript\na.wav,Hi.\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name} {message}"):
        read_samples(tmp_path / name)
    with pytest.raises(UserError, match=f"neither metadata.json nor a .jsonl file, but {name} {message}"):
        read_samples(tmp_path)


def test_a_compressed_file_under_a_plain_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(gzip.compress(json.dumps({"text": "T"}).encode()))
    with pytest.raises(UserError, match=r"train.jsonl is compressed: unpack it first"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "human", "value": "Q"}]}, "this is a ShareGPT record: call the list 'messages'"),
        ({"instruction": "Q", "input": "", "output": "A"}, "this is an Alpaca record: write instruction and input as"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "these are preferences: rawloop learns from one answer"),
        ({"prompt": "Q", "completion": "A"}, "write question and answer as the user and the assistant message"),
        ({"audio_filepath": "a.wav", "duration": 1.0}, "call the clip that is learnt 'audio_file'"),
        ({"path": "a.mp3", "sentence": "Hi.", "locale": "en"}, "call the clip that is learnt 'audio_file'"),
        ({"file_name": "a.wav", "transcription": "Hi."}, "call the clip that is learnt 'audio_file'"),
        ({"start": 0, "supervisions": [{"text": "Hi."}], "recording": {}}, "this is a cut of lhotse: write"),
        ({"speaker": "x"}, "this is no sample$"),
        ({"texts": "A document."}, r"this is no sample \(did you mean 'text'\?\)$"),
        ({"message": []}, r"this is no sample \(did you mean 'messages'\?\)$"),
    ],
)
def test_a_record_of_another_layout(record: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "T"}) + "\n" + json.dumps(record))
    with pytest.raises(UserError, match=f"line 2: none of 'messages', 'audio_file' and 'text' .*: {message}"):
        read_samples(tmp_path)
    (tmp_path / "x.jsonl").write_text(json.dumps(record, indent=1))
    with pytest.raises(UserError, match=f"x.jsonl has no 'samples' .*: {message}"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("x.jsonl", '{"text": "A"}\n{"id": "b", "text": "B", "text": "C"}', "x.jsonl line 2: the key 'text'"),
        ("x.jsonl", '{"id": "b", "text": "B", "text": "C"}', "x.jsonl line 1: the key 'text'"),
        ("x.jsonl", '{"messages": [{"role": "user", "role": "assistant"}]}', "x.jsonl line 1: the key 'role'"),
        ("metadata.json", '{"samples": [{"id": "b", "scene": "x", "scene": "y"}]}', "metadata.json: the key 'scene'"),
        ("metadata.json", '{"samples": [], "samples": []}', "metadata.json: the key 'samples'"),
    ],
)
def test_a_key_that_stands_twice_is_refused(name: str, text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{place} occurs twice in an object.*: take one of them out"):
        read_samples(tmp_path / name)


def test_arguments_of_a_call_with_a_key_twice(tmp_path: Path) -> None:
    call = {"function": {"name": "lamp", "arguments": '{"on": 1, "on": 0}'}}
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=r"messages\[1\]: 'arguments' of lamp is .*the key 'on' occurs twice"):
        read_samples(tmp_path)


def test_paths_that_differ_within_one_part(tmp_path: Path, tone: Callable[..., Path]) -> None:
    tone("a.wav"), tone("b.wav")
    part = {"type": "audio", "path": "a.wav", "url": "b.wav"}
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": [part]}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=r"in which 'path' is 'a.wav' and 'url' is 'b.wav', which should be the same"):
        read_samples(tmp_path)
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}).replace("b.wav", "a.wav"))
    assert len(read_samples(tmp_path)) == 1


@pytest.mark.parametrize(
    ("written", "there", "hint"),
    [
        ("é.wav", unicodedata.normalize("NFD", "é.wav"), "the same name exists in the Unicode form NFD"),
        (unicodedata.normalize("NFD", "é.wav"), "é.wav", "the same name exists in the Unicode form NFC"),
        ("wavs\\a.wav", "wavs/a.wav", r"write / for \\: that file exists"),
        ("wavs\\a.wav", "b.wav", r"write / for \\, which separates folders on Windows only"),
        ("A.WAV", "a.wav", "there is 'a.wav': mind upper and lower case"),
    ],
)
def test_a_missing_file_that_is_there_under_another_name(
    written: str, there: str, hint: str, tone: Callable[..., Path], metadata: Callable[..., Path]
) -> None:
    tone(there)
    with pytest.raises(UserError, match=rf"1 audio file is missing: .*samples\[0\].* \({hint}"):
        read_samples(metadata({**CLIP, "audio_file": written}))


def test_samples_of_both_sets_are_counted(tone: Callable[..., Path], metadata: Callable[..., Path]) -> None:
    tone("a.wav"), tone("b.wav", hertz=300)
    samples = read_samples(metadata(*({**CLIP, "audio_file": name, "id": name} for name in ("a.wav", "b.wav"))))
    others = read_samples(metadata({**CLIP, "id": "x"}, {**CLIP, "transcript": "Ho.", "id": "y"}))
    some, other, none = (np.array([*map(content_hash, given)], np.uint64) for given in (samples, others, []))
    assert (shared(some, some), shared(some, other), shared(none, other)) == (2, 1, 0)


def test_only_the_files_that_a_message_names_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []

    def name(record: Record) -> str:
        named.append(record.place)
        return record.place

    monkeypatch.setattr(Record, "__str__", name)
    samples = [{"audio_file": f"gone{i}.wav", "transcript": "Hi."} for i in range(20)]
    (tmp_path / "metadata.json").write_text(json.dumps({"samples": samples}))
    with pytest.raises(UserError, match=r"^20 audio files are missing: .*samples\[4\]; and 15 more\. Restore them"):
        read_samples(tmp_path)
    assert named == [f"samples[{i}]" for i in range(5)]
