"""Sinks: each library gets the lines of a run; one that fails, hangs or dies neither ends nor holds up the training."""

import json
import math
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import soundfile

from rawloop import sinks
from rawloop.demo import SPEECH
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.records import Records, RecordsConfig, read_events, read_metrics
from rawloop.sinks import Sinks, check_packages, check_sinks

SETTINGS = {"output": "runs/x", "optim": {"lr": 1e-4, "schedule": "cosine"}, "data": {"train": None}}
LONG = 120.0  # seconds that a busy machine may take
Name = Any  # of a sink


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"the optional package {package} is not installed")


def records_of(folder: Path, *names: Name, settings: dict[str, Any] = SETTINGS) -> Records:
    return Records(folder, World(), RecordsConfig(report_to=[*names]), log=None, settings=settings)


def warnings_of(folder: Path) -> list[str]:
    return [event["reason"] for event in read_events(folder) if event["kind"] == "warning"]


def run_twice(folder: Path, name: Name) -> None:
    """A run that is killed after step 3 and resumed from step 1 with another learning rate."""
    first = records_of(folder, name)
    for step in (1, 2, 3):
        first.metrics(step, {"loss": step / 2, "loss/audio": float(step), "name": "x", "none": None})
    first.close()
    later = {**SETTINGS, "optim": {"lr": 2e-4, "schedule": "cosine"}}
    with records_of(folder, name, settings=later) as records:
        records.rewind(1)
        records.metrics(2, {"loss": 8.0})
        records.metrics(2, {"eval_loss": math.nan})
        records.sounds(2, {"listen/line 1": SPEECH / "eval" / "eval-en-02.flac"})
    assert warnings_of(folder) == []


def processes() -> list[psutil.Process]:
    found = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in found if "rawloop.sink_process" in one.cmdline()]


def until(found: Callable[[], Any]) -> Any:
    """Wait for something, and return it."""
    end = time.monotonic() + LONG
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"audio": 0, "tensors": 0})
    read.Reload()
    return read


# -- what each of them gets ----------------------------------------------------------------------------------------


def test_tensorboard_gets_numbers_clips_and_the_config(tmp_path: Path) -> None:
    run_twice(tmp_path, "tensorboard")
    assert not processes()
    read = events_of(tmp_path)
    assert set(read.Tags()["scalars"]) == {"loss", "loss/audio", "eval_loss"}
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("loss")] == [(1, 0.5), (2, 8.0)]
    assert math.isnan(read.Scalars("eval_loss")[0].value)
    clip = read.Audio("listen/line 1")[0]
    about = soundfile.info(SPEECH / "eval" / "eval-en-02.flac")
    assert (clip.sample_rate, clip.length_frames, clip.step) == (about.samplerate, about.frames, 2)
    texts = [tensor.tensor_proto.string_val[0].decode() for tensor in read.Tensors("config/text_summary")]
    assert texts[-1] == ("```yaml\noutput: runs/x\noptim:\n  lr: 0.0002\n  schedule: cosine\ndata:\n  train: null\n```")


READ_WANDB = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2 as protocol

def records(data):  # LevelDB's log: blocks of 32 KiB, of pieces with a header of 7 bytes; the file has one too
    place, whole = 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield protocol.Record.FromString(whole)
            whole = b""

def show(*values):
    print(json.dumps(values))

for path in sys.argv[1:]:
    for record in records(open(path, "rb").read()):
        for item in record.history.item:
            show("history", item.key or "/".join(item.nested_key), json.loads(item.value_json))
        for item in [*record.run.config.update, *record.config.update]:
            show("config", item.key or "/".join(item.nested_key), json.loads(item.value_json))
        if record.HasField("run"):
            show("run", record.run.run_id, record.run.display_name, record.run.project)
        if record.HasField("exit"):
            show("exit", record.exit.exit_code)
