"""Optimizers and schedulers that continue from a checkpoint as if they had never stopped, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError
from rawloop.optim import OptimConfig, build_optimizer
from rawloop.optim_state import NamedOptimizerState, SchedulerState
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import Records, RecordsConfig


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def step(net: nn.Module, optimizer: Optimizer, seed: int = 0) -> float:
    """One update; the loss is differentiable enough for every optimizer, LBFGS too."""
    torch.manual_seed(seed)
    inputs = torch.randn(3, 4)

    def closure() -> float:
        optimizer.zero_grad()
        loss = net(inputs).square().mean()
        loss.backward()
        return float(loss.item())

    return float(optimizer.step(closure))


def test_state_of_a_weight_of_another_order_in_memory_goes_on_bit_for_bit() -> None:
    """A checkpoint stores numbers row by row; fused AdamW takes weight and state to be in one order."""

    def start() -> tuple[nn.Module, Optimizer, NamedOptimizerState]:
        net = model()
        net[0].weight.data = net[0].weight.data.t().contiguous().t()  # type: ignore[index]
        optimizer = AdamW(net.parameters(), lr=1e-2, fused=True)
        return net, optimizer, NamedOptimizerState(optimizer, net.named_parameters)

    straight, first, kept = start()
    step(straight, first)
    saved, weights = kept.state_dict(), copy.deepcopy(straight.state_dict())
    for values in saved["state"].values():
        values |= {key: value.clone(memory_format=torch.contiguous_format) for key, value in values.items()}
    step(straight, first, 1)
    resumed, second, restored = start()
    resumed.load_state_dict(weights)
    restored.load_state_dict(saved)
    step(resumed, second, 1)
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))


# -- all of torch's optimizers and schedulers: 10 + 10 = 20 --------------------------------------------------------


def two_groups(net: nn.Module, kind: Callable[..., Optimizer], **options: Any) -> Optimizer:
    """Matrices and vectors in groups of their own, as everybody has them."""
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) == flag] for flag in (True, False))
    return kind([{"params": matrices, "lr": 0.02}, {"params": vectors, "lr": 0.01}], **options)


def one_group(net: nn.Module, kind: Callable[..., Optimizer], **options: Any) -> Optimizer:
    return kind(net.parameters(), **options)


class ScheduleFree(Optimizer):
    """The state layout of schedule-free optimizers: counters in the group, another iterate per weight."""

    def __init__(self, params: Any, lr: float = 0.02, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "weight_sum": 0.0, "train_mode": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2
            share = group["lr"] ** 2 / group["weight_sum"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
        return loss


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda net: two_groups(net, optim.SGD, momentum=0.9, nesterov=True),
    "Adam": lambda net: two_groups(net, optim.Adam, amsgrad=True),
    "AdamW": lambda net: two_groups(net, AdamW, weight_decay=0.1),
    "AdamW, fused": lambda net: two_groups(net, AdamW, fused=True),
    "Adafactor": lambda net: two_groups(net, optim.Adafactor),
    "RMSprop": lambda net: two_groups(net, optim.RMSprop, momentum=0.9, centered=True),
    "Adagrad": lambda net: two_groups(net, optim.Adagrad),
    "Adadelta": lambda net: two_groups(net, optim.Adadelta),
    "Adamax": lambda net: two_groups(net, optim.Adamax),
    "NAdam": lambda net: two_groups(net, optim.NAdam),
    "RAdam": lambda net: two_groups(net, optim.RAdam),
    "ASGD": lambda net: two_groups(net, optim.ASGD),
    "Rprop": lambda net: two_groups(net, optim.Rprop),
    "LBFGS": lambda net: one_group(net, optim.LBFGS, lr=0.1, line_search_fn="strong_wolfe"),
    "schedule-free": lambda net: two_groups(net, ScheduleFree),
    "by name": lambda net: AdamW(net.named_parameters(), lr=0.02),
}
SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "StepLR": lambda o: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [4, 12, 12, 15], 0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 12),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=15),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 25, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4, 2),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda k: 1 / (k + 1)),
    "LambdaLR of numpy": lambda o: schedules.LambdaLR(o, lambda k: np.exp(-k / 8)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda k: 0.9),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, [0.1, 0.05], total_steps=25),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.001, 0.1, step_size_up=7, mode="exp_range", gamma=0.98),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=6), schedules.MultiStepLR(o, [3, 9], 0.5)], [6]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ExponentialLR(o, 0.95), schedules.MultiStepLR(o, [5, 13])]
    ),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=1, threshold=0.5),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, 0.001, anneal_epochs=15),
}


class Run:
    """A loop of one's own with an optimizer, a scheduler, and a manager of checkpoints."""

    def __init__(self, folder: Path, optimizer: str, schedule: str) -> None:
        self.net = model()
        self.optimizer = OPTIMIZERS[optimizer](self.net)
        self.schedule = SCHEDULES[schedule](self.optimizer)
        world = World()
        self.records = Records(folder, world, RecordsConfig())
        self.parts: dict[str, Any] = {
            "model": self.net,
            "optimizer": NamedOptimizerState(self.optimizer, self.net.named_parameters),
            "schedule": SchedulerState(self.schedule),
        }
        self.manager = CheckpointManager(folder, CheckpointConfig(), world, self.records, self.parts)

    def train(self, start: int, stop: int) -> list[Any]:
        """Train, and return the learning rates and other options of each step, and the weights at the end."""
        options = []
        for k in range(start, stop):
            loss = step(self.net, self.optimizer, seed=k)
            options.append([{**group, "params": None} for group in self.optimizer.param_groups])
            if isinstance(self.schedule, schedules.ReduceLROnPlateau):
                self.schedule.step(loss)
            else:
                self.schedule.step()
        return [*options[-10:], [p.detach().clone() for p in self.net.parameters()]]

    def close(self) -> None:
        self.manager.close()
        self.records.close()


