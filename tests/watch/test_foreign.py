"""Healthy loops of unusual forms: no alarm, no error of the watch, and the same numbers as without it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop.watch.config import WatchConfig
from rawloop.watch.watch import Watch

F: Any = torch.nn.functional
STEPS = 8
Loop = Callable[[Any], list[Tensor]]


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 5, generator=generator).to(dtype), torch.randint(3, (6,), generator=generator))
        for _ in range(STEPS)
    ]


def double(make: Any) -> list[Tensor]:
    model = net().double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with make(model, optimizer) as watch:
        for x, y in batches(torch.float64):
            with watch.step((x, y)):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return list(model.parameters())


class Filter(nn.Module):
    """A filter of complex numbers in the frequencies of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat)), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Any:
        spectrum = torch.fft.rfft(x).unsqueeze(-1) * self.filter
        return self.head(torch.fft.irfft(spectrum, n=5, dim=1).flatten(1))


def complex_weights(make: Any) -> list[Tensor]:
    model = Filter()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with make(model, optimizer) as watch:
        for x, y in batches():
            with watch.step((x, y)):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return list(model.parameters())


def sparse_gradients(make: Any) -> list[Tensor]:
    model = nn.Sequential(nn.EmbeddingBag(20, 8, sparse=True), nn.Linear(8, 3))
    first: Any = torch.optim.SparseAdam(model[0].parameters(), 1e-2)
    second = torch.optim.Adam(model[1].parameters(), 1e-2)
    with make(model, [first, second]) as watch:
        for x, y in batches():
            ids = (x * 7).long() % 20
            with watch.step((ids, y)):
                first.zero_grad()
                second.zero_grad()
                F.cross_entropy(model(ids), y).backward()
                first.step()
                second.step()
    return list(model.parameters())


def closures(make: Any) -> list[Tensor]:
    model = net()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with make(model, optimizer) as watch:
        for _ in range(4):
            with watch.step((x, y)):

                def closure() -> Any:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
    return list(model.parameters())


