"""Stopping from outside: nothing is lost, all ranks stop together, and what goes on ends as if nothing had happened."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pytest
import torch

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.run_folder import mark_launch
from rawloop.checkpoint.slots import find_slots, verify
from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.data import DataConfig
from rawloop.data.batches import Loader
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import Preempted, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.loop import Run, TrainConfig, train
from rawloop.optim import OptimConfig
from rawloop.preempt import AGAIN, SIGNALS, STOP_FILE, exit_code_after, first_reason, watch_ctrl_c, watch_signals
from rawloop.records import TIMES, read_events, read_metrics

Change = Callable[[Run], None]


@pytest.fixture(scope="module")
def base(text_checkpoint: Path, text_data: Path) -> RunConfig:
    """A run of 4 steps on texts, evaluated at every other step, saved at step 3 and at the end."""
    return RunConfig(
        device="cpu",
        model=ModelConfig(path=str(text_checkpoint)),
        adapter=AdapterConfig(rank=4, dropout=0.1),
        data=DataConfig(str(text_data / "train.jsonl"), str(text_data / "eval.jsonl")),
        train=TrainConfig(batch_size=1, max_steps=4, log_every=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=2, batch_size=2),
        checkpoint=CheckpointConfig(save_every=3, keep_last=0),
    )


def go(config: RunConfig, world: World | None = None, change: Change | None = None) -> Run:
    """What `rawloop train` does, in this process."""
    with watch_signals(Path(config.output) / STOP_FILE) as preemption:
        run = build_run(config, world or World(), lambda line: None)
        run.preemption = preemption
        try:
            if change:
                change(run)
            train(run)
        finally:
            run.close()
    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]


def state(folder: Path, step: int) -> dict[str, bytes]:
    """All of a checkpoint but its manifest, which holds the folder's own digests, and the best slot's number."""
    slot = folder / "checkpoints" / f"step-{step:08d}"
    assert slot.is_dir()
    return {str(file.relative_to(slot)): file.read_bytes() for file in sorted(slot.rglob("*")) if file.is_file()}


def slots(folder: Path) -> list[int]:
    found = find_slots(folder)
    for slot in found:
        verify(slot)
    return sorted(int(slot.name[-8:]) for slot in found)


def stops(folder: Path) -> list[str]:
    return [event["reason"] for event in read_events(folder) if event["kind"] == "stop"]


def in_training(step: int, number: signal.Signals = signal.SIGTERM) -> Change:
    """Send this process a signal in the middle of the update that leads to `step`."""

    def change(run: Run) -> None:
        update = run.optimizer.step

        def signalled(*arguments: Any) -> Any:
            if run.state.step == step - 1:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
            return update(*arguments)

        run.optimizer.step = signalled  # type: ignore[method-assign, assignment]

    return change


def in_evaluation(step: int) -> Change:
    """Send this process a signal after the first batch of the evaluation at `step`."""

    def change(run: Run) -> None:
        assert run.evaluator is not None
        batches: Any = run.evaluator.batches

        class Signalling:
            def __iter__(self) -> Iterator[Batch]:
                for number, batch in enumerate(batches):
                    if number == 1 and run.state.step == step:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

        run.evaluator.batches = Signalling()

    return change


@pytest.fixture(scope="module")
def whole(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped. Read it only."""
    folder = tmp_path_factory.mktemp("whole")
    go(replace(base, output=str(folder)))
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    assert metrics(folder) == metrics(whole)
    assert state(folder, 4) == state(whole, 4)
    assert (folder / "best.json").read_text() == (whole / "best.json").read_text()


@pytest.mark.parametrize(
    ("change", "step", "saved"),
    [
        (in_training(1, signal.SIGUSR1), 1, [0, 1]),
        (in_training(3), 3, [0, 2, 3]),
        (in_evaluation(0), 0, [0]),
        (in_evaluation(2), 2, [0, 2]),
        (in_evaluation(4), 4, [0, 2, 3, 4]),
    ],
    ids=["training", "where a checkpoint is", "first evaluation", "evaluation", "last evaluation"],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    base: RunConfig, whole: Path, tmp_path: Path, change: Change, step: int, saved: list[int]
) -> None:
    config = replace(base, output=str(tmp_path))
    with pytest.raises(
        Preempted, match=rf"^stopped by SIG\w+ at step {step}; checkpoint: .*/step-{step:08d}; continue from it with"
    ):
        go(config, change=change)
    assert slots(tmp_path) == saved
    assert len([event for event in read_events(tmp_path) if event["kind"] == "save"]) == len(saved)
    assert len(stops(tmp_path)) == 1
    go(replace(config, resume="auto"))
    assert_same_run(tmp_path, whole)


