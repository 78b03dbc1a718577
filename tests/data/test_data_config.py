"""Options of the data: limits that make sense, and where the codes lie."""

import subprocess
import sys
from pathlib import Path

import pytest

from rawloop.data import DataConfig, codes_folder
from rawloop.errors import UserError


@pytest.mark.parametrize(("low", "high"), [(-1.0, 30.0), (5.0, 5.0), (6.0, 5.0), (0.0, float("nan"))])
def test_impossible_limits(low: float, high: float) -> None:
    with pytest.raises(UserError, match=r"they need 0 <= min_seconds < max_seconds"):
        DataConfig(min_seconds=low, max_seconds=high)


def test_negative_workers() -> None:
    with pytest.raises(UserError, match=r"data.num_workers is -1"):
        DataConfig(num_workers=-1)


def test_codes_lie_beside_the_data(tmp_path: Path) -> None:
    assert codes_folder(DataConfig(train=str(tmp_path))) == tmp_path / ".rawloop-codes"
    assert codes_folder(DataConfig(train=str(tmp_path / "a.jsonl"), eval="x")) == tmp_path / ".rawloop-codes"
    assert codes_folder(DataConfig(eval=str(tmp_path))) == tmp_path / ".rawloop-codes"
    assert codes_folder(DataConfig(train="x", codes=str(tmp_path))) == tmp_path


def test_no_data() -> None:
    with pytest.raises(UserError, match=r"no data: set --data.train"):
        codes_folder(DataConfig())


def test_the_config_needs_no_torch() -> None:
    code = "import sys, rawloop.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=240, check=False).returncode == 0
