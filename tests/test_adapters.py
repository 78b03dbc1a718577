"""Adapters on the demo checkpoint of Higgs Audio v2: what is trained, what is stored, and that plain PEFT reads it."""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file, save_model
from safetensors.torch import load_model as load_safetensors
from torch import Tensor, nn
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.files import WEIGHTS, ModelFiles, copy_all
from rawloop.adapters.fingerprint import BaseFingerprint, checksum
from rawloop.adapters.lora import add_adapter, count_parameters
from rawloop.adapters.merge import base_of, merge_adapter
from rawloop.contracts import Batch, Family
from rawloop.data.codes import CodeCache
from rawloop.data.samples import read_samples
from rawloop.errors import CheckpointError, UserError
from rawloop.families import ModelConfig, load_family

HEADS = ["audio_lm_head", "text_lm_head"]
LAYERS = 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(demo_checkpoint: Path) -> Family:
    return load_family(ModelConfig(path=str(demo_checkpoint / "model")))


@pytest.fixture(scope="module")
def batch(family: Family, demo_data: Path) -> Batch:
    cache = CodeCache(demo_data / "codes")
    return family.collate([family.example(sample, cache) for sample in read_samples(demo_data / "train")[:2]])


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def adapted(family: Family, notices: list[str]) -> Callable[..., nn.Module]:
    """Give `adapted(**keys of AdapterConfig)`: a fresh model with that adapter; `notices` gets its notices."""

    def build(**keys: Any) -> nn.Module:
        return add_adapter(family.load_model(), AdapterConfig(**keys), notices)

    return build


