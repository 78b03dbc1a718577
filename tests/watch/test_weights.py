"""Weights that are not finite, or of an absurd size, by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.watch import Watch
from rawloop.watch.weights import UnsoundWeights


class Block(nn.Module):
    """A layer of a small transformer: a norm, an attention and a feed-forward part."""

    up: Any
    down: Any
    attention: Any

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        added: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + added


class Model(nn.Module):
    layers: Any
    embed: Any
    mask: torch.Tensor

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(1, 10, 32))
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(32, 50, bias=False)
        self.register_buffer("mask", torch.full((10, 10), float("-inf")).triu(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(ids) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


def at_start(model: nn.Module) -> list[Finding]:
    with Watch(model, detectors=[UnsoundWeights()]) as watch:
        pass
    return list(watch.findings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_weights_at_initialisation_are_sound(dtype: torch.dtype, layers: int) -> None:
    model = Model(layers)
    for layer in model.layers:  # residual branches may begin at zero, and a whole head too
        nn.init.zeros_(layer.down.weight)
    assert at_start(model.to(dtype)) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "whisper", "convnext"])
def test_models_of_transformers_are_sound(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 90},
        "llama": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
        "t5": {"d_model": 32, "num_layers": 3, "d_ff": 64, "d_kv": 8, "num_heads": 4, "vocab_size": 90},
        "whisper": {"d_model": 36, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64},
        "convnext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]},
    }
    assert at_start(AutoModel.from_config(AutoConfig.for_model(kind, **sizes[kind]))) == []


def test_lora_over_a_bfloat16_base_is_sound_and_a_dead_pair_is_not() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Model().bfloat16(), LoraConfig(r=4, target_modules=["up", "down"]))
    assert at_start(model) == []
    nn.init.zeros_(model.get_parameter("base_model.model.layers.2.up.lora_A.default.weight"))
    (found,) = at_start(model)
    assert found.kind == "weights_constant"
    assert found.cause.place.parameter.endswith("layers.2.up.lora_A.default.weight")


FAULTS: dict[str, tuple[str, Callable[[Model], Any]]] = {
    "layers.1.up.weight": ("weights_not_finite", lambda m: m.layers[1].up.weight.data[3, 4].fill_(float("nan"))),
    "mask": ("weights_not_finite", lambda m: m.mask[2, 1].fill_(float("nan"))),
    "layers.2.down.weight": ("weights_absurd", lambda m: m.layers[2].down.weight.data.mul_(100)),
    "layers.3.up.weight": ("weights_constant", lambda m: m.layers[3].up.weight.data.zero_()),
    "head.weight": ("weights_constant", lambda m: nn.init.constant_(m.head.weight, 0.02)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str) -> None:
    kind, damage = FAULTS[name]
    model = Model()
    damage(model)
    (found,) = at_start(model)
    assert (found.kind, found.step, found.ordinary) == (kind, 0, False)
    assert found.cause.place.parameter + found.cause.place.tensor == name


def test_the_first_damaged_number_is_named() -> None:
    model = Model(1)
    model.layers[0].up.weight.data[3, 4:6] = float("inf")
    found = at_start(model)[0]
    assert found.cause.evidence == {"damaged numbers": 2, "of": 2048, "first index": "[3, 4]", "value": "inf"}
    assert found.cause.place.module == "layers.0.up"


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.layers[0].down.weight.data.mul_(300),
        lambda m: m.layers[0].up.weight.data[1, 1].fill_(3e30),
        lambda m: m.embed.weight.data[7, 1].fill_(-40000),
        lambda m: m.layers[0].attention.out_proj.weight.data.mul_(0.0).add_(torch.randn(32, 32)).mul_(40),
    ],
)
def test_absurd_weights_are_named_without_siblings(damage: Callable[[Model], Any]) -> None:
    model = Model(1)
    damage(model)
    (found,) = at_start(model)
    assert found.kind == "weights_absurd"
    assert "layers.0" in found.cause.place.parameter or "embed" in found.cause.place.parameter


@pytest.mark.parametrize(("gradient", "words"), [(1.0, "by the optimizer's update"), (float("nan"), "given to the")])
def test_weights_that_an_update_damages_are_named_with_the_steps(gradient: float, words: str) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, config=WatchConfig(every=2), detectors=[UnsoundWeights()]) as watch:
        for step in range(5):
            with watch.step():
                optimizer.zero_grad()
                (model(torch.randn(2, 4)).sum() * (gradient if step == 2 else 1.0)).backward()
                optimizer.param_groups[0]["lr"] = float("inf") if step == 2 and gradient == 1.0 else 0.1
                optimizer.step()
    (found,) = [finding for finding in watch.findings if finding.kind != "not_finite"]  # that is the tracer's
    assert (found.kind, found.step, found.since) == ("weights_not_finite", 2, 1)
    assert "between the ends of steps 0 and 2" in found.what
    assert words in found.cause.what
    assert found.cause.whose == "optimizer"
