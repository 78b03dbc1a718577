"""`import rawloop` and `rawloop --help` come at once: nothing heavy is imported before it is used."""

import subprocess
import sys
import time

import pytest

LIMIT = 0.4  # seconds
HEAVY = ("torch", "transformers", "peft", "numpy", "yaml", "tqdm")
IMPORT = "import rawloop"
HELP = "import sys, rawloop.cli; sys.argv = ['rawloop', '--help']; assert rawloop.cli.main() == 0"


@pytest.mark.parametrize("code", [IMPORT, HELP])
def test_nothing_heavy_is_imported(code: str) -> None:
    check = f"{code}; import sys; loaded = [name for name in {HEAVY} if name in sys.modules]; assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [["-c", IMPORT], ["-m", "rawloop", "--help"]])
def test_it_takes_less_than_the_limit(arguments: list[str]) -> None:
    assert min(seconds(arguments) for _ in range(5)) < LIMIT  # the least: other processes only ever add


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start
