"""Which format a data set has, paths that may and may not be followed, ids, and files that are no data set."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.contracts import Sample
from rawloop.data import DataConfig
from rawloop.data.samples import read_samples, usable
from rawloop.errors import BadSample, UserError

Write = Callable[..., Path]
Tone = Callable[..., Path]
CHAT = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}


def sample(**values: Any) -> dict[str, Any]:
    return {"audio_file": "a.wav", "transcript": "Hi.", **values}


@pytest.fixture(autouse=True)
def clip(tone: Tone) -> Path:
    return tone("a.wav")


def test_the_folder_or_its_file(metadata: Write) -> None:
    folder = metadata(sample())
    assert read_samples(folder) == read_samples(folder / "metadata.json") == read_samples(str(folder))


def test_a_folder_with_one_jsonl(jsonl: Write) -> None:
    assert len(read_samples(jsonl(CHAT, CHAT).parent)) == 2


@pytest.mark.parametrize("number", [1, 2])
def test_samples_as_jsonl(number: int, jsonl: Write) -> None:
    assert len(read_samples(jsonl(*[sample()] * number))) == number


def test_formats_are_told_apart_by_content(jsonl: Write, metadata: Write, tmp_path: Path) -> None:
    metadata(sample()).joinpath("metadata.json").rename(tmp_path / "odd.jsonl")
    jsonl(CHAT, CHAT, name="odd.json")
    assert read_samples(tmp_path / "odd.jsonl")[0].task == "single_speaker_smart_voice"
    assert len(read_samples(tmp_path / "odd.json")) == 2


def test_blank_lines_bom_and_crlf(tmp_path: Path) -> None:
    line = json.dumps(CHAT)
    (tmp_path / "x.jsonl").write_bytes(f"\ufeff\r\n{line}\r\n\r\n{line}\r\n".encode())
    assert [sample.source for sample in read_samples(tmp_path)] == ["x.jsonl line 2", "x.jsonl line 4"]


def test_line_separator_inside_a_string(jsonl: Write) -> None:
    chat = {"messages": [{"role": "user", "content": "a\u2028b"}, CHAT["messages"][1]]}
    assert len(read_samples(jsonl(chat, CHAT))) == 2


def test_unicode_names(tone: Tone, metadata: Write) -> None:
    path = tone("tiếng việt/عربي 中文.wav")
    samples = read_samples(metadata(sample(audio_file="tiếng việt/عربي 中文.wav", id="một")))
    assert samples[0].audio_paths() == [path.resolve()]


def test_names_that_are_not_utf8(tone: Tone, metadata: Write, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.wav")
    tone("b.wav").rename(tmp_path / odd)
    (tmp_path / "metadata.json").write_text(json.dumps({"samples": [sample(audio_file=odd)]}))
    assert read_samples(tmp_path)[0].audio_paths() == [tmp_path.resolve() / odd]


def test_name_with_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(sample(audio_file="\ud800/a.wav")))
    with pytest.raises(UserError, match=r"a character that no file name has"):
        read_samples(tmp_path)


def test_half_a_character(clip: Path, tmp_path: Path) -> None:
    text = "half \ud83d"
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}, CHAT["messages"][1]]}
    for record in (sample(transcript=text), chat, {"messages": [{"role": "user", "content": text}]}):
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        with pytest.raises(UserError, match=r"line 1: .* half a character \(a lone surrogate\) at 5"):
            read_samples(tmp_path)


def test_ids_that_nobody_gave(metadata: Write) -> None:
    samples = read_samples(metadata(sample(), sample(), sample(id=5)))
    assert [sample.id for sample in samples] == ["a.wav", "a.wav samples[1]", "5"]


@pytest.mark.parametrize("second", ["5", 5])
def test_duplicate_id(second: object, metadata: Write) -> None:
    with pytest.raises(UserError, match=r"samples\[2\] \(id .?5.?\) has the id of samples\[0\]"):
        read_samples(metadata(sample(id="5"), sample(), sample(audio_id=second)))


@pytest.mark.parametrize("value", [True, ["x"], 1.5])
def test_id_of_a_wrong_type(value: object, metadata: Write) -> None:
    with pytest.raises(UserError, match=r"'id' is .* it must be a string or a whole number"):
        read_samples(metadata(sample(id=value)))


def test_missing_files_are_counted(metadata: Write, tmp_path: Path) -> None:
    folder = metadata(*(sample(audio_file=f"gone{index}.wav") for index in range(7)), sample())
    with pytest.raises(UserError) as caught:
        read_samples(folder)
    message = str(caught.value)
    assert message.startswith("7 audio files are missing: 'gone0.wav' of ")
    assert f"'gone4.wav' of {tmp_path}/metadata.json samples[4]; and 2 more" in message
    assert "gone5" not in message


def test_files_need_not_be_checked(metadata: Write, tmp_path: Path) -> None:
    samples = read_samples(metadata(sample(audio_file="gone.wav")), check_files=False)
    assert samples[0].audio_paths() == [tmp_path.resolve() / "gone.wav"]


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    path = tmp_path_factory.mktemp("outside") / "out.wav"
    path.write_bytes(clip.read_bytes())
    return path


def escapes(folder: Path, outside: Path) -> dict[str, str]:
    (folder / "link.wav").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "chain.wav").symlink_to(folder / "link.wav")
    up = os.path.relpath(outside, folder)
    return {
        "absolute": str(outside),
        "dots": up,
        "deep dots": f"x/../{up}",
        "url": outside.as_uri(),
        "linked file": "link.wav",
        "linked folder": "linked/out.wav",
        "chain": "chain.wav",
    }


@pytest.mark.parametrize("way", ["absolute", "dots", "deep dots", "url", "linked file", "linked folder", "chain"])
def test_no_path_leaves_the_folder(way: str, metadata: Write, outside: Path, tmp_path: Path) -> None:
    value = escapes(tmp_path, outside)[way]
    folder = metadata(sample(audio_file=value))
    with pytest.raises(UserError, match=r"leaves the data folder .*--data.allow_outside true") as caught:
        read_samples(folder)
    assert value in str(caught.value)
    assert str(outside.resolve()) in str(caught.value)
    allowed = read_samples(folder, DataConfig(allow_outside=True))
    assert allowed[0].audio_paths() == [outside.resolve()]


def test_a_sibling_with_the_same_beginning_is_outside(metadata: Write, clip: Path, tmp_path: Path) -> None:
    sibling = tmp_path.with_name(tmp_path.name + "2")
    sibling.mkdir()
    (sibling / "a.wav").write_bytes(clip.read_bytes())
    with pytest.raises(UserError, match=r"leaves the data folder"):
        read_samples(metadata(sample(audio_file=f"../{sibling.name}/a.wav")))


def test_links_inside_the_folder_are_resolved(metadata: Write, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "link.wav").symlink_to(clip)
    samples = read_samples(metadata(sample(audio_file="link.wav"), sample(audio_file="./x/../a.wav")))
    assert [sample.audio_paths() for sample in samples] == [[clip.resolve()], [clip.resolve()]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (".", r"'\.' is a folder"),
        ("sub", "'sub' is a folder"),
        ("sub/", "'sub/' is a folder"),
        ("a.wav/b.wav", "1 audio file is missing"),
        ("broken.wav", "1 audio file is missing"),
        ("loop.wav", "'loop.wav' is a link that leads to itself"),
        ("a\0b.wav", "a character that no file name has"),
        ("x" * 300 + ".wav", "cannot be looked up: File name too long"),
    ],
)
def test_paths_that_are_no_files(value: str, message: str, metadata: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "broken.wav").symlink_to("nowhere.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    with pytest.raises(UserError, match=message):
        read_samples(metadata(sample(audio_file=value)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [], "info": 1}', r"has no 'samples' \(it has the keys data, info\)"),
        ("{}", r"has no 'samples' \(it has {} \(dict\)\)"),
        ("5", "has no 'samples'"),
        ('{"samples": []}', "has no samples: a data set needs at least one"),
        ("[]", "has no samples: a data set needs at least one"),
        ('{"samples": {"a": 1}}', r"'samples' is .* it must be a list"),
        ('{"samples": ["a"]}', r"samples\[0\] is 'a' \(str\): it must be an object"),
        ('{"samples": [{"path": "a.wav"}]}', r"samples\[0\]: none of 'messages', 'audio_file' and 'text' .*keys path"),
        ("", "is empty"),
        (" \n", "is empty"),
        ('{"samples": [\n{"audio_file": }]}', r"line 2: not JSON \(Expecting value, column 16\)"),
        ('{"samples": [', "line 1: not JSON"),
    ],
)
def test_bad_metadata(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_samples(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "metadata.json"))


@pytest.mark.parametrize("broken", [1, 3])
def test_broken_line(broken: int, tmp_path: Path) -> None:
    lines = [json.dumps(CHAT)] * 3
    lines[broken - 1] = lines[0][:-3]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"x.jsonl line {broken}: not JSON"):
        read_samples(tmp_path)


def test_line_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(CHAT) + "\n[1]\n")
    with pytest.raises(UserError, match=r"x.jsonl line 2 is \[1\] \(list\): it must be an object"):
        read_samples(tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json.dumps(CHAT).encode() + b'\n{"messages": "\xe9"}')
    with pytest.raises(UserError, match=r"x.jsonl line 2 is not UTF-8"):
        read_samples(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone does not exist: give a folder with metadata.json"):
        read_samples(tmp_path / "gone")


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither metadata.json nor a .jsonl file"):
        read_samples(tmp_path)


def test_folder_with_several_jsonl(jsonl: Write) -> None:
    jsonl(CHAT, name="b.jsonl")
    with pytest.raises(UserError, match=r"several .jsonl files \(b.jsonl, train.jsonl\): name one of them"):
        read_samples(jsonl(CHAT).parent)


def test_samples_that_may_be_left_out_are_named_all_at_once(jsonl: Write) -> None:
    samples = read_samples(jsonl(*[{"id": f"s{number}", **CHAT} for number in range(9)]))

    def check(sample: Sample) -> None:
        if sample.id not in ("s0", "s4"):
            raise BadSample(f"sample '{sample.id}' is too long")

    with pytest.raises(UserError) as caught:
        usable(samples, check, skip=False)
    assert str(caught.value) == (
        "7 of 9 samples cannot be used: sample 's1' is too long; sample 's2' is too long; sample 's3' is too long; "
        "sample 's5' is too long; sample 's6' is too long; and 2 more. Or leave them out: --data.on_bad_sample skip"
    )
    kept, left_out = usable(samples, check, skip=True)
    assert [sample.id for sample in kept] == ["s0", "s4"]
    assert list(left_out) == ["s1", "s2", "s3", "s5", "s6", "s7", "s8"]


def test_other_mistakes_are_never_left_out(jsonl: Write) -> None:
    def check(sample: Sample) -> None:
        raise UserError("its template is missing")

    with pytest.raises(UserError, match=r"^its template is missing$"):
        usable(read_samples(jsonl(CHAT)), check, skip=True)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "9" * 5000])
def test_a_depth_or_a_number_that_no_data_has(name: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(f'{{"text": "a", "x": {value}}}\n{{"text": "b"}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl?( line 1)?: a number in it is too long, or its nesting too deep"):
        read_samples(file)
    file.write_text(value if value[0] == "[" else f'{{"samples": {value}}}')
    with pytest.raises(UserError, match=r"a\.jsonl?( line 1)?: a number in it is too long, or its nesting too deep"):
        read_samples(file)


@pytest.mark.parametrize("name", ["two\nlines.flac", "a" * 5000])
def test_a_path_of_any_kind_is_told_on_one_short_line(tmp_path: Path, name: str) -> None:
    record = {"audio_file": name, "transcript": "Hello."}
    (tmp_path / "metadata.json").write_text(json.dumps({"samples": [{"id": name, **record}]}))
    with pytest.raises(UserError) as caught:
        read_samples(tmp_path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert len(said) < 1500
