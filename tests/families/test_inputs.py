"""Somebody else's batches: dicts, attribute-style objects, other names for labels, keys that a model would swallow."""

from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from rawloop.errors import UserError
from rawloop.families.inputs import BatchAdapter

CPU = torch.device("cpu")
IDS = torch.arange(12).view(2, 6)


@dataclass
class Data:
    input_ids: Tensor
    label_ids: Tensor
    attention_mask: Tensor | None = None


class ExtendedBatch:
    """As the original Higgs Audio code has it: attributes, `keys()` and a length."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def keys(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


def tiny(kind: Any = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return kind(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "labels": IDS},
        {"input_ids": IDS, "label_ids": IDS, "position_ids": None},
        UserDict(input_ids=IDS, labels=IDS),
        SimpleNamespace(input_ids=IDS, label_ids=IDS),
        ExtendedBatch(input_ids=IDS, label_ids=IDS, attention_mask=None),
        Data(IDS, IDS),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_all_kinds_of_batches_give_the_same_loss(batch: Any) -> None:
    model = tiny()
    adapter = BatchAdapter(model, CPU)
    assert set(adapter(batch)) == {"input_ids", "labels"}
    assert torch.equal(adapter.loss(batch), model(input_ids=IDS, labels=IDS).loss)


class Original(nn.Module):
    """Takes the names of the original Higgs Audio code."""

    def forward(self, input_ids: Tensor, label_ids: Tensor, label_audio_ids: Tensor, audio_features: Tensor) -> Any:
        return SimpleNamespace(loss=audio_features.sum() + label_audio_ids.sum())


def test_labels_go_by_the_name_that_the_model_has_and_features_get_its_dtype() -> None:
    batch = {"input_ids": IDS, "labels": IDS, "audio_labels": IDS, "audio_features": torch.ones(3).double()}
    arguments = BatchAdapter(Original(), CPU, torch.bfloat16)(batch)
    assert list(arguments) == ["input_ids", "label_ids", "label_audio_ids", "audio_features"]
    assert arguments["audio_features"].dtype == torch.bfloat16
    assert arguments["label_ids"].dtype == torch.int64


def test_a_key_that_the_model_would_swallow_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"has 'input_idz', which LlamaForCausalLM\.forward does not take \(did you mean 'input_ids"
    ):
        BatchAdapter(tiny(), CPU)({"input_idz": IDS})
    with pytest.raises(UserError, match=r"the batch has 'labels', which LlamaModel\.forward does not take"):
        BatchAdapter(tiny(LlamaModel), CPU)({"input_ids": IDS, "labels": IDS})
    with pytest.raises(UserError, match=r"both 'label_ids' and another key for LlamaForCausalLM\.forward's 'labels'"):
        BatchAdapter(tiny(), CPU)({"input_ids": IDS, "labels": IDS, "label_ids": IDS})


def test_a_model_that_gives_no_loss_is_found_on_the_first_batch() -> None:
    class Swallows(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return SimpleNamespace(loss=None, logits=input_ids)

    with pytest.raises(
        UserError, match=r"Swallows\.forward took labels and returned no loss .*labels that it scores, of labels"
    ):
        BatchAdapter(Swallows(), CPU).loss({"input_ids": IDS, "label_ids": IDS})
    with pytest.raises(UserError, match=r"LlamaForCausalLM\.forward was given no labels and returned no loss"):
        BatchAdapter(tiny(), CPU).loss({"input_ids": IDS})


def test_what_is_no_batch_is_refused() -> None:
    for wrong in (IDS.tolist(), 3, "text"):
        with pytest.raises(
            UserError, match=r"the batch is a .*: it must be a mapping, or an object with the inputs as"
        ):
            BatchAdapter(tiny(), CPU)(wrong)
