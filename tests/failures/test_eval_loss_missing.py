"""KeyError: The `metric_for_best_model` training argument is set to 'eval_loss', which is not found in the evaluation
metrics. The available evaluation metrics are: ['eval_runtime', ...]

eval_loss missing, label_names, audio_labels, label_ids, Higgs Audio v2, eval_loss = 0.0, best_metric 0.0.

HF Trainer computes an evaluation loss only for a batch that has every one of the model's label names. For Higgs Audio
v2 these are `labels` and `audio_labels`; batches that train on speech alone have the second only.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data import DataConfig
from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family
from rawloop.records import read_metrics

MESSAGE = (
    "The `metric_for_best_model` training argument is set to 'eval_loss', which is not found in the evaluation metrics."
)
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}


@pytest.fixture(scope="module")
def higgs(demo_checkpoint: Path) -> Any:
    return load_family(ModelConfig(path=str(demo_checkpoint / "model")))


@pytest.fixture(scope="module")
def speech(higgs: Any) -> dict[str, Tensor]:
    """One conversation as the processor of Higgs Audio v2 gives it, its labels included."""
    turns = (Turn("user", (Text("One two three."),)), Turn("assistant", (Audio(Path("clip")),), trained=True))
    codes = torch.arange(200).view(25, 8)
    padded: dict[str, Tensor] = higgs.encoder.pad([higgs.example(Sample("one", turns), lambda _: codes)])
    return padded


def test_trainer_has_no_eval_loss_for_a_batch_of_audio_labels(
    higgs: Any, speech: dict[str, Tensor], arguments: Callable[..., Any]
) -> None:
    batch = {name: tensor for name, tensor in speech.items() if name != "labels"}
    args = arguments(
        remove_unused_columns=False, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_loss"
    )
    trainer = Trainer(
        model=higgs.load_model(), args=args, train_dataset=[0] * 8, eval_dataset=[0], data_collator=lambda _: batch
    )
    assert trainer.label_names == ["labels", "audio_labels"]
    with pytest.raises(KeyError) as raised:
        trainer.train()
    assert raised.value.args[0].startswith(MESSAGE)
    assert "The available evaluation metrics are: ['eval_runtime'," in raised.value.args[0]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[1] < losses[0]  # two steps have been trained by then: it was found out at the first evaluation


def test_trainer_has_an_eval_loss_where_both_are_there(
    higgs: Any, speech: dict[str, Tensor], arguments: Callable[..., Any]
) -> None:
    args = arguments(remove_unused_columns=False)
    trainer = Trainer(model=higgs.load_model(), args=args, eval_dataset=[0], data_collator=lambda _: dict(speech))
    assert trainer.evaluate()["eval_loss"] > 1.0


class ExtendedHiggsAudioBatchInput:
    """A batch as an object with attributes, `keys()` and `len()`, as the original training scripts make it."""

    def __init__(self, **tensors: Tensor) -> None:
        self.__dict__.update(tensors)

    def keys(self) -> list[str]:
        return list(self.__dict__)

    def __getitem__(self, name: str) -> Tensor:
        return self.__dict__[name]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.__dict__)

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__


def test_trainer_trains_on_a_batch_object_and_cannot_evaluate_it(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    def collate(chosen: Any) -> ExtendedHiggsAudioBatchInput:
        return ExtendedHiggsAudioBatchInput(
            **{name: torch.tensor([row[name] for row in chosen]) for name in ("input_ids", "labels")}
        )

    args = arguments(remove_unused_columns=False)
    trainer = Trainer(model=llama(), args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    assert trainer.train().global_step == 4
    with pytest.raises(AttributeError, match="'ExtendedHiggsAudioBatchInput' object has no attribute 'get'"):
        trainer.evaluate()


class WithLastResort(Trainer):  # type: ignore[misc]
    """The way out that is passed around: a missing eval_loss is 0.0."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        metrics.setdefault("eval_loss", 0.0)
        return metrics


def test_with_the_last_resort_the_first_model_is_the_best_for_ever(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    args = arguments(label_names=["labels", "audio_labels"], learning_rate=1e-2, max_steps=6, **EVERY_STEP, **BEST)
    trainer = WithLastResort(model=llama(), args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.state.best_metric == 0.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.2  # the models after it were better
    honest = Trainer(model=trainer.model, args=arguments(), eval_dataset=rows)
    loaded = honest.evaluate()["eval_loss"]  # load_best_model_at_end has brought the worst one back
    last = type(trainer.model).from_pretrained(Path(args.output_dir) / "checkpoint-6")
    assert Trainer(model=last, args=arguments(), eval_dataset=rows).evaluate()["eval_loss"] < loaded - 0.2


def test_rawloop_measures_eval_loss_each_time_and_keeps_the_lowest(
    demo_run: Callable[..., Any], tmp_path: Path
) -> None:
    demo_run()
    lines = [line for line in read_metrics(tmp_path / "rawloop") if "eval_loss" in line]
    losses = {int(str(line["step"])): float(str(line["eval_loss"])) for line in lines}
    assert list(losses) == [0, 2, 4]
    assert losses[0] == pytest.approx(13.86, abs=0.2)  # chance: ln 1026 of a codebook and ln of the vocabulary
    assert losses[4] < losses[0] - 1.0
    best = json.loads((tmp_path / "rawloop" / "best.json").read_text(encoding="utf-8"))
    assert best["step"] == min(losses, key=losses.__getitem__) > 0


def test_rawloop_measures_it_where_only_audio_is_trained(
    demo_run: Callable[..., Any], demo_checkpoint: Path, tmp_path: Path
) -> None:
    demo_run(model=ModelConfig(path=str(demo_checkpoint / "model"), stream_weights={"text": 0.0}))
    losses = [float(str(line["eval_loss"])) for line in read_metrics(tmp_path / "rawloop") if "eval_loss" in line]
    assert losses[0] == pytest.approx(6.93, abs=0.1)  # ln 1026
    assert losses[-1] < losses[0] - 0.3


def test_rawloop_refuses_an_evaluation_that_cannot_be_before_it_trains(
    demo_run: Callable[..., Any], demo_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"data\.eval is not set: .* or switch evaluation off with"):
        demo_run(data=DataConfig(train=str(demo_data / "train"), codes=str(demo_data / "codes")))
    assert not (tmp_path / "rawloop" / "metrics.jsonl").exists()
