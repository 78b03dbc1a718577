"""Runs `rawloop` commands in processes that are forked after everything is imported: a second each instead of five.

usage: python fork_server.py < jobs. A line {"ranks": [[argument, ...], ...], "environment": [...], "logs": [...]}
starts one process per rank, whose output goes to `LOG.out` and `LOG.err`, and answers with their ids. A line
{"wait": [id, ...], "seconds": S} answers with their exit codes, minus the signal for those that one ended; those that
are still there then are killed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # DDP imports it when it is first built

import rawloop.cli.evaluate
import rawloop.cli.inspect
import rawloop.cli.merge
import rawloop.cli.prepare
import rawloop.cli.train
import rawloop.families.higgs_audio_v2
from rawloop.cli import main


def start(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Fork a process that runs one command, and return its id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    code = 1
    try:
        code = main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what the interpreter does at its end is tested with real processes


def wait(children: list[int], seconds: float) -> list[int]:
    """Return the exit codes of the children; -9 for one that had to be killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def answer(job: dict[str, object]) -> list[int]:
    """Do one job."""
    if "wait" in job:
        return wait(job["wait"], job["seconds"])  # type: ignore[arg-type]
    rows = zip(job["ranks"], job["environment"], job["logs"], strict=True)  # type: ignore[call-overload]
    return [start(*row) for row in rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert Path(rawloop.cli.__file__).is_file()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
