"""The index of samples: what it returns, when it is built, and who builds it."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rawloop.changes import contents_of
from rawloop.components import checked_with
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.data import mapped as mapped_module
from rawloop.data.batches import BatchPlan, MicroBatches
from rawloop.data.index import SampleIndex, decoded, encoded, open_samples
from rawloop.data.keys import KeyCheck
from rawloop.data.mapped import Mapped, Writer, open_or_build
from rawloop.data.reading import _whole, read_records
from rawloop.data.samples import SampleReader, read_samples
from rawloop.data.splits import load_samples, open_codes, prepare_codes
from rawloop.errors import RawloopError, UserError
from rawloop.families import ModelConfig, load_family, source_of

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "loss": True}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": [1.5, None]}}]}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": f"Text {number}."}) + "\n" for number in range(5)))
    return file


def opened(path: Path, config: DataConfig | None = None, said: list[str] | None = None) -> SampleIndex:
    """Open the index of a data file, which lies in its folder."""
    say = (lambda line: None) if said is None else said.append
    return open_samples(str(path), config or DataConfig(), False, path.parent / "codes", say)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which every reading of a data file is added."""
    read: list[Path] = []
    iterate = SampleReader.__iter__

    def counted(reader: SampleReader) -> Any:
        read.append(reader.file)
        return iterate(reader)

    monkeypatch.setattr(SampleReader, "__iter__", counted)
    return read


def test_samples_are_those_of_read_samples(jsonl: Callable[..., Path]) -> None:
    clip = {"audio_file": "a.wav", "transcript": "Words.", "speakers": {"SPEAKER0": "deep"}, "mine": {"é": [1, 0.1]}}
    reference = {"ref_audio_file": "b.wav", "ref_transcript": "Other words."}
    records = [
        {"text": "Plain 😀 text."},
        {"messages": CHAT, "id": "chat"},
        {"messages": [*CHAT, CHAT[0], CALL], "tools": [{"name": "f"}]},
        clip,
        {**clip, **reference, "id": 7, "offset": 0.5, "duration": 2.0},
    ]
    file = jsonl(*records)
    index, listed = opened(file), read_samples(file, check_files=False)
    assert list(index) == listed
    assert (index[-1], index[1:3], len(index)) == (listed[-1], listed[1:3], 5)
    assert [decoded(encoded(sample)) for sample in listed] == listed
    with pytest.raises(IndexError):
        index[5]


