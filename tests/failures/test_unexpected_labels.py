"""HiggsAudioModel.forward() got an unexpected keyword argument 'labels' (or 'label_ids').

TypeError, unexpected keyword argument, default_data_collator, PEFT task_type CAUSAL_LM, did not return a loss, dummy
loss, loss 0.0 and grad_norm 0.0.

Trainer, its default collator and PEFT rename labels as they think fit, and recent models swallow a name that they do
not know. A dummy loss in the place of the missing one ends the error messages, and the training.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from rawloop import PrecisionConfig, PrecisionPolicy
from rawloop.errors import TrainingError, UserError
from rawloop.families import ModelConfig, load_family
from rawloop.inputs import check_inputs

Rows = list[dict[str, list[int]]]


class HiggsAudioModel(nn.Module):
    """A model whose targets have names of their own, as the original Higgs Audio code has them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Any = None, label_ids: Any = None) -> Any:
        return self.model(input_ids=input_ids, labels=label_ids)


class StrictModel(nn.Module):
    """A model that takes `labels`, and nothing that it does not know."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.model(input_ids=input_ids, labels=labels)


@pytest.fixture
def named_label_ids(rows: Rows) -> Rows:
    return [{"input_ids": row["input_ids"], "label_ids": row["labels"]} for row in rows]


def own_collator(chosen: Rows) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in chosen]) for name in chosen[0]}


def test_trainer_passes_labels_to_a_model_that_has_none(
    llama: Callable[..., Any], rows: Rows, arguments: Callable[..., Any]
) -> None:
    args = arguments(remove_unused_columns=False)
    trainer = Trainer(model=HiggsAudioModel(llama()), args=args, train_dataset=rows)
    with pytest.raises(TypeError, match=r"HiggsAudioModel\.forward\(\) got an unexpected keyword argument 'labels'"):
        trainer.train()


def test_the_default_collator_renames_label_ids_back_to_labels(
    llama: Callable[..., Any], named_label_ids: Rows, arguments: Callable[..., Any]
) -> None:
    args = arguments(remove_unused_columns=False)
    trainer = Trainer(model=HiggsAudioModel(llama()), args=args, train_dataset=named_label_ids)
    with pytest.raises(TypeError, match=r"HiggsAudioModel\.forward\(\) got an unexpected keyword argument 'labels'"):
        trainer.train()


def test_the_other_way_round_it_is_label_ids(
    llama: Callable[..., Any], named_label_ids: Rows, arguments: Callable[..., Any]
) -> None:
    args = arguments(remove_unused_columns=False)
    trainer = Trainer(model=StrictModel(llama()), args=args, train_dataset=named_label_ids, data_collator=own_collator)
    with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'label_ids'"):
        trainer.train()


def test_peft_for_causal_lm_passes_labels_and_more_whatever_the_batch_has(
    llama: Callable[..., Any], with_lora: Callable[..., Any], named_label_ids: Rows, arguments: Callable[..., Any]
) -> None:
    args = arguments(remove_unused_columns=False)
    plain = with_lora(HiggsAudioModel(llama()))
    Trainer(model=plain, args=args, train_dataset=named_label_ids, data_collator=own_collator).train()
    model = HiggsAudioModel(llama())
    model.prepare_inputs_for_generation = None  # type: ignore[assignment]  # PEFT reads it
    wrapped = with_lora(model, task_type="CAUSAL_LM")
    trainer = Trainer(model=wrapped, args=args, train_dataset=named_label_ids, data_collator=own_collator)
    with pytest.raises(TypeError, match=r"HiggsAudioModel\.forward\(\) got an unexpected keyword argument"):
        trainer.train()


def test_a_model_of_transformers_swallows_label_ids_and_gives_no_loss(
    llama: Callable[..., Any], named_label_ids: Rows, arguments: Callable[..., Any]
) -> None:
    batch = own_collator(named_label_ids[:2])
    assert llama()(**batch).loss is None  # no error
    args = arguments(remove_unused_columns=False)
    trainer = Trainer(model=llama(), args=args, train_dataset=named_label_ids, data_collator=own_collator)
    with pytest.raises(ValueError, match="The model did not return a loss from the inputs, only the following keys"):
        trainer.train()


class WithDummyLoss(Trainer):  # type: ignore[misc]
    """The patch that is passed around for it."""

    def compute_loss(self, model: nn.Module, inputs: Any, **others: Any) -> Tensor:
        loss: Tensor | None = model(**inputs).loss
        return torch.tensor(0.0, requires_grad=True) if loss is None else loss


def test_with_a_dummy_loss_trainer_reports_success_and_trains_nothing(
    llama: Callable[..., Any], named_label_ids: Rows, arguments: Callable[..., Any]
) -> None:
    model = llama()
    before = [weight.detach().clone() for weight in model.parameters()]
    args = arguments(remove_unused_columns=False)
    trainer = WithDummyLoss(model=model, args=args, train_dataset=named_label_ids, data_collator=own_collator)
    assert trainer.train().global_step == 4
    steps = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    assert steps == [(0.0, 0.0)] * 4
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_rawloop_matches_batch_keys_to_the_forward_signature(llama: Callable[..., Any]) -> None:
    with pytest.raises(
        UserError, match=r"the batch has 'label_ids', which LlamaForCausalLM\.forward does not take.*'labels'"
    ):
        check_inputs(llama(), ["input_ids", "label_ids"])
    with pytest.raises(
        UserError, match=r"the batch has 'labels', which HiggsAudioModel\.forward does not take.*'label_ids'"
    ):
        check_inputs(HiggsAudioModel(llama()), ["input_ids", "labels"])
    check_inputs(HiggsAudioModel(llama()), ["input_ids", "label_ids"])


def test_rawloop_refuses_a_key_that_higgs_would_swallow(demo_checkpoint: Any) -> None:
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    model, batch = family.load_model(), family.probe()
    batch.inputs["audio_label_ids"] = batch.inputs["audio_input_ids"]
    model.model(**batch.inputs)  # no error: it is ignored
    with pytest.raises(UserError, match=r"the batch has 'audio_label_ids', which HiggsAudioV2.* does not take"):
        family.losses(model, batch)


def test_rawloop_refuses_a_dummy_loss(llama: Callable[..., Any]) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), torch.device("cpu"))
    policy.prepare(llama())
    with pytest.raises(TrainingError, match="the loss is not connected to any trainable weight"):
        policy.backward(torch.tensor(0.0, requires_grad=True))


def test_rawloop_trains_higgs_by_its_own_names(demo_run: Callable[..., Any]) -> None:
    run = demo_run()
    assert run.state.step == run.best.step == 4
    assert run.best.value < 12.5  # eval_loss, from 13.86
