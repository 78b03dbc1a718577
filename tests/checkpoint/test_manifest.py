"""The manifest: any change to any file of a slot, the manifest included, is found; an untouched slot is accepted."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.slots import read_manifest, verify
from rawloop.checkpoint.writer import Contents, write_slot
from rawloop.errors import CheckpointError
from rawloop.pack import pack

VERSIONS: dict[str, str | None] = {"torch": "2", "rawloop": None}


def make_slot(folder: Path, **marks: Any) -> Path:
    slot = folder / "step-00000003"
    state = pack({"w": torch.randn(20), "b": torch.ones(3, dtype=torch.bfloat16), "n": 3})
    write_slot(
        slot, Contents(3, VERSIONS, {"model": state, "plain": pack({"x": 1.5})}, [{"rng": state}] * 2, {}, **marks)
    )
    return slot


def all_files(slot: Path) -> list[Path]:
    return sorted(path for path in slot.rglob("*") if path.is_file())


def test_an_untouched_slot_is_accepted_and_its_manifest_says_what_is_in_it(tmp_path: Path) -> None:
    best = BestRecord("ü", "max", 0.1, 3)
    manifest = verify(make_slot(tmp_path, best=best, keep=True))
    assert (manifest.step, manifest.world_size) == (3, 2)
    assert (manifest.states, manifest.per_rank, manifest.folders) == (["model", "plain"], ["rng"], {})
    assert manifest.meta == {"best": best._asdict(), "keep": True}
    assert manifest.versions == VERSIONS
    assert manifest.size == sum(path.stat().st_size for path in all_files(tmp_path) if path.name != "MANIFEST.json")


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def check_flips(slot: Path, flips: list[tuple[Path, int, int]]) -> None:
    for path, position, bit in flips:
        flip(path, position, bit)
        with pytest.raises(CheckpointError, match=path.name):
            verify(slot)
        flip(path, position, bit)
    verify(slot)


def test_every_flipped_bit_of_a_sample_is_found_and_the_file_named(tmp_path: Path) -> None:
    slot, rng = make_slot(tmp_path), random.Random(0)
    flips = [
        (path, rng.randrange(path.stat().st_size), rng.randrange(8)) for path in all_files(slot) for _ in range(40)
    ]
    assert len(flips) > 200
    check_flips(slot, flips)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_flipped_bit_of_every_file_is_found(tmp_path: Path) -> None:
    slot = make_slot(tmp_path)
    for path in all_files(slot):
        check_flips(slot, [(path, place, bit) for place in range(path.stat().st_size) for bit in range(8)])


def test_every_truncation_and_every_longer_file_is_found(tmp_path: Path) -> None:
    slot = make_slot(tmp_path)
    for path in all_files(slot):
        data = path.read_bytes()
        for cut in {0, 1, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:cut])
            with pytest.raises(CheckpointError, match=path.name):
                verify(slot)
        path.write_bytes(data + b"\n")
        with pytest.raises(CheckpointError, match=path.name):
            verify(slot)
        path.write_bytes(data)
    verify(slot)


def test_every_missing_file_is_found(tmp_path: Path) -> None:
    slot = make_slot(tmp_path)
    for path in all_files(slot):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{path.name}.*(is missing|never completed)"):
            verify(slot)
        path.write_bytes(data)
    verify(slot)


def test_a_manifest_of_another_checkpoint_does_not_fit(tmp_path: Path) -> None:
    slot, other = make_slot(tmp_path), make_slot(tmp_path / "other")
    (slot / "MANIFEST.json").write_bytes((other / "MANIFEST.json").read_bytes())
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        verify(slot)


def link(path: Path, to: Path | str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def link_folder(path: Path) -> None:
    path.rename(path.with_name(".aside"))
    path.symlink_to(path.with_name(".aside"))


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda slot: (slot / "state" / "zz.safetensors").write_text(""), r"state/zz\.safetensors is not in its manif"),
        (lambda slot: (slot / "notes.txt").write_text(""), r"notes\.txt is not in its manifest: .* move it away"),
        (lambda slot: link(slot / "state" / "model.json", "model.json"), r"state/model\.json is a link"),
        (lambda slot: link(slot / "state" / "model.json", "/dev/zero"), r"state/model\.json is a link"),
        (lambda slot: link(slot / "zz", "/dev/zero"), "zz is a link"),
        (lambda slot: fifo(slot / "state" / "model.json"), r"state/model\.json is a special file"),
        (lambda slot: fifo(slot / "zz"), "zz is a special file"),
        (lambda slot: link_folder(slot / "state"), "state is a link"),
        (lambda slot: link(slot / "MANIFEST.json", "/dev/zero"), r"MANIFEST\.json: it is a link, not a manifest"),
        (lambda slot: fifo(slot / "MANIFEST.json"), r"MANIFEST\.json: it is a special file, not a manifest"),
        (lambda slot: os.truncate(slot / "MANIFEST.json", 10**9), r"MANIFEST\.json: it is a file of 1,000,000,000 byt"),
    ],
)
def test_what_does_not_belong_into_a_slot_is_named(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    slot = make_slot(tmp_path)
    spoil(slot)
    with pytest.raises(CheckpointError, match=said):
        verify(slot)


def test_files_that_systems_leave_are_passed_over(tmp_path: Path) -> None:
    slot = make_slot(tmp_path)
    for name in (".DS_Store", "state/.nfs000000001", "state/._model.safetensors", ".ipynb_checkpoints/x.safetensors"):
        (slot / name).parent.mkdir(exist_ok=True)
        (slot / name).write_text("x")
    (slot / "empty").mkdir()
    verify(slot)


@pytest.mark.parametrize(
    ("write", "said"), [(lambda folder: link(folder / "x", "/dev/zero"), "no plain file"), (str, "nothing was written")]
)
def test_a_part_that_writes_a_link_or_nothing_is_no_save(
    tmp_path: Path, write: Callable[[Path], None], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        write_slot(tmp_path / "step-00000003", Contents(3, {}, {}, [{}], {"model": ("model", write)}))


RECORD = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"step": None},
        {"world_size": "1"},
        {"new": 1},
        {"files": None},
        {"files": {}},
        {"files": {"a": {}}},
        {"files": {"a": {**RECORD, "size": "0"}}},
        {"files": {"a": {**RECORD, "sha256": None}}},
        *({"files": {name: RECORD}} for name in ("/dev/zero", "/etc/hosts", "../x", "a/../../x", "a//b", "./a", "")),
        {"folders": {"model": "../step-00000002/model"}},
        {"folders": {"model": "/model"}},
        {"folders": {"model": 7}},
        {"states": [["x"]]},
        {"meta": []},
        {"versions": None},
    ],
)
def test_a_manifest_that_fits_its_digest_and_is_not_ours_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    slot = make_slot(tmp_path)
    body = {**json.loads((slot / "MANIFEST.json").read_bytes()), **change}
    del body["sha256"]
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (slot / "MANIFEST.json").write_text(json.dumps(body, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: rawloop does not write such a manifest"):
        read_manifest(slot)


def test_a_manifest_of_brackets_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: it cannot be read"):
        read_manifest(tmp_path)


def test_a_folder_that_is_not_there_hints_at_the_shared_disk(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder here; ranks on several machines"):
        read_manifest(tmp_path / "none")
