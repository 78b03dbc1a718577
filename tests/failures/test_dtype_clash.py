"""masked_scatter: expected self and source to have same dtypes but got BFloat16 and Float (Higgs Audio v2).

Also: `Index put requires the source and destination dtypes match`, `expected scalar type Half but found Float`,
`expected m1 and m2 to have the same dtype`; upcast norms, upcast_layernorm, cast_training_params, FP32 embeddings.

Recipes that cast some weights of a 16-bit model to float32 (its norms, or whatever is trained) do not fit models that
write one part of their hidden states into another.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from rawloop import PrecisionConfig, PrecisionPolicy
from rawloop.families import ModelConfig, load_family

CPU = torch.device("cpu")
Loss = Callable[[nn.Module], Tensor]


@pytest.fixture(scope="module")
def family(demo_checkpoint: Path) -> Any:
    return load_family(ModelConfig(path=str(demo_checkpoint / "model")))


def upcast_norms(model: nn.Module) -> None:
    """What peft's and LLaMA-Factory's helpers do to keep norms stable: every vector of weights in float32."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("dtype", "word"), [(torch.bfloat16, "BFloat16"), (torch.float16, "Half")])
def test_higgs_with_float32_norms_over_16_bit_weights_raises(
    family: Any, dtype: torch.dtype, word: str, autocast: bool
) -> None:
    model = family.load_model().to(dtype)
    upcast_norms(model)
    # torch 2.13 leaves out the blank: "but gotBFloat16 and Float"
    message = rf"masked_scatter: expected self and source to have same dtypes but got ?{word} and Float"
    with pytest.raises(RuntimeError, match=message), torch.autocast("cpu", dtype=dtype, enabled=autocast):
        model(**family.probe().inputs)


def test_llama_with_float32_norms_over_fp16_weights_raises(llama: Callable[..., Any], loss_of: Loss) -> None:
    model = llama(torch.float16)
    upcast_norms(model)
    with pytest.raises(RuntimeError, match="expected m1 and m2 to have the same dtype, but got: float != c10::Half"):
        loss_of(model)


class TwoEmbeddings(nn.Module):
    """A small speech model: audio codes are embedded into the places that the text leaves open."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.audio, self.head = nn.Embedding(32, 16), nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)

    def forward(self, input_ids: Tensor, codes: Tensor) -> Tensor:
        hidden = self.text(input_ids)
        hidden[input_ids == 0] = self.audio(codes)
        logits: Tensor = self.head(hidden[input_ids == 0])
        return logits


TEXT, CODES = torch.tensor([[3, 4, 0, 0, 0, 0, 5]]), torch.tensor([7, 13, 29, 31])


def cast_trained_weights(model: nn.Module) -> None:
    """The recipe against `Attempting to unscale FP16 gradients.`: float32 for what is trained, and for that only."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def test_casting_only_what_is_trained_breaks_a_model_of_two_embeddings() -> None:
    model = TwoEmbeddings().bfloat16()
    model.audio.requires_grad_(False)
    cast_trained_weights(model)
    message = "Index put requires the source and destination dtypes match, got Float for the destination and BFloat16"
    with pytest.raises(RuntimeError, match=message), torch.autocast("cpu", dtype=torch.bfloat16):
        model(TEXT, CODES)


class Adapted(nn.Module):
    """A frozen 16-bit layer and low-rank weights beside it, multiplied as many hand-written adapters do it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(16, 64, bias=False).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(16, 4) * 0.1), nn.Parameter(torch.zeros(4, 64))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + torch.einsum("...i,ir,ro->...o", hidden, self.down, self.up)  # type: ignore[no-any-return]


def test_float32_adapters_over_fp16_activations_raise() -> None:
    model = Adapted().half()
    cast_trained_weights(model)
    with pytest.raises(RuntimeError, match="expected scalar type Half but found Float"):
        model(torch.randn(4, 16).half())


def learn(model: nn.Module, loss_of: Callable[[], Tensor], mode: Any, steps: int, lr: float) -> list[float]:
    """Train with rawloop's policy; loss before every step and after the last."""
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    model = policy.prepare(model)
    optimizer = AdamW([p for _, p in policy.named_parameters()], lr=lr)
    losses = []
    for _ in range(steps):
        with policy.autocast():
            loss = loss_of()
        losses.append(loss.item())
        policy.backward(loss)
        assert policy.step(optimizer, 1.0).applied
    with torch.no_grad(), policy.autocast():
        return [*losses, loss_of().item()]


def test_rawloop_trains_the_norms_of_a_16_bit_higgs_as_float32_does(family: Any) -> None:
    batch, losses = family.probe(), {}
    for mode in ("fp32", "bf16"):
        model = family.load_model().to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)

        def loss_of(model: nn.Module = model) -> Tensor:
            streams = family.losses(model, batch).values()
            return torch.stack([stream.total / stream.targets for stream in streams]).sum()

        losses[mode] = learn(model, loss_of, mode, steps=6, lr=0.1)
        held = {p.dtype for p in model.parameters() if p.ndim == 1}
        assert held == {torch.float32}
    assert losses["fp32"][-1] < losses["fp32"][0] - 1.0
    assert losses["bf16"][-1] == pytest.approx(losses["fp32"][-1], abs=0.1)


def test_rawloop_trains_one_of_two_embeddings_as_float32_does() -> None:
    losses = {}
    for mode in ("fp32", "bf16", "amp_fp16"):
        model = TwoEmbeddings().bfloat16()
        model.audio.requires_grad_(False)

        def loss_of(model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(TEXT, CODES).float(), CODES)

        losses[mode] = learn(model, loss_of, mode, steps=30, lr=0.03)
        assert model.audio.weight.dtype == torch.float32
    assert losses["fp32"][-1] < losses["fp32"][0] - 1.0
    assert losses["bf16"][-1] == pytest.approx(losses["fp32"][-1], abs=0.02)
    assert losses["amp_fp16"][-1] == pytest.approx(losses["fp32"][-1], abs=0.02)


def test_rawloop_trains_float32_adapters_over_an_fp16_layer_as_float32_does() -> None:
    losses = {}
    hidden, targets = torch.randn(8, 16), torch.arange(8)
    for mode in ("fp32", "bf16", "amp_fp16"):
        model = Adapted().half()

        def loss_of(model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(hidden).float(), targets)

        losses[mode] = learn(model, loss_of, mode, steps=30, lr=0.03)
        computed = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp_fp16": torch.float16}
        assert model.base.weight.dtype == computed[mode]
    assert losses["fp32"][-1] < losses["fp32"][0] - 1.0
    assert losses["bf16"][-1] == pytest.approx(losses["fp32"][-1], abs=0.05)
    assert losses["amp_fp16"][-1] == pytest.approx(losses["fp32"][-1], abs=0.05)
