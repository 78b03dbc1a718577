"""How many files and functions of the package one step, one save and one resume pass through, on the demo.

    bash launch/quickstart.sh                    # makes .demo, on which it runs
    python tests/benchmarks/call_paths.py        # --verbose names the files

A step runs from after one optimizer update to after the next, without evaluation or saving, with a log line. A save is
`CheckpointManager.save` until the checkpoint is on the disk, its thread included. A resume is what `rawloop/resume.py`
calls. A function counts once, and only if it is called by name: no lambda, comprehension or generator expression.
"""

import argparse
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import rawloop
from rawloop.build import build_run
from rawloop.config import parse
from rawloop.dist import World
from rawloop.loop import train

PACKAGE = str(Path(rawloop.__file__).parent) + "/"
STEPS = 4


class Calls:
    """The functions of the package that were called while it recorded, and the deepest nesting of them."""

    def __init__(self, under: str = "") -> None:
        self.under = under  # only what is called under a function of this file
        self.functions: set[tuple[str, str]] = set()
        self.deepest = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """A profile function, for `sys.setprofile`."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
            return
        stack = [name for name in _files(frame) if name.startswith(PACKAGE)]
        if self.under and PACKAGE + self.under not in stack:
            return
        self.functions.add((code.co_filename.removeprefix(PACKAGE), code.co_qualname))
        self.deepest = max(self.deepest, len(stack))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record in this thread and in those that are started meanwhile."""
        sys.setprofile(self)
        threading.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def report(self, name: str, verbose: bool) -> None:
        """Print a line, and the files if asked to."""
        files = sorted({file for file, _ in self.functions})
        print(f"{name}: {len(files)} files, {len(self.functions)} functions, depth {self.deepest}")
        for file in files if verbose else ():
            print(f"    {file}: {', '.join(sorted(f for home, f in self.functions if home == file))}")


def _files(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def build(output: Path, *more: str) -> Any:
    """A run of the demo in one process, without evaluation and without a save of its own."""
    arguments = ["--config", "configs/demo.yaml", "--output", str(output), "--train.max_steps", str(STEPS)]
    arguments += ["--train.log_every", "1", "--evaluation.enabled", "false", "--records.report_to", "[]"]
    arguments += ["--checkpoint.save_at_end", "false"]
    config = parse([*arguments, "--device", "cpu", *more], "call_paths").config
    return build_run(config, World(), lambda line: None)


def main() -> None:
    """Trace the three and print what they pass through."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="name the files and functions")
    verbose = parser.parse_args().verbose
    output = Path(tempfile.mkdtemp(prefix="call-paths-"))
    try:
        run = build(output / "run")
        step, save, resume = Calls(), Calls(), Calls(under="resume.py")
        updates = 0

        def after_update(*_: object) -> None:
            nonlocal updates
            updates += 1
            sys.setprofile(step if updates == 2 else None)

        run.optimizer.register_step_post_hook(after_update)
        train(run)
        with save.recording():
            run.checkpoints.save(STEPS)
            run.checkpoints.finish()
        run.close()
        with resume.recording():
            again = build(output / "run", "--resume", "latest")
        again.close()
    finally:
        shutil.rmtree(output)
    for name, calls in (("step", step), ("save", save), ("resume", resume)):
        calls.report(name, verbose)


if __name__ == "__main__":
    main()
