"""Healthy loops that look suspicious."""

import copy
import math

import torch
from torch import Tensor, nn

from tests.faults.form import Control
from tests.faults.loops import CharGpt, Codec
from tests.faults.scripts import IGNORE, PAD, Llama
from tests.faults.second_loops import Ctc, Gan, Table


class WarmRestarts(CharGpt):
    """A cosine that starts again each ten steps, as SGDR does."""

    steps = 30

    def learning_rate(self, step: int) -> float:
        return self.lr * 0.5 * (1.02 + math.cos(math.pi * (step % 10) / 10))


class ZeroHead(Table):
    """The last layer starts from zero, as in diffusion models and residual branches: nothing passes it in step 0."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in list(self.model.parameters())[-2:]:
            nn.init.zeros_(parameter)


class FillerRow(Llama):
    """The last batches are filled up with a row of padding only: no label, and nothing to attend to."""

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        batch = super().collate(indices)
        if indices[0] >= (self.steps - 4) * self.batch_size:
            batch["input_ids"][-1], batch["attention_mask"][-1], batch["labels"][-1] = PAD, 0, IGNORE
        return batch


class MixedRates(Codec):
    """Embeddings learn 100 times as slowly as heads; an averaged copy is kept for evaluation; 2 rows are never used."""

    def __init__(self) -> None:
        super().__init__()
        tables = [p for name, p in self.model.named_parameters() if name.startswith("embeddings")]
        others = [p for name, p in self.model.named_parameters() if not name.startswith("embeddings")]
        self.optimizer = torch.optim.AdamW([{"params": tables, "lr": 5e-5}, {"params": others, "lr": 5e-3}])
        self.average = copy.deepcopy(self.model).requires_grad_(False)

    def on_step_end(self, step: int) -> None:
        for kept, value in zip(self.average.parameters(), self.model.parameters()):
            kept.lerp_(value.detach(), 0.1)


CONTROLS = (
    Control("a GAN whose losses swing", Gan),
    Control("warm restarts of the learning rate", WarmRestarts),
    Control("a head that starts from zero", ZeroHead),
    Control("a filler row of padding", FillerRow),
    Control("rates 100 times apart, an averaged copy", MixedRates),
    Control("CTC: a loss in sum, clipped in each step", Ctc),
)
