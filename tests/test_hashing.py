"""Content hashes of files and folders."""

import hashlib
from pathlib import Path

import pytest

from rawloop.errors import UserError
from rawloop.files import hash_folder, sha256_file, sha256_files, sketch_file


def test_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_sketch_is_of_size_and_middle(tmp_path: Path) -> None:
    file = tmp_path / "a"
    sketches = set()
    for content in (b"", b"x", b"y", b"x" * 9000, b"x" * 9001, b"x" * 4500 + b"y" + b"x" * 4499):
        file.write_bytes(content)
        sketches.add(sketch_file(file))
    assert len(sketches) == 6
    file.write_bytes(b"y" + b"x" * 8999)  # what it does not see
    assert sketch_file(file) in sketches


def test_files_by_name_and_content(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    first = sha256_files(paths)
    assert sha256_files(reversed(paths)) == first
    paths[0].write_text("b")
    paths[1].write_text("a")
    assert sha256_files(paths) != first


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_folder_counts_config_and_weights(model: Path) -> None:
    first = hash_folder(model)
    (model / "README.md").write_text("other words")
    assert hash_folder(model) == first
    for name in ("config.json", "model-2.safetensors"):
        (model / name).write_text("changed")
        assert hash_folder(model) != first
        (model / name).write_text(name)
    assert hash_folder(model) == first


@pytest.mark.parametrize(("pattern", "missing"), [("config.json", "config.json"), ("*.safetensors", "safetensors")])
def test_folder_that_is_no_model(pattern: str, missing: str, model: Path) -> None:
    for path in model.glob(pattern):
        path.unlink()
    with pytest.raises(UserError, match=f"has no .*{missing}"):
        hash_folder(model)
