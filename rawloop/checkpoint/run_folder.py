"""Locks an output folder, so that one run never overwrites another.

When a process dies, torchrun restarts all processes, even if they were refused the folder of another run. So a launch
marks the folder that it trains into: its restarts continue from the newest checkpoint there, like `--resume auto`.
"""

import fcntl
import os
import socket
import struct
import sys
from os.path import expanduser
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryFile

from rawloop.checkpoint.slots import BEST, CHECKPOINTS, find_slots, readable_best
from rawloop.dist import World
from rawloop.errors import Preempted, UserError
from rawloop.files import replace_file
from rawloop.launcher import read_ranks
from rawloop.preempt import STOP_FILE

LAUNCH = ".launch"  # first line: name of the launch; second line: STOPPED if its processes were told to stop
STOPPED = "stopped"
LOCK = ".lock"
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process
MARKS = ("config.yaml", "metrics.jsonl", "events.jsonl", "best.json", CHECKPOINTS, BEST)


class RunLock:
    """Keeps other processes from training into a folder until it is released or this process ends.

    The kernel releases the lock when the process ends, in any way. Data workers do not inherit it. It does not stop a
    second lock of the same process. On a file system without locks, `notice` says so.

    Raises:
        UserError: another process has the lock, or the folder is not writable.
    """

    def __init__(self, folder: Path) -> None:
        self.notice: str | None = None
        self._path, self._made = folder / LOCK, not (folder / LOCK).exists()
        self._lock(folder)
        while self.notice is None and not self._is_in_place():  # the last holder deleted the file after it was opened
            os.close(self._file)
            self._lock(folder)
        if self.notice is None:
            os.truncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _lock(self, folder: Path) -> None:
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if self._path.is_symlink() or self._path.is_dir():
                raise self._no_file() from error
            raise _not_writable(folder, folder, error) from error
        if not S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise self._no_file()
        try:
            self.renew()
        except UserError:
            os.close(self._file)
            raise
        except OSError as error:
            self.notice = f"nothing keeps a second run from training into {folder}: no file locks ({error.strerror})"

    def renew(self) -> None:
        """Take the lock again: the process loses it when it closes any other handle of the file.

        Raises:
            UserError: another process has the lock.
        """
        if self.notice is not None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # systems differ in what they raise
            holder = os.pread(self._file, 300, 0).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"output is '{self._path.parent}', into which {holder} is training now: wait for it, end it, or pass "
                "another --output"
            ) from None

    def _no_file(self) -> UserError:
        return UserError(f"{self._path} is the lock of a run's folder, and must be a regular file: remove it")

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self._path.lstat())
        except FileNotFoundError:
            return False

    def release(self, started: bool = True) -> None:
        """Let other processes train into the folder. Deletes the lock's file if the run has not `started`.

        It may be called again.
        """
        if self._file < 0:
            return
        if self._made and not started:
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1


