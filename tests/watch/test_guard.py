"""An error of the watch becomes a finding; the loop goes on as without a watch. The user's errors pass."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.errors import LostRank
from rawloop.watch.findings import Cause, Finding, Findings, Place, merged
from rawloop.watch.guard import Guard, cause_of
from rawloop.watch.subject import Detector, StepRecord, Subject
from rawloop.watch.watch import Watch

F: Any = torch.nn.functional


class Broken(Detector):
    """Fails in each step, after a finding."""

    def __init__(self) -> None:
        self.calls = 0

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        self.calls += 1
        yield Finding("before", "seen before the error", (Cause("data", "it"),), record.step)
        raise KeyError("a mistake of ours")


class Seer(Detector):
    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        yield Finding("seen", "a step ended", (Cause("data", "it"),), record.step, ordinary=True)


def train(watch: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    with watch:
        for step in range(steps):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            with watch.step(x):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), x[:, :1])
                loss.backward()
                optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def made() -> tuple[nn.Linear, torch.optim.SGD]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), 0.1)


def losses_without_errors() -> list[float]:
    model, optimizer = made()
    return train(Watch(model, optimizer, detectors=[]), model, optimizer)


def test_a_detector_that_fails_is_told_and_stays_off() -> None:
    model, optimizer = made()
    broken, said = Broken(), list[str]()
    watch = Watch(model, optimizer, detectors=[broken, Seer()], say=said.append)
    assert train(watch, model, optimizer) == losses_without_errors()
    found = {finding.kind: finding for finding in watch.findings}
    assert set(found) == {"before", "watch_failed", "seen"}
    assert broken.calls == 1
    assert found["seen"].times == 3
    assert not found["watch_failed"].ordinary
    assert "Broken" in found["watch_failed"].what
    assert "KeyError" in found["watch_failed"].cause.what
    assert "mistake of ours" in found["watch_failed"].cause.what
    assert "raise KeyError" in found["watch_failed"].cause.place.expression
    assert any("Broken" in text for text in said)


def test_an_error_of_the_recording_does_not_reach_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no storage")

    monkeypatch.setattr("rawloop.watch.tape.Tape.refs", fail)
    model, optimizer = made()
    watch = Watch(model, optimizer, detectors=[], say=lambda text: None)
    assert train(watch, model, optimizer) == losses_without_errors()
    (finding,) = watch.findings
    assert finding.kind == "watch_failed"
    assert finding.what.startswith("recording failed")


def test_a_folder_that_cannot_be_written_does_not_end_the_loop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model, optimizer = made()
    watch = Watch(model, optimizer, detectors=[Seer()], out=tmp_path / "file", say=lambda text: None)
    assert train(watch, model, optimizer) == losses_without_errors()
    assert {"seen", "watch_failed"} == {finding.kind for finding in watch.findings}


def test_a_stream_that_is_closed_does_not_end_the_loop() -> None:
    class Alarm(Detector):
        def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
            yield Finding("alarm", "a step ended", (Cause("data", "it"),), record.step)

    def closed(text: str) -> None:
        raise BrokenPipeError

    model, optimizer = made()
    watch = Watch(model, optimizer, detectors=[Alarm()], say=closed)
    assert train(watch, model, optimizer) == losses_without_errors()
    assert {finding.kind for finding in watch.findings} == {"alarm", "watch_failed"}


def test_errors_of_the_user_pass_and_the_end_of_a_loader_is_no_finding() -> None:
    model, optimizer = made()
    with Watch(model, optimizer, detectors=[], say=lambda text: None) as watch:
        with pytest.raises(ZeroDivisionError), watch.step():
            raise ZeroDivisionError
        with pytest.raises(StopIteration), watch.step():
            next(iter([]))
    assert [finding.kind for finding in watch.findings] == ["exception"]


def test_without_a_report_an_error_is_raised() -> None:
    with pytest.raises(KeyError), Guard().over("a part"):
        raise KeyError


def test_a_rank_that_did_not_come_is_no_error_of_the_watch() -> None:
    cause = cause_of(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2137"))
    assert (cause.whose, str(cause.place)) == ("distributed", "place not known")
    assert "another rank did not come to this step" in cause.what
    assert "has left the loop early" in cause.advice
    assert cause_of(LostRank("rank 1 did not come in time")).whose == "distributed"


def test_an_exception_after_damaged_weights_is_not_told() -> None:
    model, optimizer = made()
    with Watch(model, optimizer, detectors=[], say=lambda text: None) as watch:
        for step in range(2):
            x = torch.full((2, 3), float("nan"))
            with pytest.raises(ValueError) if step else nullcontext(), watch.step(x):
                if step:
                    torch.distributions.Categorical(logits=model(x), validate_args=True)
                optimizer.zero_grad()
                F.mse_loss(model(x), x[:, :1]).backward()
                optimizer.step()
    assert [finding.kind for finding in watch.findings] == ["not_finite"]


def test_weights_that_are_written_between_micro_batches_are_not_blamed_on_the_optimizer() -> None:
    model, optimizer = made()
    with Watch(model, optimizer, detectors=[], say=lambda text: None) as watch:
        for number in range(6):
            x = torch.randn(2, 3)
            if number == 5:
                with torch.no_grad():
                    model.weight[0, 0] = torch.inf
            with watch.step(x):
                F.mse_loss(model(x), x[:, :1]).backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
    (finding,) = watch.findings
    assert (finding.kind, finding.step, finding.cause.whose) == ("not_finite", 2, "not known")
    assert "code outside the optimizer has written to it since the last update" in finding.cause.what


def test_after_damaged_weights_nothing_is_told_until_they_are_finite() -> None:
    class EachStep(Detector):
        def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
            yield Finding("step", "a step", (Cause("data", "it", Place(tensor=str(record.step))),), record.step)

    model, optimizer = made()
    saved, said = {name: w.clone() for name, w in model.state_dict().items()}, list[str]()
    with Watch(model, optimizer, detectors=[EachStep()], say=said.append) as watch:
        for step in range(6):
            x = torch.full((2, 3), float("nan") if step == 1 else 1.0)
            if step == 4:
                model.load_state_dict(saved)
            with watch.step(x):
                optimizer.zero_grad()
                F.mse_loss(model(x), x[:, :1]).backward()
                optimizer.step()
    assert [finding.step for finding in watch.findings if finding.kind == "step"] == [0, 1, 4, 5]
    assert [finding.step for finding in watch.findings if finding.kind == "not_finite"] == [1]
    lines = [text for text in said if "the weights" in text]
    assert "No other finding is told until the weights are finite again" in lines[0]
    assert "finite again" in lines[1]
    assert len(lines) == 2


def test_many_findings_of_one_kind_become_one() -> None:
    one = [Finding("k", "large", (Cause("data", "it", Place(parameter=name)),), 0) for name in "abcde"]
    other = Finding("other", "small", (Cause("data", "it"),), 0)
    first, last = merged([*one, other])
    assert (first.kind, first.cause.place.parameter, first.cause.evidence["others alike"]) == ("k", "a", 4)
    assert "the same in b, c, d" in first.what
    assert last is other
    assert merged(one[:2]) == one[:2]
    assert len(Findings().extend(merged(one))) == 1
