"""Why the census stops a run: with the stop token masked a model unlearns to stop, and no loss shows it."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.contracts import IGNORE, Batch, Labels
from rawloop.families.higgs_audio_v2 import HiggsAudioV2

EOS = 1025


@torch.no_grad()
def stops(family: HiggsAudioV2, model: nn.Module, batch: Batch) -> tuple[float, float]:
    """How likely the model ends a clip where it ends, and its mean loss over the codes before that, nats."""
    targets = batch.labels["audio"].targets
    logs = family.logits(model, batch)["audio"].log_softmax(-1)
    of_target = logs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    ends, codes = targets == EOS, (targets != IGNORE) & (targets != EOS)
    return float(of_target[ends].exp().mean()), float(-of_target[codes].mean())


def without_stop_tokens(batch: Batch) -> Batch:
    """Label as the processor of transformers does."""
    positions, targets = batch.labels["audio"]
    masked = targets.masked_fill(targets == EOS, IGNORE)
    labels = {**batch.labels, "audio": Labels(positions, masked)}
    return Batch(batch.inputs, labels, {**batch.targets, "audio": int((masked != IGNORE).sum())}, batch.ids)


def fine_tune(family: HiggsAudioV2, model: nn.Module, batch: Batch, steps: int) -> nn.Module:
    model = deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        losses = family.losses(model, batch)
        torch.stack([loss.total / loss.targets for loss in losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_model_unlearns_to_stop_where_the_stop_token_is_masked(
    family: HiggsAudioV2, examples: list[Any], loaded_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = family.collate(examples[:2])
    rows = {"random weights": stops(family, loaded_model, batch)}
    learnt = fine_tune(family, loaded_model, batch, 25)
    rows["25 steps with our labels"] = stops(family, learnt, batch)
    rows["25 more with our labels"] = stops(family, fine_tune(family, learnt, batch, 25), batch)
    rows["25 more, stop token masked"] = stops(family, fine_tune(family, learnt, without_stop_tokens(batch), 25), batch)
    for name, (probability, loss) in rows.items():
        print(f"{name:28} P(EOS at the end) {probability:.4f}  loss of the codes {loss:.3f}")
    chance, taught, longer, masked = rows.values()
    assert chance[0] < 0.002
    assert taught[0] > 0.2
    assert longer[0] > taught[0]
    assert masked[0] < 0.3 * taught[0]
    assert masked[0] < 0.1 * longer[0]
    assert masked[1] < longer[1] + 0.05  # and the loss looks as good