"""


def test_tensorboard_hides_what_a_run_that_goes_back_writes_again(tmp_path: Path) -> None:
    with records_of(tmp_path, "tensorboard") as records:
        for step in (1, 2, 3):
            records.metrics(step, {"loss": step / 2})
        records.rewind(1)
        records.metrics(2, {"loss": 8.0})
    assert scalars(tmp_path) == [(1, 0.5), (2, 8.0)]


@needs("wandb")
def test_wandb_gets_numbers_clips_and_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "voice"
    run_twice(run, "wandb")
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    command = [
        sys.executable,
        "-c",
        READ_WANDB,
        *map(str, files),
    ]  # a process of its own: its import changes the environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    identity = (run / "wandb-id").read_text()
    assert {tuple(line[1:]) for line in said if line[0] == "run"} == {(identity, "voice", "rawloop")}
    assert [line[2] for line in said if line[1] == "loss"] == [0.5, 1.0, 1.5, 8.0]
    assert [line[2] for line in said if line[1] == "step"] == [1, 2, 3, 2, 2, 2]
    assert [line[2] for line in said if line[1] == "name"] == ["x", "x", "x"]
    assert [line[2] for line in said if line[1] == "listen/line 1/_type"] == ["audio-file"]
    assert [line[2]["lr"] for line in said if line[:2] == ["config", "optim"]] == [1e-4, 2e-4]
    assert [line[1] for line in said if line[0] == "exit"] == [1, 0]  # broken off, then complete


def stored_by_mlflow(file: Path) -> dict[str, list[tuple[Any, ...]]]:
    asked = {
        "runs": "select run_uuid, name, status from runs",
        "experiments": "select experiments.name from experiments join runs using (experiment_id)",
        "loss": "select step, value from metrics where key = 'loss' order by timestamp, step",
        "eval_loss": "select step, is_nan from metrics where key = 'eval_loss'",
        "params": "select key, value from params",
        "tags": "select key, value from tags where key like 'resumed.%'",
    }
    with closing(sqlite3.connect(file)) as store:
        return {name: store.execute(question).fetchall() for name, question in asked.items()}


@needs("mlflow")
def test_mlflow_gets_numbers_and_the_config_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    run_twice(tmp_path / "voice", "mlflow")
    found = stored_by_mlflow(tmp_path / "store.db")
    assert found["runs"] == [((tmp_path / "voice" / "mlflow-id").read_text(), "voice", "FINISHED")]
    assert found["experiments"] == [("rawloop",)]
    assert found["loss"] == [(1, 0.5), (2, 1.0), (3, 1.5), (2, 8.0)]
    assert found["eval_loss"] == [(2, 1)]
    expected = {"output": "runs/x", "optim.lr": "0.0001", "optim.schedule": "cosine", "data.train": "None"}
    assert dict(found["params"]) == expected
    assert found["tags"] == [("resumed.optim.lr", "0.0002")]


@needs("mlflow")
def test_mlflow_gets_numbers_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    with pytest.raises(UserError, match=r"report_to has mlflow, which is not set up: MlflowException: The fil"):
        check_sinks(RecordsConfig(report_to=["mlflow"]))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_sinks(RecordsConfig(report_to=["mlflow"]))
    run_twice(tmp_path / "voice", "mlflow")
    (losses,) = (tmp_path / "store").glob("*/*/metrics/loss")
    assert [line.split()[1:] for line in losses.read_text().splitlines()][-1] == ["8.0", "2"]
    assert losses.with_name("loss.audio").is_file()  # a file `loss` leaves no place for a folder `loss`


@needs("trackio")
def test_trackio_gets_numbers_clips_and_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    run = tmp_path / "voice"
    check_sinks(RecordsConfig(report_to=["trackio"]))
    run_twice(run, "trackio")
    with closing(sqlite3.connect(tmp_path / "store" / "rawloop.db")) as store:
        lines = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = store.execute("select config from configs").fetchall()
    name = (run / "trackio-id").read_text()
    assert name.startswith("voice-")
    assert {line[0] for line in lines} == {name}
    values = [(line[1], json.loads(line[2])) for line in lines]
    assert [(step, value["loss"]) for step, value in values if "loss" in value] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (2, 8),
    ]
    assert any("listen/line 1" in value for _, value in values)
    assert json.loads(configs[-1][0])["optim"]["lr"] == 2e-4


# -- what is wrong before the start --------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, package: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"has {package}, but .* not installed: run `pip install 'rawloop\[{package}\]'`"
    ):
        records_of(tmp_path / "run", package)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B and TensorBoard make folders of their own names, which Python takes for packages."""
    config = RecordsConfig(report_to=["tensorboard"])
    check_packages(config)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(UserError, match="the package tensorboard is not installed"):
        check_packages(config)


