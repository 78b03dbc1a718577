"""What is said of a loss or a gradient that is not finite: what was found, with sample and module, and no more."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawloop.contracts import Batch, Family, Labels, StreamLoss
from rawloop.diagnose.verdict import read_losses
from rawloop.losses import LossModule

GOOD, BAD = ("a", 1.0), ("bad", 2.0)


class Attention(nn.Module):
    """Rows that see nothing become NaN, as in a softmax of their own making."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        scores = hidden @ hidden.transpose(1, 2) + torch.zeros_like(mask).masked_fill(mask == 0, -math.inf)[:, None]
        return scores.softmax(-1) @ hidden


class Log(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.relu().log() if hidden.amin() < -5 else hidden


class Tiny(nn.Module):
    """Looks up ids, adds a feature, attends."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention, self.tail, self.head = nn.Embedding(9, 8), Attention(), tail, nn.Linear(8, 9)

    def forward(self, ids: Tensor, features: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(ids) + features[:, None, None]
        made: Tensor = self.head(self.tail(self.attention(hidden, attention_mask)))
        return made


class Scored:
    """Samples are (name, feature); `spoil` is what happens to a batch, `loss` how logits and targets are scored."""

    streams = ("s",)

    def __init__(self) -> None:
        self.spoil: Callable[[Batch], Batch] = lambda batch: batch
        self.loss: Callable[[Tensor, Tensor], Tensor] = partial(F.cross_entropy, reduction="sum")

    def collate(self, examples: list[tuple[str, float]]) -> Batch:
        count = len(examples)
        inputs = {
            "ids": torch.arange(4).repeat(count, 1),
            "features": torch.tensor([value for _, value in examples]),
            "attention_mask": torch.ones(count, 4),
        }
        labels = Labels(torch.arange(4 * count), torch.arange(1, 5).repeat(count))
        return self.spoil(Batch(inputs, {"s": labels}, {"s": 4 * count}, [name for name, _ in examples]))

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"s": model(**batch.inputs).flatten(0, 1).float()}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        total = self.loss(self.logits(model, batch)["s"], batch.labels["s"].targets)
        return {"s": StreamLoss(total, batch.targets["s"])}


@pytest.fixture
def family() -> Scored:
    return Scored()


def said(family: Scored, tail: nn.Module | None = None, autocast: Any = nullcontext, **weights: float) -> str:
    """What is found of two batches of two samples, one of which is `bad`."""
    model = Tiny(tail or nn.Identity())
    for name, value in weights.items():
        model.get_parameter(name.replace("_", ".")).data.flatten()[0] = value
    groups = [[GOOD, ("b", 1.0)], [("c", 1.0), BAD]]
    batches = [family.collate(group) for group in groups]
    module = LossModule(model, family.losses)
    return read_losses(cast(Family, family), module, batches, autocast, groups)["s"].not_finite


def line(text: str) -> str:
    """The one line of this file that starts with a text, as a message shows it."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    ((number, found),) = [(n, one) for n, one in enumerate(lines, 1) if one.strip().startswith(text)]
    return f"({Path(__file__).name}:{number}: {found.partition('  #')[0].strip()})"


def test_nothing_is_said_and_no_sample_is_run_alone_while_all_is_well(family: Scored) -> None:
    made: list[int] = []

    def spoil(batch: Batch) -> Batch:
        made.append(len(batch.ids))
        return batch

    family.spoil = spoil
    assert said(family) == ""
    assert made == [2, 2]


def test_a_weight_that_is_damaged(family: Scored) -> None:
    assert (
        said(family, head_weight=math.inf)
        == "its loss is not finite: the weight 'head.weight' is not finite (1 of 72 numbers)"
    )


def test_a_buffer_that_is_damaged(family: Scored) -> None:
    norm = nn.BatchNorm1d(4).eval()
    cast(Tensor, norm.running_mean)[2] = math.nan
    assert "the buffer 'tail.running_mean' is not finite (1 of 4 numbers)" in said(family, norm)


def change(name: str, value: float) -> Callable[[Batch], Batch]:
    """Change the bad sample's row of an input."""

    def spoil(batch: Batch) -> Batch:
        if "bad" in batch.ids:
            batch.inputs[name][batch.ids.index("bad")] = value
        return batch

    return spoil


def test_a_feature_that_is_nan(family: Scored) -> None:
    family.spoil = change("features", math.nan)
    assert said(family).startswith(
        "its loss is not finite: the sample bad alone causes it; its input 'features' is not finite; "
    )


def test_a_row_that_is_masked_whole(family: Scored) -> None:
    family.spoil = change("attention_mask", 0)
    assert said(family) == (
        "its loss is not finite: the sample bad alone causes it; 1 row(s) of "
        "its 'attention_mask' mask every position; the first that is not finite is the output of 'attention' (float32)"
        ": a mask blocks every position of a row, and torch.Tensor.softmax makes NaN from it "
        + line("return scores.softmax(-1)")
    )


def test_the_logarithm_of_zero_in_the_model(family: Scored) -> None:
    family.spoil = change("features", -9.0)
    found = said(family, Log())
    assert (
        "bad alone causes it; all weights and inputs are finite; the first that is not finite is the output of 'tail' "
        "(float32): log of 0 " + line("return hidden.relu().log()") in found
    )


def test_the_logarithm_of_zero_in_the_loss(family: Scored) -> None:
    family.loss = lambda logits, targets: -(1e4 * logits).softmax(-1).gather(1, targets[:, None]).log().sum()
    assert said(family) == (
        "its loss is not finite: each of the samples a, b causes it alone; all weights and inputs are finite; the "
        "model's output is finite, and the loss computed from it is not: log of 0 "
        + line("family.loss = lambda logits, targets: -(1e4")
    )


def test_a_dtype_with_too_little_range(family: Scored) -> None:
    found = said(family, nn.Linear(8, 8), partial(torch.autocast, "cpu", dtype=torch.float16), tail_weight=1e5)
    assert (
        "are finite; the first that is not finite is the output of 'tail' (float16): torch.nn.functional.linear"
        in found
    )
    assert found.endswith(
        " in float32, and float16 ends at 65504; the weight 'tail.weight' has values up to 1e+05; without autocast, in "
        "float32, it is finite"
    )


def test_samples_that_give_it_only_together(family: Scored) -> None:
    family.loss = lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum") / (8 - len(targets))
    assert "no sample alone causes it, only the samples a, b together; all weights and inputs are" in said(family)


class Root(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + (hidden * 0).abs().sqrt()  # whose derivative at 0 is 0 x infinity


def test_a_gradient_that_is_not_finite_under_a_loss_that_is(family: Scored) -> None:
    found = said(family, Root())
    assert found.startswith(
        "its loss is finite, and its gradient is not: each of the samples a, b causes it alone; all "
    )
    assert found.endswith(
        "in backward, the first gradient that is not finite (float32) is made in 'tail': the backward pass of sqrt at "
        "0 makes infinity from finite gradients " + line("return hidden + (hidden * 0)")
    )


class Norm(nn.Module):
    """Takes the mean over a batch, which must be one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = Root()(hidden + self.norm(hidden.mean(1))[:, None])
        return made


def test_a_model_that_takes_no_sample_alone(family: Scored) -> None:
    found = said(family, Norm())
    assert found.startswith(
        "its loss is finite, and its gradient is not: in the batch of the samples a, b; all weights and inputs are"
    )
