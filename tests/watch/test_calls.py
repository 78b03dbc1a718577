"""Inputs that do not reach the model."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.watch.batches import Batches
from rawloop.watch.findings import Finding
from rawloop.watch.watch import Watch


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config)


def called(model: nn.Module, **inputs: Any) -> dict[str, Finding]:
    """The findings about one call of a model, by the keyword."""
    with Watch(model, detectors=[Batches()]) as watch, watch.step(inputs):
        model(**inputs)
    swallowed = (finding for finding in watch.findings if finding.kind == "input_swallowed")
    return {finding.cause.place.tensor: finding for finding in swallowed}


def test_labels_that_kwargs_swallow() -> None:
    ids = torch.randint(3, 32, (2, 6))
    found = called(llama(), input_ids=ids, label_ids=ids)
    assert "did you mean 'labels'?" in found["label_ids"].cause.what
    assert (found["label_ids"].cause.whose, found["label_ids"].ordinary) == ("data", False)


def test_a_mask_with_a_near_name() -> None:
    ids = torch.randint(3, 32, (2, 6))
    found = called(llama(), input_ids=ids, labels=ids, attention_masks=torch.ones_like(ids))
    assert [(name, finding.ordinary) for name, finding in found.items()] == [("attention_masks", False)]


def test_calls_that_are_right() -> None:
    ids = torch.randint(3, 32, (2, 6))
    model = llama()
    assert called(model, input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(12)) == {}
    assert called(model, input_ids=ids, use_cache=False) == {}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_wrapper_that_passes_everything_on() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = llama(), nn.Linear(2, 2)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    ids = torch.randint(3, 32, (2, 6))
    assert called(Wrapper(), input_ids=ids, labels=ids) == {}


def test_what_was_seen_before_the_loop_failed_is_told() -> None:
    ids, model = torch.randint(3, 32, (2, 6)), llama()
    with pytest.raises(AttributeError), Watch(model, detectors=[Batches()]) as watch:  # noqa: SIM117
        with watch.step():
            torch.autograd.backward(model(input_ids=ids, label_ids=ids).loss.sum())
    assert "input_swallowed" in {finding.kind for finding in watch.findings}
