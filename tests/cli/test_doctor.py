"""`rawloop doctor`: what it finds in order, what it finds wrong, and that a failed check stops those that need it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rawloop.cli import doctor, main
from rawloop.errors import RawloopError


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sound_config_passes_everything(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--config", str(config)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["passed"] * 5
    assert sorted(tmp_path.rglob("*")) == before


def test_the_first_failure_says_what_and_the_rest_waits(config: Path, door: Callable[..., Any]) -> None:
    done = door("doctor", "--config", config, "--adapter.target_modules", "[qproj]")
    assert done.code == 1
    rows = [line.split()[0] for line in done.out.splitlines()]
    assert rows == ["passed", "FAILED", "skipped", "skipped", "skipped"]
    assert "adapter.target_modules has 'qproj', which matches no layer" in done.out
    assert "1 of 5 checks failed: data, model, labels, first pass" in done.err


def written(folder: Path, gradient: list[float], loss: Any, mode: str = "fp32", name: str = "w") -> Path:
    folder.mkdir()
    save_file({name: torch.tensor(gradient)}, folder / "gradients.safetensors")
    (folder / "loss.json").write_text(f'{{"eval_loss": {loss}, "mode": "{mode}"}}')
    return folder


@pytest.mark.parametrize(
    ("gradient", "loss", "mode", "found"),
    [
        ([1.0, 2.0], 3.0, "fp32", None),
        ([1.0, 2.0 + 1e-6], 3.0, "fp32", None),
        (
            [1.0, 2.001],
            3.0,
            "fp32",
            r"gradients differ by 4\.5e-04 and eval_loss differ by 0\.0e\+00; rounding in fp32 explains 1e-05: why",
        ),
        ([1.0, 2.0], 3.1, "fp32", r"eval_loss differ by 3\.3e-02; rounding in fp32 explains 1e-05"),
        ([1.0, 2.001], 3.0, "bf16", None),
        ([1.0, 2.2], 3.0, "bf16", "rounding in bf16 explains 3e-02"),
        ([1.0, float("nan")], 3.0, "fp32", "gradients differ by nan"),
        ([1.0, 2.0], "null", "fp32", None),
        ([1.0, 2.0], "NaN", "fp32", "eval_loss differ by nan"),
    ],
)
def test_differences_beyond_rounding_are_found(
    tmp_path: Path, gradient: list[float], loss: Any, mode: str, found: str | None
) -> None:
    first, second = written(tmp_path / "a", [1.0, 2.0], 3.0, mode), written(tmp_path / "b", gradient, loss, mode)
    if found is None:
        assert doctor.compare(first, second, "why").startswith("gradients differ by")
        return
    with pytest.raises(RawloopError, match=found):
        doctor.compare(first, second, "why")


def test_gradients_of_other_weights_are_found(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", [1.0], 1.0), written(tmp_path / "b", [1.0], 1.0, name="v")
    with pytest.raises(RawloopError, match="gradients reach 1 weights in one and 1 in the other: why"):
        doctor.compare(first, second, "why")


def test_files_that_differ_are_named(tmp_path: Path) -> None:
    for name, byte in (("a", b"1"), ("b", b"2")):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state" / "same.safetensors").write_bytes(b"0")
        (tmp_path / name / "state" / "other.safetensors").write_bytes(byte)
    assert doctor.different_files(tmp_path / "a", tmp_path / "b") == ["state/other.safetensors"]


def test_the_last_words_of_a_process_are_ours_where_there_are_any() -> None:
    assert doctor.last_words("x\nrawloop train: it is so\nTraceback\n") == "rawloop train: it is so"
    assert doctor.last_words("x\ny\n\n") == "y"
    assert doctor.last_words("") == "no message"