def train(model: nn.Module, family: Family, batch: Batch, steps: int = 2) -> nn.Module:
    """Move every trainable weight away from where it started."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        losses = family.losses(model, batch)
        torch.autograd.backward(torch.stack([loss.total / loss.targets for loss in losses.values()]).sum())
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, family: Family, batch: Batch) -> Tensor:
    return torch.cat([rows.flatten() for rows in family.logits(model.eval(), batch).values()])


def trained_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def trained_layers(model: nn.Module) -> set[str]:
    """Kinds of layer that LoRA sits in: `self_attn.q_proj`."""
    return {".".join(name.split(".lora_")[0].split(".")[-2:]) for name in trained_names(model) if ".lora_" in name}


# -- what is trained ---------------------------------------------------------------------------------------------


def test_default_targets_are_the_attention_of_every_layer(
    adapted: Callable[..., nn.Module], notices: list[str]
) -> None:
    model = adapted(rank=4)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert trained_names(model) == {
        f"model.layers.{layer}.self_attn.{kind}.lora_{matrix}.default.weight"
        for layer in range(LAYERS)
        for kind in kinds
        for matrix in "AB"
    }
    assert notices[0].startswith("LoRA on 8 layers: ")


def test_parameters_are_counted_exactly(adapted: Callable[..., nn.Module], family: Family, notices: list[str]) -> None:
    base = family.load_model()
    total = sum(parameter.numel() for parameter in base.parameters())
    heads = sum(base.get_parameter(f"{head}.weight").numel() for head in HEADS)
    shapes = [(160, 160), (80, 160), (80, 160), (160, 160)]  # (out, in) of q, k, v and o
    lora = LAYERS * sum(4 * (rows + columns) for rows, columns in shapes)
    assert count_parameters(adapted(rank=4)) == (lora, total + lora)
    # PEFT trains a copy of a module to save and keeps the original
    assert count_parameters(adapted(rank=4, modules_to_save=HEADS)) == (lora + heads, total + lora + heads)
    assert count_parameters(adapted(mode="full")) == (total, total)
    share = 100 * lora / (total + lora)
    assert notices[1] == f"trainable parameters: {lora:,} of {total + lora:,} ({share:.2f}%)"


def test_a_target_of_both_mlps_says_so_and_a_narrower_one_does_not(
    adapted: Callable[..., nn.Module], notices: list[str]
) -> None:
    assert trained_layers(adapted(target_modules=["up_proj"])) == {"mlp.up_proj", "audio_mlp.up_proj"}
    assert notices[0] == (
        "target 'up_proj' matches 4 layers, which are audio_mlp.up_proj, mlp.up_proj: "
        "use one of these names for only that kind"
    )
    for target in ("audio_mlp.up_proj", "mlp.up_proj"):
        notices.clear()
        assert trained_layers(adapted(target_modules=[target])) == {target}
        assert [line for line in notices if "target" in line] == []


def test_all_linear_takes_every_linear_layer_and_names_them(
    adapted: Callable[..., nn.Module], notices: list[str]
) -> None:
    model = adapted(target_modules=["all-linear"], modules_to_save=["audio_lm_head"])
    mlps = {f"{mlp}.{kind}_proj" for mlp in ("mlp", "audio_mlp") for kind in ("gate", "up", "down")}
    assert trained_layers(model) == mlps | {f"self_attn.{kind}_proj" for kind in "qkvo"} | {"text_lm_head"}
    assert "audio_lm_head.modules_to_save.default.weight" in trained_names(model)
    kinds = "self_attn.k_proj (2), self_attn.o_proj (2), self_attn.q_proj (2), self_attn.v_proj (2), text_lm_head (1)"
    assert notices[0].startswith("LoRA on 21 layers: audio_mlp.down_proj (2), ")
    assert notices[0].endswith(f"{kinds}; in full: audio_lm_head")


@pytest.mark.parametrize(
    ("target", "near"),
    [("qproj", "q_proj"), ("self_attn", "self_attn.q_proj"), ("mlp.up", "mlp.up_proj"), ("query", "q_proj")],
)
def test_a_target_that_matches_nothing_is_refused_with_near_ones(
    adapted: Callable[..., nn.Module], target: str, near: str
) -> None:
    with pytest.raises(UserError) as caught:
        adapted(target_modules=["q_proj", target])
    line = str(caught.value)
    assert line.startswith(f"adapter.target_modules has '{target}', which matches no layer of the model; near: ")
    assert near in line.partition("near: ")[2].split(", ")


def test_modules_to_save_are_those_named_and_no_others(adapted: Callable[..., nn.Module]) -> None:
    def saved(*modules: str) -> set[str]:
        names = trained_names(adapted(rank=1, modules_to_save=list(modules)))
        return {name.split(".modules_to_save")[0] for name in names if ".modules_to_save." in name}

    assert saved(*HEADS) == set(HEADS)
    assert saved("norm") == {"model.norm"}  # PEFT itself would take every layer norm too
    assert saved("mlp") == {f"model.layers.{layer}.mlp" for layer in range(LAYERS)}  # and every audio_mlp
    assert saved("layers.1.mlp") == {"model.layers.1.mlp"}
    with pytest.raises(UserError, match=r"adapter.modules_to_save has 'lm_head', which matches no .*audio_lm_head"):
        saved("lm_head")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": []}, "adapter.target_modules is empty"),
        ({"target_modules": ["q_proj", "all-linear"]}, "'all-linear' beside others"),
        ({"target_modules": ["all-linear", "q_proj"]}, "'all-linear' beside others"),
        ({"target_modules": ["q_proj", "audio_lm_head"], "modules_to_save": HEADS}, "remove it from one of them"),
        ({"target_modules": ["mlp.up_proj"], "modules_to_save": ["layers.0.mlp"]}, "'mlp.up_proj', which is model.lay"),
        ({"mode": "lroa"}, "adapter.mode is 'lroa'"),
        ({"rank": 0}, "adapter.rank is 0"),
        ({"dropout": 1.0}, "adapter.dropout is 1.0"),
        ({"freeze": ["model.layer.0.*"]}, "matches no parameter; near: .*model.layers.0"),
    ],
)
def test_contradictions_are_refused(adapted: Callable[..., nn.Module], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(**keys)


def test_dora_and_rslora_are_peft_s(adapted: Callable[..., nn.Module], family: Family, batch: Batch) -> None:
    dora = adapted(rank=4, dora=True)
    assert {name.rpartition(".lora_")[2] for name in trained_names(dora)} == {
        "A.default.weight",
        "B.default.weight",
        "magnitude_vector.default.weight",
    }
    before = logits(family.load_model(), family, batch)
    torch.testing.assert_close(logits(dora, family, batch), before)  # it starts as the base model
    plain, stable = adapted(rank=4, alpha=6.0), adapted(rank=4, alpha=6.0, rslora=True)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    scales = [model.get_submodule(layer).scaling["default"] for model in (plain, stable)]  # type: ignore[index]
    assert scales == [6.0 / 4, 6.0 / 2]


def test_freezing_is_by_the_model_s_own_names_with_and_without_peft(adapted: Callable[..., nn.Module]) -> None:
    pattern = "model.layers.0.*"
    lora, full = adapted(freeze=[pattern]), adapted(mode="full", freeze=[pattern, "*embed*"])
    everything = adapted(), adapted(mode="full")
    assert trained_names(lora) == {n for n in trained_names(everything[0]) if n.startswith("model.layers.1.")}
    assert trained_names(full) == {
        n for n in trained_names(everything[1]) if not n.startswith("model.layers.0.") and "embed" not in n
    }
    head = adapted(modules_to_save=HEADS, freeze=["text_lm_head.*"])
    assert {n.split(".")[0] for n in trained_names(head)} == {"model", "audio_lm_head"}
    with pytest.raises(UserError, match=r"no weight of the model is trainable: .* adapter.freeze is \['\*'\]"):
        adapted(freeze=["*"])


class Towers(nn.Module):
    """A model that comes with a frozen encoder."""

    def __init__(self, *frozen: str) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        self.decoder = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        for name in frozen:
            self.get_submodule(name).requires_grad_(False)


def test_what_a_model_comes_with_frozen_stays_so_and_is_said() -> None:
    notices: list[str] = []
    model = add_adapter(Towers("encoder"), AdapterConfig(mode="full"), notices)
    assert {name.split(".")[0] for name in trained_names(model)} == {"decoder"}
    assert notices[0] == (
        "frozen by load_model: 30 parameters (encoder.head.*, encoder.q_proj.*); adapter.unfreeze would train them"
    )
    assert notices[1].startswith("trainable parameters: 30 of 60")
    some = add_adapter(Towers("encoder"), AdapterConfig(mode="full", unfreeze=["encoder.head.*"]), notices)
    assert trained_names(some) == trained_names(model) | {"encoder.head.weight", "encoder.head.bias"}
    assert notices[2].startswith("frozen by load_model: 20 parameters (encoder.q_proj.*)")
    both = AdapterConfig(mode="full", unfreeze=["encoder.*"], freeze=["encoder.head.*"])
    assert len(trained_names(add_adapter(Towers("encoder"), both, []))) == 6  # freeze has the last word
    with pytest.raises(UserError, match=r"adapter\.unfreeze has 'encode\.\*', which matches no parameter; near: e"):
        add_adapter(Towers("encoder"), AdapterConfig(mode="full", unfreeze=["encode.*"]), [])
    with pytest.raises(UserError, match=r"trainable: .* load_model has frozen 8, which adapter\.unfreeze can"):
        add_adapter(Towers("encoder", "decoder"), AdapterConfig(mode="full"), [])
    with pytest.raises(UserError, match=r"adapter\.unfreeze is \['x'\] and adapter\.mode is lora"):
        AdapterConfig(unfreeze=["x"])


def test_lora_on_layers_that_came_frozen_is_said() -> None:
    def notices(*frozen: str, **keys: Any) -> list[str]:
        found: list[str] = []
        add_adapter(Towers(*frozen), AdapterConfig(rank=1, **keys), found)
        return [line for line in found if "frozen" in line]

    (line,) = notices("encoder", target_modules=["q_proj"], modules_to_save=["head"])
    assert line.startswith("LoRA or modules_to_save train 2 layers that load_model has frozen (encoder.head, encoder.q")
    assert notices("encoder", target_modules=["decoder.q_proj"]) == []
    assert notices("encoder", "decoder", target_modules=["q_proj"]) == []  # a family that freezes all for LoRA
    assert notices(target_modules=["q_proj"]) == []


def test_frozen_weights_stay_and_trained_ones_move(
    adapted: Callable[..., nn.Module], family: Family, batch: Batch
) -> None:
    for model in (adapted(rank=2, modules_to_save=HEADS), adapted(mode="full", freeze=["*norm*"])):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, family, batch)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


# -- files -------------------------------------------------------------------------------------------------------


LORA = {"rank": 4, "modules_to_save": HEADS}


@pytest.fixture(scope="module")
def trained(family: Family, batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A trained adapter on the demo model, and the folder that it was saved in."""
    model = train(add_adapter(family.load_model(), AdapterConfig(**LORA), []), family, batch)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("adapter")
    ModelFiles(model, family.load_model).snapshot(copy=False)(folder)
    return model, folder


