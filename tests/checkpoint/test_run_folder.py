"""Claiming a run folder: nothing of another run is ever written over."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.placing import set_best
from rawloop.checkpoint.reader import choose
from rawloop.checkpoint.run_folder import (
    RunLock,
    choose_resume,
    claim_run_folder,
    is_inside,
    is_locked,
    mark_launch,
    remove_stop_file,
)
from rawloop.checkpoint.writer import Contents, write_slot
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.pack import pack
from rawloop.records import Records, RecordsConfig
from tests.forks import Forks


def test_a_fresh_folder_is_made_and_one_with_other_things_is_taken(tmp_path: Path) -> None:
    claim_run_folder(tmp_path / "a" / "b", World(), resume=False)
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "notes.txt").write_text("mine")
    claim_run_folder(tmp_path, World(), resume=False)


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.jsonl", "events.jsonl", "best.json", "best", "checkpoints"])
def test_a_folder_of_another_run_is_refused_unless_resuming(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).mkdir()
    with pytest.raises(UserError, match=rf"already holds a run \({mark}\): it has no checkpoint"):
        claim_run_folder(tmp_path, World(), resume=False)
    claim_run_folder(tmp_path, World(), resume=True)


def test_the_advice_is_to_resume_where_that_is_possible(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match="pass --resume latest to continue it, or another --output"):
        claim_run_folder(tmp_path, World(), resume=False)


@pytest.mark.parametrize("where", ["best", "checkpoints/discarded/step-00000005"])  # "best": of an older version
def test_the_advice_is_to_resume_from_the_best_where_that_is_all(tmp_path: Path, where: str) -> None:
    best = tmp_path / where
    record = BestRecord("eval_loss", "min", 0.5, 5)
    write_slot(best, Contents(5, {}, {"x": pack(1)}, [{}], {}, record))
    if where != "best":
        set_best(tmp_path, best, record)
    with pytest.raises(UserError, match=f"its only checkpoint is the best one: pass --resume {best}, or another"):
        claim_run_folder(tmp_path, World(), resume=False)
    with pytest.raises(UserError, match=f"has no checkpoint: pass --resume {best}"):
        choose(tmp_path, "latest", World())


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file"):
        claim_run_folder(tmp_path / "x", World(), resume=False)
    with pytest.raises(UserError, match="cannot be created"):
        claim_run_folder(tmp_path / "x" / "y", World(), resume=True)


def test_one_process_trains_into_a_folder_at_a_time(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import signal, sys; from pathlib import Path; from rawloop.checkpoint.run_folder import claim_run_folder; "
        "from rawloop.dist import World; claim_run_folder(Path(sys.argv[1]), World(), resume=False); "
        "print('held', flush=True); signal.pause()"
    )
    other = forks.start("-c", code, run)
    other.wait_for("held")
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"into which process {other.pid} on .* is training now: wait for it"):
            claim_run_folder(run, World(), resume=resume)
    other.kill()
    forks.wait([other])
    lock = claim_run_folder(run, World(), resume=False)  # the kernel has let go of it
    assert lock is not None
    assert lock.notice is None
    lock.release()


class Counter:
    """A part of a checkpoint."""

    def state_dict(self) -> dict[str, int]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def manager_of(run: Path, records: Records) -> CheckpointManager:
    return CheckpointManager(run, CheckpointConfig(asynchronous=False), World(), records, {"counter": Counter()})


def locked_out(forks: Forks, run: Path) -> str:
    """What another process is told that would train into the folder."""
    code = f"from pathlib import Path; from rawloop.checkpoint.run_folder import RunLock; RunLock(Path({str(run)!r}))"
    return forks.run("-c", code).stderr


def test_another_process_asks_whether_a_folder_is_locked_and_takes_no_lock(forks: Forks, tmp_path: Path) -> None:
    assert is_locked(tmp_path) is False
    lock = RunLock(tmp_path)
    code = "import signal, sys; from pathlib import Path; from rawloop.checkpoint.run_folder import is_locked; "
    assert forks.run("-c", f"{code}print(is_locked(Path(sys.argv[1])))", tmp_path, check=True).stdout == "True\n"
    lock.release()
    assert is_locked(tmp_path) is False


def test_a_manager_holds_the_lock_of_its_folder(forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with Records(run, World(), RecordsConfig()) as records:
        first, second = manager_of(run, records), manager_of(run, records)  # as when a cell of a notebook is run again
        first.close()  # which drops the process's lock
        second.save(1)
        assert f"into which process {os.getpid()} on " in locked_out(forks, run)
        second.close()
        assert locked_out(forks, run) == ""
        code = (
            "import signal, sys; from pathlib import Path; from rawloop.checkpoint.run_folder import RunLock; "
            "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); signal.pause()"
        )
        other = forks.start("-c", code, run)
        other.wait_for("held")
        with pytest.raises(
            UserError, match=rf"into which process {other.pid} on .* is training now: .*other --output$"
        ):
            manager_of(run, records)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it, and nobody has looked
        with pytest.raises(UserError, match=r"This is one of 2 processes that were started together: "):
            manager_of(run, records)
        with pytest.raises(UserError, match="is training now"):
            second.save(2)  # it was closed
        other.kill()
        forks.wait([other])


@pytest.mark.parametrize("kind", ["file", "dangling", "folder", "fifo"])
def test_what_is_no_file_in_the_place_of_the_lock_is_refused(tmp_path: Path, kind: str) -> None:
    other, lock = tmp_path / "other", tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    if kind == "file":
        other.write_text("mine")
    if kind in ("file", "dangling"):
        lock.symlink_to(other)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(UserError, match=f"{lock} is the lock of a run's folder, and must be a regular file"):
        claim_run_folder(tmp_path / "run", World(), resume=False)
    assert other.exists() == (kind == "file")
    assert kind != "file" or other.read_text() == "mine"


def test_a_lock_that_was_deleted_while_it_was_opened_is_taken_anew(
    forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder was refused and left nothing. A lock on a file without a name would keep nobody out."""
    lockf, deleted = fcntl.lockf, threading.Event()

    def slow(file: int, command: int) -> None:
        lockf(file, command)
        if not deleted.is_set():
            (tmp_path / ".lock").unlink()
            deleted.set()

    monkeypatch.setattr(fcntl, "lockf", slow)
    lock = RunLock(tmp_path)
    said = locked_out(forks, tmp_path)
    lock.release()
    assert deleted.is_set()
    assert f"into which process {os.getpid()} on " in said


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(file: int, command: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock = claim_run_folder(tmp_path, World(), resume=False)
    assert lock is not None
    assert (
        lock.notice == f"nothing keeps a second run from training into {tmp_path}: no file locks (No locks available)"
    )
    lock.release()


def test_a_job_that_is_put_back_under_its_old_id_is_no_restart(tmp_path: Path) -> None:
    """Its marks are of the launch before: what that one was told, and that the folder was its own, count no more."""
    first, again = World(launch="4711"), World(launch="4711", restarts=1)
    for stopped in (True, False):
        mark_launch(tmp_path, first, stopped=stopped)
        assert choose_resume(tmp_path, None, first) == (None, False)
        assert choose_resume(tmp_path, None, again) == (None, False)
    mark_launch(tmp_path, first)
    choose_resume(tmp_path, None, World(launch="another"))
    assert choose_resume(tmp_path, None, again) == (None, True)


@pytest.mark.parametrize("text", ["", "x", "4711", '{"launch": "4711"}', "\xff"])
def test_a_damaged_mark_is_none(tmp_path: Path, text: str) -> None:
    """The folder is then one of another run: it is refused, unless the user says how to go on with it."""
    (tmp_path / ".launch").write_bytes(text.encode("latin1"))
    assert choose_resume(tmp_path, None, World(launch="4711", restarts=1)) == (None, False)


def test_a_folder_in_the_place_of_the_stop_file_is_the_users_to_remove(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir()
    with pytest.raises(UserError, match="STOP is a folder, and stops a run like a file of that name: remove it"):
        remove_stop_file(tmp_path)


def test_checkpoints_on_another_disk_are_of_the_run_that_links_to_them(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    (disk / "step-00000001").mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    assert is_inside(run, str(run / "checkpoints" / "step-00000001"))
    assert is_inside(run, str(run / "best"))
    assert not is_inside(run, str(tmp_path / "other" / "best"))
