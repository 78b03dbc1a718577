"""The tests that need bitsandbytes, in one process that finds it: `launch/setup.sh dev` puts it beside the packages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = Path(sys.prefix) / "apart"
NAMED = "(nf4 or adamw_8bit or lion) and not paged"  # a paged optimizer needs a GPU
FILES = ("test_optimizers.py", "test_quantize.py", "test_sharded_optim.py")


@pytest.mark.parametrize(
    ("which", "named"),
    [
        ("not slow", NAMED),
        pytest.param("slow", f"({NAMED}) or sharded_optim", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_none_of_them_is_skipped(which: str, named: str) -> None:
    assert (FOLDER / "bitsandbytes").is_dir(), f"{FOLDER} has no bitsandbytes: run `bash launch/setup.sh dev`"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", f"{which} and not gpu"]
    files = [str(HERE / name) for name in FILES]
    done = subprocess.run([*command, "-k", named, *files], env=environment, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    found = re.match(r"(\d+) passed, \d+ deselected in ", last)  # none failed, none skipped
    assert found, done.stdout + done.stderr
    assert int(found[1]) > 10
