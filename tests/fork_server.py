"""Runs Python programs in processes that are forked after everything is imported: at once, instead of after 4 s.

usage: python fork_server.py < jobs. A line {"arguments": [...], "folder": ..., "environment": {...}, "log": ...,
"finalize": ...} starts what `python ARGUMENTS...` would start, with its output in `LOG.out` and `LOG.err`, and answers
with its process id. A line {"poll": [id, ...]} answers with their exit codes: minus the signal if one ended a process,
"stopped" if SIGSTOP has stopped it, and null while it runs.
"""

import gc
import json
import os
import runpy
import sys
from typing import Any

import pytest  # noqa: F401  (test files import it)
import torch._dynamo  # DDP imports it when it is first built
import torch.distributed.fsdp

import rawloop.build
import rawloop.checkpoints
import rawloop.cli.evaluate
import rawloop.cli.export
import rawloop.cli.inspect
import rawloop.cli.merge
import rawloop.cli.prepare
import rawloop.cli.replay
import rawloop.cli.train
import rawloop.families.higgs_audio_v2  # noqa: F401


def start(job: dict[str, Any]) -> int:
    """Fork a process that runs a program, and return its id."""
    child = os.fork()
    if child:
        return child
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['log']}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), number)
    if job["finalize"]:
        run(job["arguments"])
        sys.exit()
    code = attempt(job["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what the interpreter does at its end takes longer than most tests


def attempt(arguments: list[str]) -> int:
    """Run a program, and return its exit code."""
    try:
        run(arguments)
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            print(left.code, file=sys.stderr)
        return left.code or 0 if isinstance(left.code, int | None) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def run(arguments: list[str]) -> None:
    """Do what the interpreter does with its arguments: -c CODE, -m MODULE or FILE, each with arguments of its own."""
    first, *rest = arguments
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]
    sys.path[0] = os.path.dirname(os.path.abspath(first)) if not first.startswith("-") else ""
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


def poll(child: int) -> int | str | None:
    """Return the exit code of a child, "stopped", or None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
    if not done:
        return None
    return "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def answer(job: dict[str, Any]) -> Any:
    """Do one job."""
    return [poll(child) for child in job["poll"]] if "poll" in job else start(job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # else each child copies the memory of all modules when it collects garbage
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
