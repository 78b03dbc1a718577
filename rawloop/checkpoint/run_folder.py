"""Claiming an output folder, so that one run never writes over another.

When a process dies, torchrun starts all of them again, also where the folder of another run was refused. So a launch
marks the folder that it trains into: its restarts go on from the newest checkpoint there, as `--resume auto` does.
"""

import fcntl
import os
import socket
from os.path import expanduser
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryFile
from typing import NamedTuple

from rawloop.checkpoint.slots import BEST, CHECKPOINTS, find_slots, readable_best
from rawloop.dist import World
from rawloop.errors import Preempted, UserError
from rawloop.files import replace_file
from rawloop.preempt import STOP_FILE

LAUNCH = ".launch"  # the launch's name, and on the next line whether its processes were told to stop
STOPPED = "stopped"
LOCK = ".lock"


class Beginning(NamedTuple):
    """The state that a run begins from: `latest`, the folder of a slot, or None for a fresh start.

    `own` says that the files in its folder belong to this run, though there may be no checkpoint yet.
    """

    resume: str | None
    own: bool


MARKS = ("config.yaml", "metrics.jsonl", "events.jsonl", "best.json", CHECKPOINTS, BEST)


class RunLock:
    """Keeps a second process from training into a folder, as long as this one lives or until it is released.

    The kernel lets go of it when the process ends, however it ends. It is per process, so data workers do not hold it,
    and a second lock of the same process is none. Where the file system has no locks, `notice` says so.

    Raises:
        UserError: another process holds it, or the folder cannot be written into.
    """

    def __init__(self, folder: Path) -> None:
        self.notice: str | None = None
        self._path, self._made = folder / LOCK, not (folder / LOCK).exists()
        self._lock(folder)
        while self.notice is None and not self._is_in_place():  # its last holder has deleted it while it was opened
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
        """Take the lock again: this process loses it when it closes any other opening of the file.

        Raises:
            UserError: another process holds it.
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
        return UserError(f"{self._path} is no plain file, as the lock of a run's folder is one: remove it")

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self._path.lstat())
        except FileNotFoundError:
            return False

    def release(self, begun: bool = True) -> None:
        """Let others train into the folder, of which nothing is left if the run has not `begun`. Once is enough."""
        if self._file < 0:
            return
        if self._made and not begun:
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1


def lock_run_folder(folder: Path) -> RunLock | None:
    """Lock a run folder, if there is one yet; see `RunLock`."""
    return RunLock(folder) if folder.is_dir() else None


def claim_run_folder(folder: Path, world: World, *, resume: bool, lock: RunLock | None = None) -> RunLock | None:
    """Make `folder` if need be, refuse another run in there, and lock it. Call it on every rank; rank 0 has the lock.

    `resume` says that what is in there is of this run, and `lock` is rank 0's, if it holds one already.
    """

    def claim() -> RunLock:
        _check(folder, resume)
        return lock or RunLock(folder)

    return world.on_all_ranks(claim, only_main=True)


def check_nothing_has_begun(folder: Path) -> None:
    """Refuse a folder that was not there when it was decided what to begin from, and that holds a run now."""
    if any((folder / name).exists() for name in MARKS):
        raise UserError(
            f"output is '{folder}', in which another process has begun a run just now: pass another --output, or go "
            "on with that run by --resume latest"
        )


def _check(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output is '{folder}', which is a file: name a folder")
    found = [name for name in MARKS if (folder / name).exists()]
    if found and not resume:
        advice = "pass --resume latest to go on with it, or another --output"
        if not find_slots(folder):
            advice = "it has no checkpoint to resume from: pass another --output, or delete the folder"
            best = readable_best(folder)
            if best:
                advice = f"its only checkpoint is the best one: pass --resume {best}, or another --output"
        raise UserError(f"output is '{folder}', which already holds a run ({', '.join(found)}): {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output is '{folder}', which cannot be made: {error.strerror}") from error
    for place in (folder, folder / CHECKPOINTS):
        _check_writable(folder, place)


def _check_writable(folder: Path, place: Path) -> None:
    """Find out before a model is loaded for minutes; a file without a name leaves nothing behind."""
    try:
        with TemporaryFile(dir=place):
            pass
    except FileNotFoundError:
        pass  # there are no checkpoints yet
    except OSError as error:
        raise _not_writable(folder, place, error) from error


def _not_writable(folder: Path, place: Path, error: OSError) -> UserError:
    return UserError(
        f"output is '{folder}', and nothing can be written into {place}: {error.strerror}; mend its permissions, "
        "or pass another --output and go on from this run with --resume CHECKPOINT"
    )


def mark_launch(folder: Path, world: World, *, stopped: bool = False) -> None:
    """Mark the folder as this launch's, or its run as stopped, for torchrun's restarts. Rank 0 under torchrun does."""
    if world.launch and world.is_main:
        replace_file(folder / LAUNCH, f"{world.launch}\n{STOPPED if stopped else ''}")


def _mark(folder: Path, world: World) -> str | None:
    """Read the mark that this launch's processes left before torchrun restarted them; None if there is none.

    A scheduler gives a requeued job its old id: the first processes of a launch remove a mark of its name.
    """
    file = folder / LAUNCH
    launch, _, mark = file.read_text(errors="replace").rpartition("\n") if file.is_file() else ("", "", "")
    if not world.launch or launch != world.launch:
        return None
    if not world.restarts:
        file.unlink()
        return None
    return mark


def where_to_begin(folder: Path, resume: str | None, world: World) -> Beginning:
    """Decide what a run begins from, by what the user says (`latest`, `auto`, a slot's folder, or None).

    Raises Preempted if the processes of this launch were told to stop, and torchrun has started them again.
    """
    beginning = world.from_main(world.on_all_ranks(lambda: _begin(folder, resume, world), only_main=True))
    assert beginning is not None
    return beginning


def _begin(folder: Path, resume: str | None, world: World) -> Beginning:
    mark = _mark(folder, world)
    if mark == STOPPED:
        raise Preempted("was told to stop before torchrun started it again; go on with --resume latest")
    own = mark is not None or resume is not None
    if find_slots(folder) and (mark is not None or resume == "auto"):
        return Beginning("latest", own)
    return Beginning(None if resume == "auto" else resume, own)


def is_inside(folder: Path, resume: str) -> bool:
    """Whether a slot's path leads into a run's folder."""
    slot = Path(expanduser(resume)).resolve()
    return any(slot.is_relative_to(place.resolve()) for place in (folder, folder / CHECKPOINTS, folder / BEST))


def remove_stop_file(folder: Path) -> str | None:
    """Remove a stop file that was left by an earlier run, and return a sentence about it. Rank 0 does."""
    file = folder / STOP_FILE
    if file.is_dir():
        raise UserError(f"{file} is a folder, which stops a run as a file of that name does: remove it")
    if not file.exists():
        return None
    file.unlink()
    return f"removed {file}, which stopped an earlier run"
