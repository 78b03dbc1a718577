"""Loops of many kinds: what their passes are made of is recorded, and the watch changes nothing that they compute."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawloop import Watch
from rawloop.watch.rerun import run_again
from rawloop.watch.subject import Detector, Pass, StepRecord, Subject


class Reruns(Detector):
    """Runs the passes of each update again, and keeps whether the gradients are those of the loop."""

    def __init__(self) -> None:
        self.same: list[bool] = []
        self.passes: list[list[Pass]] = []
        self.norms: list[float | None] = []
        self.reasons: list[str] = []

    def gradients(self, subject: Subject, record: StepRecord) -> tuple[()]:
        """Compare."""
        weights = dict(subject.named())
        again = run_again(subject.model, weights.items(), record.passes).gradients if record.passes else {}
        self.same.append(all(torch.equal(grad, weights[name].grad) for name, grad in again.items()))  # type: ignore[arg-type]
        self.passes.append(record.passes)
        self.norms.append(record.grad_norm)
        self.reasons.append(record.why_no_passes)
        return ()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def small() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 4))


def test_a_function_of_the_users_own_is_an_entry() -> None:
    model, reruns = small(), Reruns()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    own = vars(torch.autograd.Function)["apply"]
    with Watch(model, optimizer, detectors=[reruns]) as watch, watch.step():
        Double.apply(model(torch.randn(3, 4))).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert reruns.same == [True]
    assert [len(passes) for passes in reruns.passes] == [1]
    assert vars(torch.autograd.Function)["apply"] is own


def test_the_parts_of_a_model_may_be_called_on_their_own() -> None:
    model, reruns = nn.ModuleDict({"maker": small(), "judge": small()}), Reruns()
    maker, judge = model["maker"], model["judge"]
    optimizers = [torch.optim.Adam(part.parameters(), 1e-3) for part in (judge, maker)]
    with Watch(model, optimizers) as watch:
        watch.detectors.append(reruns)
        for _ in range(2):
            with watch.step(real := torch.randn(5, 4)):
                fake = maker(torch.randn(5, 4))
                optimizers[0].zero_grad()
                loss: Any = F.softplus(judge(fake.detach())).mean() + F.softplus(-judge(real)).mean()
                loss.backward()
                optimizers[0].step()
            with watch.step(real):
                optimizers[1].zero_grad()
                loss = F.softplus(-judge(maker(torch.randn(5, 4)))).mean()
                loss.backward()
                optimizers[1].step()
    assert len(reruns.passes) == 4
    assert all(len(passes) == 1 for passes in reruns.passes)


@pytest.mark.parametrize("clip_all", [True, False])
def test_the_norm_of_clipping_is_taken_if_it_is_that_of_all_gradients(
    clip_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reruns = small(), Reruns()
    counted: list[int] = []

    def counting(grads: Any) -> Any:
        counted.append(len(grads))
        return _norm(grads)

    monkeypatch.setattr("rawloop.watch.hooks.total_norm", counting)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Watch(model, optimizer, detectors=[reruns]) as watch:
        for _ in range(4):
            with watch.step():
                model(torch.ones(3, 4)).square().sum().backward()
                norm = float(_norm([w.grad for w in model.parameters()]))
                nn.utils.clip_grad_norm_(model.parameters() if clip_all else [model[0].weight], 1e9)
                optimizer.step()
                optimizer.zero_grad()
            assert reruns.norms[-1] == pytest.approx(norm)
    assert len(counted) == (1 if clip_all else 4)


def _norm(grads: Any) -> Any:
    return torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))