@pytest.fixture
def copy_of(trained: tuple[nn.Module, Path], tmp_path: Path) -> Callable[..., Path]:
    """Give `copy_of(change)`: a copy of the trained adapter whose weights went through `change`."""

    def write(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        save_file(change(load_file(trained[1] / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text((trained[1] / "adapter_config.json").read_text())
        return tmp_path

    return write


def plain(demo_checkpoint: Path) -> Any:
    """The base model as any user of transformers loads it."""
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(demo_checkpoint / "model", use_text_head=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT, with transformers 5
def test_plain_peft_gives_the_logits_of_the_trained_model(
    trained: tuple[nn.Module, Path], demo_checkpoint: Path, family: Family, batch: Batch
) -> None:
    model, folder = trained
    loaded = PeftModel.from_pretrained(plain(demo_checkpoint), folder)
    after = logits(loaded, family, batch)
    assert torch.equal(after, logits(model, family, batch))
    assert not torch.allclose(after, logits(plain(demo_checkpoint), family, batch), atol=0.1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_plain_transformers_generates_speech_with_the_adapter(
    trained: tuple[nn.Module, Path], demo_checkpoint: Path
) -> None:
    loaded = PeftModel.from_pretrained(plain(demo_checkpoint), trained[1]).eval()
    processor: Any = AutoProcessor.from_pretrained(demo_checkpoint / "model")
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]},
        {"role": "scene", "content": [{"type": "text", "text": "Audio is recorded from a quiet room."}]},
        {"role": "user", "content": [{"type": "text", "text": "The boats come home at dusk."}]},
    ]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    codes = loaded.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert codes.shape[0] == 1
    assert codes.shape[2] == 8
    assert 9 < codes.shape[1] <= 21  # frames with the first column of BOS, at most what was asked for
    (waveform,) = processor.batch_decode(codes)
    assert waveform.ndim == 1
    assert waveform.numel() >= 960  # a frame at 25 frames/s and 24 kHz
    assert torch.isfinite(waveform).all()
    assert waveform.std() > 0


def test_adapter_is_stored_bit_for_bit(
    trained: tuple[nn.Module, Path], adapted: Callable[..., nn.Module], family: Family
) -> None:
    model, folder = trained
    fresh = adapted(**LORA)
    files = ModelFiles(fresh, family.load_model)
    assert files.folder == "adapter"
    files.load(folder)
    stored = dict(model.named_parameters())
    assert all(torch.equal(parameter, stored[name]) for name, parameter in fresh.named_parameters())
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert {name.split(".")[2] for name in names} == {"model", *HEADS}
    assert len(names) == LAYERS * 4 * 2 + 2


def test_the_adapter_knows_its_base(trained: tuple[nn.Module, Path], demo_checkpoint: Path) -> None:
    assert base_of(trained[1]) == (str(demo_checkpoint / "model"), None)


def test_the_adapters_files_are_as_the_umask_says_and_in_one_order(trained: tuple[nn.Module, Path]) -> None:
    """Colleagues read them; and a set's order, which differs from process to process, makes equal runs differ."""
    probe = trained[1].parent / "probe"
    probe.touch()
    modes = {path.stat().st_mode for path in (probe, *trained[1].iterdir())}
    assert len(modes) == 1
    targets = json.loads((trained[1] / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 4
    assert targets == sorted(targets)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"rank": 8}, "16 weight(s) of another shape (base_model.model"),
        ({"target_modules": ["q_proj", "v_proj"]}, "model: 8 weight(s) unknown"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "mlp.up_proj"]}, "4 weight(s) missing"),
        (
            {"modules_to_save": []},
            "(base_model.model.audio_lm_head.weight, base_model.model.text_lm_head.weight); were",
        ),
        ({"dora": True}, "8 weight(s) missing"),
        ({"alpha": 64.0}, "adapter.alpha 32.0, this run has 64.0"),
        ({"rslora": True}, "adapter.rslora False, this run has True"),
    ],
)
def test_another_adapter_is_refused(
    trained: tuple[nn.Module, Path],
    adapted: Callable[..., nn.Module],
    family: Family,
    keys: dict[str, Any],
    problem: str,
) -> None:
    model = adapted(**{**LORA, **keys})
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        ModelFiles(model, family.load_model).load(trained[1])
    assert problem in str(caught.value)
    assert str(trained[1]) in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def lose_one(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(weights.items())[1:])


