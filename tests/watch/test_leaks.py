"""Targets that their own prediction can see."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.watch.findings import Finding
from rawloop.watch.leaks import Leaks
from rawloop.watch.subject import Pass, StepRecord, Subject

NAMES = ("a", "b", "c")


class Tiny(nn.Module):
    """One layer of attention over a window of earlier positions."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(32, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head, self.causal = nn.Linear(16, 32), causal

    def forward(self, ids: Tensor) -> Tensor:
        """Take (batch, positions); return logits (batch, positions, vocabulary)."""
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1) if self.causal else None
        return torch.as_tensor(self.head(self.layer(self.table(ids), mask)))


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, 32), labels.reshape(-1))


def probed(model: nn.Module, forward: Any, **inputs: Tensor) -> list[Finding]:
    inputs = inputs or {"ids": torch.randint(3, 32, (3, 12))}
    record = StepRecord(0, inputs, NAMES, [Pass(inputs, forward, {}, NAMES)])
    subject = Subject(model, [], None, model.named_parameters)
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    detector = Leaks()
    found = list(detector.gradients(subject, record))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert list(detector.gradients(subject, record)) == []  # once
    return found


def test_shifted_labels_are_quiet() -> None:
    model = Tiny()
    assert probed(model, lambda x: cross_entropy(model(x["ids"])[:, :-1], x["ids"][:, 1:])) == []
    assert probed(model, lambda x: F.cross_entropy(model(x["ids"])[:, :-1].mT, x["ids"][:, 1:])) == []
    ids = torch.randint(3, 32, (3, 12))
    moved = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    assert probed(model, lambda x: cross_entropy(model(x["ids"]), x["labels"]), ids=ids, labels=moved) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_own_loss_is_quiet(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    assert probed(model, lambda x: model(input_ids=x["ids"], labels=x["ids"]).loss) == []


def test_labels_that_are_not_shifted() -> None:
    model = Tiny()
    (found,) = probed(model, lambda x: cross_entropy(model(x["ids"]), x["ids"]))
    assert (found.kind, found.ordinary, found.cause.whose) == ("target_visible", False, "loss")
    assert "not shifted" in found.cause.what
    assert (found.cause.place.sample, found.cause.place.row, found.cause.place.position) == ("a", 0, 6)


def test_logits_and_labels_of_the_same_positions() -> None:
    model = Tiny()
    (found,) = probed(model, lambda x: cross_entropy(model(x["ids"])[:, 1:], x["ids"][:, 1:]))
    assert (found.kind, found.cause.whose) == ("target_visible", "loss")


def test_attention_that_is_not_causal() -> None:
    model = Tiny(causal=False)
    (found,) = probed(model, lambda x: cross_entropy(model(x["ids"])[:, :-1], x["ids"][:, 1:]))
    assert (found.kind, found.cause.whose) == ("target_visible", "model")
    assert found.cause.place.module == "layer.self_attn"


class Mixing(nn.Module):
    """A convolution over positions that looks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.conv = nn.Embedding(32, 16), nn.LayerNorm(16), nn.Conv1d(16, 16, 7, padding=3)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        """Take (batch, positions); return logits (batch, positions, vocabulary)."""
        return torch.as_tensor(self.head(self.conv(self.norm(self.table(ids)).mT).mT))


def test_a_convolution_that_looks_ahead_is_named() -> None:
    model = Mixing()
    (found,) = probed(model, lambda x: cross_entropy(model(x["ids"])[:, :-1], x["ids"][:, 1:]))
    assert (found.kind, found.cause.place.module) == ("target_visible", "conv")
    assert not any(module._forward_hooks for module in model.modules())


def test_models_that_see_the_whole_row_by_design() -> None:
    model = Tiny(causal=False)
    assert probed(model, lambda x: cross_entropy(model(x["ids"]), x["ids"])) == []  # an autoencoder
    ids = torch.randint(3, 32, (3, 12))
    hidden = torch.rand(3, 12) < 0.3
    labels = ids.masked_fill(~hidden, -100)
    given = ids.masked_fill(hidden, 1)
    assert probed(model, lambda x: cross_entropy(model(x["ids"]), x["labels"]), ids=given, labels=labels) == []
    tags = torch.randint(0, 4, (3, 12))
    assert probed(model, lambda x: cross_entropy(model(x["ids"]), x["labels"]), ids=ids, labels=tags) == []


def test_passes_without_ids_or_cross_entropy_are_left_alone() -> None:
    model = Tiny()
    assert probed(model, lambda x: model(x["ids"]).square().mean()) == []
    linear = nn.Linear(4, 4)
    assert probed(linear, lambda x: linear(x["x"]).sum(), x=torch.randn(3, 4)) == []


def test_labels_that_are_not_shifted_are_found_in_a_model_whose_head_starts_at_zero() -> None:
    model, detector = Tiny(), Leaks()
    ids = torch.randint(3, 32, (3, 12))
    one = Pass({"ids": ids}, lambda x: cross_entropy(model(x["ids"]), x["ids"]), {}, NAMES)
    found = []
    with torch.no_grad():
        head = model.head.weight.clone()
        model.head.weight.zero_()
    for step in range(12):
        found += list(
            detector.gradients(Subject(model, [], None, model.named_parameters), StepRecord(step, passes=[one]))
        )
        with torch.no_grad():
            model.head.weight.copy_(head)
    assert [(finding.kind, finding.step) for finding in found] == [("target_visible", 8)]