def is_locked(folder: Path) -> bool | None:
    """Return whether another process trains into a folder now; None if this system or file system does not tell.

    It only asks, because a lock taken for a moment could keep a run from starting. The process that trains must not
    call it: it would lose its lock.
    """
    if sys.platform != "linux":  # elsewhere the fields have another order
        return None
    try:
        with open(folder / LOCK, "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)


def hold_lock(lock: RunLock | None, folder: Path, world: World) -> RunLock:
    """Renew rank 0's lock of a folder, or lock the folder if there is no lock yet."""
    try:
        if lock is not None:
            lock.renew()
            return lock
        folder.mkdir(parents=True, exist_ok=True)
        return RunLock(folder)
    except UserError as error:
        launched = read_ranks()[1]
        if launched == 1 or world.size > 1:
            raise
        advice = "hand every part the World that open_world gives; World() is a single process"
        raise UserError(f"{error}. This is one of {launched} processes that were started together: {advice}") from None


def claim_run_folder(folder: Path, world: World, *, resume: bool, lock: RunLock | None = None) -> RunLock | None:
    """Create `folder` if needed, refuse it if another run is in it, and lock it. Call it on every rank.

    Args:
        folder: the run folder.
        world: the ranks.
        resume: whether the files in the folder belong to this run.
        lock: rank 0's lock of the folder, if there is one already.

    Returns:
        the lock, on rank 0.
    """

    def claim() -> RunLock:
        _check(folder, resume)
        return lock or RunLock(folder)

    return world.on_all_ranks(claim, only_main=True)


def check_no_run(folder: Path) -> None:
    """Refuse a folder in which another process has started a run since `choose_resume` found no folder."""
    if any((folder / name).exists() for name in MARKS):
        raise UserError(
            f"output is '{folder}', in which another process has started a run just now: pass another --output, or "
            "resume that run with --resume latest"
        )


def _check(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output is '{folder}', which is a file: name a folder")
    found = [name for name in MARKS if (folder / name).exists()]
    if found and not resume:
        advice = "pass --resume latest to continue it, or another --output"
        if not find_slots(folder):
            advice = "it has no checkpoint to resume from: pass another --output, or delete the folder"
            best = readable_best(folder)
            if best:
                advice = f"its only checkpoint is the best one: pass --resume {best}, or another --output"
        raise UserError(f"output is '{folder}', which already holds a run ({', '.join(found)}): {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output is '{folder}', which cannot be created: {error.strerror}") from error
    for place in (folder, folder / CHECKPOINTS):
        try:
            with TemporaryFile(dir=place):  # finds a read-only folder before the model is loaded, which takes minutes
                pass
        except FileNotFoundError:
            pass  # there is no folder of checkpoints yet
        except OSError as error:
            raise _not_writable(folder, place, error) from error


def _not_writable(folder: Path, place: Path, error: OSError) -> UserError:
    return UserError(
        f"output is '{folder}', and nothing can be written into {place}: {error.strerror}; fix its permissions, "
        "or pass another --output and continue this run with --resume CHECKPOINT"
    )


def mark_launch(folder: Path, world: World, *, stopped: bool = False) -> None:
    """Mark the folder as this launch's, or the run as stopped, for torchrun's restarts. Only rank 0 writes."""
    if world.launch and world.is_main:
        replace_file(folder / LAUNCH, f"{world.launch}\n{STOPPED if stopped else ''}")


def _mark(folder: Path, world: World) -> str | None:
    """Return the mark that this launch left before torchrun restarted its processes, or None.

    A scheduler gives a requeued job the same id, so the first processes of a launch remove a mark of that id.
    """
    file = folder / LAUNCH
    launch, _, mark = file.read_text(errors="replace").rpartition("\n") if file.is_file() else ("", "", "")
    if not world.launch or launch != world.launch:
        return None
    if not world.restarts:
        file.unlink()
        return None
    return mark


def choose_resume(folder: Path, resume: str | None, world: World) -> tuple[str | None, bool]:
    """Decide what a run resumes from, given the user's choice: `latest`, `auto`, the folder of a slot, or None.

    Returns:
        `latest`, the folder of a slot, or None for a new run; and whether the files in `folder` belong to this run,
        even if it has no checkpoint yet.

    Raises:
        Preempted: this launch was told to stop, and torchrun has restarted its processes.
    """

    def choose() -> tuple[str | None, bool]:
        mark = _mark(folder, world)
        if mark == STOPPED:
            raise Preempted("was told to stop before torchrun started it again; continue with --resume latest")
        is_ours = mark is not None or resume is not None
        if find_slots(folder) and (mark is not None or resume == "auto"):
            return "latest", is_ours
        return None if resume == "auto" else resume, is_ours

    chosen = world.from_main(world.on_all_ranks(choose, only_main=True))
    assert chosen is not None
    return chosen


def is_inside(folder: Path, resume: str) -> bool:
    """Whether the path of a slot is inside a run's folder."""
    slot = Path(expanduser(resume)).resolve()
    return any(slot.is_relative_to(place.resolve()) for place in (folder, folder / CHECKPOINTS, folder / BEST))


def remove_stop_file(folder: Path) -> str | None:
    """Remove the stop file of an earlier run, and return a sentence about it. Only rank 0 calls this."""
    file = folder / STOP_FILE
    if file.is_dir():
        raise UserError(f"{file} is a folder, and stops a run like a file of that name: remove it")
    if not file.exists():
        return None
    file.unlink()
    return f"removed {file}, which stopped an earlier run"