CASES = [(name, "CosineAnnealingLR") for name in OPTIMIZERS] + [("AdamW", name) for name in SCHEDULES]
CASES += [("SGD", "CyclicLR"), ("LBFGS", "MultiStepLR"), ("schedule-free", "LambdaLR")]


@pytest.mark.parametrize(("optimizer", "schedule"), CASES)
def test_ten_and_ten_steps_are_twenty(optimizer: str, schedule: str, tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", optimizer, schedule)
    wanted = straight.train(0, 20)
    straight.close()
    stopped = Run(tmp_path / "stopped", optimizer, schedule)
    stopped.train(0, 10)
    stopped.manager.save(10)
    stopped.close()
    resumed = Run(tmp_path / "stopped", optimizer, schedule)
    resumed.manager.load()
    found = resumed.train(10, 20)
    resumed.close()
    assert found[:-1] == wanted[:-1]
    assert all(torch.equal(a, b) for a, b in zip(found[-1], wanted[-1], strict=True))


def test_all_of_torch_is_covered() -> None:
    """But for SparseAdam, which takes sparse gradients only, and Muon, which takes matrices only."""
    kinds = {name for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    assert kinds - {"Optimizer", "SparseAdam", "Muon"} <= set(OPTIMIZERS)
    kinds = {name for name, kind in vars(schedules).items() if isinstance(kind, type) and issubclass(kind, LRScheduler)}
    assert kinds - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULES)


# -- the state -----------------------------------------------------------------------------------------------------


def test_state_by_name_continues_bit_for_bit() -> None:
    straight = model()
    optimizer = build_optimizer(straight.named_parameters(), OptimConfig(lr=0.01))
    for _ in range(3):
        step(straight, optimizer)
    resumed = model()
    resumed.load_state_dict(straight.state_dict())
    other = build_optimizer(resumed.named_parameters(), OptimConfig(lr=0.01))
    saved = NamedOptimizerState(optimizer, straight.named_parameters).state_dict()
    NamedOptimizerState(other, resumed.named_parameters).load_state_dict(saved)
    assert set(saved["state"]) == {name for name, _ in straight.named_parameters()}
    for net, held in ((straight, optimizer), (resumed, other)):
        step(net, held)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_state_that_does_not_fit_is_refused_by_name() -> None:
    net = model()
    optimizer = build_optimizer(net.named_parameters(), OptimConfig())
    step(net, optimizer)
    part = NamedOptimizerState(optimizer, net.named_parameters)
    state = part.state_dict()
    shapes = state["groups"][0]["params"]
    shape = shapes.pop("2.weight")
    with pytest.raises(CheckpointError, match=r"1 weights have none \['2.weight'\]"):
        part.load_state_dict(state)
    shapes |= {"2.weight": shape, "other": shape}
    with pytest.raises(CheckpointError, match=r"1 are not in the model.*\['other'\]"):
        part.load_state_dict(state)
    del shapes["other"]
    shapes["0.weight"] = [3, 3]
    with pytest.raises(CheckpointError, match=r"0.weight has shape \(3, 3\), the weight has \(8, 4\)"):
        part.load_state_dict(state)


def test_an_optimizer_of_another_model_and_a_used_up_generator_are_refused() -> None:
    net, other = model(), model()
    optimizer = AdamW([*net.parameters(), nn.Parameter(torch.ones(1), requires_grad=False)])
    NamedOptimizerState(optimizer, net.named_parameters).state_dict()
    with pytest.raises(UserError, match="6 of the 6 parameters that the optimizer trains have no name in `named`"):
        NamedOptimizerState(optimizer, other.named_parameters).state_dict()
    with pytest.raises(UserError, match=r"without \(\): it got AdamW and generator"):
        NamedOptimizerState(optimizer, net.named_parameters())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="it got Sequential and method"):
        NamedOptimizerState(net, net.named_parameters)  # type: ignore[arg-type]


