"""The watch inside a run: it changes no bit of the training, tells findings as events, and keeps bad steps."""

import math
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.contracts import Batch, StreamLoss
from rawloop.dist import World, unwrap_ddp
from rawloop.errors import LostRank, TrainingError
from rawloop.loop import Run
from rawloop.precision.config import PrecisionConfig
from rawloop.preempt import watch_signals
from rawloop.records import read_events, read_metrics
from rawloop.sharding import part_of
from rawloop.spike_watch import SpikeWatch
from rawloop.watch.capsule import Capsule, read_facts, read_states, write_capsule
from rawloop.watch.config import WatchConfig
from rawloop.watched import RunWatch
from tests.kept_runs import go, trained


@pytest.fixture
def base(text_run: RunConfig) -> RunConfig:
    """A run of 3 steps on a tiny Llama, with LoRA, dropout and accumulation."""
    return text_run


def trained_by(world: World, config: RunConfig) -> dict[str, Tensor]:
    return trained(go(config, world))


@pytest.mark.parametrize(
    "mode", ["amp_fp16", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fp32", "bf16", "native_fp16"))]
)
def test_a_watched_run_trains_the_same_bits(base: RunConfig, tmp_path: Path, mode: Any) -> None:
    config = replace(base, precision=PrecisionConfig(mode=mode))
    off = go(replace(config, output=str(tmp_path / "off"), watch=WatchConfig(enabled=False)))
    on = go(replace(config, output=str(tmp_path / "on"), watch=WatchConfig(every=1)))
    assert on.watch is not None
    assert off.watch is None
    for (name, weight), other in zip(trained(off).items(), trained(on).values(), strict=True):
        assert torch.equal(weight, other), name
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in read_metrics(tmp_path / "on")] == [
            line[key] for line in read_metrics(tmp_path / "off")
        ]
    events = read_events(tmp_path / "on")
    assert not [event for event in events if event["kind"] in ("warning", "capsule")]
    assert [
        event["reason"] for event in events if event["kind"] == "finding" and not event["finding"]["ordinary"]
    ] == []


@pytest.mark.slow
def test_two_watched_ranks_train_the_same_bits(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    config = replace(base, train=replace(base.train, batch_size=1, max_steps=2))
    on, other = run_ranks(trained_by, replace(config, output=str(tmp_path / "on"), watch=WatchConfig(every=1)))
    off, _ = run_ranks(trained_by, replace(config, output=str(tmp_path / "off"), watch=WatchConfig(enabled=False)))
    assert all(torch.equal(on[name], off[name]) and torch.equal(on[name], other[name]) for name in on)


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_the_recorder_reads_nothing_from_the_device(base: RunConfig, tmp_path: Path) -> None:
    def without_detectors(run: Run) -> None:
        if isinstance(run.watch, RunWatch):
            run.watch.watch.detectors.clear()
        reads.count = 0

    counts = []
    for enabled in (False, True):
        config = replace(base, output=str(tmp_path / str(enabled)), watch=WatchConfig(enabled=enabled))
        with Reads() as reads:
            go(config, change=without_detectors)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


class Poisoned:
    """The family's losses, NaN in the passes of these numbers."""

    def __init__(self, losses: Any, passes: Iterable[int]) -> None:
        self.losses, self.passes, self.number = losses, set(passes), -1

    def __call__(self, model: Any, batch: Batch) -> dict[str, StreamLoss]:
        self.number += 1
        found: dict[str, StreamLoss] = self.losses(model, batch)
        if self.number in self.passes:
            return {name: loss._replace(total=loss.total * math.nan) for name, loss in found.items()}
        return found


def poison(passes: Iterable[int]) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        module: Any = run.module
        module.losses = Poisoned(module.losses, passes)

    return change


def test_an_alarm_is_an_event_and_a_capsule(kept_run: Path) -> None:
    (event,) = [e for e in read_events(kept_run) if e["kind"] == "finding" and not e["finding"]["ordinary"]]
    assert (event["step"], event["finding"]["kind"]) == (2, "test")
    assert "something is wrong" in event["reason"]
    (path,) = (kept_run / "capsules").iterdir()
    assert path.name == "step-00000002-rank0"
    facts = read_facts(path)
    assert facts["why"].startswith("finding test")
    assert facts["findings"][0]["causes"][0]["what"] == "the test says so"
    assert (facts["step"], facts["world_size"], facts["precision"]) == (2, 1, "fp32")
    state = read_states(path, facts)
    assert [len(one["batch"]["ids"]) for one in state("passes")["passes"]] == [2, 2]
    assert set(state("weights")["trained"]) == set(facts["gradients"])
    assert len(state("optimizer")["state"]) == len(facts["gradients"])
    assert [kept["step"] for kept in facts["history"]] == [0, 1]
    assert [[len(one["ids"]) for one in kept["batch"]] for kept in state("earlier")["steps"]] == [[2, 2], [2, 2]]
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors", ".yaml"}


def test_a_skip_tells_its_scale_floor_and_history(base: RunConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path), precision=PrecisionConfig(mode="native_fp16"))
    go(config, change=poison([2]))
    (event,) = [event for event in read_events(tmp_path) if event["kind"] == "skip"]
    assert (event["scale"], event["next_scale"], event["scale_floor"]) == (2.0**15, 2.0**14, 1.0)
    assert event["last_scales"] == [2.0**15, 2.0**15]


