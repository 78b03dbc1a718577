"""Loops of many kinds: what their passes are made of is recorded, and the watch changes nothing that they compute."""

import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rawloop import Watch
from rawloop.dist import World
from rawloop.watch.rerun import run_again
from rawloop.watch.subject import Detector, Pass, StepRecord, Subject
from tests.watch.loops import Double


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


@pytest.mark.parametrize("reused", [False, True])
def test_two_updates_in_one_block_have_passes_of_their_own(reused: bool) -> None:
    model, reruns = nn.ModuleDict({"maker": small(), "judge": small()}), Reruns()
    maker, judge = model["maker"], model["judge"]
    optimizers = [torch.optim.Adam(part.parameters(), 1e-3) for part in (judge, maker)]
    with Watch(model, optimizers, detectors=[reruns]) as watch:
        for _ in range(2):
            with watch.step(real := torch.randn(5, 4)):
                fake = maker(torch.randn(5, 4))
                loss: Any = F.softplus(judge(fake.detach())).mean() + F.softplus(-judge(real)).mean()
                loss.backward()
                optimizers[0].step()
                model.zero_grad()
                fake = fake if reused else maker(torch.randn(5, 4))
                (F.softplus(-judge(fake)).mean() + judge(fake.detach()).mean() * 0).backward()
                optimizers[1].step()
                model.zero_grad()
    assert reruns.same == [True] * 4
    assert [len(passes) for passes in reruns.passes] == [1, 0 if reused else 1] * 2
    why = "was computed before an update in the same block, which has changed the weights"
    assert [why in reason for reason in reruns.reasons] == [False, reused] * 2


class Own(TorchFunctionMode):
    """A mode of the user's that gives numbers a dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.full:
            kwargs = {**(kwargs or {}), "dtype": torch.float64}
        return func(*args, **(kwargs or {}))


def modes() -> list[Any]:
    return [torch._C._get_function_stack_at(n) for n in range(torch._C._len_torch_function_stack())]


@pytest.mark.parametrize("entered", [*itertools.permutations(range(3))])
def test_the_stack_of_modes_is_the_users_whatever_is_left_first(entered: tuple[int, ...]) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watches = [Watch(model, optimizer, detectors=[], say=lambda text: None) for _ in range(2)]
    with watches[0], watches[1]:
        for left, own in itertools.product(itertools.permutations(range(3)), (Own, torch.device)):
            for error in (None, KeyError()):
                contexts: list[Any] = [
                    watches[0].step(),
                    own("cpu") if own is torch.device else own(),
                    watches[1].step(),
                ]
                for n in entered:
                    contexts[n].__enter__()
                model(torch.randn(3, 4)).mean().backward()
                optimizer.step()
                for n in left:
                    model(torch.randn(3, 4)).mean()
                    contexts[n].__exit__(type(error) if error else None, error, None)
                assert modes() == [], (left, own)
    assert {one.kind for watch in watches for one in watch.findings.alarms} == {"exception"}


def test_the_default_device_may_change_inside_a_block() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.set_default_device("cpu")
    try:
        with Watch(model, optimizer, detectors=[]) as watch, watch.step():
            model(torch.randn(3, 4)).mean().backward()
            model(torch.randn(3, 4))
            torch.set_default_device(None)
            assert [type(mode).__name__ for mode in modes()] == ["Recorder"]
    finally:
        torch.set_default_device(None)
    assert modes() == []


class Halve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.full((), 0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


def test_the_users_mode_is_on_in_a_function_of_the_users_own() -> None:
    model = small()
    with Own(), Watch(model, detectors=[]) as watch, watch.step():
        assert Halve.apply(model(torch.randn(3, 4)).sum()).dtype == torch.float64  # type: ignore[no-untyped-call]


def test_operations_are_recorded_as_a_mode_of_the_users_makes_them() -> None:
    model, reruns = small(), Reruns()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Own(), Watch(model, optimizer, detectors=[reruns]) as watch, watch.step():
        (model(torch.randn(3, 4)) * torch.full((3, 4), 0.1)).mean().backward()
        optimizer.step()
    assert reruns.same == [True]
    tape = reruns.passes[0][0].forward.tape  # type: ignore[attr-defined]
    assert [entry.kwargs["dtype"] for entry in tape.entries if entry.function is torch.full] == [torch.float64]


class Caster(nn.Module):
    """A wrapper that sets autocast, as those of other libraries do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(x).float()


@pytest.mark.parametrize("backend", ["", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_passes_run_again_inside_wrappers_and_outside_a_compiler(backend: str) -> None:
    reruns = Reruns()
    model: Any = torch.compile(small().eval(), backend=backend) if backend else Caster(small())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, detectors=[reruns]) as watch:
        for micro_step in range(4):
            with watch.step(x := torch.randn(3, 4)):
                model(x).square().mean().backward()
                if micro_step % 2:
                    optimizer.step()
                    optimizer.zero_grad()
    assert reruns.same == [True, True]
    assert [len(passes) for passes in reruns.passes] == [2, 2]


def test_watches_may_be_nested() -> None:
    model, inner, outer = small(), Reruns(), Reruns()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first, second = (Watch(model, optimizer, detectors=[one]) for one in (outer, inner))
    with first, second:
        for _ in range(2):
            with first.step(x := torch.randn(3, 4)), second.step(x):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert [inner.same, outer.same] == [[True, True], [True, True]]
    assert [len(passes) for one in (inner, outer) for passes in one.passes] == [1, 1, 1, 1]


def train_on_rank(world: World, ill: bool, watched: bool) -> tuple[list[Any], float]:
    """Train three steps in DDP; the data of rank 1 has a NaN in the second."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = Watch(model, optimizer) if watched else None
    with watch or nullcontext():
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + world.rank)
            x = torch.randn(3, 4, generator=generator)
            if ill and world.rank == 1 and step == 1:
                x[2, 0] = math.nan
            with watch.step({"x": x}, [f"r{world.rank}s{step}n{n}" for n in range(3)]) if watch else nullcontext():
                model(x).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    found = [(f.kind, f.cause.whose, f.cause.place.sample) for f in watch.findings.alarms] if watch else []
    return found, float(sum(weight.detach().double().sum() for weight in model.parameters()))


def train_three_times(world: World) -> list[tuple[list[Any], float]]:
    return [train_on_rank(world, ill, watched) for ill, watched in ((False, False), (False, True), (True, True))]


def test_ranks_of_which_one_has_a_bad_sample(run_ranks: Any) -> None:
    bare, watched, ill = zip(*run_ranks(train_three_times), strict=True)
    assert [weights for _, weights in bare] == [weights for _, weights in watched]
    assert [found for found, _ in watched] == [[], []]
    (first, _), (second, _) = ill
    assert ("not_finite", "data", "r1s1n2") in second
    assert [whose for kind, whose, _ in first if kind == "not_finite"] == ["distributed"]


@pytest.mark.parametrize("clip_all", [True, False])
def test_the_norm_of_clipping_is_taken_if_it_is_that_of_all_gradients(
    clip_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reruns = small(), Reruns()
    counted: list[int] = []

    def counting(grads: Any) -> Any:
        counted.append(len(grads))
        return _norm(grads)

    monkeypatch.setattr("rawloop.watch.scalars.total_norm", counting)
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
