"""Function 'LogSoftmaxBackward0' returned nan values in its 0th output.

RuntimeError, torch.autograd.set_detect_anomaly, detect_anomaly, loss is nan, which batch, attention mask all False.

Anomaly detection names the last operation of the loss, at the price of a much slower run, and finds nothing in a pass
that has no backward. Which sample it was, and whether its weights and inputs were sound, is left to the reader.
"""

import math
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawloop.contracts import Batch, Family, Labels, StreamLoss
from rawloop.diagnose.verdict import judge, read_losses
from rawloop.losses import LossModule

NAMES = ["first", "second", "padded", "last"]


class Attention(nn.Module):
    """A softmax over nothing is NaN."""

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden_from = torch.where(mask, 0.0, -math.inf)[:, None]
        return (hidden @ hidden.transpose(1, 2) + hidden_from).softmax(-1) @ hidden


class Reader(nn.Module):
    """A model of one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Embedding(8, 4), Attention(), nn.Linear(4, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        made: Tensor = self.head(self.attention(self.embed(input_ids), attention_mask))
        return made


class Readers:
    """As much of a family as the first loss asks for. Examples are names; that of `padded` is masked whole."""

    streams = ("text",)

    def collate(self, names: list[str]) -> Batch:
        ids = torch.arange(6).repeat(len(names), 1)
        mask = torch.tensor([name != "padded" for name in names])[:, None].expand(-1, 6)
        labels = Labels(torch.arange(6 * len(names)), ids.flatten() + 1)
        return Batch({"input_ids": ids, "attention_mask": mask}, {"text": labels}, {"text": ids.numel()}, names)

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"text": model(**batch.inputs).flatten(0, 1)}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        logits, targets = self.logits(model, batch)["text"], batch.labels["text"].targets
        return {"text": StreamLoss(F.cross_entropy(logits, targets, reduction="sum"), batch.targets["text"])}


def go_back_watched(family: Readers, model: nn.Module) -> None:
    with torch.autograd.detect_anomaly():
        torch.autograd.backward(family.losses(model, family.collate(NAMES))["text"].total)


def test_anomaly_detection_names_an_operation_and_no_sample() -> None:
    family, model = Readers(), Reader()
    loss = family.losses(model, family.collate(NAMES))["text"].total
    assert math.isnan(loss.item())  # and nothing has been said
    with pytest.warns(UserWarning, match="Anomaly Detection|Error detected"), pytest.raises(RuntimeError) as caught:
        go_back_watched(family, model)
    assert str(caught.value).startswith("Function 'LogSoftmaxBackward0' returned nan values in its 0th output.")
    assert not any(name in str(caught.value) for name in NAMES)


def test_rawloop_says_which_sample_which_input_and_which_module() -> None:
    family: Any = Readers()
    groups = [NAMES[:2], NAMES[2:]]
    batches = [family.collate(group) for group in groups]
    module = LossModule(Reader(), family.losses)
    reading = read_losses(cast(Family, family), module, batches, nullcontext, groups)["text"]
    verdict = judge("text", reading, math.log(8))
    assert verdict.kind == "DEAD"
    assert verdict.why == (
        "its loss is not finite: the sample padded alone causes it; 1 row(s) of its "
        "'attention_mask' mask every position; the first that is not finite is the output of 'attention' (float32): a "
        "mask blocks every position of a row, and torch.Tensor.softmax makes NaN from it "
        "(test_nan_without_a_name.py:30: return (hidden @ hidden.transpose(1, 2) + hidden_from).softmax(-1) @ hidden)"
    )
