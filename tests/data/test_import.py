"""Foreign layouts: what is read from each, what is left out and why, and what is written."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.data import DataConfig
from rawloop.data.foreign import importing
from rawloop.data.foreign.config import ImportConfig
from rawloop.data.foreign.importing import Imported, import_data
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

Tone = Callable[..., Path]
NASTY = 'She said: "no\\n", then \u202bשלום\u202c 🙂 | and\u2028more'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def wavs(tone: Tone) -> Callable[..., None]:
    """Give `wavs(*names)`, which writes a short clip for each name into the source."""

    def write(*names: str) -> None:
        for name in names:
            tone(f"source/{name}", seconds=0.1)

    return write


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., Imported]:
    """Give `take(source, eval=0, ...)`, which imports into `tmp_path / "out"`."""

    def run(source: Path, **options: Any) -> Imported:
        return import_data(ImportConfig(str(source), str(tmp_path / "out"), **{"eval": 0.0, **options}))

    return run


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def left_out(done: Imported) -> dict[str, list[str]]:
    return done.gathered.reasons()


def write_lines(file: Path, *rows: object) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


def test_a_folder_with_words_beside_the_clips(
    source: Path, wavs: Callable[..., None], take: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)  # a relative path is named
    wavs("ann/a.wav", "ann/b.wav", "bob/c.wav", "bob/d.wav", "bob/e.wav", "bob/f.wav", "bob/.hidden.wav")
    (source / "ann" / "a.txt").write_text(f"\ufeff{NASTY}\n", encoding="utf-8")
    (source / "ann" / "b.lab").write_text("Words.", encoding="utf-8")
    (source / "bob" / "c.txt").write_text(" \n", encoding="utf-8")
    (source / "bob" / "d.txt").write_bytes(b"caf\xe9")
    (source / "bob" / "e.txt").write_text("One.", encoding="utf-8")
    (source / "bob" / "e.lab").write_text("Two.", encoding="utf-8")
    (source / "README.txt").write_text("About.", encoding="utf-8")
    done = take(Path("source"))
    assert [(r["id"], r["transcript"], r["speaker_id"]) for r in lines(done.output / "train.jsonl")] == [
        ("ann/a.wav", NASTY, "ann"),
        ("ann/b.wav", "Words.", "ann"),
    ]
    assert left_out(done) == {
        "empty transcript": ["bob/c.wav"],
        "words are not UTF-8": ["bob/d.wav (d.txt, byte 3)"],
        "two transcripts": ["bob/e.wav (its .txt and its .lab differ)"],
        "no words beside it": ["bob/f.wav (f.txt or f.lab)"],
        "words without audio": ["README.txt"],
    }


def test_ljspeech(source: Path, wavs: Callable[..., None], take: Any) -> None:
    wavs("wavs/a.wav", "wavs/b.wav", "wavs/c.wav", "../outside.wav")
    (source / "wavs" / "empty.wav").touch()
    rows = ['a|He said "12|twelve', "b|raw words|", "c|w|x|y", "a|again", "d|gone", "../../outside|w", "empty|w", "c|"]
    done = take(write_lines(source / "metadata.csv", *rows).parent)
    texts = [(r["id"], r["transcript"]) for r in lines(done.output / "train.jsonl")]
    assert texts == [("a", "twelve"), ("b", "raw words")]
    assert left_out(done) == {
        "broken line": [
            "metadata.csv line 3 (it has 4 columns: an id, the words, and maybe the normalized words)",
        ],
        "an id that occurs twice": ["metadata.csv line 4 ('a', like metadata.csv line 1)"],
        "audio is missing": ["metadata.csv line 5 (wavs/d.wav: No such file or directory)"],
        "audio outside the folder": [
            f"metadata.csv line 6 (wavs/../../outside.wav is not in {source}: name the audio's folder with --root)"
        ],
        "audio is an empty file": ["metadata.csv line 7 (wavs/empty.wav)"],
        "empty transcript": ["metadata.csv line 8"],
    }
    report = json.loads((done.output / "import.json").read_text(encoding="utf-8"))
    assert report["left_out"] == dict.fromkeys(left_out(done), 1)
    assert len(report["left_out_entries"]) == 6


def test_common_voice(source: Path, wavs: Callable[..., None], take: Any) -> None:
    wavs(*(f"clips/{n}.mp3.wav" for n in range(6)))
    rows = [f"spk{n % 3}\t{n}.mp3.wav\t{NASTY if n else 'Hi.'}\t2\ten" for n in range(6)]
    head = "client_id\tpath\tsentence\tup_votes\tlocale"
    table = write_lines(source / "validated.tsv", head, *rows, "spk0\tx.mp3", "spk0\t\tw\t0\ten", "s\t0.mp3\t\t0\ten")
    write_lines(source / "reported.tsv", "sentence\treason", "w\tbad")
    done = take(source, eval=0.2)
    train, held = lines(done.output / "train.jsonl"), lines(done.output / "eval.jsonl")
    assert (len(train), len(held)) == (4, 2)
    assert len({r["speaker_id"] for r in held}) == 1
    assert not {r["speaker_id"] for r in held} & {r["speaker_id"] for r in train}
    assert train[0]["language"] == "en"
    assert set(left_out(done)) == {"broken line", "no audio named", "empty transcript"}
    write_lines(source / "train.tsv", head, rows[0])
    with pytest.raises(UserError, match=r"can be read in 2 ways \(train.tsv, validated.tsv\): name the file"):
        take(source, force=True)
    assert len(take(table, force=True).gathered.items) == 6


def test_nemo(source: Path, wavs: Callable[..., None], take: Any) -> None:
    wavs("a.wav", "b.wav")
    manifest = write_lines(
        source / "manifest.json",
        {"audio_filepath": "a.wav", "text": NASTY, "duration": 0.1, "speaker": 7},
        {"audio_filepath": str(source / "b.wav"), "text": "One.", "duration": 0.04, "offset": 0.0, "lang": "en"},
        {"audio_filepath": "b.wav", "text": "Two.", "duration": 0.04, "offset": 0.05},
        '{"audio_filepath": "a.wav", "text": "cut',
        {"audio_filepath": "a.wav", "text": None, "duration": 0.1},
        {"audio_filepath": "a.wav", "text": "w", "offset": -1, "duration": 0.1},
        '{"id": 9, "audio_filepath": "a.wav", "text": "half \\ud83d"}',
        ["no object"],
    )
    with manifest.open("ab") as file:
        file.write(b'{"audio_filepath": "a.wav", "text": "caf\xe9"}\n')
    done = take(manifest)
    found = lines(done.output / "train.jsonl")
    assert [(r.get("offset"), r.get("duration"), r["transcript"]) for r in found] == [
        (None, None, NASTY),
        (0.0, 0.04, "One."),
        (0.05, 0.04, "Two."),
    ]
    assert found[0]["speaker_id"] == "7"
    assert {reason: len(places) for reason, places in left_out(done).items()} == {
        "broken line": 3,
        "training would refuse it": 2,
        "empty transcript": 1,
    }
    config = DataConfig(allow_outside=True)
    names = [sample.audio_paths()[0].name for sample in read_samples(done.output / "train.jsonl", config)]
    assert names == ["a.wav", "b.wav#t=0,0.04", "b.wav#t=0.05,0.09"]


def recording(name: str, **changes: Any) -> dict[str, Any]:
    source = {"type": "file", "channels": [0], "source": name}
    return {"id": name[0], "sources": [source], "sampling_rate": 24000, "duration": 0.1, "channel_ids": [0], **changes}


def spoken(name: str, start: float = 0.0, duration: float = 0.1, **changes: Any) -> dict[str, Any]:
    row = {"id": f"{name}-{start}", "recording_id": name, "start": start, "duration": duration, "channel": 0}
    return {**row, "text": "Words.", "speaker": "ann", "language": "en", **changes}


def test_segments_of_a_recording_stay_together(source: Path, wavs: Callable[..., None], take: Any) -> None:
    wavs("a.wav", "b.wav", "c.wav")
    rows = [
        {"audio_filepath": f"{name}.wav", "text": "W.", "offset": 0.02 * k, "duration": 0.02}
        for k in range(4)
        for name in "abc"
    ]
    write_lines(source / "manifest.jsonl", *rows)
    done = take(source, eval=0.34)
    held = lines(done.output / "eval.jsonl")
    assert len(held) == 4
    assert len({r["audio_file"] for r in held}) == 1


def test_lhotse_supervisions(source: Path, wavs: Callable[..., None], take: Any) -> None:
    wavs("a.wav", "b.wav", "c.wav")
    two = recording("c.wav", channel_ids=[0, 1])
    url = recording("d.wav", sources=[{"type": "url", "channels": [0], "source": "https://x/d.wav"}])
    slow = recording("e.wav", transforms=[{"name": "Speed"}])
    write_lines(source / "x_recordings_dev.jsonl.gz", recording("a.wav"), recording("b.wav"), two, url, slow)
    rows = [spoken("a"), spoken("b", 0.02, 0.05), spoken("c"), spoken("d"), spoken("e"), spoken("f")]
    write_lines(source / "x_supervisions_dev.jsonl.gz", *rows, spoken("a", text=" ", id="blank"))
    done = take(source)
    assert [(r["id"], r.get("offset"), r.get("duration")) for r in lines(done.output / "train.jsonl")] == [
        ("a-0.0", None, None),
        ("b-0.02", 0.02, 0.05),
    ]
    assert set(left_out(done)) == {
        "one channel of several",
        "a recording that is no file",
        "a recording with transforms",
        "no such recording",
        "empty transcript",
    }


def test_lhotse_cuts(source: Path, wavs: Callable[..., None], take: Any) -> None:
    wavs("a.wav")
    part = [spoken("a", 0.01, 0.03), spoken("a", 0.04, 0.02)]
    cut = {
        "id": "cut",
        "start": 0.02,
        "duration": 0.06,
        "channel": 0,
        "type": "MonoCut",
        "recording": recording("a.wav"),
    }
    cuts = write_lines(source / "cuts.jsonl", {**cut, "supervisions": part}, {**cut, "type": "MixedCut", "tracks": []})
    done = take(cuts)
    assert [(r["offset"], r["duration"]) for r in lines(done.output / "train.jsonl")] == [(0.03, 0.03), (0.06, 0.02)]
    assert left_out(done)["a cut without a recording of its own"][0].startswith("cuts.jsonl line 2")


def test_sharegpt_and_alpaca(source: Path, take: Any) -> None:
    turns = [("system", "Be brief."), ("human", NASTY), ("gpt", "One."), ("human", "And?"), ("gpt", "Two.")]
    good = {"id": "g", "conversations": [{"from": who, "value": text} for who, text in turns]}
    tool = {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{}"}]}
    blank = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]}
    file = source / "chats.json"
    file.write_text(json.dumps([good, tool, blank, {"conversations": []}, good, 7]), encoding="utf-8")
    done = take(file)
    (sample,) = read_samples(done.output / "train.jsonl")
    assert [(turn.role, turn.words, turn.trained) for turn in sample.turns] == [
        ("system", "Be brief.", False),
        ("user", NASTY, False),
        ("assistant", "One.", True),
        ("user", "And?", False),
        ("assistant", "Two.", True),
    ]
    assert set(left_out(done)) == {
        "a turn of another role",
        "an empty turn",
        "no conversation",
        "an id that occurs twice",
        "broken line",
    }
    rows = [{"instruction": "Add.", "input": "1, 2", "output": "3"}, {"instruction": "Add.", "output": ""}]
    done = take(write_lines(source / "alpaca.jsonl", *rows, {"instruction": "", "output": "x"}), force=True)
    (sample,) = read_samples(done.output / "train.jsonl")
    assert [turn.words for turn in sample.turns] == ["Add.\n\n1, 2", "3"]
    assert set(left_out(done)) == {"no answer", "no instruction"}


def test_a_data_set_of_hugging_face(source: Path, wavs: Callable[..., None], take: Any) -> None:
    datasets = pytest.importorskip("datasets")
    wavs("a.wav", "b.wav")
    rows = {
        "audio": [
            {"path": None, "bytes": (source / "a.wav").read_bytes()},
            {"path": str(source / "b.wav"), "bytes": None},
        ],
        "text": [NASTY, "Two."],
        "speaker_id": [3, 4],
    }
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"audio": struct, "text": datasets.Value("string"), "speaker_id": datasets.Value("int64")}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    made = made.cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": made}).save_to_disk(str(source / "saved"))
    with pytest.raises(UserError, match=r"has the splits of a data set \(.*saved/train\): name one of them"):
        take(source / "saved")
    done = take(source / "saved" / "train", root=str(source))
    found = lines(done.output / "train.jsonl")
    assert [(r["transcript"], r["speaker_id"]) for r in found] == [(NASTY, "3"), ("Two.", "4")]
    assert (done.output / found[0]["audio_file"]).read_bytes() == (source / "a.wav").read_bytes()
    assert found[1]["audio_file"] == "clips/row-1.wav"  # saving a data set puts the files into it


def test_a_data_set_of_hugging_face_without_its_library(
    source: Path, take: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("state.json", "dataset_info.json"):
        (source / name).write_text("{}", encoding="utf-8")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs datasets, which is not installed: run `pip install 'rawloop\[datasets\]'`"
    ):
        take(source)


def test_what_cannot_be_told(source: Path, wavs: Callable[..., None], take: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone does not exist: name a folder or file"):
        take(source / "gone")
    with pytest.raises(UserError, match=r"no layout that is known \(no audio files; it has nothing\). Known are audio"):
        take(source)
    wavs("a.wav")
    with pytest.raises(UserError, match=r"1 audio files without .txt or .lab files beside them; it has a.wav"):
        take(source)
    (source / "a.txt").write_text("Words.", encoding="utf-8")
    write_lines(source / "metadata.csv", "a|Words.")
    with pytest.raises(UserError, match=r"2 ways \(metadata.csv, audio files with words beside them\): name the file"):
        take(source)
    with pytest.raises(UserError, match=r"own.jsonl has rawloop's own layout: name it as data.train"):
        take(write_lines(source / "own.jsonl", {"audio_file": "a.wav", "transcript": "w"}))
    with pytest.raises(UserError, match=r"x.csv has no layout that is known"):
        take(write_lines(source / "x.csv", "file,text", "a.wav,Words"))
    with pytest.raises(UserError, match=r"x_recordings.jsonl is not beside it"):
        take(write_lines(source / "x_supervisions.jsonl", spoken("a")))
    with pytest.raises(UserError, match=r"none of the 1 entries of .* can be used: 1 audio is missing \(first: "):
        take(write_lines(source / "m.json", {"audio_filepath": "gone.wav", "text": "w"}))
    write_lines(source / "cut_recordings.jsonl.gz", recording("a.wav"))
    cut = source / "cut_supervisions.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"recording_id": 1}\n' * 1000)[:-9])
    with pytest.raises(UserError, match=r"is damaged"):
        take(cut)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.fixture
def two(source: Path, wavs: Callable[..., None]) -> Path:
    wavs("sub/a.wav", "sub/b.wav")
    return write_lines(
        source / "manifest.jsonl",
        {"audio_filepath": "sub/a.wav", "text": "One."},
        {"audio_filepath": "sub/b.wav", "text": "Two.", "offset": 0.0, "duration": 0.05},
        {"audio_filepath": "sub/b.wav", "text": "Three.", "offset": 0.05, "duration": 0.05},
    )


def test_clips_are_named_or_copied(two: Path, take: Any, source: Path) -> None:
    done = take(two)
    assert done.outside
    assert lines(done.output / "train.jsonl")[0]["audio_file"] == str(source / "sub" / "a.wav")
    done = take(two, force=True, copy=True)
    assert not done.outside
    assert next(s.audio_paths()[0].name for s in read_samples(done.output / "train.jsonl")) == "a.wav"
    assert sorted(path.name for path in (done.output / "clips" / "sub").iterdir()) == ["a.wav", "b.wav"]


def test_an_import_into_the_source_names_paths_inside(two: Path, source: Path) -> None:
    done = import_data(ImportConfig(str(two), str(source), eval=0.4))
    assert not done.outside
    assert len(read_samples(source / "train.jsonl")) + len(read_samples(source / "eval.jsonl")) == 3
    assert (source / "manifest.jsonl").is_file()


def test_an_earlier_import_is_replaced_only_with_force(two: Path, take: Any, tmp_path: Path) -> None:
    out = take(two, eval=0.4, copy=True).output
    (out / ".rawloop-codes").mkdir()
    before = (out / "train.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"out has train.jsonl already: name another --output, or replace it with --force"
    ):
        take(two)
    assert (out / "train.jsonl").read_bytes() == before
    take(two, force=True)
    assert sorted(path.name for path in out.iterdir()) == [".rawloop-codes", "import.json", "train.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failure_leaves_the_old_files(two: Path, take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = take(two).output
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(folder: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(importing, "sync_tree", full)
    with pytest.raises(OSError, match="No space"):
        take(two, force=True, eval=0.4)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_settings_that_make_no_sense(two: Path, take: Any) -> None:
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"--eval is .*: it is a share of the samples"):
            take(two, eval=share)
    with pytest.raises(UserError, match=r"--root is '/gone', which is no folder"):
        take(two, root="/gone")
