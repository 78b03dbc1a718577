"""The manifest: any change to any file of a slot, the manifest included, is found; an untouched slot is accepted."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rawloop.checkpoint.manifest import read_manifest, verify
from rawloop.checkpoint.pack import pack
from rawloop.checkpoint.writer import Contents, write_slot
from rawloop.errors import CheckpointError

VERSIONS: dict[str, str | None] = {"torch": "2", "rawloop": None}


def make_slot(folder: Path, **meta: Any) -> Path:
    slot = folder / "step-00000003"
    state = pack({"w": torch.randn(20), "b": torch.ones(3, dtype=torch.bfloat16), "n": 3})
    write_slot(slot, Contents(3, meta, VERSIONS, {"model": state, "plain": pack({"x": 1.5})}, [{"rng": state}] * 2, {}))
    return slot


def all_files(slot: Path) -> list[Path]:
    return sorted(path for path in slot.rglob("*") if path.is_file())


def test_an_untouched_slot_is_accepted_and_its_manifest_says_what_is_in_it(tmp_path: Path) -> None:
    meta = {"loss": float("inf"), "data": {"$step": (1, 2)}, "name": "ü"}
    manifest = verify(make_slot(tmp_path, **meta))
    assert (manifest.step, manifest.world_size) == (3, 2)
    assert (manifest.states, manifest.per_rank, manifest.folders) == (["model", "plain"], ["rng"], {})
    assert manifest.meta == meta
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


def test_an_unreadable_file_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    slot = make_slot(tmp_path)
    path = slot / "state" / "model.json"
    size = path.stat().st_size
    path.unlink()
    path.symlink_to(path)  # a link to itself
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read|model\.json is missing"):
        verify(slot)
    assert size


@pytest.mark.parametrize("text", ["", "[]", "7", '{"format": 2}', '{"format": 1}', "\xff"])
def test_a_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "MANIFEST.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("change", [{"step": "x"}, {"step": None}, {"files": None}, {"files": {"a": {}}}, {"new": 1}])
def test_a_manifest_that_fits_its_digest_and_is_not_ours_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    slot = make_slot(tmp_path)
    body = {**json.loads((slot / "MANIFEST.json").read_bytes()), **change}
    del body["sha256"]
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (slot / "MANIFEST.json").write_text(json.dumps(body, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: rawloop has not written it so"):
        read_manifest(slot)


def test_a_manifest_of_brackets_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: it cannot be read"):
        read_manifest(tmp_path)


def test_a_folder_that_is_not_there_hints_at_the_shared_disk(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder here; ranks on several machines"):
        read_manifest(tmp_path / "none")
