"""A run that is stopped and resumed after every step is the run that was not stopped, bit for bit.

Two runs save after every step. One goes straight through; the other is stopped and resumed after each step, so every
one of its checkpoints was reached through all stops before it. Their checkpoints are the same files, byte for byte.
Then the other way round: whatever is left out of a checkpoint's restoration makes the two differ.
"""

import copy
import json
import math
import os
import pickle
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.files import ModelFiles
from rawloop.build import build_run
from rawloop.checkpoint import writer as slot_writer
from rawloop.checkpoint.best import BestTracker
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.reader import choose
from rawloop.checkpoint.slots import find_slots, read_manifest, verify, write_manifest
from rawloop.config import RunConfig
from rawloop.contracts import Batch, StreamLoss
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World, unwrap_ddp
from rawloop.errors import CheckpointError, Preempted, RawloopError, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.loop import Run, TrainConfig, train
from rawloop.losses import LossModule, Meter
from rawloop.optim import OptimConfig
from rawloop.optim_state import NamedOptimizerState
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.masters import TrainedWeights
from rawloop.precision.policy import PrecisionPolicy
from rawloop.preempt import Preemption
from rawloop.records import TIMES, read_events, read_metrics
from rawloop.run import TrainState
from rawloop.seed import RngState
from tests import kept_runs
from tests.forks import Forks

STEPS = 40
POISON = frozenset({2, 3, 11, 12, 13, 20, 31, 32})  # windows whose gradient is infinite


