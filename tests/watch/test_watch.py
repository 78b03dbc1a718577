"""A watch changes nothing in a loop, and says what it sees."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop import Watch, WatchConfig

F: Any = torch.nn.functional


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.norm, self.last = (
            nn.Linear(5, 8),
            nn.Dropout(0.2),
            nn.BatchNorm1d(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Any:
        return self.last(self.norm(self.drop(self.first(x)).relu()))


class Off:
    """No watch."""

    def __enter__(self) -> "Off":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, *batch: Any, **options: Any) -> "Off":
        return self


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(steps)]


def train(watched: bool, scaled: bool, every: int = 1, **optim: Any) -> tuple[list[float], list[Tensor], Any]:
    """Six blocks of a loop; returns losses, weights and the watch."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **optim)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
    losses = []
    said: list[str] = []
    watch: Any = Watch(model, optimizer, scaler, say=said.append) if watched else Off()
    with watch:
        for number, (x, y) in enumerate(batches(6), start=1):
            with watch.step((x, y)):
                with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
                    loss = F.cross_entropy(model(x), y) / every
                (scaler.scale(loss) if scaler else loss).backward()
                if number % every == 0:
                    if scaler:
                        scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    if scaler:
                        scaler.step(optimizer)
                        scaler.update()
                    else:
                        optimizer.step()
                    optimizer.zero_grad()
            losses.append(loss.item())
    return losses, [w.detach().clone() for w in [*model.parameters(), *model.buffers()]], watch


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optim", [{}, {"fused": True}])
def test_a_watch_changes_nothing(scaled: bool, every: int, optim: Any) -> None:
    before = torch.autograd.backward, torch.Tensor.backward, torch.clear_autocast_cache
    losses, weights, watch = train(True, scaled, every, **optim)
    wanted, expected, _ = train(False, scaled, every, **optim)
    assert losses == wanted
    assert all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))
    assert [finding.kind for finding in watch.findings] == []
    assert watch.record.step == 6 // every
    assert (torch.autograd.backward, torch.Tensor.backward, torch.clear_autocast_cache) == before


def test_a_log_of_zero_in_the_loss_is_traced_to_its_line_and_sample() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    said: list[str] = []
    with Watch(model, optimizer, say=said.append) as watch:
        for x, y in batches(2):
            weight = torch.ones(6)
            weight[4] = 0.0 if watch.record.step == 1 else 1.0
            with watch.step({"x": x, "y": y, "w": weight}, ids=[f"s{n}" for n in range(6)]):
                loss = (F.cross_entropy(model(x), y, reduction="none") + torch.log(weight)).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    (finding,) = [f for f in watch.findings if f.kind == "not_finite"]
    assert finding.step == 1
    assert finding.cause.whose == "loss"
    assert "torch.log(weight)" in finding.cause.place.expression
    assert finding.cause.place.sample == "s4"
    assert any("torch.log(weight)" in text for text in said)


def test_looks_come_early_and_then_seldom() -> None:
    assert [step for step in range(1200) if WatchConfig().is_due(step)] == [0, 20, 100, 500, 1000]
    assert [step for step in range(30) if WatchConfig(every=10).is_due(step)] == [0, 10, 20]


WRITES: dict[str, Any] = {
    "in place": lambda key, query: key.mul_(0.9).add_(query, alpha=0.1),
    "data in place": lambda key, query: key.data.mul_(0.9).add_(query.data, alpha=0.1),
    "other data": lambda key, query: setattr(key, "data", key.data * 0.9 + query.data * 0.1),
    "several at once": lambda key, query: torch._foreach_mul_([key], 0.9),
    "out": lambda key, query: torch.add(query, 0.5, out=key),
}


class Momentum(nn.Module):
    """A query encoder, and a key encoder that each forward pass moves after it, as in MoCo."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.query, self.key, self.write = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), write

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
                self.write(key, query)
            keys = self.key(x)
        return (self.query(x) - keys - 1).square().mean()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_weights_that_a_forward_pass_writes_are_as_without_a_watch(write: Any) -> None:
    def train(every: int) -> tuple[list[Tensor], list[int]]:
        torch.manual_seed(0)
        model = Momentum(write)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        batches = [torch.randn(8, 4) for _ in range(6)]
        if not every:
            for x in batches:
                model(x).backward()
                optimizer.step()
                optimizer.zero_grad()
        else:
            with Watch(model, optimizer, config=WatchConfig(every=every), say=lambda text: None) as watch:
                for x in batches:
                    with watch.step(x):
                        model(x).backward()
                        optimizer.step()
                        optimizer.zero_grad()
        return [w.detach().clone() for w in model.parameters()], [w._version for w in model.key.parameters()]

    (plain, versions), (watched, versions_watched) = train(0), train(1)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert versions == versions_watched