def test_the_skip_limit_leaves_a_capsule_and_the_error_names_it(base: RunConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path), precision=PrecisionConfig(mode="fp32", max_skips=2))
    with pytest.raises(TrainingError, match=r"rawloop replay .*step-00000000-rank0"):
        go(config, change=poison(range(100)))
    first, path = sorted((tmp_path / "capsules").iterdir())
    assert read_facts(first)["why"] == "finding not_finite: the loss is not finite"
    facts = read_facts(path)
    assert "skips in a row" in facts["why"]
    assert facts["loss"] == "nan"
    assert [kept["applied"] for kept in facts["history"]] == [False]


def test_a_crash_leaves_a_capsule(base: RunConfig, tmp_path: Path) -> None:
    def broken(model: Any, batch: Batch) -> Any:
        raise RuntimeError("a kernel failed")

    def change(run: Run) -> None:
        module: Any = run.module
        module.losses = broken

    with pytest.raises(RuntimeError, match="a kernel failed") as caught:
        go(replace(base, output=str(tmp_path)), change=change)
    assert any("rawloop replay" in note for note in caught.value.__notes__)
    (path,) = (tmp_path / "capsules").iterdir()
    passes = read_states(path, read_facts(path))("passes")["passes"]
    assert [bool(one["rng"]) for one in passes] == [True, False]


def test_a_capsule_is_written_on_request(base: RunConfig, tmp_path: Path) -> None:
    def ask(run: Run) -> None:
        run.preemption = preemption
        os.kill(os.getpid(), signal.SIGUSR2)

    with watch_signals() as preemption:
        go(replace(base, output=str(tmp_path), train=replace(base.train, max_steps=1)), change=ask)
    (path,) = (tmp_path / "capsules").iterdir()
    assert (path.name, read_facts(path)["why"]) == ("step-00000000-rank0", "asked for by SIGUSR2")


def test_a_lost_rank_leaves_a_capsule_without_the_device(base: RunConfig, tmp_path: Path) -> None:
    class Lost(World):
        def sum(self, values: list[float]) -> list[float]:
            if run_of[0].state.step == 2:
                raise LostRank("rank 1 did not come in time")
            return values

    run_of: list[Run] = []
    with pytest.raises(LostRank, match="rawloop replay"):
        go(replace(base, output=str(tmp_path)), Lost(), run_of.append)
    (path,) = (tmp_path / "capsules").iterdir()
    facts = read_facts(path)
    assert facts["why"] == "LostRank: rank 1 did not come in time"
    assert "could not be read" in facts["left_out"]["weights"]
    assert [kept["step"] for kept in facts["history"]] == [0, 1]


def test_what_does_not_fit_is_left_out(kept_run: Path, tmp_path: Path) -> None:
    path = kept_run / "capsules" / "step-00000002-rank0"
    facts = read_facts(path)
    assert facts["left_out"] == {}
    state = read_states(path, facts)
    names = ("passes", "earlier", "weights", "optimizer")
    again = Capsule({}, {name: state(name) for name in names})
    most = sum(facts["files"][f"{name}.safetensors"]["size"] for name in ("passes", "earlier", "weights"))
    less = write_capsule(tmp_path / "less", again, most)
    assert "watch.capsule_mb is 0" in read_facts(less)["left_out"]["optimizer"]
    assert read_states(less, read_facts(less))("optimizer") is None
    assert read_states(less, read_facts(less))("weights") is not None
    assert set(read_facts(write_capsule(tmp_path / "least", again, 0))["left_out"]) == set(names)


class Spiky:
    """The family's losses, much larger in the windows of these numbers, counted as they are trained."""

    def __init__(self, losses: Any, windows: Iterable[int]) -> None:
        self.losses, self.windows, self.number = losses, set(windows), -1

    def __call__(self, model: Any, batch: Batch) -> dict[str, StreamLoss]:
        self.number += 1
        found: dict[str, StreamLoss] = self.losses(model, batch)
        if self.number in self.windows:
            return {name: loss._replace(total=loss.total * 50) for name, loss in found.items()}
        return found


def spiky(windows: Iterable[int], spread: float = 0.05) -> Callable[[Run], None]:
    """Make these windows spikes, for a guard that has seen losses from 6.8 on, and norms from 8 on."""

    def change(run: Run) -> None:
        module: Any = unwrap_ddp(run.module)
        module.losses = Spiky(module.losses, windows)
        assert isinstance(run.watch, SpikeWatch)
        for number in range(20):  # steps, from which on the guard knows what is usual
            run.watch._guard.keep(6.8 + spread * (number % 3), 8.0 + spread * (number % 3))

    return change


