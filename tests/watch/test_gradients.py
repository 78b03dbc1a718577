"""Magnitudes of a loop: head room, and gradients over depth."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop.watch.findings import Finding
from rawloop.watch.gradients import Gradients
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
    findings = watched(model, looking(Gradients), dtype=torch.float16, scaler=torch.amp.GradScaler("cpu"), steps=1)
    (found,) = [finding for finding in findings if finding.kind == "headroom"]
    assert (found.cause.whose, found.cause.place.module) == ("precision", "layers.1.up")
    assert found.cause.evidence["head room in bits"] == pytest.approx(1.7, abs=0.1)
    assert watched(model, looking(Gradients), dtype=torch.bfloat16, steps=1) == []


class Stack(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(29, 16), nn.Linear(16, 29)
        layers: list[Any] = [nn.Linear(16, 16) for _ in range(8)]
        with torch.no_grad():
            for layer in layers:
                layer.weight *= size
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.sin(layer(x))
        return self.head(x)


@pytest.mark.parametrize(("size", "word"), [(0.3, "vanish"), (12.0, "explode"), (1.7, None)])
def test_gradients_that_change_over_depth_name_stack_and_layer(size: float, word: str | None) -> None:
    found = watched(Stack(size), looking(Gradients), steps=1)
    assert kinds(found) == (["gradients_over_depth"] if word else [])
    for finding in found:
        assert f"the gradients {word} over the 8 layers of 'layers'" in finding.what
        assert finding.cause.place.module.startswith("layers.")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_healthy_loop_is_quiet_and_keeps_no_hooks(dtype: torch.dtype | None) -> None:
    model = Model()
    assert watched(model, looking(Gradients), dtype=dtype, every=1) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_gets_no_hooks() -> None:
    model = Model()
    subject = Subject(model, [], None, model.named_parameters, compiled=True)
    Look().batch(subject, StepRecord(0, probing=True))
    assert not any(module._forward_hooks for module in model.modules())
    assert not is_compiled(model)
    model.layers[0]._compiled_call_impl = print  # as Module.compile does
    assert is_compiled(model)