def test_an_optimizer_of_masters_is_told_what_to_hand_in() -> None:
    net = model()
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16"), torch.device("cpu"))
    policy.prepare(net)
    optimizer = AdamW(net.parameters())
    policy.adopt(optimizer)
    advice = r"with a PrecisionPolicy hand in policy.named_parameters, and call policy.adopt\(optimizer\) before"
    with pytest.raises(UserError, match=advice):
        NamedOptimizerState(optimizer, net.named_parameters).state_dict()
    (group,) = NamedOptimizerState(optimizer, policy.named_parameters).state_dict()["groups"]
    assert list(group["params"]) == [name for name, _ in net.named_parameters()]


def test_state_keeps_its_dtype() -> None:
    net = nn.Linear(4, 2).half()
    optimizer = AdamW(net.parameters())
    part = NamedOptimizerState(optimizer, net.named_parameters)
    tiny = {"step": torch.tensor(1.0), "exp_avg": torch.full((2, 4), 1e-9), "exp_avg_sq": torch.full((2, 4), 1e-9)}
    state = {"weight": tiny, "bias": {"step": torch.tensor(1.0)}}
    part.load_state_dict({**part.state_dict(), "state": state})
    assert part.state_dict()["state"]["weight"]["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(part.state_dict()["state"]["weight"]["exp_avg_sq"], tiny["exp_avg_sq"])


# -- groups and their options ----------------------------------------------------------------------------------------


def trained(kind: Callable[[nn.Module], Optimizer], steps: int = 2) -> tuple[nn.Module, Optimizer, NamedOptimizerState]:
    net = model()
    optimizer = kind(net)
    for k in range(steps):
        step(net, optimizer, seed=k)
    return net, optimizer, NamedOptimizerState(optimizer, net.named_parameters)


def test_groups_of_other_members_are_refused_by_name() -> None:
    state = trained(OPTIMIZERS["AdamW"])[2].state_dict()
    other = trained(lambda net: AdamW(net.parameters()))[2]
    with pytest.raises(CheckpointError, match=r"2 then, 1 now; 4 weights have moved \['0.bias from group 1 to 0'"):
        other.load_state_dict(state)
    swapped = trained(lambda net: AdamW([{"params": [p]} for p in net.parameters()]))[2]
    with pytest.raises(CheckpointError, match=r"2 then, 6 now; 4 weights have moved"):
        swapped.load_state_dict(state)


def test_what_a_config_says_of_the_groups_may_be_kept() -> None:
    state = trained(OPTIMIZERS["AdamW"])[2].state_dict()
    net = model()
    optimizer = two_groups(net, AdamW, weight_decay=0.5)
    NamedOptimizerState(optimizer, net.named_parameters, restore_options=False).load_state_dict(copy.deepcopy(state))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    NamedOptimizerState(optimizer, net.named_parameters).load_state_dict(state)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_how_an_update_is_computed_is_the_choice_of_now() -> None:
    state = trained(OPTIMIZERS["AdamW, fused"])[2].state_dict()
    net = model()
    optimizer = two_groups(net, AdamW, foreach=False)
    NamedOptimizerState(optimizer, net.named_parameters).load_state_dict(state)
    assert [(group["fused"], group["foreach"]) for group in optimizer.param_groups] == [(None, False)] * 2


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    state = trained(lambda net: AdamW(net.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False))[2]
    net, rate = model(), torch.tensor(0.25)
    optimizer = AdamW(net.parameters(), lr=rate, foreach=False)
    part = NamedOptimizerState(optimizer, net.named_parameters)
    part.load_state_dict(copy.deepcopy(state.state_dict()))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5


def test_the_layout_without_groups_is_still_read() -> None:
    """As checkpoints of rawloop 0.1 have it: an entry for each trained weight, empty before its first update."""
    _, _, part = trained(lambda net: build_optimizer(net.named_parameters(), OptimConfig()))
    state = copy.deepcopy(part.state_dict()["state"])
    other = model()
    resumed = build_optimizer(other.named_parameters(), OptimConfig(weight_decay=0.3))
    found = NamedOptimizerState(resumed, other.named_parameters)
    found.load_state_dict({**state, "0.bias": {}})
    assert resumed.param_groups[0]["weight_decay"] == 0.3
    assert found.state_dict()["state"].keys() == state.keys() - {"0.bias"}
    assert torch.equal(found.state_dict()["state"]["2.weight"]["exp_avg"], state["2.weight"]["exp_avg"])


def test_the_state_of_a_weight_that_is_frozen_for_a_while_is_kept() -> None:
    """As those of a GAN's discriminator are during the generator's step."""
    net, optimizer, part = trained(OPTIMIZERS["AdamW"])
    net.requires_grad_(False)
    assert len(part.state_dict()["state"]) == 6
    part.load_state_dict(copy.deepcopy(part.state_dict()))
    assert len(optimizer.state) == 6


def test_a_state_that_was_not_there_is_not_there_after_loading() -> None:
    fresh = trained(OPTIMIZERS["AdamW"], steps=0)[2].state_dict()
    _, optimizer, part = trained(OPTIMIZERS["AdamW"])
    part.load_state_dict(fresh)
    assert not optimizer.state


def test_step_counters_stay_where_the_optimizer_keeps_them() -> None:
    state = trained(lambda net: AdamW(net.parameters()))[2].state_dict()
    for fused, place in ((False, "cpu"), (True, "meta")):
        net = model().to("meta")
        optimizer = AdamW(net.parameters())
        optimizer.param_groups[0]["fused"] = fused
        NamedOptimizerState(optimizer, net.named_parameters).load_state_dict(copy.deepcopy(state))
        values = optimizer.state[next(net.parameters())]
        assert (values["step"].device.type, values["exp_avg"].device.type) == (place, "meta")


def test_state_that_belongs_to_no_parameter_is_refused() -> None:
    _, optimizer, part = trained(OPTIMIZERS["SGD"])
    optimizer.state["global"] = {"k": 1}  # type: ignore[index]
    with pytest.raises(UserError, match="SGD has state for 'global', which is no parameter"):
        part.state_dict()


def test_another_kind_of_scheduler_is_refused() -> None:
    optimizer = OPTIMIZERS["SGD"](model())
    state = SchedulerState(SCHEDULES["StepLR"](optimizer)).state_dict()
    with pytest.raises(CheckpointError, match="is not a CosineAnnealingLR: T_max, eta_min, gamma, step_size dif"):
        SchedulerState(SCHEDULES["CosineAnnealingLR"](optimizer)).load_state_dict(state)
    with pytest.raises(UserError, match="SchedulerState takes a torch LRScheduler: it got a SGD"):
        SchedulerState(optimizer)  # type: ignore[arg-type]
