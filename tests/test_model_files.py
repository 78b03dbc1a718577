"""The files of a whole model: what is read back is compared with the weights in memory, all of it, under any names."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.adapters.compare import tensors_of
from rawloop.adapters.files import WEIGHTS, ModelFiles
from rawloop.errors import CheckpointError


def llama(tied: bool = False) -> LlamaForCausalLM:
    """Built from a config, as a family of one's own may do; one that `from_pretrained` gives behaves otherwise."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, tie_word_embeddings=tied, **heads
        )
    )


def load_llama(path: str) -> nn.Module:
    model: nn.Module = LlamaForCausalLM.from_pretrained(path)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("copy", [False, True])
def test_a_model_from_a_config_is_written_into_two_slots_of_one_step(tmp_path: Path, tied: bool, copy: bool) -> None:
    model: Any = llama(tied)
    model.model.norm.weight.data[0] = torch.nan  # a run may have such a weight, and its checkpoint must say so
    write = ModelFiles(model, load_llama).snapshot(copy=copy)
    for name in ("best", "step"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        stored = load_file(tmp_path / name / WEIGHTS)
        assert torch.equal(stored["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    fresh = llama(tied)
    ModelFiles(fresh, load_llama).load(tmp_path / "step")
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("names", ["own", "transformers'"])
def test_a_bit_that_is_lost_between_writing_and_reading_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    model: Any = llama() if names == "own" else Renaming()
    honest = model.save_pretrained

    def save(folder: Path, **options: Any) -> None:
        honest(folder, **options)
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[-5] ^= 1
        (folder / WEIGHTS).write_bytes(content)

    monkeypatch.setattr(model, "save_pretrained", save)
    with pytest.raises(CheckpointError, match=r"read back differs|are not theirs"):
        ModelFiles(model, load_llama).snapshot(copy=False)(tmp_path)


class Renaming(nn.Module):
    """Stores its weights under other names, one of them in two parts, as transformers stores experts."""

    def __init__(self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> None:
        super().__init__()
        self.encoder, self.experts, self.change = nn.Linear(4, 4), nn.Linear(4, 6), change

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        own = self.state_dict() if state_dict is None else state_dict
        stored = {f"e.{name}": tensor for name, tensor in own.items() if name != "experts.weight"}
        stored |= {f"expert.{k}": part.clone() for k, part in enumerate(own["experts.weight"].split(3))}
        save_file(self.change(stored), folder / WEIGHTS)


def load_renaming(path: str) -> nn.Module:
    stored, model = load_file(Path(path) / WEIGHTS), Renaming()
    own = {name.removeprefix("e."): tensor for name, tensor in stored.items() if name.startswith("e.")}
    model.load_state_dict({**own, "experts.weight": torch.cat([stored["expert.0"], stored["expert.1"]])})
    return model


class WritesItself(Renaming):
    """Its `save_pretrained` takes no weights: it writes those that it has."""

    def save_pretrained(self, folder: Path) -> None:  # type: ignore[override]
        super().save_pretrained(folder)


def test_a_model_that_takes_no_weights_is_copied_to_the_host_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = WritesItself()
    taken = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refuse(*arguments: object) -> Any:
        raise AssertionError("a weight is copied where it lies, on the GPU")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    write = ModelFiles(model, load_renaming).snapshot(copy=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # training goes on
    write(tmp_path)
    torch.testing.assert_close(load_renaming(str(tmp_path)).state_dict(), taken, rtol=0, atol=0)


def test_weights_under_other_names_are_compared_by_their_numbers(tmp_path: Path) -> None:
    model, fresh = Renaming(), Renaming()
    ModelFiles(model, load_renaming).snapshot(copy=False)(tmp_path)
    ModelFiles(fresh.bfloat16(), load_renaming).load(tmp_path)  # a model of another precision today
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(fresh.state_dict(), rounded, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"does not hold the model: 4 weight\(s\) not found under their names"):
        ModelFiles(Renaming(), lambda path: Renaming()).load(tmp_path)  # which does not read what is there


@pytest.mark.parametrize("change", [lambda stored: {}, lambda stored: {"expert.0": stored["expert.0"]}])
def test_a_model_that_does_not_write_what_is_trained_is_no_save(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    with pytest.raises(CheckpointError, match=r"does not hold the model: 4 weight\(s\) not found under their names"):
        ModelFiles(Renaming(change), load_renaming).snapshot(copy=False)(tmp_path)


def test_a_model_that_writes_itself_may_leave_out_what_is_frozen(tmp_path: Path) -> None:
    model = Renaming(lambda stored: {name: tensor for name, tensor in stored.items() if "encoder" not in name})
    model.encoder.requires_grad_(False)
    ModelFiles(model, load_renaming).snapshot(copy=False)(tmp_path)
    model.encoder.requires_grad_(True)
    with pytest.raises(CheckpointError, match="does not hold the model"):
        ModelFiles(model, load_renaming).snapshot(copy=False)(tmp_path)


def test_a_model_without_any_weight_is_no_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weight that could be compared"):
        ModelFiles(nn.Identity(), lambda path: nn.Identity()).snapshot(copy=False)(tmp_path)


def test_only_a_models_own_files_are_read(tmp_path: Path) -> None:
    """What lies beside them is another's: two sets of weights, or files that a system leaves."""
    model: Any = llama()
    model.save_pretrained(tmp_path, max_shard_size="1KB")  # shards, and an index that names them
    wanted = tensors_of(tmp_path)
    assert wanted.keys() == model.state_dict().keys()
    for name in ("zz.safetensors", "model-00001-of-00001.safetensors", "._model.safetensors"):
        save_file({name: torch.zeros(1), **{name: tensor + 1 for name, tensor in wanted.items()}}, tmp_path / name)
    torch.testing.assert_close(tensors_of(tmp_path), wanted, rtol=0, atol=0)
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert "zz.safetensors" not in tensors_of(tmp_path)
    assert len(tensors_of(tmp_path)) == len(wanted) + 1
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 7}')
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged"):
        tensors_of(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing, or no plain file"):
        tensors_of(tmp_path)
