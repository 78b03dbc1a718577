"""Records: nothing lost, nothing twice, nothing that is not JSON, and a crash costs at most the line being written."""

import json
import logging
import math
import os
import pty
import resource
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from rawloop.dist import World
from rawloop.errors import RawloopError
from rawloop.records import EventKind, Records, RecordsConfig, read_events, read_metrics
from rawloop.sinks import Value


def make(folder: Path, rank: int = 0, **config: Any) -> Records:
    return Records(folder, World(rank=rank), RecordsConfig(**config))


def strict(path: Path) -> list[dict[str, object]]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_come_back_as_they_were_and_are_valid_json(tmp_path: Path) -> None:
    values: dict[str, Value] = {
        "loss": 0.1,
        "n": 3,
        "lr": 1e-5,
        "who": "x",
        "none": None,
        "bad": math.nan,
        "up": math.inf,
        "d": -math.inf,
    }
    with make(tmp_path) as records:
        records.metrics(4, values)
    line = strict(tmp_path / "metrics.jsonl")[0]
    assert list(line) == ["step", *values]
    assert (line["bad"], line["up"], line["d"]) == ("nan", "inf", "-inf")
    read = read_metrics(tmp_path)[0]
    assert math.isnan(float(str(read.pop("bad"))))
    assert read == {"step": 4, **{name: value for name, value in values.items() if name != "bad"}}


def test_a_line_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    with make(tmp_path) as records:
        records.metrics(1, {"loss": 1.0})
        records.event("start", step=0, reason="now")
        assert len(read_metrics(tmp_path)) == 1
        assert len(read_events(tmp_path)) == 1


def test_a_tensor_is_refused_because_reading_it_waits_for_the_device(tmp_path: Path) -> None:
    with make(tmp_path) as records, pytest.raises(TypeError, match="'loss' is a Tensor"):
        records.metrics(1, {"loss": torch.tensor(1.0)})  # type: ignore[dict-item]


def test_events_have_all_fields_and_show_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(tmp_path) as records:
        records.event("skip", step=7, reason="inf in grads", norm=math.inf, ids=["a", "b"])
    event = read_events(tmp_path)[0]
    assert event.pop("time") > 1.7e9
    reason = "inf in grads"
    assert event == {"kind": "skip", "step": 7, "rank": 0, "reason": reason, "norm": "inf", "ids": ["a", "b"]}
    assert "[skip] step 7: inf in grads" in capsys.readouterr().err


def test_events_and_progress_go_to_a_log_of_ones_own_or_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, log in (("mine", logging.getLogger("mine").info), ("nowhere", None)):
        with Records(tmp_path / name, World(), RecordsConfig(), log=log) as records, records.progress(10):
            records.event("warning", step=3, reason="100% of it")
            records.metrics(3, {"loss": 1.0})
        with Records(tmp_path / name, World(rank=1), log=log) as other:
            other.event("skip", step=3, reason="on another rank")
        assert [event["reason"] for event in read_events(tmp_path / name)] == ["100% of it", "on another rank"]
    assert caplog.messages == ["[warning] step 3: 100% of it", "step 3/10  loss 1.0000"]
    assert capfd.readouterr().err == ""


def test_an_unknown_kind_of_event_is_refused(tmp_path: Path) -> None:
    kind: EventKind = "skipp"  # type: ignore[assignment]
    with make(tmp_path) as records, pytest.raises(ValueError, match="'skipp' is no kind of event"):
        records.event(kind, step=0, reason="")


