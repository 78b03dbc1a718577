"""Capsules of foreign loops: kept by a watch, and replayed bit for bit on the model that a function builds."""

import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from rawloop.cli.replay import run as replay_command
from rawloop.errors import RawloopError, UserError
from rawloop.watch.capsule import read_facts
from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Cause, Finding
from rawloop.watch.subject import Detector, StepRecord, Subject
from rawloop.watch.watch import Watch
from tests.forks import Forks
from tests.watch.loops import Double

BUILDER = """
from torch import nn

def build():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    model[4].bias.requires_grad_(False).zero_()
    return model

class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher, self.inside = nn.Linear(3, 1), nn.Linear(3, 1).requires_grad_(False), False

    def move(self):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
            slow.data.mul_(0.5).add_(fast.data, alpha=0.5)  # a write that torch does not count

    def forward(self, x):
        if self.inside:
            self.move()
        return (self.student(x) - self.teacher(x)).square().mean()

def inside():
    model = Teacher()
    model.inside = True
    return model

def other():
    return nn.Linear(3, 1)

def none():
    return None
"""


def build(function: str = "build") -> Any:
    space: dict[str, Any] = {}
    exec(BUILDER, space)
    return space[function]()


class Alarmist(Detector):
    """Finds something in the gradients of one step."""

    def gradients(self, subject: Subject, record: StepRecord) -> list[Finding]:
        wrong = Finding("test", "something is wrong", (Cause("model", "the test says so"),), record.step)
        return [wrong] if record.step == 2 else []


