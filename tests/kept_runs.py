"""Runs of a tiny model for the tests of what a watch tells and keeps."""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.families import ModelConfig
from rawloop.loop import TrainConfig, train
from rawloop.optim import OptimConfig
from rawloop.precision.config import PrecisionConfig
from rawloop.run import Run
from rawloop.settings import EvaluationConfig
from rawloop.watch.findings import Cause, Finding
from rawloop.watch.subject import Detector, StepRecord, Subject
from rawloop.watched import RunWatch


def config_of(checkpoint: Path, data: Path) -> RunConfig:
    """A run of 3 steps with LoRA, dropout and accumulation, without checks and evaluations."""
    return RunConfig(
        device="cpu",
        model=ModelConfig(family="causal_lm", path=str(checkpoint)),
        adapter=AdapterConfig(rank=4, dropout=0.2),
        data=DataConfig(train=str(data / "train.jsonl"), eval=str(data / "eval.jsonl")),
        train=TrainConfig(batch_size=2, accumulation=2, max_steps=3, log_every=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=0),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(enabled=False),
        checkpoint=CheckpointConfig(save_every=1000),
    )


def go(config: RunConfig, world: World | None = None, change: Callable[[Run], None] = lambda run: None) -> Run:
    """Train. `change` is called with the run before."""
    run = build_run(config, world or World(), lambda line: None)
    try:
        change(run)
        train(run)
    finally:
        run.close()
    return run


def trained(run: Run) -> dict[str, Tensor]:
    """The trained weights."""
    return {name: weight.detach().clone() for name, weight in run.policy.named_parameters()}


class Alarmist(Detector):
    """Finds something in the gradients of step 2."""

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at the gradients."""
        if record.step == 2:
            yield Finding("test", "something is wrong", (Cause("model", "the test says so"),), record.step)


def alarm(run: Run) -> None:
    """Let the watch find something in step 2."""
    assert isinstance(run.watch, RunWatch)
    run.watch.watch.detectors.append(Alarmist())


def kept_by(world: World, config: RunConfig) -> Path:
    """Train, and return the capsule of step 2."""
    go(config, world, alarm)
    return Path(config.output) / "capsules" / f"step-00000002-rank{world.rank}"
