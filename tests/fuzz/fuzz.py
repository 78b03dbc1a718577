"""Feeds damaged inputs to rawloop, each in a process forked from this one, and reports what is no clear answer.

usage: python fuzz.py KIND SEED FIRST LAST FOLDER. `FOLDER` holds what is damaged, see `test_fuzz.py`. Prints a JSON
object: how many inputs were accepted, refused and failed, and each failure with its way of damage and its traceback.

An input may be accepted, or refused by a `RawloopError` in one line. Any other exception, a hang, a process that dies
and what a target's own check finds (samples that are not accounted for, damage that is taken for whole) is a failure.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from targets import TARGETS  # type: ignore[import-not-found]  # beside this script

from rawloop.errors import Mistakes, RawloopError

SECONDS = 60  # for one input
MEMORY = 8 << 30  # bytes of address space beyond what this process has
Answer = tuple[str, str]  # "accepted", "refused" or "failed", and what there is to say


def answer(target: Callable[..., str], rng: random.Random, base: Path, work: Path) -> Answer:
    """Make one input and feed it."""
    said = ""
    try:
        said = target(rng, base, work)
    except RawloopError as error:
        text, way = str(error), getattr(error, "way", "")
        lines = text.splitlines() if isinstance(error, Mistakes) else [text]
        if any(not line.strip() or len(line.splitlines()) > 1 or len(line) > 3000 for line in lines):
            return "failed", f"{way}\nno line of a readable length: {text[:3000]!r}"
        return "refused", f"{way}\n{text}"
    except BaseException as error:
        return "failed", f"{getattr(error, 'way', '')}\n{traceback.format_exc()}"
    return "accepted", said


def in_a_fork(work: Path, ask: Callable[[], Answer]) -> Answer:
    """Ask in a forked process, which gets `SECONDS` and `MEMORY`."""
    file = work / "answer.json"
    child = os.fork()
    if not child:
        code = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(work / f"output-{number}", os.O_WRONLY | os.O_CREAT), number)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            file.write_text(json.dumps(ask()))
            code = 0
        finally:
            os._exit(code)
    deadline, status = time.monotonic() + SECONDS, None
    while status is None:
        done, ended = os.waitpid(child, os.WNOHANG)
        status = ended if done else None
        if not done and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "failed", f"hangs: no answer in {SECONDS} s"
        time.sleep(0.002)
    if status:
        return "failed", f"the process ended with {os.waitstatus_to_exitcode(status)}"
    kind, said = json.loads(file.read_text())
    return kind, said


def main(kind: str, seed: str, first: int, last: int, base: Path) -> dict[str, Any]:
    """Feed the inputs of these numbers."""
    target = TARGETS[kind]
    counts: Counter[str] = Counter()
    failures, lines = [], Counter[str]()
    for number in range(first, last):
        work = Path(tempfile.mkdtemp(prefix="rawloop-fuzz-"))
        rng = random.Random(f"{kind} {seed} {number}")
        result, said = in_a_fork(work, lambda rng=rng, work=work: answer(target, rng, base, work))  # type: ignore[misc]
        shutil.rmtree(work)
        counts[result] += 1
        if result == "failed":
            failures.append({"input": f"{kind} {seed} {number}", "said": said.replace(str(work), "WORK")})
        elif "-v" in sys.argv:
            lines[f"{result}: {said.replace(str(work), 'WORK')[:600]}"] += 1
    return {"counts": counts, "failures": failures, "lines": lines}


if __name__ == "__main__":
    which, key, start, stop, folder = sys.argv[1:6]
    print(json.dumps(main(which, key, int(start), int(stop), Path(folder))))