class Sharp(torch.optim.Optimizer):
    """An optimizer around SGD, which a loop uses by `climb` and `descend`, without `step`."""

    def __init__(self, weights: Any) -> None:
        super().__init__(weights, {"rho": 0.05, "lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["old"] = weight.detach().clone()
            weight.add_(0.05 * weight.grad)

    @torch.no_grad()
    def descend(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data = self.state[weight]["old"]
        self.base.step()


def two_steps_of_one_update(make: Any) -> list[Tensor]:
    model = net()
    optimizer = Sharp(model.parameters())
    with make(model, optimizer) as watch:
        for x, y in batches():
            with watch.step((x, y)):
                F.cross_entropy(model(x), y).backward()
                optimizer.climb()
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.descend()
                optimizer.zero_grad()
    assert not isinstance(watch, Watch) or watch._step == STEPS
    return list(model.parameters())


def gradient_penalty(make: Any) -> list[Tensor]:
    critic, generator = net(), nn.Linear(4, 5)
    first, second = torch.optim.Adam(critic.parameters(), 1e-3), torch.optim.Adam(generator.parameters(), 1e-3)
    both = nn.ModuleDict({"critic": critic, "generator": generator})
    with make(both, [first, second]) as watch:
        for step, (x, _) in enumerate(batches()):
            with watch.step(x):
                mixed = (0.5 * (x + generator(torch.randn(6, 4)).detach())).requires_grad_()
                (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
                first.zero_grad()
                (((slope.norm(dim=1) - 1) ** 2).mean() - critic(x).mean()).backward()
                first.step()
                if step % 5 == 4:
                    second.zero_grad()
                    (-critic(generator(torch.randn(6, 4))).mean()).backward()
                    second.step()
    return list(both.parameters())


def rows_of_other_lengths(make: Any) -> list[Tensor]:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with make(model, optimizer) as watch:
        for x, y in batches():
            nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
            with watch.step({"x": nested, "y": y}):
                optimizer.zero_grad()
                F.cross_entropy(model(nested).values(), y).backward()
                optimizer.step()
    return list(model.parameters())


def gradients_by_hand(make: Any) -> list[Tensor]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with make(model, optimizer) as watch:
        for x, y in batches():
            with watch.step((x, y)):
                grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
                for weight, grad in zip(model.parameters(), grads, strict=True):
                    weight.grad = grad
                optimizer.step()
    return list(model.parameters())


def updates_inside_backward(make: Any) -> list[Tensor]:
    model = net()
    optimizers = {weight: torch.optim.Adam([weight], 1e-3) for weight in model.parameters()}

    def update(weight: Any) -> None:
        optimizers[weight].step()
        optimizers[weight].zero_grad()

    weights: Any = model.parameters()
    for weight in weights:
        weight.register_post_accumulate_grad_hook(update)
    with make(model, list(optimizers.values())) as watch:
        for x, y in batches():
            with watch.step((x, y)):
                F.cross_entropy(model(x), y).backward()
    return list(model.parameters())


def per_sample_gradients(make: Any) -> list[Tensor]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss(weights: Any, x: Tensor, y: Tensor) -> Any:
        return F.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), y[None])

    gradients: Any = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    with make(model, optimizer) as watch:
        for x, y in batches():
            with watch.step((x, y)):
                found = gradients({name: w.detach() for name, w in model.named_parameters()}, x, y)
                for name, weight in model.named_parameters():
                    weight.grad = found[name].mean(0)
                optimizer.step()
    return list(model.parameters())


def a_frozen_teacher(make: Any) -> list[Tensor]:
    """torch's encoder layer takes another kernel in evaluation mode, without gradients, if no function mode is on."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with make(model, optimizer) as watch:
        for _ in range(STEPS):
            x = torch.randn(3, 4, 8)
            with watch.step(x):
                optimizer.zero_grad()
                with torch.no_grad():
                    wanted = teacher(x)
                F.mse_loss(model(x), wanted).backward()
                optimizer.step()
    return list(model.parameters())


def a_scaler_over_two_optimizers(make: Any) -> list[Tensor]:
    model, scaler = net(), torch.amp.GradScaler("cpu")
    optimizers = [torch.optim.Adam(model[0].parameters(), 1e-3), torch.optim.SGD(model[2].parameters(), 1e-2)]
    with make(model, optimizers, scaler) as watch:
        for x, y in batches():
            with watch.step((x, y)):
                with torch.autocast("cpu", torch.float16):
                    loss = F.cross_entropy(model(x).float(), y)
                scaler.scale(loss).backward()
                for optimizer in optimizers:
                    scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
    return list(model.parameters())


class Nobody:
    """No watch."""

    def __init__(self, *loop: Any) -> None: ...

    def __enter__(self) -> "Nobody":
        return self

    def __exit__(self, *error: object) -> None: ...

    def step(self, *batch: Any) -> "Nobody":
        return self


LOOPS: list[Loop] = [
    double,
    complex_weights,
    sparse_gradients,
    closures,
    two_steps_of_one_update,
    gradient_penalty,
    rows_of_other_lengths,
    gradients_by_hand,
    updates_inside_backward,
    per_sample_gradients,
    a_frozen_teacher,
    a_scaler_over_two_optimizers,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: str(loop.__name__))
def test_a_watch_is_quiet_and_changes_nothing(loop: Loop) -> None:
    made: list[Watch] = []

    def make(model: nn.Module, optimizer: Any, scaler: Any = None) -> Watch:
        made.append(Watch(model, optimizer, scaler, config=WatchConfig(every=3), say=lambda text: None))
        return made[-1]

    torch.manual_seed(0)
    plain = loop(Nobody)
    torch.manual_seed(0)
    watched = loop(make)
    for watch in made:
        assert watch.findings.alarms == [], str(watch.findings)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch._C._len_torch_function_stack() == 0


def test_the_hooks_on_a_model_stay_the_same_over_all_steps() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, detectors=[]) as watch:
        seen = []
        for x, _ in batches():
            with watch.step(x):
                seen.append(tuple(model._forward_pre_hooks))
    assert len(set(seen)) == 1  # a compiled caller compiles again whenever they change