def test_other_ranks_write_events_of_their_own_and_no_metrics(tmp_path: Path) -> None:
    with make(tmp_path) as main, make(tmp_path, rank=1) as other, make(tmp_path, rank=2):
        other.event("bad_sample", step=1, reason="first")
        main.event("skip", step=2, reason="second")
        other.event("warning", step=3, reason="third")
        other.metrics(1, {"loss": 1.0})
        other.progress(3).move_to(1)
    assert [(event["rank"], event["reason"]) for event in read_events(tmp_path)] == [
        (1, "first"),
        (0, "second"),
        (1, "third"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events-rank00001.jsonl",
        "events.jsonl",
        "metrics.jsonl",
    ]
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_torn_last_line_is_cut_off_and_named(tmp_path: Path, name: str) -> None:
    with make(tmp_path) as records:
        records.metrics(1, {"loss": 1.0})
        records.event("start", step=0, reason="begun")
    path = tmp_path / name
    whole = path.read_bytes()
    before = {other.name: other.read_bytes() for other in tmp_path.iterdir()}
    for cut in range(1, len(whole)):  # all but the line end
        for other, data in before.items():
            (tmp_path / other).write_bytes(data)
        path.write_bytes(whole + whole[:cut])
        assert len(read_metrics(tmp_path)) == 1  # a reader does not mind, and does not mend
        assert path.read_bytes() == whole + whole[:cut]
        with make(tmp_path) as records:
            records.metrics(2, {"loss": 2.0})
            records.event("warning", step=1, reason="on")
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
        torn = f"cut a torn last line off {name}: {whole[:cut].decode()!r}"
        assert [event["reason"] for event in read_events(tmp_path)] == ["begun", torn, "on"]


def test_garbage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RawloopError, match=r"metrics\.jsonl line 2 is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", ["null", "5", "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_a_line_without_a_step_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(RawloopError, match=r"metrics\.jsonl line 2 is no object with a whole number 'step': .*mend it"):
        read_metrics(tmp_path)


def test_rewind_takes_later_lines_out_and_keeps_them_elsewhere(tmp_path: Path) -> None:
    with make(tmp_path) as records:
        for step in range(1, 7):
            records.metrics(step, {"loss": step / 2})
    with make(tmp_path) as records:
        records.rewind(4)
        records.metrics(5, {"loss": 9.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path)[-1]["loss"] == 9.0
    assert strict(tmp_path / "metrics.discarded.jsonl") == [{"step": 5, "loss": 2.5}, {"step": 6, "loss": 3.0}]
    assert read_events(tmp_path)[-1]["reason"].startswith("moved 2 line(s) of metrics later than step 4")


def test_rewind_with_nothing_later_changes_nothing(tmp_path: Path) -> None:
    with make(tmp_path) as records:
        records.metrics(1, {"loss": 1.0})
        records.rewind(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path) -> None:
    with make(tmp_path) as records:
        records.metrics(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            with pytest.raises(RawloopError, match=r"cannot write .*metrics\.jsonl"):
                records.metrics(2, {"loss": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        records.metrics(3, {"loss": 3.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_a_folder_that_is_a_file_is_a_named_failure(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RawloopError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
        make(tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RawloopError, match=r"cannot write .*metrics\.jsonl: .*not seekable"):
        make(tmp_path)


@contextmanager
def terminal(columns: int = 80) -> Iterator[Callable[[], str]]:
    """Make stderr a terminal; gives a function that returns what it has shown since."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with open(theirs, "w") as stderr, open(ours, "rb", buffering=0) as screen, redirect_stderr(stderr):

        def shown() -> str:
            print("\0", end="", file=stderr, flush=True)  # so that there is an end to read to
            data = b""
            while not data.endswith(b"\0"):
                data += screen.read(4096)
            return data[:-1].decode()

        yield shown


def threads() -> list[threading.Thread]:
    """All threads but that of tqdm, which the first bar of a process starts for all of them."""
    return [thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"]


VALUES = {
    "loss": 4.352,
    "loss/text": 1.0,
    "grad_norm": 0.83,
    "lr": 1.2e-5,
    "samples_per_second": 12.34,
    "tokens_per_second": 4567.8,
    "mfu": 0.453,
    "data_wait": 0.04,
}


def test_a_terminal_has_a_bar_on_rank_0_that_ends_with_the_records(tmp_path: Path) -> None:
    before = {*threads()}
    with terminal(140) as shown:
        with make(tmp_path) as records:
            bar = records.progress(10, initial=4)
            bar.move_to(9)
            records.metrics(9, VALUES)
            records.metrics(9, {"eval_loss": 5.098, "eval_seconds": 1.0})
            bar.move_to(10)
        said = shown()
        assert "9/10" in said
        assert (
            "loss 4.3520, eval_loss 5.0980, lr 1.2e-05, grad_norm 0.83, 12.3 samples/s, 4568 tokens/s, MFU 45%, data 4%"
            in said
        )
        assert "step 9/10  eval_loss 5.0980" in said
        assert "step 9/10  loss" not in said
        assert {*threads()} <= before
        with make(tmp_path, progress=False) as records, make(tmp_path, rank=1) as other:
            for each in (records, other):
                each.progress(10).move_to(10)
                each.metrics(10, VALUES)
        assert shown() == ""


def test_a_log_file_has_a_line_per_log_step_and_evaluation_and_no_bar(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with make(tmp_path) as records, make(tmp_path, rank=1) as other:
        for each in (records, other):
            each.metrics(1, VALUES)  # before there is any progress
            with each.progress(60000, initial=110) as bar:
                bar.move_to(120)
                each.metrics(120, VALUES)
                each.metrics(120, {"eval_loss": 5.098, "eval_loss/text": 5.098, "eval_seconds": 1.0})
                each.metrics(120, {"precision": "fp32", "fallback": "amp_fp16 -> fp32"})
                each.metrics(121, {"loss": math.nan, "grad_norm": math.inf})
    assert capfd.readouterr().err.splitlines() == [
        "step 120/60000  loss 4.3520  lr 1.2e-05  grad_norm 0.83  12.3 samples/s  4568 tokens/s  MFU 45%  data 4%",
        "step 120/60000  eval_loss 5.0980",
        "step 121/60000  loss nan  grad_norm inf",
    ]
    with make(tmp_path, progress=False) as records, records.progress(10):
        records.metrics(1, VALUES)
    assert capfd.readouterr().err == ""