def test_an_evaluation_that_was_made_up_for_is_not_in_the_metrics_twice(
    base: RunConfig, whole: Path, tmp_path: Path
) -> None:
    config = replace(base, output=str(tmp_path))
    with pytest.raises(Preempted):
        go(config, change=in_evaluation(2))

    def killed(run: Run) -> None:
        run.optimizer.step = interrupt  # type: ignore[method-assign, assignment]

    with pytest.raises(KeyboardInterrupt):  # after the evaluation, before anything is saved
        go(replace(config, resume="latest"), change=killed)
    assert [line["step"] for line in metrics(tmp_path) if "eval_loss" in line] == [0, 2]
    go(replace(config, resume="latest"))
    assert_same_run(tmp_path, whole)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_stop_after_a_made_up_evaluation_saves_that_it_was_made(base: RunConfig, whole: Path, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path))
    with pytest.raises(Preempted):
        go(config, change=in_evaluation(2))

    def after_evaluation(run: Run) -> None:
        write = run.records.metrics

        def signalled(step: int, values: Any) -> None:
            write(step, values)
            os.kill(os.getpid(), signal.SIGTERM)

        run.records.metrics = signalled  # type: ignore[method-assign]

    with pytest.raises(Preempted, match="at step 2;"):
        go(replace(config, resume="latest"), change=after_evaluation)
    run = go(replace(config, resume="latest"), change=lambda run: no_evaluation_at(run, 2))
    assert run.state.visited == 4
    assert_same_run(tmp_path, whole)


def no_evaluation_at(run: Run, step: int) -> None:
    assert run.state.visited == step


def test_a_stop_file_stops_and_the_next_start_removes_it(base: RunConfig, whole: Path, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path))

    def leave_file(run: Run) -> None:
        (tmp_path / STOP_FILE).touch()

    with pytest.raises(Preempted, match=rf"stopped by the file {tmp_path}/STOP at step 0; checkpoint: "):
        go(config, change=leave_file)
    assert slots(tmp_path) == [0]
    said: list[str] = []
    build_run(replace(config, resume="latest"), World(), said.append).close()
    assert f"removed {tmp_path}/STOP, which stopped an earlier run" in said
    go(replace(config, resume="latest"))
    assert_same_run(tmp_path, whole)


