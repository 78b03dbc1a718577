"""A folder that is wrong or damaged is refused in one line with folder, file and cause, whatever a library raised."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rawloop.contracts import Sample, Text, Turn
from rawloop.errors import LibraryError, UserError
from rawloop.families import ModelConfig, load_family
from rawloop.families.loading import library_errors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
CHAT = Sample("s", (Turn("user", (Text("Hi."),)), Turn("assistant", (Text("Yes."),), trained=True)), source="x line 1")


@pytest.fixture
def folder(text_checkpoint: Path, tmp_path: Path) -> Path:
    """A tiny Llama of the test's own."""
    return Path(shutil.copytree(text_checkpoint, tmp_path / "model"))


def refusal(folder: Path, **options: Any) -> str:
    """The line with which a folder is refused, by the family or by its weights."""
    with pytest.raises(UserError) as caught:
        load_family(ModelConfig(path=str(folder), **options)).load_model()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert str(folder) in said
    return said.replace(str(folder), "FOLDER")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def to_bin(folder: Path, damaged: Callable[[bytes], bytes]) -> None:
    """The weights as PyTorch's own file, damaged."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(damaged((folder / "pytorch_model.bin").read_bytes()))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(POINTER), "whose model.safetensors is a Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "whose tokenizer.json is a Git LFS pointer"),
        (lambda f: cut(f / "model.safetensors"), "whose model.safetensors is damaged (SafetensorError"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "whose model.safetensors is empty: fetch it again"),
        (lambda f: (f / "model.safetensors").unlink(), "whose model cannot be loaded: Error no file named model.safe"),
        (lambda f: to_bin(f, lambda data: data[:5000]), "whose pytorch_model.bin is damaged (no file that PyTorch"),
        (lambda f: to_bin(f, lambda data: b"<html>"), "whose pytorch_model.bin is damaged (no file that PyTorch"),
        (lambda f: to_bin(f, lambda data: b"\x80\x02x"), "whose .bin file is damaged, or holds more than tensors"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "which has tokenizer.json and no tokenizer_config.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "whose tokenizer.json or tokenizer_config.json cannot be"),
        (
            lambda f: (f / "tokenizer.json").write_text("[" * 5000),
            "whose tokenizer.json is damaged (maximum recur",
        ),
        (lambda f: (f / "config.json").write_text("[" * 5000), "FOLDER/config.json is not valid JSON"),
        (lambda f: change(f / "config.json", hidden_act="silux"), "whose model cannot be loaded: KeyError 'silux'"),
        (lambda f: change(f / "config.json", hidden_size="32"), "whose config.json cannot be loaded: Strict"),
        (
            lambda f: change(f / "config.json", hidden_size=10**6),
            "makes a model of 1,103,000,008 weights",
        ),
        (lambda f: change(f / "config.json", num_hidden_layers=10**9), "config.json has num_hidden_layers 1,000,000,0"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "which has adapter_config.json beside config.json"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "it has an adapter: give its base model"),
    ],
)
def test_a_damaged_folder_is_refused_by_file_and_cause(
    folder: Path, damage: Callable[[Path], object], line: str
) -> None:
    damage(folder)
    said = refusal(folder)
    assert line.removesuffix("(") in said, said


class Runs:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_in_the_place_of_weights_runs_nothing(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save({**weights, "more": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "whose .bin file is damaged, or holds more than tensors: as opening it could run code" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_size_of_a_layer_is_no_number_of_layers(folder: Path) -> None:
    """Gemma 3n and Gemma 4 have such keys."""
    change(folder / "config.json", vocab_size_per_layer_input=262144, depthwise_separable_out_channel=1024)
    load_family(ModelConfig(path=str(folder))).load_model()


def test_one_models_folder_in_the_place_of_anothers(folder: Path, demo_checkpoint: Path) -> None:
    asked = "model.family is 'higgs_audio_v2', and model.path is 'FOLDER', a model of type 'llama'"
    assert asked in refusal(folder, family="higgs_audio_v2")
    assert "folder of an audio codec: it belongs in model.codec" in refusal(demo_checkpoint / "codec")
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model"), codec=str(folder)))
    with pytest.raises(UserError, match=r"model\.codec is '.*', a model of type 'llama': give the folder of the codec"):
        family.load_codec(torch.device("cpu"))


def test_a_codec_that_lacks_weights_is_refused(demo_checkpoint: Path, tmp_path: Path) -> None:
    codec = Path(shutil.copytree(demo_checkpoint / "codec", tmp_path / "codec"))
    text = (codec / "model.safetensors").read_bytes()
    (codec / "model.safetensors").write_bytes(text.replace(b"fc.weight", b"fc.weighp", 1))
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model"), codec=str(codec)))
    with pytest.raises(UserError, match=r"codec lacks 1 weights"):
        family.load_codec(torch.device("cpu"))


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[99]['x'] }}", "{% if %}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_fails_is_one_line_with_the_sample(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    family = load_family(ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=rf"the chat template of {folder} refuses it: "):
        family.check(CHAT)


@pytest.mark.parametrize("name", ["owner/a--b", "owner/a..b", f"owner/{'x' * 100}"])
@pytest.mark.parametrize("key", ["path", "codec"])
def test_a_hub_id_that_the_hub_refuses(key: str, name: str, demo_checkpoint: Path) -> None:
    asked: dict[str, Any] = {"path": str(demo_checkpoint / "model"), key: name}
    line = rf"model\.{key} is '{name}': no such folder, and the hub gave no such model \(.*'{name}'.*\): mend the name"

    def load() -> None:
        family: Any = load_family(ModelConfig(**asked))
        family.codec_hash()

    with pytest.raises(UserError, match=line):
        load()


def test_a_hub_model_without_config_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: str(tmp_path))
    with pytest.raises(
        UserError, match=r"^model\.path is 'owner/adapter', which has no config\.json on the hub: .*base"
    ):
        load_family(ModelConfig(path="owner/adapter"))


def test_what_is_no_damage_passes(folder: Path) -> None:
    for kind in (KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError):
        with pytest.raises(kind), library_errors(str(folder), "config.json"):
            raise kind
    with pytest.raises(UserError, match=r"^ours$"), library_errors(str(folder), "config.json"):
        raise UserError("ours")


class PanicException(BaseException):
    """As pyo3 raises it, which libraries in Rust do."""


def test_a_panic_in_rust_is_one_line(folder: Path) -> None:
    line = r"whose tokenizer.json cannot be loaded: PanicException index 7$"
    with pytest.raises(LibraryError, match=line) as caught, library_errors(str(folder), "tokenizer.json"):
        raise PanicException("index\n7")
    assert "Traceback (most recent call last)" in caught.value.trace


def test_the_traceback_is_kept_in_a_file(
    folder: Path, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rawloop.cli import main

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    change(folder / "config.json", hidden_act="silux")
    data = {split: str(text_data / f"{split}.jsonl") for split in ("train", "eval")}
    settings = {"output": str(tmp_path / "run"), "device": "cpu", "model": {"path": str(folder)}, "data": data}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "whose model cannot be loaded: KeyError 'silux' (its traceback: " in said
    kept = Path(said.partition("(its traceback: ")[2].removesuffix(")"))
    assert kept.parent == tmp_path
    assert "KeyError: 'silux'" in kept.read_text()
