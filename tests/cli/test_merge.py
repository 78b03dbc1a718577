"""`rawloop merge` on what is not as it was: another base model, adapters that mean nothing, a disk that runs full."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.files import ModelFiles
from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.adapters.lora import add_adapter
from rawloop.families import ModelConfig, load_family
from rawloop.families.causal_lm import CausalLM
from rawloop.seed import seed_all

Door = Callable[..., Any]
Refusal = Callable[..., str]
Merge = Callable[..., tuple[str | Path, ...]]


@pytest.fixture(scope="module")
def made(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base`, the tiny text model, and `adapter`, trained on it as far as a merge can tell."""
    folder = tmp_path_factory.mktemp("merge")
    shutil.copytree(text_checkpoint, folder / "base")
    family = load_family(ModelConfig(path=str(folder / "base")))
    model = add_adapter(family.load_model(), AdapterConfig(rank=2, alpha=4.0), [])
    base = BaseFingerprint(model, str(folder / "base"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    (folder / "adapter").mkdir()
    ModelFiles(model, family.load_model, base=base).snapshot(copy=False)(folder / "adapter")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, to be spoilt."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def merge(work: Path) -> Merge:
    """Give `merge(*more)`: the arguments of a merge of the copies."""
    given = ("merge", "--adapter", work / "adapter", "--model.path", work / "base", "--output", work / "merged")
    return lambda *more: (*given, *more)


def change(file: Path, values: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(values(load_file(file)), file, {"format": "pt"})


def one_number(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last number of the last weight: what a look at the first ones does not see."""
    name = "model.layers.1.self_attn.v_proj.weight"
    other = weights[name].clone()
    other[-1, -1] += 0.5
    return {**weights, name: other}


def test_a_base_that_was_overwritten_is_refused(door: Door, refusal: Refusal, merge: Merge, work: Path) -> None:
    assert door(*merge()).code == 0
    shutil.rmtree(work / "merged")
    change(work / "base" / "model.safetensors", one_number)
    said = refusal(*merge())
    assert said.startswith("the frozen weights are not those that the checkpoint was trained on: it was ")
    (work / "state").mkdir()  # of a checkpoint whose adapter does not have the file
    (work / "adapter" / "base.json").rename(work / "state" / "base.json")
    assert refusal(*merge()) == said
    (work / "state" / "base.json").unlink()
    done = door(*merge())
    assert done.code == 0
    assert f"rawloop merge: not checked whether {work / 'base'} is the base model of " in done.err
    assert "no base.json lies beside it" in done.err


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff"])
def test_a_damaged_fingerprint_is_named(refusal: Refusal, merge: Merge, work: Path, text: str) -> None:
    (work / "adapter" / "base.json").write_bytes(text.encode("latin1"))
    assert f"{work / 'adapter' / 'base.json'} is damaged" in refusal(*merge(), code=1)


@pytest.mark.parametrize(
    ("value", "said"),
    [(torch.nan, "has NaN or infinity"), (torch.inf, "has NaN or infinity"), (1e38, "not finite|cannot be merged")],
)
def test_numbers_that_are_none_are_refused(refusal: Refusal, merge: Merge, work: Path, value: float, said: str) -> None:
    def spoil(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.full_like(tensor, value) for name, tensor in weights.items()}

    change(work / "adapter" / "adapter_model.safetensors", spoil)
    line = refusal(*merge(), code=1)
    assert any(part in line for part in said.split("|")), line
    assert not (work / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(refusal: Refusal, merge: Merge, work: Path, dtype: torch.dtype) -> None:
    change(work / "adapter" / "adapter_model.safetensors", lambda w: {name: t.to(dtype) for name, t in w.items()})
    assert f"is stored as {dtype}: an adapter's weights must be floats" in refusal(*merge(), code=1)


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ({"peft_type": "IA3"}, 2, "has the peft_type 'IA3': rawloop merges adapters of type 'LORA'"),
        ({"peft_type": "lora"}, 2, "has the peft_type 'lora'"),
        ({"peft_type": None}, 2, "has the peft_type None"),
        ({"peft_type": ["LORA"]}, 2, "has the peft_type ['LORA']"),
        ({"lora_alpha": None}, 1, "r and lora_alpha are [2, None], and PEFT would guess them"),
        ({"r": 10**30}, 2, "does not fit the base model: "),
        ({"base_model_name_or_path": 7}, 1, "names no base model: base_model_name_or_path is 7"),
        ({"layers_to_transform": {"a": 1}}, 2, "does not fit the base model: "),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, 1, "cannot be merged: NotImplementedError"),
    ],
)
def test_settings_that_mean_another_adapter_are_refused(
    refusal: Refusal, merge: Merge, work: Path, values: dict[str, Any], code: int, said: str
) -> None:
    file = work / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    assert said in refusal(*merge(), code=code)


def test_weights_that_the_written_dtype_cannot_hold_are_no_model(refusal: Refusal, merge: Merge, work: Path) -> None:
    def large(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor * 1e3 if "lora" in name else tensor for name, tensor in weights.items()}

    change(work / "adapter" / "adapter_model.safetensors", large)
    said = refusal(*merge("--dtype", "float16"), code=1)
    assert "the written model has other logits (nan of the largest, in float16): it was removed" in said
    assert not [path for path in work.iterdir() if "merged" in path.name]


class WithNewHead(CausalLM):
    """A family whose base model lacks the head: it is drawn at random whenever the model is loaded."""

    def load_model(self, path: str | None = None) -> nn.Module:
        model = super().load_model(path)
        if path is None:
            nn.init.normal_(model.get_parameter("lm_head.weight"))
        return model


def test_what_the_base_model_lacks_is_drawn_as_it_was(
    door: Door, refusal: Refusal, merge: Merge, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = WithNewHead(ModelConfig(path=str(work / "base")))
    seed_all(7, 0)
    model = add_adapter(family.load_model(), AdapterConfig(rank=2, modules_to_save=["lm_head"]), [])
    shutil.rmtree(work / "adapter")
    (work / "adapter").mkdir()
    base = BaseFingerprint(model, str(work / "base"), seed=7)
    ModelFiles(model, family.load_model, base=base).snapshot(copy=False)(work / "adapter")
    monkeypatch.setattr("rawloop.exporting.load_family", WithNewHead)
    assert door(*merge()).code == 0
    shutil.rmtree(work / "merged")
    file = work / "adapter" / "base.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 8}))
    assert "the frozen weights are not those" in refusal(*merge())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [3000, 50_000])
def test_a_disk_that_runs_full_leaves_nothing(refusal: Refusal, merge: Merge, work: Path, size: int) -> None:
    with largest_file(size):
        said = refusal(*merge(), code=1)
    assert f"--output is '{work / 'merged'}', which cannot be written: the file is larger than this process" in said
    assert sorted(path.name for path in work.iterdir()) == ["adapter", "base"]
