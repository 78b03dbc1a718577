"""{'loss': 0.0, 'grad_norm': nan}: the training loss is 0 and the run goes on.

loss 0.0, grad_norm nan, logging_nan_inf_filter, NaN weights, bf16 training collapses, clean loss curve.

One step with a NaN loss turns every weight into NaN. HF Trainer takes that step, and its log shows something else.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer

from rawloop.contracts import Batch, StreamLoss
from rawloop.loop import Run
from rawloop.losses import LossModule
from rawloop.records import read_events, read_metrics


class BadSecondBatch(LlamaForCausalLM):  # type: ignore[misc]
    """A language model whose loss is NaN on its second training batch, as one bad recording makes it."""

    batches = 0

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **others: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **others)
        self.batches += self.training
        if self.training and self.batches == 2:
            output.loss = output.loss * math.nan
        return output


def lines_of(trainer: Any, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def train_badly(llama: Callable[..., Any], rows: Any, arguments: Any) -> Any:
    trainer = Trainer(model=llama(model_class=BadSecondBatch), args=arguments, train_dataset=rows)
    trainer.train()
    assert not any(torch.isfinite(weight).any() for weight in trainer.model.parameters())  # every single number
    return trainer


def test_trainer_logs_zero_for_a_model_of_nan(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    trainer = train_badly(llama, rows, arguments(bf16=True))
    first, *after = lines_of(trainer, "loss")
    assert first == pytest.approx(3.25, abs=0.05)
    assert after == [0.0, 0.0, 0.0]  # a perfect model, says the log
    assert all(math.isnan(norm) for norm in lines_of(trainer, "grad_norm")[1:])
    assert lines_of(trainer, "train_loss") == [pytest.approx(first / 4)]


def test_trainer_draws_a_clean_curve_over_a_model_of_nan(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    trainer = train_badly(llama, rows, arguments(max_steps=8, logging_steps=8, max_grad_norm=0.0))
    (shown,) = lines_of(trainer, "loss")
    assert 0.0 < shown < 3.5  # a number for eight steps of which one had a loss
    assert lines_of(trainer, "train_loss") == [pytest.approx(shown)]


def test_trainer_shows_the_nan_where_the_filter_is_off_and_trains_on_all_the_same(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    trainer = train_badly(llama, rows, arguments(logging_nan_inf_filter=False))
    assert [math.isnan(loss) for loss in lines_of(trainer, "loss")] == [False, True, True, True]


class BadSecondWindow:
    """The family's losses, NaN in the second window of training."""

    def __init__(self, losses: Callable[[nn.Module, Batch], dict[str, StreamLoss]]) -> None:
        self.losses, self.batches = losses, 0

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        result = self.losses(model, batch)
        self.batches += model.training
        if model.training and self.batches == 2:
            result["audio"] = result["audio"]._replace(total=result["audio"].total * math.nan)
        return result


def spoil(run: Run) -> None:
    module = run.module
    assert isinstance(module, LossModule)
    module.losses = BadSecondWindow(module.losses)


def test_rawloop_skips_the_step_shows_the_nan_and_names_the_samples(
    demo_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = demo_run(spoil)
    assert (run.state.step, run.state.skipped) == (4, 1)
    assert all(torch.isfinite(weight).all() for weight in run.module.parameters())
    (skip,) = [event for event in read_events(tmp_path / "rawloop") if event["kind"] == "skip"]
    assert skip["reason"] == "losses that are not finite (loss nan)"
    assert len(skip["samples"]) == 4
    lines = [line for line in read_metrics(tmp_path / "rawloop") if "loss" in line]
    losses = [float(str(line["loss"])) for line in lines]
    assert [math.isnan(loss) for loss in losses] == [False, True, False, False]  # the window that was skipped shows
    assert losses[3] < losses[0] - 1.0  # and training goes on
    evaluations = [line["eval_loss"] for line in read_metrics(tmp_path / "rawloop") if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0] - 1.0  # type: ignore[operator]