def test_a_signal_while_the_run_is_built_stops_it_at_its_first_step(base: RunConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path), evaluation=EvaluationConfig(enabled=False))
    with pytest.raises(Preempted, match="stopped by SIGTERM at step 0; checkpoint: "):
        go(config, change=lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert slots(tmp_path) == [0]


def test_a_second_signal_changes_nothing_until_the_process_has_ended(tmp_path: Path) -> None:
    script = """import sys, time, types
from rawloop import cli
from rawloop.errors import Preempted
from rawloop.preempt import watch_signals
def run(rest):
    with watch_signals() as preemption:
        print("watching", flush=True)
        while preemption.wanted() is None:
            time.sleep(0.01)
        raise Preempted("stopped")
sys.modules["rawloop.cli.train"] = types.SimpleNamespace(run=run)
sys.argv[1:] = ["train"]
code = cli.main()
print("ending", flush=True)
time.sleep(1)
sys.exit(code)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=PIPE, stderr=PIPE, text=True)
    try:
        for awaited in ("watching\n", "ending\n"):
            assert process.stdout
            assert process.stdout.readline() == awaited
            process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=240)[1]
    finally:
        process.kill()
    assert (process.returncode, error) == (75, "rawloop train: stopped\n")


def test_handlers_are_put_back_and_other_threads_set_none() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def look() -> None:
        with watch_signals() as preemption:
            seen.append([signal.getsignal(number) for number in SIGNALS])
            assert preemption.wanted() is None

    with watch_signals() as preemption:
        inside = [signal.getsignal(number) for number in SIGNALS]
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.wanted() == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert seen == [inside]
    assert inside != before


def press_at(moments: list[float]) -> None:
    for moment in moments:
        time.sleep(moment)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_asks_to_stop_and_the_second_ends() -> None:
    said: list[str] = []
    ended = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    with watch_signals() as preemption, watch_ctrl_c(preemption, said.append, ended.set):
        press_at([0, 0.05])  # a launcher may send it twice
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert preemption.wanted() == "Ctrl-C"
        assert said == ["Ctrl-C: the run saves its state after this step and ends; press Ctrl-C again to end at once"]
        assert not ended.wait(AGAIN)
        signal.raise_signal(signal.SIGINT)
        assert ended.wait(60)
        assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) == before
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises(KeyboardInterrupt):
        press_at([0, 60])
    assert [exit_code_after(reason) for reason in ("Ctrl-C on rank 1", "SIGTERM")] == [130, 75]


def test_ctrl_c_is_heard_during_an_operation_that_takes_long() -> None:
    """Python's own handlers run after it, and a second Ctrl-C before that would be the same as one."""
    said: list[bool] = []
    busy = threading.Event()
    with watch_signals() as preemption, watch_ctrl_c(preemption, lambda _: said.append(busy.is_set()), list):
        busy.set()
        presser = threading.Thread(target=press_at, args=([0.1],))
        presser.start()
        while not said:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # in C, without the GIL
            busy.clear()
        presser.join()
    assert said == [True]


def test_a_sigterm_after_ctrl_c_ends_as_torchrun_means_it() -> None:
    ended = threading.Event()
    with watch_signals() as preemption, watch_ctrl_c(preemption, lambda line: None, ended.set):
        signal.raise_signal(signal.SIGTERM)
        assert not ended.wait(0.2)
        press_at([0, AGAIN + 0.1])
        assert ended.wait(60)
        assert preemption.wanted() == "SIGTERM"


def test_where_ctrl_c_is_ignored_it_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch_signals() as preemption, watch_ctrl_c(preemption, pytest.fail, pytest.fail):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            press_at([0])
            assert preemption.wanted() is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_rank_is_named_where_not_all_were_told() -> None:
    assert first_reason([None, None]) is None
    assert first_reason(["SIGTERM", "SIGTERM"]) == "SIGTERM"
    assert first_reason([None, "SIGTERM"]) == "SIGTERM on rank 1"


class Numbers(torch.utils.data.Dataset[Any]):
    """Stands for the micro-batches: what a worker gives back is its process id."""

    def __getitem__(self, indices: list[int]) -> int:
        time.sleep(0.01)
        return os.getpid()


def test_data_workers_outlive_a_signal_to_all_and_end_with_their_parent() -> None:
    loader: Any = Loader(Numbers(), num_workers=1)  # type: ignore[arg-type]
    stream = loader.iterate(iter([[0]] * 20))
    child = next(stream)
    assert child != os.getpid()
    # Sent by another process, as torchrun does: from the parent itself it would end the worker.
    os.system(f"kill -TERM {child}; kill -USR1 {child}; kill -INT {child}")
    assert set(stream) == {child}
    again = loader.iterate(iter([[0]] * 20))
    worker = psutil.Process(next(again))
    worker.terminate()
    deadline = time.monotonic() + 5
    while worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.status() == psutil.STATUS_ZOMBIE


# -- ranks -------------------------------------------------------------------------------------------------------


def stop_rank_1(world: World, config: RunConfig) -> list[tuple[str, bool]]:
    """Only rank 1 is told to stop: in an update, then in an evaluation of the run that goes on."""
    said = []
    for change in (in_training(1), in_evaluation(2)):
        try:
            go(config, world, change if world.rank == 1 else None)
        except Preempted as stopped:
            said.append((str(stopped), stopped.is_reporter))
        config = replace(config, resume="auto")
    return said


def test_two_ranks_stop_together_when_one_is_told(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    config = replace(base, output=str(tmp_path / "run"), evaluation=EvaluationConfig(every=2, batch_size=1))
    first, second = run_ranks(stop_rank_1, config, timeout=240)
    lines = [
        f"stopped by SIGTERM on rank 1 at step {step}; checkpoint: {tmp_path}/run/checkpoints/step-{step:08d}; "
        "continue from it with --resume latest"
        for step in (1, 2)
    ]
    assert first == [(line, True) for line in lines]
    assert second == [(line, False) for line in lines]
    assert slots(tmp_path / "run") == [0, 1, 2]
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval_loss" in line] == [0]


# -- restarts ----------------------------------------------------------------------------------------------------


def stopped_at(step: int) -> Change:
    """End the run by an error in the update that leads to `step`, as a kill would."""

    def change(run: Run) -> None:
        update = run.optimizer.step

        def fail(*arguments: Any) -> Any:
            if run.state.step == step - 1:
                raise KeyboardInterrupt
            return update(*arguments)

        run.optimizer.step = fail  # type: ignore[method-assign, assignment]

    return change


@pytest.mark.parametrize("died", [2, 4])
def test_a_restart_goes_on_without_a_word_from_the_user(
    base: RunConfig, whole: Path, tmp_path: Path, died: int
) -> None:
    config = replace(base, output=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        go(config, World(launch="a"), stopped_at(died))
    run = go(config, World(launch="a", restarts=1))
    assert run.state.step == 4
    restored = [event for event in read_events(tmp_path) if event["reason"].startswith("restored ")]
    assert [event["step"] for event in restored] == [3 if died == 4 else 0]  # the best so far is a checkpoint too
    assert_same_run(tmp_path, whole)


def test_a_restart_without_a_checkpoint_of_its_own_begins_where_the_command_says(
    base: RunConfig, whole: Path, tmp_path: Path
) -> None:
    config = replace(base, output=str(tmp_path), resume=str(whole / "checkpoints" / "step-00000003"))
    with pytest.raises(KeyboardInterrupt):
        go(config, World(launch="a"), stopped_at(4))
    assert slots(tmp_path) == [3]  # what came from elsewhere is saved at once
    with pytest.raises(KeyboardInterrupt):
        go(config, World(launch="a", restarts=1), stopped_at(4))
    shutil.rmtree(tmp_path / "checkpoints")  # as if it had died before
    go(config, World(launch="a", restarts=1))
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == [4]
    assert (
        state(tmp_path, 4)["adapter/adapter_model.safetensors"] == state(whole, 4)["adapter/adapter_model.safetensors"]
    )


def test_a_restart_of_a_run_that_goes_back_goes_back_only_once(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(base, output=str(tmp_path), evaluation=EvaluationConfig(enabled=False))
    config = replace(config, checkpoint=CheckpointConfig(save_every=1, keep_last=0))
    go(config)
    back = replace(config, resume=str(tmp_path / "checkpoints" / "step-00000001"))
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointManager, "restore", interrupt)  # later checkpoints are still in their place
        with pytest.raises(KeyboardInterrupt):
            go(back, World(launch="a"))
    with pytest.raises(KeyboardInterrupt):
        go(back, World(launch="a", restarts=1), stopped_at(4))
    assert slots(tmp_path) == [1, 2, 3]
    go(back, World(launch="a", restarts=2))
    restored = [event for event in read_events(tmp_path) if event["reason"].startswith("restored ")]
    assert [event["step"] for event in restored] == [1, 3]


def test_a_folder_of_another_run_is_refused_by_a_restart_too(base: RunConfig, whole: Path) -> None:
    before = sorted(whole.rglob("*"))
    for world in (World(launch="a"), World(launch="a", restarts=1)):
        with pytest.raises(UserError, match="which already holds a run"):
            go(replace(base, output=str(whole)), world)
    assert sorted(whole.rglob("*")) == before


def test_a_run_that_was_told_to_stop_is_not_restarted(base: RunConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path), train=TrainConfig(max_steps=2), evaluation=EvaluationConfig(False))
    first, again = World(launch="a"), World(launch="a", restarts=1)
    with pytest.raises(Preempted):
        go(config, first, in_training(1))
    mark_launch(tmp_path, first, stopped=True)
    with pytest.raises(Preempted, match="was told to stop before torchrun started it again"):
        go(config, again)
    assert go(replace(config, resume="latest"), replace(first, launch="b")).state.step == 2


def test_a_restart_honours_a_stop_file(base: RunConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path), evaluation=EvaluationConfig(enabled=False))
    with pytest.raises(KeyboardInterrupt):
        go(config, World(launch="a"), stopped_at(1))
    (tmp_path / STOP_FILE).touch()
    with pytest.raises(Preempted, match="stopped by the file "):
        go(config, World(launch="a", restarts=1))


def test_auto_starts_afresh_where_there_is_no_checkpoint(base: RunConfig, whole: Path, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path / "run"), resume="auto")
    with pytest.raises(KeyboardInterrupt):
        go(config, change=stopped_at(2))
    go(config)
    assert_same_run(tmp_path / "run", whole)
    assert go(config).state.step == 4
    assert_same_run(tmp_path / "run", whole)
