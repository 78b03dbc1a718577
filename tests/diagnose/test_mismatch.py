"""A family's `losses` against its `logits`: rawloop's own agree, and what differs is found, by stream or part."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawloop.contracts import IGNORE, Batch, StreamLoss
from rawloop.diagnose.census import Census
from rawloop.diagnose.checks import Report
from rawloop.diagnose.config import ChecksConfig
from rawloop.diagnose.mismatch import find_mismatches
from rawloop.diagnose.verdict import judge, lines, read_losses
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.losses import LossModule

Losses = dict[str, StreamLoss]
Change = Callable[[HiggsAudioV2, nn.Module, Batch, Losses], Losses]
AUTOCAST: dict[str, Any] = {
    "fp32": nullcontext,
    "bf16": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "fp16": partial(torch.autocast, "cpu", dtype=torch.float16),
}


@pytest.fixture
def batch(family: HiggsAudioV2, examples: list[Any]) -> Batch:
    return family.collate(examples[:3])


def mismatches(
    family: HiggsAudioV2, module: LossModule, batch: Batch, change: Change | None = None, autocast: Any = nullcontext
) -> dict[str, str]:
    """What is found where `change` makes other losses of the family's own."""
    if change is not None:
        module.losses = lambda model, one: change(family, model, one, family.losses(model, one))
    readings = read_losses(family, module, [batch], autocast)
    return {name: reading.mismatch for name, reading in readings.items() if reading.mismatch}


@pytest.mark.parametrize("mode", AUTOCAST)
def test_losses_are_the_cross_entropy_of_the_logits_to_the_bit(
    family: HiggsAudioV2, module: LossModule, batch: Batch, mode: str
) -> None:
    with torch.no_grad(), AUTOCAST[mode]():
        losses, logits = family.losses(module.model, batch), family.logits(module.model, batch)
    assert find_mismatches(losses, logits, batch, 0.0) == {}
    targets = batch.labels["text"].targets
    assert float(F.cross_entropy(logits["text"], targets, reduction="none").sum()) == float(losses["text"].total)


def unshifted(family: HiggsAudioV2, model: nn.Module, batch: Batch, losses: Losses) -> Losses:
    """As if the positions were those of the targets: what a model that is given its labels itself makes of them."""
    labels = {s: pair._replace(positions=pair.positions + 1) for s, pair in batch.labels.items()}
    return {**losses, "text": family.losses(model, replace(batch, labels=labels))["text"]}


@pytest.mark.parametrize("mode", AUTOCAST)
def test_a_loss_that_is_not_shifted_is_found_although_the_logits_are_right(
    family: HiggsAudioV2, module: LossModule, batch: Batch, mode: str
) -> None:
    found = mismatches(family, module, batch, unshifted, AUTOCAST[mode])
    assert list(found) == ["text"]
    assert found["text"].startswith("`losses` gives 6.")
    assert "nats per target, and the cross-entropy of `logits` at the labels is 6." in found["text"]


def all_unshifted(family: HiggsAudioV2, model: nn.Module, batch: Batch, losses: Losses) -> Losses:
    labels = {s: pair._replace(positions=pair.positions + 1) for s, pair in batch.labels.items()}
    return family.losses(model, replace(batch, labels=labels))


def scaled(family: HiggsAudioV2, model: nn.Module, batch: Batch, losses: Losses) -> Losses:
    return {**losses, "audio": losses["audio"]._replace(total=losses["audio"].total * 1.01)}


def swapped(family: HiggsAudioV2, model: nn.Module, batch: Batch, losses: Losses) -> Losses:
    parts = losses["audio"].parts
    assert parts is not None
    return {**losses, "audio": losses["audio"]._replace(parts=parts[[1, 0, *range(2, 8)]])}


def miscounted(family: HiggsAudioV2, model: nn.Module, batch: Batch, losses: Losses) -> Losses:
    return {**losses, "text": losses["text"]._replace(targets=losses["text"].targets + 1)}


def smoothed(family: HiggsAudioV2, model: nn.Module, batch: Batch, losses: Losses) -> Losses:
    logits, targets = family.logits(model, batch)["text"], batch.labels["text"].targets
    total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    return {**losses, "text": losses["text"]._replace(total=total)}


def blank(family: HiggsAudioV2, model: nn.Module, batch: Batch, losses: Losses) -> Losses:
    return {**losses, "text": losses["text"]._replace(total=losses["text"].total * torch.nan)}


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        (all_unshifted, ["audio", "text"], "of `logits` at the labels is 6."),
        (scaled, ["audio"], "`losses` gives 7.0"),
        (swapped, ["audio/0", "audio/1"], "another shift, weights, a further term, or 16 bits"),
        (miscounted, ["text"], "`losses` counts 7 targets, the labels have 6"),
        (smoothed, ["text"], "`losses` gives 6."),
        (blank, [], ""),  # what is not finite is a finding of its own
    ],
)
def test_what_differs_is_named(
    family: HiggsAudioV2, module: LossModule, batch: Batch, change: Change, where: list[str], words: str
) -> None:
    found = mismatches(family, module, batch, change)
    assert list(found) == where
    assert all(words in said for said in found.values())


def test_logits_of_another_shape(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    losses, logits = family.losses(module.model, batch), family.logits(module.model, batch)
    short = {**logits, "text": logits["text"][1:]}
    assert find_mismatches(losses, short, batch, 0.0) == {"text": "`logits` gives (5, 782) for labels of (6,)"}


def test_targets_that_some_codebooks_lack(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    targets = batch.labels["audio"].targets
    assert bool((targets == IGNORE).any())
    assert mismatches(family, module, batch) == {}


def test_it_stops_a_run_unless_it_is_let_pass(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    module.losses = lambda model, one: swapped(family, model, one, family.losses(model, one))
    readings = read_losses(family, module, [batch], nullcontext)
    verdicts = [judge(name, reading, family.chance()[name.split("/")[0]]) for name, reading in readings.items()]
    assert {verdict.kind for verdict in verdicts} == {"CHANCE"}  # judged all the same
    shown = [line for line in lines(verdicts, 3, expect_chance=True) if "MISMATCH" in line]
    assert [line.split()[0] for line in shown] == ["audio/0", "audio/1"]
    assert all("6.9334  CHANCE (expected); MISMATCH: `losses` gives" in line for line in shown)
    report = Report(ChecksConfig(expect_chance=True), Census(), verdicts, {}, 0.0, 3)
    first, _ = report.problems()
    assert first.startswith("first loss of 'audio/0': MISMATCH, `losses` gives ")
    assert first.endswith("(to train anyway: --checks.allow '[mismatch]')")
    assert "audio/0 MISMATCH, audio/1 MISMATCH" in report.first_loss().summary
    assert replace(report, config=ChecksConfig(allow=["mismatch"])).problems() == []


def test_what_a_model_draws_is_drawn_alike_for_both(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    def noise(_: Any, given: Any, made: Tensor) -> Tensor:
        return made + torch.randn_like(made)

    module.model.get_submodule("text_lm_head").register_forward_hook(noise)
    assert mismatches(family, module, batch) == {}
