"""What cannot have an effect in a run of so many steps is said before the model is loaded."""

from dataclasses import replace

import pytest

from rawloop.cadences import cadence_notices
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.errors import UserError
from rawloop.settings import EvaluationConfig, OptimConfig, TrainConfig

FITS = RunConfig(
    train=TrainConfig(epochs=2.0, log_every=5),
    optim=OptimConfig(lr=1e-4, warmup_ratio=0.1),
    evaluation=EvaluationConfig(every=10),
    checkpoint=CheckpointConfig(save_every=20),
)


def told(config: RunConfig, total: int = 20) -> list[str]:
    return list(cadence_notices(config, total, num_samples=80, window=8))


def test_a_run_whose_numbers_fit_tells_its_length_alone() -> None:
    assert told(FITS) == ["20 steps of 8 samples (train.epochs 2): 2 epochs of 80 samples"]
    limited = replace(FITS, train=TrainConfig(max_steps=20, log_every=5))
    assert told(limited) == ["20 steps of 8 samples (train.max_steps): 2 epochs of 80 samples"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"optim": OptimConfig(lr=1e-4, warmup_steps=200)},
            "optim.warmup_steps is 200, and the run ends at step 20: the learning rate comes to 1e-05 and never to "
            "optim.lr, 0.0001; lower it, or set optim.warmup_ratio 0.03 in its place",
        ),
        (
            {"optim": OptimConfig(lr=1e-4, warmup_ratio=0.6)},
            "optim.warmup_ratio is 0.6, and the run ends at step 20: 60% of it is warm-up; the learning rate comes to "
            "optim.lr, 0.0001, at step 12",
        ),
        (
            {"evaluation": EvaluationConfig(every=21)},
            "evaluation.every is 21, and the run ends at step 20: it is evaluated at step 0 and at the end only",
        ),
        (
            {"checkpoint": CheckpointConfig(save_every=21)},
            "checkpoint.save_every is 21, and the run ends at step 20: it is saved at the end only",
        ),
        (
            {"checkpoint": CheckpointConfig(save_every=21, save_at_end=False)},
            "checkpoint.save_every is 21, and the run ends at step 20: it is saved never, except where an evaluation "
            "is the best",
        ),
        (
            {"train": TrainConfig(epochs=2.0, log_every=21)},
            "train.log_every is 21, and the run ends at step 20: it logs the last step only",
        ),
    ],
)
def test_each_setting_that_comes_too_late_is_told(change: dict[str, object], line: str) -> None:
    assert told(replace(FITS, **change))[1:] == [line]  # type: ignore[arg-type]


def test_one_warm_up_is_chosen() -> None:
    with pytest.raises(UserError, match=r"optim.warmup_steps is 3 and optim.warmup_ratio 0.1: set one to 0"):
        OptimConfig(warmup_steps=3, warmup_ratio=0.1)
    with pytest.raises(UserError, match=r"optim.warmup_ratio is 3: it must lie between 0 and 1"):
        OptimConfig(warmup_ratio=3)
