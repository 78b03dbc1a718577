"""Kills a process that saves, over and over, and looks at what is left. Run by `test_kill.py` as a process of its own.

usage: python killing.py FOLDER now|later everywhere | full | random ROUNDS SEED

Saves are written now, or later: in a thread, while the process goes on to the next one.

It forks the processes to be killed, so that each starts in a millisecond instead of importing torch. Prints what it
counted as JSON; a broken promise is an AssertionError.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rawloop.checkpoint.best import BestRecord, BestTracker
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.checkpoint.run_folder import LOCK
from rawloop.checkpoint.slots import find_best, find_latest, find_slots, read_manifest, verify
from rawloop.contracts import FolderState, Stateful
from rawloop.dist import World
from rawloop.errors import RawloopError
from rawloop.records import Records, RecordsConfig
from rawloop.seed import RngState

KEEP = 2
FIRST = 3  # the last pair of saves of a prepared run
FAILED = 7  # exit code of a child whose save was refused


class Part:
    """A state from which its step can be recomputed, big enough to be caught half-written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "x": [torch.full((5000,), float(self.step + i)) for i in range(4)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for i, tensor in enumerate(state["x"]):
            assert torch.equal(tensor, torch.full((5000,), float(self.step + i)))


class Folder:
    """Files of its own."""

    folder = "adapter"

    def __init__(self, part: Part) -> None:
        self.part = part

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        text = str(self.part.step) * 20_000

        def write(folder: Path) -> None:
            (folder / "weights.txt").write_text(text)

        return write

    def load(self, folder: Path) -> None:
        text = (folder / "weights.txt").read_text()
        assert text == str(self.part.step) * 20_000 or self.part.step == 0


@contextmanager
def opened(run: Path, part: Part, later: bool = False) -> Iterator[CheckpointManager]:
    parts: dict[str, Stateful | FolderState] = {
        "part": part,
        "adapter": Folder(part),
        "best": BestTracker(),
        "rng": RngState(0, 0),
    }
    config = CheckpointConfig(keep_last=KEEP, asynchronous=later, max_failures=1)
    with Records(run, World(), RecordsConfig()) as records:
        manager = CheckpointManager(run, config, World(), records, parts)
        yield manager
        manager.finish()
        manager.close()


def save_both(manager: CheckpointManager, part: Part, number: int) -> None:
    """Save two steps: one that is the best so far, and one after it that is not."""
    for step in (2 * number, 2 * number + 1):
        part.step = step
        manager.save(step, best=None if step % 2 else BestRecord("eval_loss", "min", 1 / step, step))


def child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared between processes: killed inside it, all would wait
    try:
        work()
        code = 0
    except RawloopError:  # of the checkpoint, or of the records that no longer can be written
        code = FAILED
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def leftovers(run: Path) -> list[str]:
    """What a save that was killed has left."""
    paths = (*run.iterdir(), *(run / "checkpoints").iterdir())
    return [path.name for path in paths if path.name[0] == "." and path.name != LOCK]


def look(run: Path, at_least: int, at_most: int) -> int:
    """Check a run after a kill, as the next process would find it; return the number of its newest pair of saves."""
    newest, damaged = find_latest(run)
    assert newest is not None, f"no checkpoint left: {damaged}"
    assert not damaged, f"a half-written checkpoint has a checkpoint's name: {damaged}"
    best = find_best(run)
    assert best is not None, "the best checkpoint is gone"
    assert verify(best).step in range(2 * at_least, 2 * at_most + 1, 2)
    linked = verify(run / "best").step  # what a user opens: the old one or the new one
    assert linked in range(2 * at_least, 2 * at_most + 1, 2)
    part = Part(0)
    with opened(run, part) as manager:
        step = manager.load().step
        assert part.step == step
        assert at_least <= step // 2 <= at_most, f"step {step} is the newest, not one of pair {at_least} to {at_most}"
        manager.start(step)
        noted = json.loads((run / "best.json").read_text())
        assert noted["step"] == read_manifest(run / "best").step
        assert noted["slot"] == os.readlink(run / "best")
        left = leftovers(run)
        assert not left, f"start has left {left}"
        save_both(manager, part, at_most + 1)
    assert [verify(slot).step for slot in find_slots(run)][:2] == [2 * at_most + 3, 2 * at_most + 2]
    assert len(find_slots(run)) == KEEP + 1
    return step // 2


def prepare(run: Path) -> float:
    """Make a run with checkpoints and a best one, after pair FIRST. Returns the seconds of its slowest pair."""
    part = Part(0)
    seconds = []
    with opened(run, part) as manager:
        manager.start(0)
        for step in range(1, FIRST + 1):
            begun = time.perf_counter()
            save_both(manager, part, step)
            seconds.append(time.perf_counter() - begun)
    return max(seconds)


def at_file_operation(run: Path, number: int, strike: Callable[[], None], onwards: bool) -> None:
    """Call `strike` before the file operation of that number below `run` (and before all later ones)."""
    seen = 0
    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in operations or not (event != "open" or isinstance(arguments[0], str)):
            return
        path = os.fspath(arguments[0])
        inside = str(path).startswith(str(run)) or not os.path.isabs(str(path))  # rmtree works with relative names
        if inside and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR) or not onwards):
            seen += 1
            if seen == number or (onwards and seen > number):
                strike()

    sys.addaudithook(hook)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def everywhere(folder: Path, strike: Callable[[], None], onwards: bool, later: bool) -> dict[str, Any]:
    """Strike before each file operation of a save in turn."""
    prepare(folder / "prepared")
    outcomes: Counter[str] = Counter()
    number = 0
    while True:
        number += 1
        run = folder / f"run{number}"
        shutil.copytree(folder / "prepared", run)

        def work(run: Path = run, number: int = number) -> None:
            part = Part(FIRST)
            with opened(run, part, later) as manager:
                manager.start(2 * FIRST + 1)
                at_file_operation(run, number, strike, onwards)
                save_both(manager, part, FIRST + 1)

        _, status = os.waitpid(child(work), 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL, FAILED), f"operation {number}: exit code {code}"
        found = look(run, FIRST, FIRST + 1)
        shutil.rmtree(run)
        if code == 0:
            assert found == FIRST + 1
            return {"operations": number - 1, **outcomes}
        outcomes[f"pair {found}"] += 1