def loop(folder: Path, *, autocast: bool = False, poison: int = -1, detectors: Any = None, break_at: int = -1) -> Path:
    """Train in a loop of one's own, with accumulation and dropout, under watch."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    config = WatchConfig()
    with Watch(model, optimizer, out=folder, config=config, detectors=detectors, say=lambda text: None) as watch:
        for step in range(4):
            for half in range(2):
                x, y = torch.randn(4, 3), torch.randn(4, 1)
                if (step, half) == (poison, 1):
                    x[2, 1] = math.nan
                with watch.step({"x": x, "y": y}, ids=[f"s{step}-{half}-{row}" for row in range(4)]):
                    if step == break_at:
                        raise RuntimeError("a kernel failed")
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = mse_loss(model(x).float(), y) / 2
                    torch.autograd.backward(loss)
                    if half:
                        optimizer.step()
                        optimizer.zero_grad()
            if step == poison:
                break
    return folder / "capsules" / f"step-{2 if poison < 0 else poison:08d}-rank0"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with functions that build models, in the working folder."""
    (tmp_path / "my_models.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "my_models"
    sys.path[:] = path
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loop_of_ones_own_is_replayed_bit_for_bit(tmp_path: Path, module: str, autocast: bool, capsys: Any) -> None:
    path = loop(tmp_path / "out", autocast=autocast, detectors=[Alarmist()])
    facts = read_facts(path)
    assert (facts["kind"], facts["step"], facts["why"]) == ("loop", 2, "finding test: something is wrong")
    assert [kept["step"] for kept in facts["history"]] == [0, 1]
    replay_command([str(path), "--model", f"{module}:build", "--device", "cpu", "--bisect"])
    out = capsys.readouterr().out
    assert out.count("equal bit for bit") == 3
    assert "the replay is equal, bit for bit" in out
    assert "s2-1-" in out


def test_a_fresh_process_names_the_sample(tmp_path: Path, module: str, forks: Forks) -> None:
    path = loop(tmp_path / "out", poison=1)
    arguments = ["-m", "rawloop", "replay", str(path), "--model", f"{module}:build", "--bisect"]
    done = forks.run(*arguments, cwd=tmp_path, check=True)
    assert "s1-1-2" in done.stdout
    assert "'x' contains NaN" in " ".join(done.stdout.split())


def test_a_crash_keeps_the_batch(tmp_path: Path, module: str, capsys: Any) -> None:
    with pytest.raises(RuntimeError, match="a kernel failed"):
        loop(tmp_path / "out", break_at=2)
    path = tmp_path / "out" / "capsules" / "step-00000002-rank0"
    replay_command([str(path), "--model", f"{module}:build", "--device", "cpu"])
    why = "nothing can run again: an exception left the step before its backward pass; the capsule has the batch, the "
    assert why in capsys.readouterr().out
    with pytest.raises(UserError, match=why):
        replay_command([str(path), "--model", f"{module}:build", "--device", "cpu", "--bisect"])


def taught(folder: Path, function: str, *, poison: bool = False) -> Path:
    """Train with a frozen moving average of the weights, without names of samples; `poison` writes to a weight."""
    torch.manual_seed(0)
    model = build(function)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    with Watch(model, optimizer, out=folder, detectors=[Alarmist()], say=lambda text: None) as watch:
        for step in range(3):
            for half in range(2):
                with watch.step(x := torch.randn(4, 3)):
                    model(x).backward()
                    if poison and (step, half) == (2, 0):
                        model.student.weight.data[0, 1] = math.inf
                    if half:
                        optimizer.step()
                        optimizer.zero_grad()
            if function == "Teacher":
                model.move()
    return folder / "capsules" / "step-00000002-rank0"


def test_frozen_weights_that_the_loop_moves_come_from_the_capsule(tmp_path: Path, module: str, capsys: Any) -> None:
    path = taught(tmp_path / "out", "Teacher")
    replay_command([str(path), "--model", f"{module}:Teacher", "--device", "cpu", "--bisect"])
    out = " ".join(capsys.readouterr().out.split())
    assert "pass 1 of 2: loss" in out
    assert "the replay is equal, bit for bit" in out
    assert re.search("each alone, the largest gradient first: row [0-3]: loss", out)


def test_a_forward_pass_that_moves_frozen_weights_is_told(tmp_path: Path, module: str, capsys: Any) -> None:
    path = taught(tmp_path / "out", "inside")
    replay_command([str(path), "--model", f"{module}:inside", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "weights or buffers had changed since they ran first" in out
    assert "hardware" not in out


def test_a_comparison_with_nan_names_what_is_not_finite(tmp_path: Path, module: str, capsys: Any) -> None:
    path = taught(tmp_path / "out", "Teacher", poison=True)
    replay_command([str(path), "--model", f"{module}:Teacher", "--device", "cpu"])
    out = capsys.readouterr().out
    assert re.search(r"pass 1 of 2: loss 0\.\d+ then, (nan|inf) now: not finite now", out)
    assert "the weight 'student.weight' is not finite (1 of 3 numbers): NaN cannot be compared" in out
    assert "had changed since they ran first, by a forward pass or by code beside the optimizer (pass 1)" in out
    assert "hardware" not in out


def test_a_capsule_that_cannot_be_replayed_is_told_as_such(tmp_path: Path) -> None:
    model, said = build(), list[str]()
    with Watch(model, out=tmp_path, detectors=[Alarmist()], say=said.append) as watch:
        watch.begin(step=2)
        with watch.step():
            Double.apply(model(torch.randn(4, 3))).sum().backward()  # type: ignore[no-untyped-call]
            watch._before()
    (path,) = (tmp_path / "capsules").iterdir()
    assert f"the step is kept in {path}; it can be read, not replayed: the tape cannot be stored" in said[-1]
    assert "Double.apply" in said[-1]
    assert "rawloop replay" not in said[-1]


def test_a_row_of_bad_steps_makes_one_capsule(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    zero = torch.zeros(())
    bad: dict[int, Callable[[Tensor], Tensor]] = {  # two rows, each line another finding
        2: lambda loss: loss + zero.log(),
        3: lambda loss: loss / zero,
        4: lambda loss: loss / zero,
        8: lambda loss: loss * torch.full((), math.inf),
        9: lambda loss: loss + (loss - loss).log(),
    }
    with Watch(model, optimizer, out=tmp_path, config=WatchConfig(capsules=9), say=lambda text: None) as watch:
        for number in range(12):
            with watch.step(x := torch.randn(4, 3)):
                bad.get(number, lambda loss: loss)(model(x).square().mean()).backward()  # type: ignore[no-untyped-call]
                if number in bad:  # a scaler looks and skips
                    watch._before()
                    watch._after(False)
                else:
                    optimizer.step()
                optimizer.zero_grad()
    assert len([one for one in watch.findings if one.kind == "not_finite"]) == 4
    kept = sorted(path.name for path in (tmp_path / "capsules").iterdir())
    assert kept == ["step-00000002-rank0", "step-00000005-rank0"]  # skipped steps keep their number


def test_another_model_is_refused(tmp_path: Path, module: str) -> None:
    path = loop(tmp_path / "out", detectors=[Alarmist()])

    def said(*options: str) -> str:
        with pytest.raises(RawloopError) as caught:
            replay_command([str(path), "--device", "cpu", *options])
        return f"{caught.value.exit_code} {caught.value}"

    assert "2 " in said()
    assert "name the function that builds its model (Sequential), with --model package.module:function" in said()
    assert "is not that of the loop: the weight 0.weight was (8, 3) torch.float32, and is none" in said(
        "--model", f"{module}:other"
    )
    assert "returned a NoneType" in said("--model", f"{module}:none")
    assert "has no biuld (did you mean 'build'?)" in said("--model", f"{module}:biuld")
    assert "dtypes are the loop's own" in said("--model", f"{module}:build", "--precision", "bf16")
    (tmp_path / "my_models.py").write_text(BUILDER.replace("zero_()", "fill_(1.0)"))
    sys.modules.pop(module)
    assert "1 frozen weights of --model my_models:build are not those of the loop (4.bias)" in said(
        "--model", f"{module}:build"
    )


def test_tensors_of_no_use_are_no_reason_to_fail(tmp_path: Path) -> None:
    model = build()

    def shown(x: Tensor) -> Tensor:
        return x

    with Watch(model, out=tmp_path, detectors=[Alarmist()], say=lambda text: None) as watch, watch.step(object()):
        model(shown(torch.randn(4, 3))).sum().backward()
    assert not (tmp_path / "capsules").exists()
