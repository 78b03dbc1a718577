"""--load_best_model_at_end requires the saving steps to be a round multiple of the evaluation steps.

save_steps 10000, eval_steps 60000, load_best_model_at_end, disable_evaluation, save_strategy best.

HF Trainer's best model is a pointer to one of its periodic checkpoints, so every evaluation must meet a save. The ways
out each cost something: no best model, or no periodic checkpoints.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from rawloop.checkpoint.config import CheckpointConfig
from rawloop.evaluate import EvaluationConfig
from rawloop.loop import TrainConfig
from rawloop.records import read_metrics

MESSAGE = (
    "--load_best_model_at_end requires the saving steps to be a round multiple of the evaluation steps, "
    "but found 10000, which is not a round multiple of 60000."
)
REPORTED = {"save_strategy": "steps", "save_steps": 10000, "eval_strategy": "steps", "eval_steps": 60000}


def checkpoints(args: Any) -> list[str]:
    return sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))


def test_trainer_refuses_the_reported_cadences(arguments: Callable[..., Any]) -> None:
    with pytest.raises(ValueError) as raised:
        arguments(load_best_model_at_end=True, **REPORTED)
    assert str(raised.value) == MESSAGE


def test_the_flag_that_disables_evaluation_takes_the_best_model_with_it(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="--load_best_model_at_end requires the save and eval strategy to match"):
        arguments(load_best_model_at_end=True, save_strategy="steps", eval_strategy="no")
    args = arguments(save_strategy="steps", save_steps=2, eval_strategy="no")
    trainer = Trainer(model=llama(), args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert checkpoints(args) == ["checkpoint-2", "checkpoint-4"]
    assert (trainer.state.best_metric, trainer.state.best_model_checkpoint) == (None, None)


def test_save_strategy_best_gives_the_periodic_checkpoints_up(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    args = arguments(**best, save_steps=2, eval_strategy="steps", eval_steps=3, max_steps=4)
    Trainer(model=llama(), args=args, train_dataset=rows, eval_dataset=rows).train()
    assert "checkpoint-2" not in checkpoints(args)  # a run that is killed before its first evaluation has nothing
    assert "checkpoint-3" in checkpoints(args)


def kept(folder: Path) -> tuple[list[int], list[int], list[int]]:
    """The steps of a rawloop run that were evaluated, that were saved, and those that were the best so far."""
    lines = [line for line in read_metrics(folder) if "eval_loss" in line]
    saved = sorted(int(slot.name.removeprefix("step-")) for slot in (folder / "checkpoints").glob("step-*"))
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    evaluated = [int(str(line["step"])) for line in lines]
    losses = [float(str(line["eval_loss"])) for line in lines]
    won = [step for number, step in enumerate(evaluated) if losses[number] == min(losses[: number + 1])]
    assert best["step"] == won[-1]
    assert (folder / "best" / "adapter" / "adapter_model.safetensors").is_file()
    return evaluated, saved, won


def test_rawloop_takes_the_reported_cadences(demo_run: Callable[..., Any], tmp_path: Path) -> None:
    demo_run(
        evaluation=EvaluationConfig(every=60000),
        checkpoint=CheckpointConfig(save_every=10000),
        train=TrainConfig(batch_size=4, max_steps=3),
    )
    assert kept(tmp_path / "rawloop") == ([0, 3], [0, 3], [0, 3])  # the first and the last are always evaluated


@pytest.mark.parametrize(
    ("save", "every", "evaluated", "saved"),
    [(2, 3, [0, 3, 5], [2, 4, 5]), (4, 1, [0, 1, 2, 3, 4, 5], [4, 5]), (1, 6, [0, 5], [1, 2, 3, 4, 5])],
)
def test_rawloop_keeps_the_best_of_any_cadences(
    demo_run: Callable[..., Any], tmp_path: Path, save: int, every: int, evaluated: list[int], saved: list[int]
) -> None:
    demo_run(
        evaluation=EvaluationConfig(every=every),
        checkpoint=CheckpointConfig(save_every=save, keep_last=0),
        train=TrainConfig(batch_size=2, max_steps=5),
    )
    found, there, won = kept(tmp_path / "rawloop")
    assert found == evaluated
    assert there == sorted({*saved, *won})  # a model that was the best is a checkpoint like any other


def test_rawloop_without_evaluation_saves_and_trains_as_with_it(demo_run: Callable[..., Any], tmp_path: Path) -> None:
    demo_run(output=str(tmp_path / "with"))
    demo_run(output=str(tmp_path / "without"), evaluation=EvaluationConfig(enabled=False))
    for name in ("with", "without"):
        saved = {slot.name[-1] for slot in (tmp_path / name / "checkpoints").glob("step-*")}
        assert saved - {"0"} == {"2", "4"}  # the first model is the best at first
        assert ("0" in saved) == (name == "with")
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("with", "without")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