class Amplify(torch.autograd.Function):
    """The loss as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None


class Hostile:
    """A family's losses in training, with noise from every random stream, and not finite in some windows.

    In a world of two, rank 1 alone has the windows that are not finite.
    """

    def __init__(self, run: Run, gradients: frozenset[int], losses: frozenset[int]) -> None:
        self.run, self.gradients, self.bad = run, gradients, losses
        module = unwrap_ddp(run.module)
        assert isinstance(module, LossModule)
        self.losses, module.losses = module.losses, self

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        result = self.losses(model, batch)
        if not model.training:
            return result
        noise = torch.rand(()).item() + random.random() + float(np.random.rand())
        hit = self.run.world.rank == self.run.world.size - 1
        window = self.run.state.window
        for stream, loss in result.items():
            total = loss.total * (1 + noise / 8)
            if hit and window in self.gradients:
                total = Amplify.apply(total, math.inf)  # type: ignore[no-untyped-call]
            if hit and window in self.bad:
                total = total * math.nan
            result[stream] = loss._replace(total=total)
        return result


@pytest.fixture(scope="module")
def base(text_checkpoint: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a Llama as small as they come, that saves after every step."""
    folder = tmp_path_factory.mktemp("smallest")
    shutil.copytree(text_checkpoint, folder, dirs_exist_ok=True)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig.from_pretrained(text_checkpoint, **sizes, num_key_value_heads=1, attention_dropout=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return RunConfig(
        device="cpu",
        model=ModelConfig(path=str(folder)),
        adapter=AdapterConfig(rank=2, dropout=0.1),
        data=DataConfig(train=str(text_data / "train.jsonl"), eval=str(text_data / "eval.jsonl")),
        train=TrainConfig(batch_size=1, max_steps=STEPS, log_every=3),
        optim=OptimConfig(lr=3e-3, warmup_steps=5),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=4, batch_size=5),
        checkpoint=CheckpointConfig(save_every=1, keep_last=0),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small files are forced to the disk here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


class Stop(Exception):
    """Ends a run between two windows, as a signal would."""


def stop_before(run: Run, arrived: Callable[[TrainState], bool], save: bool = False) -> None:
    """Let the run end before the first window at which the state has `arrived`; with a checkpoint of that moment."""
    rate = run.lr

    def lr(step: int) -> float:  # asked once per window, before anything is done with it
        if arrived(run.state):
            assert run.checkpoints is not None
            if save:
                run.checkpoints.finish()
                run.checkpoints.save(run.state.step)
            raise Stop
        return rate(step)

    run.lr = lr


def go(config: RunConfig, change: Callable[[Run], None], world: World | None = None) -> None:
    """Train until the end or a `Stop`; resume if the folder holds a run."""
    resume = "latest" if (Path(config.output) / "checkpoints").exists() else None
    run = build_run(replace(config, resume=resume), world or World(), lambda line: None)
    try:
        change(run)
        train(run)
    except Stop:
        pass
    finally:
        run.close()


def content(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint of a run, the best one included."""
    paths = [*(run / "checkpoints").rglob("*"), *(run / "best").rglob("*"), run / "best.json"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def numbers(run: Path) -> list[str]:
    """The lines of metrics.jsonl, without the times taken."""
    return [repr({key: line[key] for key in line if key not in TIMES}) for line in read_metrics(run)]


def skips(run: Path) -> list[tuple[Any, ...]]:
    events = [event for event in read_events(run) if event["kind"] == "skip"]
    return [(event["step"], event["reason"], event["samples"]) for event in events]


def different(first: Path, second: Path) -> list[str]:
    """The names of the files that differ between two runs, `metrics` and `skips` among them."""
    ours, theirs = content(first), content(second)
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    names += ["metrics"] * (numbers(first) != numbers(second))
    return names + ["skips"] * (skips(first) != skips(second))


class Case(NamedTuple):
    """One row of the product; each pair of values of two columns stands in some row."""

    mode: str
    adapter: str
    world: int
    workers: int
    accumulation: int
    asynchronous: bool

    def config(self, base: RunConfig, output: Path) -> RunConfig:
        scale = LossScaleConfig(init=2.0**20, growth_interval=4, hysteresis=2)
        precision: Any = PrecisionConfig(mode=self.mode)  # type: ignore[arg-type]
        if self.mode.endswith("fp16"):
            precision = replace(precision, loss_scale=scale)
        adapter = base.adapter if self.adapter == "lora" else AdapterConfig(mode="full")
        return replace(
            base,
            output=str(output),
            precision=precision,
            adapter=adapter,
            data=replace(base.data, num_workers=self.workers),
            train=replace(base.train, accumulation=self.accumulation),
            checkpoint=replace(base.checkpoint, asynchronous=self.asynchronous),
        )


CASES = [
    Case("fp32", "lora", 1, 0, 1, True),
    Case("fp32", "full", 2, 2, 4, False),
    Case("bf16", "lora", 2, 0, 4, True),
    Case("bf16", "full", 1, 2, 1, False),
    Case("amp_fp16", "lora", 1, 2, 4, False),
    Case("amp_fp16", "full", 2, 0, 1, True),
    Case("native_fp16", "lora", 2, 2, 1, True),
    Case("native_fp16", "full", 1, 0, 4, False),
]
STOPS = (3, 20)  # from which the run then goes to its end


def test_the_cases_have_every_pair_of_values() -> None:
    columns = list(zip(*CASES, strict=True))
    for i, first in enumerate(columns):
        for second in columns[i + 1 :]:
            assert {(a, b) for a in first for b in second} == set(zip(first, second, strict=True))


def stop_everywhere(world: World, configs: dict[str, RunConfig], steps: int) -> int:
    """Train straight, in as many pieces as there are steps, and in two pieces. Returns the number of resumes."""

    def until(step: int) -> Callable[[Run], None]:
        def change(run: Run) -> None:
            Hostile(run, POISON, frozenset())
            stop_before(run, lambda state: state.step == step)

        return change

    go(configs["straight"], until(steps), world)
    for step in range(1, steps + 1):
        go(configs["pieces"], until(step), world)
    stops = [stop for stop in STOPS if stop < steps]
    for stop in stops:
        for step in (stop, steps):
            go(replace(configs["pieces"], output=f"{configs['straight'].output}-{stop}"), until(step), world)
    return steps - 1 + len(stops)


def compare(case: Case, base: RunConfig, folder: Path, run_ranks: Callable[..., list[Any]], steps: int) -> int:
    base = replace(base, train=replace(base.train, max_steps=steps))
    configs = {name: case.config(base, folder / name) for name in ("straight", "pieces")}
    if case.world == 1:
        resumes = stop_everywhere(World(), configs, steps)
    else:
        resumes = run_ranks(stop_everywhere, configs, steps, timeout=600)[0]
    straight = folder / "straight"
    assert len(find_slots(straight)) == steps + 1  # the evaluation of step 0 was the best for a while
    assert len(skips(straight)) >= sum(window < steps for window in POISON)
    stopped = ["pieces", *(f"straight-{stop}" for stop in STOPS if stop < steps)]
    for name in stopped:
        assert different(straight, folder / name) == [], name
    return resumes


@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[7], marks=pytest.mark.slow)], ids=str)
def test_stopped_after_each_of_some_steps(
    base: RunConfig, folder: Path, run_ranks: Callable[..., list[Any]], case: Case
) -> None:
    assert compare(case, base, folder, run_ranks, 5) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stopped_after_every_step(
    base: RunConfig, folder: Path, run_ranks: Callable[..., list[Any]], case: Case
) -> None:
    resumes = compare(case, base, folder, run_ranks, STEPS)
    print(f"{case}: {resumes} resumes, {STEPS} checkpoints each the same, {len(skips(folder / 'straight'))} skips")


# -- whatever is left out is noticed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A run of 10 steps that is stopped before window `stop`, where the numbers in question are not those of a start.

    `gradients` and `losses` are the windows in which these are not finite.
    """

    precision: PrecisionConfig
    stop: int
    gradients: frozenset[int] = frozenset()
    losses: frozenset[int] = frozenset()
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(rank=2, dropout=0.1))

    def config(self, base: RunConfig, output: Path) -> RunConfig:
        return replace(
            base,
            output=str(output),
            precision=self.precision,
            adapter=self.adapter,
            train=TrainConfig(batch_size=1, max_steps=10, log_every=1),
            evaluation=EvaluationConfig(every=2, batch_size=5, best_mode="max"),  # falls: never better than at first
        )

    def straight(self, run: Run) -> None:
        Hostile(run, self.gradients, self.losses)

    def stopped(self, run: Run) -> None:
        self.straight(run)
        stop_before(run, lambda state: state.window == self.stop, save=True)


SCALE = LossScaleConfig(init=2.0**10, growth_interval=4)
FULL = AdapterConfig(mode="full")
SCENARIOS = {
    "after good steps": Scenario(PrecisionConfig("amp_fp16", loss_scale=SCALE), 6, frozenset({1, 2, 9})),
    "among bad steps": Scenario(
        PrecisionConfig("native_fp16", loss_scale=replace(SCALE, hysteresis=3)), 7, frozenset({5, 6, 7})
    ),
    "before giving up": Scenario(PrecisionConfig("amp_fp16", ["fp32"], max_skips=4), 7, frozenset({5, 6, 7, 8})),
    "among bad losses": Scenario(
        PrecisionConfig("amp_fp16", ["fp32"], max_nonfinite_losses=3), 7, losses=frozenset({5, 6, 7})
    ),
    "with masters": Scenario(PrecisionConfig("native_fp16", loss_scale=SCALE), 6, frozenset({2}), adapter=FULL),
}
GOOD = "after good steps"
LEFT_OUT: list[tuple[str, type[Any], tuple[str, ...]]] = [
    (GOOD, ModelFiles, ()),
    ("with masters", ModelFiles, ()),
    (GOOD, NamedOptimizerState, ()),
    (GOOD, NamedOptimizerState, ("step",)),
    (GOOD, NamedOptimizerState, ("exp_avg",)),
    (GOOD, NamedOptimizerState, ("exp_avg_sq",)),
    ("with masters", TrainedWeights, ()),
    (GOOD, PrecisionPolicy, ("scaler", "scale")),
    (GOOD, PrecisionPolicy, ("scaler", "good_steps")),
    ("among bad steps", PrecisionPolicy, ("scaler", "scale")),
    ("among bad steps", PrecisionPolicy, ("scaler", "bad_steps")),
    ("before giving up", PrecisionPolicy, ("skips_in_a_row",)),
    ("among bad losses", PrecisionPolicy, ("bad_losses_in_a_row",)),
    (GOOD, TrainState, ("step",)),
    (GOOD, TrainState, ("window",)),
    (GOOD, TrainState, ("skipped",)),
    (GOOD, TrainState, ("samples",)),
    ("among bad steps", Meter, ()),
    (GOOD, BestTracker, ("worse_in_a_row",)),
    (GOOD, RngState, ("torch",)),
    (GOOD, RngState, ("python",)),
    (GOOD, RngState, ("numpy",)),
]


def leave_out(patch: pytest.MonkeyPatch, part: type[Any], path: tuple[str, ...]) -> None:
    """Let a part keep what it was built with, all of it or what stands at `path` of its state."""
    name = "load" if part is ModelFiles else "load_state_dict"
    load = getattr(part, name)

    def without(self: Any, state: Any) -> None:
        if path:
            state = copy.deepcopy(state)
            fresh = self.state_dict()
            if part is NamedOptimizerState:  # has nothing before its first step
                held = state["state"]
                fresh = {name: {path[0]: torch.zeros_like(values[path[0]])} for name, values in held.items()}
            places = [(state, fresh)] if part is not NamedOptimizerState else [(held[n], fresh[n]) for n in held]
            for target, source in places:
                for key in path[:-1]:
                    target, source = target[key], source[key]
                assert pickle.dumps(target[path[-1]]) != pickle.dumps(source[path[-1]]), "it is as in a new run"
                target[path[-1]] = source[path[-1]]
            load(self, state)

    patch.setattr(part, name, without)


class Runs:
    """The straight and the stopped run of each scenario, made when they are first asked for."""

    def __init__(self, base: RunConfig, folder: Path) -> None:
        self.base, self.folder = base, folder

    def made(self, name: str) -> tuple[Path, Path]:
        scenario, folder = SCENARIOS[name], self.folder / name
        if not folder.exists():
            go(scenario.config(self.base, folder / "straight"), scenario.straight)
            go(scenario.config(self.base, folder / "stopped"), scenario.stopped)
        return folder / "straight", folder / "stopped"

    def resumed(self, name: str, output: Path) -> list[str]:
        """Resume a copy of the stopped run, and return what differs from the straight one, after the stop."""
        straight, stopped = self.made(name)
        shutil.copytree(stopped, output, symlinks=True)
        steps = int(find_slots(output)[0].name[-8:])
        go(SCENARIOS[name].config(self.base, output), SCENARIOS[name].straight)
        return [path for path in different(straight, output) if f"step-{steps:08d}" not in path]


@pytest.fixture(scope="module")
def runs(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_with_nothing_left_out_nothing_differs(runs: Runs, tmp_path: Path, name: str) -> None:
    assert runs.resumed(name, tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part", "path"), LEFT_OUT, ids=lambda value: str(value))
def test_whatever_is_left_out_is_noticed(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: type[Any], path: tuple[str, ...]
) -> None:
    runs.made(name)
    leave_out(monkeypatch, part, path)
    found = runs.resumed(name, tmp_path / "run")
    assert found
    weights = [file for file in found if "adapter" in file or "/model/" in file]
    where = [*["weights"] * bool(weights), *(kind for kind in ("metrics", "skips") if kind in found)]
    states = sorted({Path(file).stem for file in found if "/state/" in file})
    print(f"LEFT OUT {part.__name__}{list(path)} {name}: noticed in {', '.join([*where, *states])}")


# -- another number of processes ---------------------------------------------------------------------------------------


def train_on(world: World, config: RunConfig, until: int) -> list[list[str]]:
    """Go on to step `until`; return the ids of this rank's samples, a list for each window."""
    seen: list[list[str]] = []
    began: list[tuple[TrainState, int]] = []

    def watch(run: Run) -> None:
        start = run.windows
        began.append((run.state, run.state.window))

        def windows(window: int) -> Iterator[list[Batch]]:
            for batches in start(window):
                seen.append([name for batch in batches for name in batch.ids])
                yield batches

        run.windows = windows
        stop_before(run, lambda state: state.step == until)

    go(config, watch, world)
    ((state, first),) = began
    return seen[: state.window - first]  # one more may be fetched and not used


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_two_processes_then_one_then_two_train_as_one_does(
    base: RunConfig,
    text_checkpoint: Path,
    folder: Path,
    run_ranks: Callable[..., list[Any]],
    adapter: Any,
) -> None:
    plain = replace(
        base,
        model=ModelConfig(path=str(text_checkpoint)),  # without dropout, which every rank draws for itself
        adapter=AdapterConfig(mode=adapter, rank=4),
        evaluation=EvaluationConfig(every=1, batch_size=5),
    )
    one, two = TrainConfig(2, 2, max_steps=18, log_every=1), TrainConfig(1, 2, max_steps=18, log_every=1)
    expected = train_on(World(), replace(plain, train=one, output=str(folder / "one")), 18)
    mixed = replace(plain, train=two, output=str(folder / "mixed"))
    windows: list[list[str]] = []
    for processes, until in ((2, 6), (1, 12), (2, 18)):
        if processes == 2:
            shares = run_ranks(train_on, mixed, until)
        else:
            shares = [train_on(World(), replace(mixed, train=one), until)]
        windows += [[name for share in shares_of_window for name in share] for shares_of_window in zip(*shares)]
    assert len(windows) == len(expected) == 18
    assert [sorted(window) for window in windows] == [sorted(window) for window in expected]
    ours, theirs = read_metrics(folder / "mixed"), read_metrics(folder / "one")
    worst = 0.0
    for line, other in zip(ours, theirs, strict=True):
        assert line["step"] == other["step"]
        for key in {"loss", "eval_loss"} & set(line):
            worst = max(worst, abs(float(line[key] or 0) / float(other[key] or 0) - 1))
    print(f"{adapter}: the same samples in 18 steps, losses within {worst:.1e}")
    assert worst < 2e-6
    afresh = [event for event in read_events(folder / "mixed") if "starts afresh" in event["reason"]]
    assert [event["rank"] for event in afresh] == [1]


# -- which checkpoint is gone on from, and what becomes of the others --------------------------------------------------


@pytest.fixture
def short(base: RunConfig, tmp_path: Path) -> RunConfig:
    """Four steps, all saved and evaluated."""
    train = TrainConfig(1, 1, max_steps=4, log_every=1)
    return replace(base, output=str(tmp_path / "run"), train=train, evaluation=EvaluationConfig(every=1, batch_size=5))


def finished(config: RunConfig, change: Callable[[Run], None] = lambda run: None) -> Run:
    return kept_runs.go(config, change=change)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "precision.json"])
def test_damage_after_a_fallback_is_passed_over_for_a_checkpoint_before_it(short: RunConfig, name: str) -> None:
    """Which mode the weights are cast for is told by the checkpoint that is gone on from, not by the newest."""
    precision = PrecisionConfig("amp_fp16", ["fp32"], max_nonfinite_losses=2, loss_scale=SCALE)
    config = replace(short, precision=precision, evaluation=EvaluationConfig(enabled=False))
    run = finished(config, lambda run: void(Hostile(run, frozenset(), frozenset({2, 3}))))
    assert run.policy.name == "fp32"
    for step in (3, 4):
        flip(Path(config.output) / f"checkpoints/step-{step:08d}/state" / name)
    resumed = build_run(replace(config, resume="latest"), World(), lambda line: None)
    try:
        assert (resumed.state.step, resumed.policy.name) == (2, "amp_fp16")
        told = [event["reason"] for event in read_events(Path(config.output)) if "skipped a damaged" in event["reason"]]
        assert len(told) == 2
    finally:
        resumed.close()


def void(_: object) -> None:
    """Drop a value."""


def test_the_line_of_a_fallback_to_come_is_written_once(short: RunConfig, tmp_path: Path) -> None:
    """Killed after it, a run goes on from the checkpoint of the same step, before it."""
    precision = PrecisionConfig("amp_fp16", ["fp32"], max_nonfinite_losses=2, loss_scale=SCALE)
    config = replace(short, precision=precision)

    def hostile(run: Run) -> None:
        Hostile(run, frozenset(), frozenset({2, 3}))

    def killed(run: Run) -> None:
        hostile(run)
        stop_before(run, lambda state: state.window == 4)

    go(replace(config, output=str(tmp_path / "whole")), hostile)
    go(config, killed)
    assert numbers(Path(config.output)) == numbers(tmp_path / "whole")[: len(numbers(Path(config.output)))]
    go(config, hostile)
    assert numbers(Path(config.output)) == numbers(tmp_path / "whole")


def weights_of(slot: Path) -> bytes:
    return (slot / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["checkpoints/discarded/step-00000004", "best"])
def test_a_run_that_goes_on_from_elsewhere_is_gone_on_with_whenever_it_ends(short: RunConfig, where: str) -> None:
    folder = Path(short.output)
    finished(short)
    first = weights_of(folder / "checkpoints" / "step-00000004")
    other = replace(short, optim=replace(short.optim, lr=1e-3), resume=str(folder / "checkpoints" / "step-00000002"))
    finished(other)
    newest = folder / "checkpoints" / "step-00000004"
    second = weights_of(newest)
    assert second != first
    slot = folder / where
    expected = first if where != "best" else weights_of(slot)
    step = 4 if where != "best" else json.loads((folder / "best.json").read_text())["step"]
    longer = replace(short, train=replace(short.train, max_steps=6), checkpoint=CheckpointConfig(100, 1))
    with pytest.raises(KeyboardInterrupt):  # before the first window
        finished(replace(longer, resume=str(slot)), interrupt)
    assert find_slots(folder)[0].name == f"step-{step:08d}"
    assert weights_of(find_slots(folder)[0]) == expected
    run = finished(replace(longer, resume="latest"))
    assert run.state.step == 6
    aside = [weights_of(path) for path in (folder / "checkpoints" / "discarded").glob("step-*")]
    assert {first, second} <= {*aside, expected}  # nothing is lost of either branch


def test_a_state_from_elsewhere_that_cannot_be_saved_costs_nothing(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of the newest checkpoint's step."""
    folder, newest = Path(short.output), "step-00000004"
    finished(replace(short, checkpoint=CheckpointConfig(1, 1)))
    other = folder / "checkpoints" / "discarded" / newest
    shutil.copytree(folder / "checkpoints" / newest, other)

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rawloop.checkpoint.writer.write_slot", full)
    with pytest.raises(CheckpointError, match="cannot save step-00000004"):
        build_run(replace(short, resume=str(other)), World(), lambda line: None)
    assert [path.name for path in find_slots(folder)] == [newest, "step-00000003"]
    assert verify(folder / "checkpoints" / newest).step == 4


def test_who_trains_in_a_folder_is_said_before_what_is_wrong_with_the_settings(forks: Forks, short: RunConfig) -> None:
    finished(short)
    code = (
        "import signal, sys; from pathlib import Path; from rawloop.checkpoint.run_folder import RunLock; "
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); signal.pause()"
    )
    other = forks.start("-c", code, short.output)
    other.wait_for("held")
    for config in (replace(short, resume="latest", seed=3), replace(short, resume="auto"), short):
        with pytest.raises(UserError, match=rf"into which process {other.pid} on .* is training now"):
            build_run(config, World(), lambda line: None)
    other.kill()
    forks.wait([other])
    finished(replace(short, resume="latest"))


def test_a_run_that_has_ended_holds_no_lock(short: RunConfig) -> None:
    lock = str(Path(short.output).resolve() / ".lock")

    def held() -> list[str]:
        return [path for path in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if path == lock]

    seen: list[list[str]] = []
    finished(short, lambda run: seen.append(held()))
    assert seen == [[lock]]
    assert held() == []


def interrupt(run: Run) -> None:
    raise KeyboardInterrupt


def measuring(run: Run, values: dict[int, float]) -> None:
    """Let the evaluation of each step come out at these."""
    assert run.evaluator is not None
    evaluate = run.evaluator.run

    def measured(stop: Callable[[], str | None]) -> Any:
        evaluation = evaluate(stop)
        return evaluation._replace(metrics={**evaluation.metrics, "eval_loss": values[run.state.step]})

    run.evaluator.run = measured  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("left_out", ["value", "step", None])
def test_a_best_value_left_out_is_noticed_where_the_slot_is_of_what_is_given_up(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch, left_out: str | None
) -> None:
    """Elsewhere the slot says it again."""
    folder, values = Path(short.output), {0: 5.0, 1: 3.0, 2: 4.0, 3: 3.5, 4: 1.0}
    finished(short, lambda run: measuring(run, values))
    best = folder / "checkpoints" / "step-00000003" / "state" / "best.json"
    expected = best.read_bytes()
    if left_out:
        leave_out(monkeypatch, BestTracker, (left_out,))
    finished(replace(short, resume=str(folder / "checkpoints" / "step-00000002")), lambda run: measuring(run, values))
    assert (best.read_bytes() == expected) == (left_out is None)


def test_a_best_model_that_could_not_be_written_does_not_cost_the_one_before(short: RunConfig) -> None:
    """The values fall, rise again, and the disk is full in between: what is in the slot is compared with."""
    folder, values = Path(short.output), {0: 5.0, 1: 3.0, 2: 4.5, 3: 6.0, 4: 5.5}

    def full_at(*steps: int) -> Callable[[Run], None]:
        def change(run: Run) -> None:
            assert run.checkpoints is not None
            part = run.checkpoints.parts.folders["model"]
            snapshot = part.snapshot

            def refused(copy: bool) -> Callable[[Path], None]:
                write = snapshot(copy)
                return write if run.state.step not in steps else full

            def full(folder: Path) -> None:
                raise OSError(28, "No space left on device")

            part.snapshot = refused  # type: ignore[method-assign]
            measuring(run, values)

        return change

    config = replace(short, checkpoint=CheckpointConfig(100, save_at_end=False, max_failures=9))
    run = finished(config, full_at(1))
    # 4.5 beat the 5.0 that had been kept; 6.0 and 5.5 did not beat it
    assert json.loads((folder / "best.json").read_text())["value"] == 4.5
    assert run.best is not None
    assert (run.best.value, run.best.step) == (4.5, 2)
    again = replace(config, output=f"{folder}-again", checkpoint=CheckpointConfig(1, max_failures=9))
    with pytest.raises(CheckpointError, match="but not the best model: cannot save step-00000002"):
        finished(again, full_at(1, 2))
    assert json.loads((Path(again.output) / "best.json").read_text())["value"] == 5.0


def test_a_resumed_run_believes_the_best_that_was_written(short: RunConfig) -> None:
    """A better value has been seen, and its model could not be written before the run was killed."""
    folder = Path(short.output)
    finished(short)
    written = json.loads((folder / "best.json").read_text())
    assert written["step"] == 4
    (folder / "best").unlink()
    (folder / "best").symlink_to("checkpoints/step-00000003")
    (folder / "best.json").unlink()
    manifest = read_manifest(folder / "best")
    (folder / "best" / "MANIFEST.json").unlink()
    best = {"metric": "eval_loss", "mode": "min", "value": 9.0, "step": 3}
    write_manifest(folder / "best", replace(manifest, meta={"best": best}))
    run = build_run(replace(short, resume="latest"), World(), lambda line: None)
    run.close()
    assert run.best is not None
    assert (run.best.value, run.best.step) == (9.0, 3)
    earlier = replace(short, resume=str(folder / "checkpoints" / "step-00000002"))
    run = build_run(earlier, World(), lambda line: None)
    run.close()
    assert run.best is not None
    assert (run.best.value, run.best.step) == (9.0, 3)  # a better one of before it was never written


def test_data_workers_are_forked_when_nothing_is_being_written(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best model of step 0 may still be: a worker would inherit the locks of the thread."""
    write = slot_writer.write_slot

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return write(*arguments)

    monkeypatch.setattr("rawloop.checkpoint.writer.write_slot", slow)
    seen = []

    def look(run: Run) -> None:
        start = run.windows

        def windows(window: int) -> Iterable[list[Batch]]:
            assert run.checkpoints is not None
            seen.append([thread.name for thread in threading.enumerate() if "rawloop-save" in thread.name])
            return start(window)

        run.windows = windows

    finished(replace(short, train=replace(short.train, max_steps=1)), look)
    assert seen == [[]]


@pytest.mark.parametrize("evaluation", [EvaluationConfig(enabled=False), EvaluationConfig(every=1)], ids=["off", "on"])
def test_no_checkpoint_says_that_lines_stand_that_could_not_be_written(
    short: RunConfig, evaluation: EvaluationConfig
) -> None:
    short = replace(short, evaluation=evaluation)

    def refuse(run: Run) -> None:
        write = run.records.metrics

        def metrics(step: int, values: Any) -> None:
            if step == 3:
                raise RawloopError("cannot write metrics.jsonl: no space is left on the disk")
            write(step, values)

        run.records.metrics = metrics  # type: ignore[method-assign]

    with pytest.raises(RawloopError, match="cannot write metrics"):
        finished(short, refuse)
    assert [path.name for path in find_slots(Path(short.output))][:2] == ["step-00000002", "step-00000001"]
    finished(replace(short, resume="latest"))
    finished(replace(short, output=f"{short.output}-whole"))
    assert numbers(Path(short.output)) == numbers(Path(f"{short.output}-whole"))


def test_a_folder_in_which_another_run_has_begun_meanwhile_is_refused(
    short: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the checkpoint to branch from is verified, for minutes, another start makes the same new folder."""
    finished(short)
    new = replace(short, output=f"{short.output}-new", resume=f"{short.output}/checkpoints/step-00000002")

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr("rawloop.resume.choose", choose)
        finished(new)
        return choose(*arguments)

    monkeypatch.setattr("rawloop.resume.choose", slow)
    with pytest.raises(UserError, match="in which another process has started a run just now"):
        build_run(new, World(), lambda line: None)
    names = [path.name for path in find_slots(Path(new.output))]
    assert names[0] == "step-00000004"


def test_a_stop_that_no_record_takes_is_a_stop(short: RunConfig) -> None:
    """On rank 0 alone, another exit code than the other ranks' would come of it."""

    def refuse(run: Run) -> None:
        event = run.records.event
        run.preemption = Preemption()
        run.preemption.received = "SIGTERM"

        def full(kind: Any, **fields: Any) -> None:
            if kind == "stop":
                raise RawloopError("cannot write events.jsonl: no space is left on the disk")
            event(kind, **fields)

        run.records.event = full  # type: ignore[method-assign]

    with pytest.raises(Preempted, match=r"checkpoint: .*step-00000000; .* \(it is in no record: cannot write events"):
        finished(short, refuse)


def test_a_model_that_is_refused_leaves_no_run(short: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise UserError("a weight stands outside of the adapter")

    with monkeypatch.context() as patched:
        patched.setattr("rawloop.ready.ModelFiles", refuse)
        with pytest.raises(UserError, match="outside of the adapter"):
            build_run(short, World(), lambda line: None)
    finished(replace(short, train=replace(short.train, max_steps=1)))
