"""One rank of the `run_ranks` fixture: a process that runs one function of a test file and hands back its result.

It is forked by a server that has imported the libraries and nothing else: gloo and torch's thread pools do not survive
a fork. The test file is loaded by its path, because tests are no package.
"""

import faulthandler
import importlib.util
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load(name: str, path: str) -> ModuleType:
    """Load the test file under the name that pytest gave it, so that pickled classes are found again."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def attempt(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Call the function; tell what it returned or raised, and when."""
    try:
        return {"kind": "result", "value": function(*arguments), "moment": time.monotonic()}
    except BaseException as error:  # whatever it is, the test process raises it
        return {"kind": "error", "value": error, "moment": time.monotonic(), "text": traceback.format_exc()}


def call(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job's function in the world that the environment describes."""
    import torch
    from _pytest.config import apply_warning_filters

    from rawloop.dist import open_world

    torch.set_num_threads(1)
    torch.manual_seed(0)
    apply_warning_filters(job["filters"], [])  # warnings are errors here too
    function = getattr(load(job["module"], job["path"]), job["function"])
    arguments = pickle.loads(job["arguments"])  # after the module: they may be instances of its classes
    with open_world("cpu", timeout=job["timeout"]) as world:
        # Inside the world: once this rank leaves it, the others fail too, and the cause must carry the earliest moment.
        return attempt(function, world, *arguments)


def packed(outcome: dict[str, Any]) -> bytes:
    """Pickle an outcome; an exception that refuses is replaced by its text."""
    try:
        content = pickle.dumps(outcome)
        pickle.loads(content)
    except Exception as error:
        if outcome["kind"] == "result":
            return packed(outcome | {"kind": "error", "value": TypeError(f"cannot be sent: {error!r}"), "text": ""})
        return pickle.dumps(outcome | {"value": RuntimeError(repr(outcome["value"]))})
    return content


def main(folder: Path, rank: int) -> None:
    """Read the job, run it, and write its outcome. The exit code is 1 for an error."""
    job = pickle.loads((folder / "job.pickle").read_bytes())
    faulthandler.dump_traceback_later(0.9 * job["timeout"])  # where it hangs, before it is killed for that
    outcome = attempt(call, job)
    if outcome["kind"] == "result":  # of `call`, which is an outcome itself
        outcome = outcome["value"]
    faulthandler.cancel_dump_traceback_later()
    (folder / f"rank{rank}.pickle").write_bytes(packed(outcome))
    sys.exit(outcome["kind"] == "error")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