def test_damaged_adapters_are_refused(
    copy_of: Callable[..., Path], adapted: Callable[..., nn.Module], family: Family
) -> None:
    files = ModelFiles(adapted(**LORA), family.load_model)
    folder = copy_of(lose_one)
    with pytest.raises(CheckpointError, match=r"1 weight\(s\) missing \(base_model.model.audio_lm_head.weight\)"):
        files.load(folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{folder} is damaged: "):
        files.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{folder} holds no safetensors file"):
        files.load(folder)


def test_what_is_not_on_the_disk_as_in_memory_is_no_save(
    adapted: Callable[..., nn.Module], family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that loses a bit: the file is changed between writing and reading it back."""
    for keys in (LORA, {"mode": "full"}):
        model: Any = adapted(**keys)
        honest = model.save_pretrained

        def save(folder: Path, honest: Callable[..., None] = honest, **options: Any) -> None:
            honest(folder, **options)
            (file,) = folder.glob("*.safetensors")
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)

        monkeypatch.setattr(model, "save_pretrained", save)
        folder = tmp_path / str(keys.get("mode", "lora"))
        folder.mkdir()
        with pytest.raises(CheckpointError, match="read back differs from the weight in memory"):
            ModelFiles(model, family.load_model).snapshot(copy=False)(folder)


def test_a_full_model_is_stored_bit_for_bit_and_loads_plainly(
    adapted: Callable[..., nn.Module], family: Family, batch: Batch, tmp_path: Path
) -> None:
    model = train(adapted(mode="full"), family, batch, steps=1)
    files = ModelFiles(model, family.load_model)
    assert files.folder == "model"
    files.snapshot(copy=False)(tmp_path)
    fresh = adapted(mode="full")
    ModelFiles(fresh, family.load_model).load(tmp_path)
    stored = dict(model.named_parameters())
    assert all(torch.equal(parameter, stored[name]) for name, parameter in fresh.named_parameters())
    loaded: Any = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path, use_text_head=True)
    assert torch.equal(logits(loaded, family, batch), logits(model, family, batch))
    save_file(lose_one(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, first audio_lm_head\.weight"):
        files.load(tmp_path)


# -- merging -----------------------------------------------------------------------------------------------------


def test_weights_of_several_dtypes_are_restored_as_they_were(
    adapted: Callable[..., nn.Module], family: Family, tmp_path: Path
) -> None:
    """config.json names one dtype, and loading as a user would rounds all weights to it."""
    model: Any = adapted(mode="full").bfloat16()
    model.audio_lm_head.float()
    with torch.no_grad():
        model.audio_lm_head.weight += 1e-5
    files = ModelFiles(model, family.load_model)
    files.snapshot(copy=False)(tmp_path)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    files.load(tmp_path)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


class Tied(nn.Module):
    """A module without `save_pretrained`, of which two names are one weight."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(16, size), nn.Linear(size, 16, bias=False), nn.BatchNorm1d(size)
        self.head.weight = self.embed.weight


def read_tied(path: str) -> nn.Module:
    model = Tied()
    load_safetensors(model, Path(path) / WEIGHTS)
    return model


def test_a_plain_module_is_stored_as_its_weights_and_buffers(tmp_path: Path) -> None:
    model, fresh = Tied(), Tied()
    model.norm(torch.randn(4, 8))
    ModelFiles(model, read_tied).snapshot(copy=False)(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert not torch.equal(model.embed.weight, fresh.embed.weight)
    ModelFiles(fresh, read_tied).load(tmp_path)
    assert fresh.head.weight is fresh.embed.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])


class Wrapper(nn.Module):
    """Somebody's module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model


def zero(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_is_written_later_is_what_was_there(
    adapted: Callable[..., nn.Module], family: Family, tmp_path: Path, mode: str
) -> None:
    model = adapted(mode=mode, rank=2, modules_to_save=[] if mode == "full" else HEADS)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = [p.detach().clone() for p in trained]
    write = ModelFiles(Wrapper(model), family.load_model).snapshot(copy=True)
    with torch.no_grad():
        for parameter in trained:
            parameter.zero_()
    write(tmp_path)
    ModelFiles(torch.compile(model), family.load_model).load(tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(parameter, value) for parameter, value in zip(trained, wanted, strict=True))


class WritesItself(Tied):
    """A module with a `save_pretrained` of its own, which knows no `state_dict`."""

    def save_pretrained(self, folder: Path) -> None:
        save_model(self, str(folder / WEIGHTS))


@pytest.mark.parametrize("kind", [Tied, WritesItself])
def test_a_plain_module_is_written_later_as_it_was(kind: type[Tied], tmp_path: Path) -> None:
    model = kind()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write = ModelFiles(model, read_tied).snapshot(copy=True)
    zero(model)
    write(tmp_path)
    ModelFiles(model, read_tied).load(tmp_path)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_trained_weights_outside_of_the_adapter_are_refused(adapted: Callable[..., nn.Module], family: Family) -> None:
    module = Wrapper(adapted(**LORA))
    module.head = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"^head\.bias is trained and outside of the adapter"):
        ModelFiles(module, family.load_model)


class StoredUnderOtherNames(Tied):
    """As many models of transformers are."""

    def save_pretrained(self, folder: Path) -> None:
        weights = {f"other.{name}": tensor.contiguous().clone() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)


def test_a_load_model_that_reads_another_file_is_found_out_or_not_asked(tmp_path: Path) -> None:
    stored, model = Tied(), Tied()
    ModelFiles(stored, read_tied).snapshot(copy=False)(tmp_path)
    ModelFiles(model, lambda _: Tied()).load(tmp_path)  # all names are in the file
    assert all(torch.equal(tensor, stored.state_dict()[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "other").mkdir()
    StoredUnderOtherNames().save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"does not hold the model: .* not found under their names"):
        ModelFiles(StoredUnderOtherNames(), lambda _: StoredUnderOtherNames()).load(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"does not fit the model: .* of another shape"):
        ModelFiles(Tied(4), lambda _: Tied(4)).load(tmp_path)


@pytest.mark.parametrize("keys", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_merged_equals_base_plus_adapter(
    adapted: Callable[..., nn.Module], family: Family, batch: Batch, tmp_path: Path, keys: dict[str, Any]
) -> None:
    model = train(adapted(**LORA, **keys), family, batch)
    ModelFiles(model, family.load_model).snapshot(copy=False)(tmp_path)
    merged, before, difference = merge_adapter(family.load_model(), tmp_path, lambda m: logits(m, family, batch))
    assert 0 < difference < 1e-5
    assert {name for name, _ in merged.named_parameters()} == {n for n, _ in family.load_model().named_parameters()}
    wanted = logits(model, family, batch)
    assert torch.equal(before, wanted)
    assert (logits(merged, family, batch) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_merge_that_goes_wrong_shows_in_the_difference(
    trained: tuple[nn.Module, Path], family: Family, batch: Batch
) -> None:
    calls = 0

    def probe(model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:  # after the merge
            model.get_parameter("model.layers.0.self_attn.q_proj.weight").data.mul_(1.5)
        return logits(model, family, batch)

    assert merge_adapter(family.load_model(), trained[1], probe)[2] > 1e-3


def test_merging_what_is_no_adapter_of_this_model_is_refused(
    trained: tuple[nn.Module, Path], copy_of: Callable[..., Path], family: Family, tmp_path: Path
) -> None:
    def merge(folder: Path) -> None:
        merge_adapter(family.load_model(), folder, lambda model: torch.zeros(1))

    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        base_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 weight\(s\) missing .*q_proj\.lora_A"):
        merge(copy_of(lambda weights: {n: w for n, w in weights.items() if "0.self_attn.q_proj.lora_A" not in n}))
    head = "base_model.model.audio_lm_head.weight"
    for change in (lose_one, lambda weights: {**weights, head: weights[head][:100]}):
        with pytest.raises(UserError, match=f"{tmp_path} does not fit the base model: .*audio_lm_head"):
            merge(copy_of(change))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match=f"{tmp_path} does not fit the base model: .*No modules were targeted"):
        merge(tmp_path)


def test_a_module_and_its_child_of_the_same_name_are_saved_once(
    adapted: Callable[..., nn.Module], family: Family, batch: Batch, tmp_path: Path
) -> None:
    model = train(adapted(**{**LORA, "modules_to_save": ["embed_audio_tokens"]}), family, batch)
    copies = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "embed_audio" in name]
    assert len(copies) == 1
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, family, batch)
    assert not torch.equal(before[copies[0]], model.get_parameter(copies[0]))
    files = ModelFiles(model, family.load_model)
    files.snapshot(copy=False)(tmp_path)
    files.load(tmp_path)


def test_frozen_weights_have_a_fingerprint(adapted: Callable[..., nn.Module]) -> None:
    first, second, third = (BaseFingerprint(adapted(**LORA)) for _ in range(3))
    second.load_state_dict(first.state_dict())
    changed = adapted(**LORA)
    with torch.no_grad():
        changed.get_parameter("base_model.model.model.norm.weight").add_(1e-3)
    stored = BaseFingerprint(adapted(**LORA), "owner/base", "abc").state_dict()
    origin = {"path": "owner/base", "revision": "abc", "config": stored["config"], "seed": 0}
    assert stored == {"weights": third.weights, **origin}
    known = str(stored["config"])[:12]
    said = rf"it was 'owner/base' \(revision abc, config {known}\), this is 'other' \(revision None, config {known}\)"
    with pytest.raises(UserError, match=f"frozen weights are not those that the checkpoint was trained on: {said}"):
        BaseFingerprint(changed, "other").load_state_dict(stored)


def test_one_number_anywhere_in_the_frozen_weights_is_noticed(adapted: Callable[..., nn.Module]) -> None:
    stored = BaseFingerprint(adapted(**LORA)).state_dict()
    changed = adapted(**LORA)
    with torch.no_grad():
        changed.get_parameter("base_model.model.model.embed_tokens.weight")[-1, -1] += 1e-3
    with pytest.raises(UserError, match="frozen weights are not those that the checkpoint was trained on"):
        BaseFingerprint(changed).load_state_dict(stored)


def test_a_fingerprint_is_of_the_base_with_or_without_adapter_in_any_dtype(family: Family) -> None:
    model = family.load_model().bfloat16().requires_grad_(False)
    base = BaseFingerprint(model).weights
    assert BaseFingerprint(model.float()).weights == base
    adapted = add_adapter(model, AdapterConfig(modules_to_save=["audio_lm_head"]), [])
    assert BaseFingerprint(adapted).weights == base
    adapted.requires_grad_(False)  # as merge loads it
    assert BaseFingerprint(adapted).weights == base
    assert checksum(torch.empty(0)) == "(0,) 00000000"


def test_a_fingerprint_is_of_the_bases_buffers_where_no_checkpoint_has_them() -> None:
    def net(mean: float, config: AdapterConfig | None = None) -> nn.Module:
        model = nn.Sequential(OrderedDict(layer=nn.Linear(2, 2), norm=nn.BatchNorm1d(2)))
        for weight in model.parameters():
            nn.init.ones_(weight)
        nn.init.constant_(model.get_buffer("norm.running_mean"), mean)
        return model.requires_grad_(False) if config is None else add_adapter(model, config, [])

    lora = AdapterConfig(rank=1, target_modules=["layer"])
    base = BaseFingerprint(net(0.0)).weights
    for config in (lora, replace(lora, modules_to_save=["norm"])):
        assert BaseFingerprint(net(0.0, config)).weights == base
        assert BaseFingerprint(net(1.0, config)).weights != base
    full = AdapterConfig(mode="full", freeze=["norm.*"])
    assert BaseFingerprint(net(0.0, full)).weights == BaseFingerprint(net(1.0, full)).weights


def test_another_config_of_the_same_weights_is_noticed(adapted: Callable[..., nn.Module]) -> None:
    model = adapted(**LORA)
    stored = BaseFingerprint(model, "owner/base").state_dict()
    again = BaseFingerprint(adapted(**LORA), "elsewhere")
    again.load_state_dict(stored)
    assert again.notice == ""  # only its place is another
    model.config.bos_token_id = 7  # type: ignore[union-attr]
    other = BaseFingerprint(model, "elsewhere")
    other.load_state_dict(stored)
    assert other.notice.startswith("the base model's config has changed, its weights have not: 'owner/base' (revision")
    plain = BaseFingerprint(nn.Linear(2, 2).requires_grad_(False))
    assert plain.state_dict()["config"] is None


def test_copies_are_written_over_earlier_ones_but_not_over_each_other() -> None:
    tied = torch.ones(3)
    first = copy_all({"a": tied, "b": tied}, {})
    assert first["a"] is first["b"]
    second = copy_all({"a": torch.full((3,), 2.0), "b": torch.full((3,), 3.0)}, first)
    assert second["a"] is first["a"]
    assert second["a"].tolist() == [2.0] * 3
    assert second["b"].tolist() == [3.0] * 3
    assert copy_all({"a": torch.zeros(2)}, second)["a"].tolist() == [0.0] * 2
