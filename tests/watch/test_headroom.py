"""Outputs near the limit of their dtype, and hooks that leave no trace."""

import pytest
import torch

from rawloop.watch.findings import Finding
from rawloop.watch.headroom import Headroom
from rawloop.watch.look import Look
from rawloop.watch.subject import StepRecord, Subject
from rawloop.watch.wrappers import is_compiled
from tests.watch.loops import Model, looking, watched


def kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


def test_outputs_near_the_limit_of_fp16_are_named_with_their_bits() -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].up.bias[3] = 20_000
    findings = watched(model, looking(Headroom), dtype=torch.float16, scaler=torch.amp.GradScaler("cpu"), steps=1)
    (found,) = [finding for finding in findings if finding.kind == "headroom"]
    assert (found.cause.whose, found.cause.place.module) == ("precision", "layers.1.up")
    assert found.cause.evidence["head room in bits"] == pytest.approx(1.7, abs=0.1)
    assert watched(model, looking(Headroom), dtype=torch.bfloat16, steps=1) == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_healthy_loop_is_quiet_and_keeps_no_hooks(dtype: torch.dtype | None) -> None:
    model = Model()
    assert watched(model, looking(Headroom), dtype=dtype, every=1) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_gets_no_hooks() -> None:
    model = Model()
    subject = Subject(model, [], None, model.named_parameters, compiled=True)
    look = Look()
    (finding,) = look.start(subject)
    assert (finding.kind, finding.ordinary) == ("modules_not_seen", True)
    look.batch(subject, StepRecord(0, probing=True))
    assert not any(module._forward_hooks for module in model.modules())
    assert list(look.start(Subject(model, [], None, model.named_parameters))) == []
    assert not is_compiled(model)
    model.layers[0]._compiled_call_impl = print  # as Module.compile does
    assert is_compiled(model)
