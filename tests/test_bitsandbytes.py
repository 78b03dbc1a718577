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


@pytest.mark.parametrize(
    "which", ["not slow", pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_none_of_them_is_skipped(which: str) -> None:
    assert (FOLDER / "bitsandbytes").is_dir(), f"{FOLDER} has no bitsandbytes: run `bash launch/setup.sh dev`"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", f"{which} and not gpu"]
    files = [str(HERE / name) for name in ("test_optimizers.py", "test_quantize.py")]
    done = subprocess.run([*command, "-k", NAMED, *files], env=environment, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    found = re.match(r"(\d+) passed, \d+ deselected in ", last)  # none failed, none skipped
    assert found, done.stdout + done.stderr
    assert int(found[1]) > 10