def findings(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of findings of this kind."""
    return [e for e in read_events(folder) if e["kind"] == "finding" and e["finding"]["kind"] == kind]


def guarded(base: RunConfig, folder: Path, spikes: Any, **more: Any) -> RunConfig:
    """A run of 4 steps with the guard."""
    train = replace(base.train, accumulation=1, max_steps=4)
    return replace(base, output=str(folder), train=train, watch=WatchConfig(spikes=spikes, capsules=1, **more))


def test_a_spike_is_warned_of_or_skipped(base: RunConfig, tmp_path: Path) -> None:
    runs = {name: go(guarded(base, tmp_path / name, name), change=spiky([2])) for name in ("warn", "skip", "off")}
    for name, count in (("warn", 0), ("skip", 1)):
        (finding,) = findings(tmp_path / name, "spike")
        watch = runs[name].watch
        assert isinstance(watch, SpikeWatch)
        assert len(watch._guard.loss) == 20 + 3 + count  # the spike is not usual, also if it was applied
        assert finding["step"] == 2
        assert "is a spike: the last 22 were" in finding["reason"]
        assert "train.jsonl line" in finding["finding"]["causes"][0]["place"]["sample"]
        assert runs[name].state.skipped == count
        assert (tmp_path / name / "capsules" / "step-00000002-rank0").is_dir()
    (skip,) = [e for e in read_events(tmp_path / "skip") if e["kind"] == "skip"]
    assert "is a spike" in skip["reason"]
    assert (runs["skip"].state.step, runs["skip"].state.window) == (4, 5)
    assert findings(tmp_path / "off", "spike") == []
    warned, off = trained(runs["warn"]), trained(runs["off"])
    assert all(torch.equal(weight, off[name]) for name, weight in warned.items())


def test_too_many_spikes_end_the_run(base: RunConfig, tmp_path: Path) -> None:
    config = guarded(base, tmp_path, "skip", max_spikes=2)
    with pytest.raises(TrainingError, match=r"3 steps were skipped as spikes, more than watch.max_spikes \(2\)"):
        go(config, change=spiky(range(100)))


def test_a_run_goes_back_after_a_spike_and_leaves_its_samples_out(base: RunConfig, tmp_path: Path) -> None:
    config = replace(guarded(base, tmp_path, "rollback"), checkpoint=CheckpointConfig(save_every=2))
    run = go(config, change=spiky([3]))
    assert (run.state.step, run.state.window, run.state.left_out) == (4, 5, [3])
    restored = [e["reason"] for e in read_events(tmp_path) if e["kind"] == "restore"]
    assert "went back from step 3 to step-00000002 after a spike; window 3 is left out" in restored
    lines: list[dict[str, Any]] = [line for line in read_metrics(tmp_path) if "samples_per_second" in line]
    assert [line["step"] for line in lines] == list(range(1, 5))
    for line in lines:
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(config.train.batch_size)
    assert not [e for e in read_events(tmp_path) if e["kind"] == "finding" and "outside" in e["finding"]["kind"]]


def spiky_on_rank_1(world: World, config: RunConfig) -> tuple[dict[str, Tensor], list[int]]:
    run = go(config, world, change=spiky([3] if world.rank else [], spread=3.0))  # one sample a rank
    return {name: part_of(weight) for name, weight in trained(run).items()}, run.state.left_out


@pytest.mark.slow
def test_sharded_runs_warn_skip_and_go_back_as_others(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    """With the numbers of DDP, which the tests above hold: the guard sees the same losses and norms."""
    for spikes in ("warn", "skip", "rollback"):
        ends = []
        for parallel in ("ddp", "fsdp"):
            config = replace(guarded(base, tmp_path / spikes / parallel, spikes), parallel=parallel)
            config = replace(
                config, train=replace(config.train, batch_size=1), checkpoint=CheckpointConfig(save_every=2)
            )
            (_, left_out), _ = run_ranks(spiky_on_rank_1, config)
            kinds = [event["kind"] for event in read_events(tmp_path / spikes / parallel)]
            losses = [line["loss"] for line in read_metrics(tmp_path / spikes / parallel) if "loss" in line]
            ends.append((left_out, *(kinds.count(kind) for kind in ("skip", "restore")), losses))
            assert findings(tmp_path / spikes / parallel, "spike")
        assert ends[1] == (*ends[0][:3], pytest.approx(ends[0][3]))
        left_out, skips, restored, _ = ends[0]
        assert (left_out, skips, restored > 0) == {
            "warn": ([], 0, False),
            "skip": ([], 1, False),
            "rollback": ([3], 1, True),
        }[spikes]


@pytest.mark.slow
def test_two_ranks_agree_on_a_spike(base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    config = guarded(base, tmp_path, "rollback")
    config = replace(config, train=replace(config.train, batch_size=1), checkpoint=CheckpointConfig(save_every=2))
    (first, left_out), (second, _) = run_ranks(spiky_on_rank_1, config)
    assert left_out == [3]
    assert all(torch.equal(first[name], second[name]) for name in first)
    (skip,) = [e for e in read_events(tmp_path) if e["kind"] == "skip"]
    assert "is a spike" in skip["reason"]