@needs("wandb")
def test_a_missing_key_of_wandb_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"records\.report_to has wandb, which is not set up: UsageError: .*API key"):
        check_sinks(RecordsConfig(report_to=["wandb"]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_sinks(RecordsConfig(report_to=["wandb"]))


# -- what goes wrong in the middle ---------------------------------------------------------------------------------


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sinks]:
    made = Sinks(tmp_path, RecordsConfig(report_to=["tensorboard"]), {}, None)
    yield made
    assert list(made.close(True)) == []


def scalars(folder: Path) -> list[tuple[int, float]]:
    return [(scalar.step, scalar.value) for scalar in events_of(folder).Scalars("loss")]


def test_a_full_disk_is_told_once_and_every_line_is_written_when_there_is_room(tmp_path: Path, sink: Sinks) -> None:
    (process,) = until(processes)
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    for step in range(4):
        sink.write(step, {"loss": float(step)})
    told = until(lambda: list(sink.problems()))
    assert [line.partition(":")[0] for line in told] == [
        "tensorboard does not take the line of step 0, which is tried again"
    ]
    assert "File too large" in told[0]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    told = until(lambda: list(sink.problems()))
    assert told == ["tensorboard takes lines again, from step 0 on; nothing was lost"]
    sink.write(4, {"loss": 4.0})
    assert list(sink.close(True)) == []
    assert scalars(tmp_path) == [(step, float(step)) for step in range(5)]


def test_a_sink_that_fails_to_the_end_is_told_with_the_number_of_lines(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way of the folder")
    with records_of(tmp_path, "tensorboard") as records:
        for step in range(3):
            records.metrics(step, {"loss": float(step)})
    first, last = warnings_of(tmp_path)
    assert first.startswith("tensorboard does not take the line of step 0, which is tried again: FileExistsError")
    assert last == "tensorboard lacks the last 3 line(s) (metrics.jsonl has every line)"
    assert len(read_metrics(tmp_path)) == 3


def test_a_sink_that_hangs_holds_up_nothing_and_is_killed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "LIMIT", 0.5)
    with records_of(tmp_path, "tensorboard") as records:
        records.metrics(0, {"loss": 0.0})
        (process,) = until(processes)
        process.suspend()
        for step in range(1, 3000):  # much more than a pipe holds
            records.metrics(step, {"loss": float(step), "text": "x" * 100})
    assert not process.is_running()
    assert len(read_metrics(tmp_path)) == 3000
    assert warnings_of(tmp_path) == [
        "tensorboard did not end within 0.5 s and was killed: it may lack the last lines (metrics.jsonl has every line)"
    ]


def test_lines_that_wait_for_a_sink_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "MOST", 10)
    sink = Sinks(tmp_path, RecordsConfig(report_to=["tensorboard"]), {}, None)
    (process,) = until(processes)
    process.suspend()
    big = {f"loss/{number}": 1.0 for number in range(5000)}
    for step in range(30):
        sink.write(step, big)
    (told,) = sink.problems()
    assert told.startswith("tensorboard lacks ")
    process.resume()
    list(sink.close(True))


def written(folder: Path, step: int) -> bool:
    if not (folder / "tensorboard").exists() or "loss" not in events_of(folder).Tags()["scalars"]:
        return False
    return (step, step) in scalars(folder)


def has_ended(process: psutil.Process) -> bool:
    """Whether it is a zombie with no other thread, so that its end of the pipe is closed."""
    return process.status() == psutil.STATUS_ZOMBIE and len(os.listdir(f"/proc/{process.pid}/task")) == 1


def test_a_process_that_is_killed_is_started_again_three_times(tmp_path: Path) -> None:
    sink = Sinks(tmp_path, RecordsConfig(report_to=["tensorboard"]), SETTINGS, 0)
    said = []
    for step in range(4):
        sink.write(step, {"loss": float(step)})
        (process,) = until(processes)
        until(partial(written, tmp_path, step))
        process.kill()
        until(partial(has_ended, process))
        sink.write(step, {"again": 1.0})
        said += list(sink.problems())
    again = "tensorboard has ended by itself (exit code -9); it was started again and may lack some lines"
    assert said == [again] * 3 + ["tensorboard has ended by itself (exit code -9); it gets nothing more in this run"]
    sink.write(5, {"loss": 5.0})
    assert list(sink.close(True)) == []
    assert scalars(tmp_path) == [(step, float(step)) for step in range(4)]


def test_signals_for_the_training_do_not_end_a_sink(tmp_path: Path, sink: Sinks) -> None:
    sink.write(0, {"loss": 0.0})
    until(lambda: (tmp_path / "tensorboard").exists())
    (process,) = until(processes)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(process.pid, number)
    sink.write(1, {"loss": 1.0})
    assert list(sink.close(True)) == []
    assert scalars(tmp_path) == [(0, 0.0), (1, 1.0)]


@needs("mlflow")
@pytest.mark.slow
def test_a_server_that_never_answers_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "LIMIT", 10.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system accepts connections, and nobody reads
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        with records_of(tmp_path, "mlflow") as records:
            for step in range(3):
                records.metrics(step, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 3
    assert any("mlflow" in line and "metrics.jsonl has every line" in line for line in warnings_of(tmp_path))