def test_batches_and_facts_are_those_of_a_list(demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> None:
    config = DataConfig(str(demo_data / "train"), str(demo_data / "eval"), str(demo_data / "codes"))
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    cache = open_codes(config, family)
    listed = read_samples(str(demo_data / "train"), config)
    index = load_samples(config, family, cache, "train", print)
    plan = BatchPlan(len(listed), 2, seed=3)
    assert len(index) == len(listed)
    for window in range(6):
        made = [
            MicroBatches(samples, partial(family.example, codes=cache), family.collate, seed=3).made(
                plan.micro_batches(window)[0]
            )[1]
            for samples in (listed, index)
        ]
        assert made[0].ids == made[1].ids
        assert made[0].inputs.keys() == made[1].inputs.keys()
        assert all(torch.equal(tensor, made[1].inputs[name]) for name, tensor in made[0].inputs.items())
        assert all(map(torch.equal, made[0].labels["audio"], made[1].labels["audio"]))
    of_list, of_index = (contents_of(family, cache, {"data.train": samples}) for samples in (listed, index))
    assert of_list.of_run() == of_index.of_run()
    assert list(of_list.digests["data.train"]) == list(of_index.digests["data.train"])


def test_it_is_built_once(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reads(monkeypatch)
    first = list(opened(texts))
    assert list(opened(texts)) == first
    assert len(read) == 1


def test_a_data_file_of_the_same_size_and_time_is_read_again(texts: Path) -> None:
    opened(texts)
    before = texts.stat()
    texts.write_text(texts.read_text().replace("Text 3.", "Text 9."))
    os.utime(texts, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts.stat().st_size == before.st_size
    assert opened(texts)[3].turns[0].words == "Text 9."


def test_other_settings_have_another_index(jsonl: Callable[..., Path]) -> None:
    file = jsonl({"audio_file": "a.wav", "transcript": "Words."})
    scenes = [opened(file, DataConfig(default_scene=scene))[0].turns[0].words for scene in ("One.", "Two.", "One.")]
    assert scenes == ["One.", "Two.", "One."]


def test_a_changed_transcript_file_is_read_again(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Before.")
    file = jsonl({"audio_file": "a.wav", "transcript_file": "a.txt"})
    assert opened(file)[0].turns[-2].words == "Before."
    (tmp_path / "a.txt").write_text("After.")
    assert opened(file)[0].turns[-2].words == "After."


def test_notices_are_told_at_every_start(jsonl: Callable[..., Path]) -> None:
    file = jsonl({"text": "One.", "odd": 1})
    said: list[str] = []
    read_samples(file, notice=said.append)
    assert opened(file).notices == opened(file).notices == said
    assert len(said) == 1


@pytest.mark.parametrize("damage", ["cut", "array", "end", "empty"])
def test_a_damaged_index_is_told_and_built_again(damage: str, texts: Path) -> None:
    expected = list(opened(texts))
    (file,) = (texts.parent / "codes" / "index").glob("*.samples")
    content: Any = bytearray(file.read_bytes())
    if damage == "array":
        content[content.index(opened(texts).file.arrays["crcs"].tobytes())] ^= 1
    elif damage == "end":
        content[-30] ^= 1
    file.write_bytes({"cut": content[:-7], "empty": b""}.get(damage, content))
    said: list[str] = []
    assert list(opened(texts, said=said)) == expected
    assert [line.split(" (")[0] for line in said] == [f"{file} is damaged"]
    assert opened(texts, said=said)
    assert len(said) == 1


def test_a_record_that_was_damaged_is_not_used(texts: Path) -> None:
    index = opened(texts)
    content = bytearray(index.file.file.read_bytes())
    content[20] ^= 1
    index.file.file.write_bytes(content)
    with pytest.raises(RawloopError, match=r"\.samples is damaged \(record 0 is not what was written\): delete it"):
        opened(texts)[0]


def test_a_mistake_leaves_no_index(jsonl: Callable[..., Path]) -> None:
    file = jsonl({"text": "One."}, {"text": ""})
    for _ in range(2):
        with pytest.raises(UserError, match="line 2: 'text' is ''"):
            opened(file)
    assert [path.name for path in (file.parent / "codes" / "index").glob("*[!k]")] == []


def test_a_writer_that_was_killed_leaves_nothing_that_is_used(texts: Path) -> None:
    opened(texts)
    (file,) = (texts.parent / "codes" / "index").glob("*.samples")
    file.rename(file.with_name(f".tmp-{file.name}"))
    assert len(opened(texts)) == 5
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}.lock"]


def test_one_builds_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_module, "EVERY", 0.05)
    built: list[str] = []

    def build(writer: Writer, say: Callable[[str], None]) -> None:
        built.append("now")
        say("12 of 34")
        time.sleep(0.4)
        writer.finish("key", {"numbers": np.arange(3)}, {})

    def use(said: list[str]) -> Mapped:
        return open_or_build(tmp_path, "name", "key", build, said.append)

    lines: list[list[str]] = [[], [], []]
    with ThreadPoolExecutor(3) as pool:
        files = list(pool.map(use, lines))
    assert built == ["now"]
    assert [file.arrays["numbers"].tolist() for file in files] == [[0, 1, 2]] * 3
    assert sum("waiting for the process that builds the index: 12 of 34" in said for said in lines) == 2


def test_a_folder_that_cannot_be_written(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (texts.parent / "codes").mkdir()
    (texts.parent / "codes" / "index").touch()
    (texts.parent / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(texts.parent / "tmp"))
    read, said = reads(monkeypatch), list[str]()
    assert [len(opened(texts, said=said)) for _ in range(2)] == [5, 5]
    assert len(read) == len(said) == 1
    assert "cannot be written: the index is built in" in said[0]


def test_prepare_builds_it(
    demo_checkpoint: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(demo_data, tmp_path / "data")
    config = DataConfig(str(data / "train"), str(data / "eval"), str(data / "codes"))
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    prepare_codes(config, family, about={"model": "demo"})
    read = reads(monkeypatch)
    for split, number in (("train", 8), ("eval", 5)):
        assert len(load_samples(config, family, open_codes(config, family), split, print, {"model": "demo"})) == number
    assert read == []


def test_all_commands_use_the_same_file(demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They import different modules of rawloop."""
    config = RunConfig(model=ModelConfig(path=str(demo_checkpoint / "model")))
    family = load_family(config.model)
    before, source = checked_with(config, family), source_of(type(family))
    other = ModuleType("rawloop.other")
    other.__file__ = __file__
    monkeypatch.setitem(sys.modules, "rawloop.other", other)
    assert source_of(type(family)) != source
    assert checked_with(config, family) == before


# -- what is looked up when the samples were checked before -----------------------------------------------------------


def test_a_later_start_looks_up_no_clip_unless_asked(
    demo_checkpoint: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_data, data)  # keeps the times
    config = DataConfig(str(data / "train"), codes=str(data / "codes"))
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model")))

    def load(config: DataConfig) -> list[str]:
        cache = open_codes(config, family)
        samples = load_samples(config, family, cache, "train", print)
        assert cache is not None
        return [cache.identity(path) for sample in samples for path in sample.audio_paths()]

    first, looked_up = load(config), list[str]()
    stat, lstat = os.stat, os.lstat

    def recorded(call: Callable[..., Any], path: Any, *args: Any, **keys: Any) -> Any:
        looked_up.append(str(path))
        return call(path, *args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", partial(recorded, stat))
        patch.setattr(os, "lstat", partial(recorded, lstat))
        assert load(config) == first
    assert not [path for path in looked_up if path.endswith((".wav", ".flac", ".ogg"))]

    clip = next(path for path in sorted((data / "train").rglob("*")) if path.suffix in (".wav", ".flac", ".ogg"))
    clip.write_bytes(clip.read_bytes()[:-2] + b"xx")
    assert load(config) == first
    with pytest.raises(UserError, match=rf"1 clip\(s\) changed since they were encoded: .*{clip.name}"):
        load(replace(config, verify=True))


# -- files that are read piece by piece -------------------------------------------------------------------------------

FORMS = [
    '[{"text": "a"}, {"text": "b"}]',
    " [ ] ",
    '{"samples": [{"text": "a"}, {"text": "b"}], "dataset_info": {"name": [1, {"x": "]}"}]}}',
    '{"dataset_info": {}, "samples": [\n{"text": "a\\u2028\\"},{"}\n,\n{"text": "b"}\n]\n}\n',
    '{"samples": []}',
    '{"text": "a"}\n{"text": "b"}\n',
    '\n\n{"text": "a"}\r\n\r\n{"text": "b"}',
    '{"text": "a"}\r{"text": "b"}',
    '{"text": "a"}',
    '{"text":\n"a"}\n{"text": "b"}',
    '{"text": "a"} {"text": "b"}',
    '{"samples": [{"text": "a"}], "samples": []}',
    '{"samples": [{"text": "a", "text": "b"}]}',
    '{"samples": [{"text": "a"},]}',
    '{"samples": [{"text": "a"}] "x": 1}',
    '{"samples": [{"text": "a"}]} x',
    '{"samples": {"text": "a"}}',
    '{"samples": [{"text": "a"}, 7]}',
    '{"x": 1}',
    '[{"text": "a"}, {"text": "b"',
    '{"text": "a"}\n{"text": ',
    '{"text": "a"}\n{"text": "b"} {"text": "c"}\n',
    "12\n13",
    '"a"',
    "",
    "\ufeff[1.5e3]",
]


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_in_pieces_is_the_whole_file(
    form: str, suffix: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same records or the same message, except that a mistake in a record comes before a broken end."""
    monkeypatch.setattr("rawloop.data.stream.CHUNK", chunk)
    file = tmp_path / f"data{suffix}"
    file.write_bytes(form.encode())

    def outcome(read: Callable[[Path, KeyCheck], Any]) -> Any:
        try:
            return [(record.place, record.values) for record in read(file, KeyCheck())]
        except UserError as error:
            return str(error)

    assert outcome(read_records) == outcome(_whole)


def test_bytes_that_are_not_utf8_in_the_middle(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "a"}\n' * 1000 + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"data.jsonl line 1001 is not UTF-8 \(byte 14010\): convert the file to UTF-8"):
        read_samples(file)
