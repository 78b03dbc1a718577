"""The second half of the faults: mistakes in the data, and jumps."""

import time

import torch
from torch import Tensor, nn

from rawloop.watch.findings import Finding
from tests.faults.form import Fault, within
from tests.faults.loops import Attention, CharGpt, Ddp, Denoiser, Gpt
from tests.faults.scripts import IGNORE, PAD, Images, Lora
from tests.faults.second_loops import Table, Waves


# ------------------------------------------------------------------------------------------------------------- data
class PaddingAsTarget(Lora):
    """The labels are padded with the tokenizer's padding id, which the loss does not ignore."""

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        batch = super().collate(indices)
        padding = batch["attention_mask"] == 0
        return batch | {"labels": batch["labels"].masked_fill(padding & (batch["labels"] == IGNORE), PAD)}


class SixteenBits(Waves):
    """From step 8 the third clip of a batch comes from a reader that returns 16-bit integers, unscaled."""

    def waves(self, step: int) -> tuple[Tensor, Tensor]:
        waves, classes = super().waves(step)
        if step >= 8:
            waves[2] = (waves[2] * 32768).round()
        return waves, classes


class MultipliedMask(Attention):
    """The causal mask is multiplied with the scores: a hidden position has the score 0, and is seen."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5
        weights = torch.softmax(scores * torch.ones(t, t).tril(), -1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(b, t, c))
        return mixed


class SeesTheFuture(CharGpt):
    """Attention with a causal mask that hides nothing."""

    def make_model(self) -> nn.Module:
        model = Gpt()
        for block in model.blocks:
            block.attn = MultipliedMask(32, 4)
        return model


class ClassBeyondHead(Images):
    """One image of step 6 has class 5 of the classes 0 to 4."""

    def images(self, step: int) -> tuple[Tensor, Tensor]:
        images, classes = super().images(step)
        if step == 6:
            classes[1] = 5
        return images, classes


class SameOnEveryRank(Ddp):
    """The loader does not know its rank: all ranks train on the same clips."""

    def batch(self, step: int) -> dict[str, Tensor]:
        return Denoiser.batch(self, step)

    def ids(self, step: int) -> list[str]:
        return Denoiser.ids(self, step)


# ------------------------------------------------------------------------------------------------------------ jumps
class OtherUnit(Table):
    """One price of step 14 is in another unit, 2000 times as large."""

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = super().batch(step)
        if step == 14:
            batch["price"][5] = 2000.0
        return batch


class SlowLoader(Denoiser):
    """From step 14 a clip is read from a slow disk."""

    def batch(self, step: int) -> dict[str, Tensor]:
        if step >= 14:
            time.sleep(0.15)
        return super().batch(step)


class ScaleOfAnotherJob(Images):
    """Before step 12 the scaler gets the state of another job, whose scale was 2**40."""

    steps = 24

    def on_step_end(self, step: int) -> None:
        if step == 11:
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": 2.0**40})


def _tensor_is(finding: Finding, *names: str) -> bool:
    return any(name in finding.cause.place.tensor for name in names)


FAULTS = (
    Fault(
        "padding is a target",
        "data",
        PaddingAsTarget,
        ("data", "loss"),
        r"padd|\bpad\b|attention.mask|ignore|masked position",
        lambda f: _tensor_is(f, "labels") and within(f, 0, 5),
    ),
    Fault(
        "16-bit samples without scaling from step 8",
        "data",
        SixteenBits,
        ("data",),
        r"range|magnitude|larg|size|scal|3276|16.bit|int16|times|jump|ordinary|outlier|history",
        lambda f: (_tensor_is(f, "wave") or f.cause.place.sample == "wav-66") and within(f, 8, 9),
    ),
    Fault(
        "a causal mask that is multiplied",
        "data",
        SeesTheFuture,
        ("model", "data", "loss"),
        r"future|causal|leak|ahead|later|can see|sees|own target|visible",
        lambda f: (
            any(name in f.cause.place.module for name in ("attn", "blocks"))
            or f.cause.place.tensor in ("x", "y")
            or any(name in f.cause.place.expression for name in ("softmax", "tril", "cross_entropy"))
        ),
    ),
    Fault(
        "a class beyond the head",
        "data",
        ClassBeyondHead,
        ("data",),
        r"outside|beyond|out of|range|bound|no class|only \d+|too large|exceed",
        lambda f: f.cause.place.sample == "img-49" and f.step == 6,
        mentions=r"img-49",
        crash=IndexError,
    ),
    Fault(
        "the same clips on both ranks",
        "data",
        SameOnEveryRank,
        ("data", "distributed"),
        r"same|identical|equal|duplicat|shard|repeat",
        lambda f: within(f, 0, 5),
    ),
    Fault(
        "one price in another unit",
        "jumps",
        OtherUnit,
        ("data",),
        r"loss|norm|jump|spike|outlier|larg|history",
        lambda f: within(f, 14, 14),
    ),
    Fault(
        "reading slows down at step 14",
        "jumps",
        SlowLoader,
        ("data", "hardware"),
        r"data|load|wait|read",
        lambda f: within(f, 14, 15),
    ),
    Fault(
        "the scaler gets another job's scale",
        "jumps",
        ScaleOfAnotherJob,
        ("precision", "optimizer"),
        r"scale|skip|overflow",
        lambda f: within(f, 11, 16),
    ),
)