def at_random(folder: Path, rounds: int, seed: int, later: bool) -> dict[str, Any]:
    """Kill a process that saves, every other time aimed into a save; each goes on where the last one was killed.

    The kill is aimed by the byte with which the process announces its first save, and falls within the time that one
    takes. The other times it falls anywhere from the start of a process that saves without a pause.
    """
    rng = random.Random(seed)
    run = folder / "run"
    duration = prepare(run)
    reached = FIRST
    counted: Counter[str] = Counter()
    for number in range(rounds):
        aimed = number % 2 == 1
        (reader, writer), (announced, announce) = os.pipe(), os.pipe()

        def work(start: int = reached, writer: int = writer, announce: int = announce) -> None:
            part = Part(start)
            with opened(run, part, later) as manager:
                manager.start(2 * start + 1)
                os.write(announce, b"!")
                for step in range(start + 1, start + 100_000):
                    save_both(manager, part, step)
                    os.write(writer, (step - later).to_bytes(8, "big"))  # the save before it is on the disk now

        pid = child(work)
        os.close(writer)
        os.close(announce)
        if aimed:
            os.read(announced, 1)
        time.sleep(rng.uniform(0, duration) if aimed else rng.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(announced)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        committed = max(reached, int.from_bytes(data[-8:], "big")) if data else reached
        names = leftovers(run)
        counted.update(name.split("-")[0] for name in names)
        counted["aimed"] += aimed
        counted["in a save"] += bool(names)
        counted["aimed, in a save"] += aimed and bool(names)
        look(run, committed, committed + 1 + later)
        reached = committed + 2 + later
    return {"kills": rounds, "steps": reached, **counted}


def main() -> None:
    folder, later, mode = Path(sys.argv[1]), sys.argv[2] == "later", sys.argv[3]
    if mode == "random":
        result = at_random(folder, int(sys.argv[4]), int(sys.argv[5]), later)
    else:
        result = everywhere(folder, refuse if mode == "full" else die, mode == "full", later)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
