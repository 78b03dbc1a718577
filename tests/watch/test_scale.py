"""The loss scale: ordinary skips, a scale that collapses, none at all, and one that is too low."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.watch.findings import Finding, Findings
from rawloop.watch.look import Look
from rawloop.watch.scale import LossScale
from rawloop.watch.subject import StepRecord, Subject
from tests.watch.loops import Model, looking, mean_loss, watched

FP16 = torch.float16


class Scaler:
    """A scaler as far as a watch reads it."""

    def __init__(self, scale: float = 2.0**16) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


def history(applied: str, scaler: Scaler, loss: float = 1.0, backoff: float = 0.5) -> list[Finding]:
    """Tell a detector of steps that were applied (`+`) or skipped (`-`)."""
    detector, findings = LossScale(Look()), Findings()
    subject = Subject(torch.nn.Linear(1, 1), [], scaler, lambda: [])
    detector.start(subject)
    for step, mark in enumerate(applied):
        scaler.scale *= 1 if mark == "+" else backoff
        findings.extend(detector.end(subject, StepRecord(step, loss=loss, applied=mark == "+")))
    return list(findings)


def test_the_first_skips_of_a_real_scaler_are_ordinary_and_counted() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    findings = watched(Model(), looking(LossScale), dtype=FP16, scaler=scaler, steps=12)
    assert all(finding.ordinary for finding in findings)
    (found,) = [finding for finding in findings if finding.kind == "scale_search"]
    assert found.times == found.cause.evidence["skips"]
    assert found.cause.evidence["first scale"] == 2.0**24


def test_every_skip_adds_to_the_history() -> None:
    (found,) = history("---+", Scaler())
    assert found.cause.evidence["last scales"] == "32768 16384 8192"
    assert found.cause.evidence["scale"] == 8192


@pytest.mark.parametrize(
    ("applied", "scale", "backoff", "kind", "words"),
    [
        ("-" * 17, 2.0**16, 0.5, "scale_collapses", "halved 17 times"),
        ("+" + "-" * 31, 2.0**60, 0.5, "scale_collapses", "halved 31 times"),
        ("-" * 142, 2.0**16, 0.5, "scale_collapses", "overflows float32"),
        ("+" + "-" * 10, 2.0**16, 0.5, "skips_often", "10 steps in a row"),
        ("-" * 10, 2.0**16, 1.0, "skips_often", "10 steps in a row"),
        ("+--" * 10, 2.0**24, 1.0, "skips_often", "67% of the last 30 steps"),
        ("+" * 100 + "+++++++-" * 13, 2.0**16, 1.0, "skips_often", "of the last 100 steps"),
    ],
)
def test_skips_that_are_not_ordinary(applied: str, scale: float, backoff: float, kind: str, words: str) -> None:
    found = {finding.kind: finding for finding in history(applied, Scaler(scale), backoff=backoff)}
    assert not found[kind].ordinary
    assert words in found[kind].cause.what


@pytest.mark.parametrize("applied", ["-" * 12 + "+" * 50, "--+-+++", ("+" * 60 + "-") * 4])
def test_usual_skips_are_ordinary(applied: str) -> None:
    assert all(finding.ordinary for finding in history(applied, Scaler(2.0**24)))


def test_a_loss_that_is_not_a_number_is_not_the_scalers_fault() -> None:
    (found,) = history("-", Scaler(), loss=math.nan)
    assert (found.kind, found.cause.whose, found.ordinary) == ("skip_of_bad_loss", "not known", False)


def tiny(model: Any, ids: Tensor, step: int) -> Tensor:
    return mean_loss(model, ids, step) / 2**12


@pytest.mark.parametrize(
    ("scaler", "kind"),
    [
        (None, "no_loss_scaling"),
        (torch.amp.GradScaler("cpu", enabled=False), "no_loss_scaling"),
        (torch.amp.GradScaler("cpu", init_scale=1.0), "scale_too_low"),
    ],
)
def test_a_scale_that_lets_fp16_flush_gradients(scaler: Any, kind: str) -> None:
    (found,) = watched(Model(), looking(LossScale), dtype=FP16, scaler=scaler, loss=tiny, steps=2)
    assert (found.kind, found.cause.whose, found.ordinary) == (kind, "precision", False)
    assert float(found.cause.evidence["lost"]) + float(found.cause.evidence["subnormal"]) > 0.5
    assert float(found.cause.evidence["most lost"]) > 0.05
    assert found.cause.place.parameter in dict(Model().named_parameters())
    better = float(found.cause.advice.rpartition(" ")[2])
    scaler = torch.amp.GradScaler("cpu", init_scale=better)
    assert watched(Model(), looking(LossScale), dtype=FP16, scaler=scaler, loss=tiny, steps=2) == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_without_fp16_no_scale_is_needed(dtype: torch.dtype | None) -> None:
    assert watched(Model(), looking(LossScale), dtype=dtype, loss=tiny) == []


def test_an_ordinary_scaler_is_quiet() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert watched(Model(), looking(LossScale), dtype=FP16, scaler=scaler, every=1) == []


@pytest.mark.parametrize(("init", "kind"), [(2.0**15, None), (1.0, "scale_too_low")])
def test_a_scale_of_rawloops_own_policy_is_judged(init: float, kind: str | None) -> None:
    model = Model()
    policy = PrecisionPolicy(PrecisionConfig("amp_fp16", loss_scale=LossScaleConfig(init=init)), "cpu")
    policy.prepare(model)
    look, record = Look(), StepRecord(0, probing=True)
    subject = Subject(model, [], policy.scaler, policy.named_parameters)
    look.batch(subject, record)
    ids = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(0))
    with policy.autocast():
        loss = tiny(model, ids, 0)
    policy.backward(loss)
    record.scale = init
    look.gradients(subject, record)
    look.end(subject, record)
    assert [finding.kind for finding in LossScale(look).end(subject, record)] == ([kind] if kind else [])
