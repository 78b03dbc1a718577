"""Healthy loops that look ill to a watch that knows too little."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults.form import Control
from tests.faults.loops import CHARACTERS, CONTEXT, CharGpt, Gpt
from tests.faults.scripts import Images, Llama, Lora


class ScalerStart(Images):
    """The first skips of a scaler that starts high."""

    first_scale = 2.0**24
    steps = 40


class Bf16(CharGpt):
    """Float32 weights under bfloat16 autocast, with dropout."""

    def make_model(self) -> nn.Module:
        return Gpt(dropout=0.1)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)


class SpikeThatRecovers(CharGpt):
    """One batch of noise at step 40, from which training recovers."""

    steps = 60

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = super().get_batch(step)
        return x, (torch.randint(0, CHARACTERS, y.shape) if step == 40 else y)


class AdditiveMask(CharGpt):
    """The batch has an additive attention mask, with -inf where nothing may be seen."""

    def extras(self) -> dict[str, Tensor]:
        return {"mask": torch.full((self.batch_size, 1, CONTEXT, CONTEXT), float("-inf")).triu(1)}

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x, mask=self.extras()["mask"]).flatten(0, 1), y.flatten())


class TiedWeights(CharGpt):
    """The head is the embedding."""

    def make_model(self) -> nn.Module:
        model = Gpt()
        nn.init.normal_(model.wte.weight, std=0.05)
        model.head.weight = model.wte.weight
        return model


class FrozenStem(Images):
    """The stem is frozen; its BatchNorm goes on counting."""

    first_scale = 2.0**10

    def make_model(self) -> nn.Module:
        model = super().make_model()
        model.get_submodule("stem").requires_grad_(False)
        return model


CONTROLS = (
    Control("a scaler's first skips", ScalerStart),
    Control("bfloat16 autocast and dropout", Bf16),
    Control("a spike that recovers", SpikeThatRecovers),
    Control("additive masks with -inf", AdditiveMask),
    Control("tied weights", TiedWeights),
    Control("a frozen stem with BatchNorm", FrozenStem),
    Control("LoRA with accumulation and dropout", Lora),
    Control("a plain fine-tuning", Llama),
)
