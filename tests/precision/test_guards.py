"""Loops of other people: several optimizers, own clipping, lines left over from before, DDP and accelerate.

Every case runs in every mode: it does what a careful loop in plain PyTorch does, or says which line to change.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rawloop.dist import World, no_sync
from rawloop.errors import TrainingError, UserError
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.settings import DDPConfig

MODES: list[Any] = ["fp32", "bf16", "amp_fp16", "native_fp16"]
SCALED = ["amp_fp16", "native_fp16"]
EVERY = pytest.mark.parametrize("mode", MODES)


class Pair(nn.Module):
    """A generator and a discriminator of the same seed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.g: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.d: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def noise(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(6, 3, generator=generator).to(self.dtype)

    def real(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + step)
        return torch.randn(6, 4, generator=generator).to(self.dtype) + 1

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def loss_d(self, step: int) -> Tensor:
        fake = self.g(self.noise(step)).detach()
        loss: Tensor = (self.d(self.real(step)).float() - 1).square().mean() + self.d(fake).float().square().mean()
        return loss

    def loss_g(self, step: int) -> Tensor:
        loss: Tensor = (self.d(self.g(self.noise(step))).float() - 1).square().mean()
        return loss


class Gan:
    """A GAN under a policy, with an optimizer for each half."""

    def __init__(self, mode: Any, make: Callable[..., Optimizer] = AdamW, **settings: Any) -> None:
        self.pair = Pair()
        if mode in SCALED:  # nothing overflows in these tests but what shall
            settings.setdefault("loss_scale", LossScaleConfig(init=2.0**6))
        self.policy = PrecisionPolicy(PrecisionConfig(mode, **settings))
        self.policy.prepare(self.pair)
        self.d, self.g = make(self.pair.d.parameters(), lr=0.01), make(self.pair.g.parameters(), lr=0.01)

    def backward(self, which: str, step: int, factor: float = 1.0, **options: Any) -> None:
        with self.policy.autocast():
            loss = self.pair.loss_d(step) if which == "d" else self.pair.loss_g(step)
        self.policy.backward(loss * factor, **options)

    def values(self) -> dict[str, Tensor]:
        return {name: self.policy.trained.value(name).clone() for name in self.policy.trained.weights}


def by_hand(steps: int, play: Callable[[Pair, Optimizer, Optimizer, int], None]) -> dict[str, Tensor]:
    """A loop in plain PyTorch, in float32."""
    pair = Pair()
    d, g = AdamW(pair.d.parameters(), lr=0.01), AdamW(pair.g.parameters(), lr=0.01)
    for step in range(steps):
        play(pair, d, g, step)
    return {name: value.detach() for name, value in pair.named_parameters()}


def backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)


def agrees(found: dict[str, Tensor], wanted: dict[str, Tensor], mode: str) -> None:
    for name, value in wanted.items():
        if mode == "fp32":
            assert torch.equal(found[name], value), name
        else:  # by hand, gradients that leak move weights by 0.02 and more
            torch.testing.assert_close(found[name], value, rtol=0, atol=0.008)


def careful(pair: Pair, d: Optimizer, g: Optimizer, step: int) -> None:
    d.zero_grad()
    backward(pair.loss_d(step))
    d.step()
    g.zero_grad()
    backward(pair.loss_g(step))
    g.step()


def careless(pair: Pair, d: Optimizer, g: Optimizer, step: int) -> None:
    backward(pair.loss_d(step))
    d.step()
    d.zero_grad()
    backward(pair.loss_g(step))
    g.step()
    g.zero_grad()


@EVERY
@pytest.mark.parametrize("habit", ["plain", "zeroes"])
def test_a_gan_is_trained_as_a_careful_loop_trains_it(mode: Any, habit: str) -> None:
    gan = Gan(mode)
    for step in range(8):
        for name, optimizer in (("d", gan.d), ("g", gan.g)):
            if habit == "zeroes":  # the line that a plain loop needs does no harm
                optimizer.zero_grad()
            gan.backward(name, step)
            assert gan.policy.step(optimizer).applied
    wanted = by_hand(8, careful)
    agrees(gan.values(), wanted, mode)
    leaky = by_hand(8, careless)
    assert max(float((leaky[name] - value).abs().max()) for name, value in wanted.items()) > 0.02


@EVERY
def test_two_losses_before_two_steps_add_up_as_in_torch(mode: Any) -> None:
    def both(pair: Pair, d: Optimizer, g: Optimizer, step: int) -> None:
        d.zero_grad()
        g.zero_grad()
        backward(pair.loss_d(step))
        backward(pair.loss_g(step))
        d.step()
        g.step()

    gan = Gan(mode)
    for step in range(4):
        gan.backward("d", step)
        gan.backward("g", step)
        assert gan.policy.step(gan.d).applied
        assert gan.policy.step(gan.g).applied
    agrees(gan.values(), by_hand(4, both), mode)


@EVERY
def test_one_backward_for_two_optimizers_that_are_stepped_one_by_one(mode: Any) -> None:
    one, other = Gan(mode), Gan(mode)
    for step in range(4):
        for gan in (one, other):
            gan.backward("g", step)
            gan.backward("d", step)  # an accumulation window of two
        assert one.policy.step(one.d).applied
        assert one.policy.step(one.g).applied
        assert other.policy.step([other.d, other.g]).applied
    assert all(torch.equal(value, other.values()[name]) for name, value in one.values().items())
    with pytest.raises(TrainingError, match="no weight of the optimizer got a gradient"):
        one.policy.step(one.d)


@pytest.mark.parametrize("mode", SCALED)
def test_the_second_step_of_a_window_unscales_by_the_scale_of_the_window(mode: Any) -> None:
    grows = LossScaleConfig(init=2.0**10, growth_interval=1)
    stays = LossScaleConfig(init=2.0**10)
    gans = [Gan(mode, make=SGD, loss_scale=scale) for scale in (grows, stays)]
    for gan in gans:
        gan.backward("g", 0)
        assert gan.policy.step(gan.d).applied
        assert gan.policy.step(gan.g).applied
    assert gans[0].policy.scaler is not None
    assert gans[0].policy.scaler.scale == 2.0**11  # grown once, for one window
    assert all(torch.equal(value, gans[1].values()[name]) for name, value in gans[0].values().items())


@EVERY
def test_only_one_of_two_optimizers_is_unscaled_by_hand(mode: Any) -> None:
    one, other = Gan(mode, make=SGD), Gan(mode, make=SGD)
    for gan in (one, other):
        gan.backward("g", 0)
    one.policy.unscale(one.d)
    for gan in (one, other):
        assert gan.policy.step(gan.d).applied
        assert gan.policy.step(gan.g).applied
    assert all(torch.equal(value, other.values()[name]) for name, value in one.values().items())


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("mode", SCALED)
def test_gradients_of_the_other_optimizer_must_not_be_clipped_while_they_are_scaled(mode: Any, early: bool) -> None:
    gan = Gan(mode)
    gan.backward("g", 0)
    gan.policy.unscale(gan.d)
    if early:
        clip_grad_norm_(gan.pair.g.parameters(), 1e-3)
    assert gan.policy.step(gan.d).applied
    if not early:
        clip_grad_norm_(gan.pair.g.parameters(), 1e-3)
    with pytest.raises(UserError, match="the gradients were changed between"):
        gan.policy.step(gan.g)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("mode", SCALED)
def test_gradients_in_one_bucket_are_no_reason_to_refuse_the_other_optimizer(mode: Any, by_hand: bool) -> None:
    gan = Gan(mode)
    weights = list(gan.pair.parameters())
    bucket = torch.zeros(sum(p.numel() for p in weights), dtype=gan.pair.dtype)  # as DDP's gradient_as_bucket_view
    for weight, part in zip(weights, torch.split(bucket, [p.numel() for p in weights]), strict=True):
        weight.grad = part.view_as(weight)
    gan.backward("g", 0)
    if by_hand:
        gan.policy.unscale(gan.d)
        clip_grad_norm_(gan.pair.d.parameters(), 1e-3)
    assert gan.policy.step(gan.d, max_norm=None if by_hand else 1e-3).applied
    assert gan.policy.step(gan.g).applied


@EVERY
def test_a_skipped_half_leaves_the_other_one_alone(mode: Any) -> None:
    gan = Gan(mode)
    gan.backward("d", 0, factor=1e38)
    assert not gan.policy.step(gan.d).applied
    gan.backward("g", 0)
    assert gan.policy.step(gan.g).applied
    gan.backward("d", 1)
    assert gan.policy.step(gan.d).applied


@EVERY
def test_a_window_that_fell_back_is_dropped_for_every_optimizer(mode: Any) -> None:
    gan = Gan(mode, fallback=[] if mode == "fp32" else ["fp32"], max_skips=1)
    gan.backward("g", 0, factor=1e38)
    if mode == "fp32":
        with pytest.raises(TrainingError, match="no mode is left"):
            gan.policy.step(gan.g)
        return
    assert gan.policy.step(gan.g).fell_back == f"{mode} -> fp32"
    result = gan.policy.step(gan.d)
    assert (result.applied, result.fell_back) == (False, None)
    assert str(result.skipped_because).startswith(f"the window was dropped: fell back from {mode}")
    gan.backward("g", 0)
    assert gan.policy.step([gan.d, gan.g]).applied


@EVERY
def test_inputs_and_retain_graph_are_those_of_torch(mode: Any) -> None:
    gan = Gan(mode)
    with gan.policy.autocast():
        loss = gan.pair.loss_g(0)
    held = [p for name, p in gan.policy.named_parameters() if name.startswith("g.")]
    gan.policy.backward(loss, inputs=held, retain_graph=True)
    assert all(p.grad is None for p in gan.pair.d.parameters())
    assert all(p.grad is not None for p in gan.pair.g.parameters())
    gan.policy.backward(loss, inputs=gan.pair.g.parameters())
    assert gan.policy.step(gan.g).applied
    with pytest.raises(TrainingError, match="no weight of the optimizer got a gradient"):
        gan.policy.step(gan.d)


@EVERY
@pytest.mark.parametrize("over", ["model", "optimizer"])
def test_clipping_of_ones_own_after_unscale_is_what_the_policy_does(mode: Any, over: str) -> None:
    one, other = Gan(mode, make=SGD), Gan(mode, make=SGD)
    for step in range(3):
        for gan in (one, other):
            gan.backward("d", step, factor=20.0)
            gan.backward("d", step + 50, factor=20.0)
        one.policy.unscale(one.d)
        weights = list(one.pair.d.parameters()) if over == "model" else one.d.param_groups[0]["params"]
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in weights)
        norm = clip_grad_norm_(weights, 0.5)
        result = one.policy.step(one.d)
        expected = other.policy.step(other.d, max_norm=0.5)
        assert (result.applied, expected.applied) == (True, True)
        assert float(norm) == pytest.approx(expected.grad_norm, rel=1e-6)
        assert result.grad_norm == pytest.approx(0.5, rel=1e-5)
        assert float(norm) > 2.0
    for name, value in other.values().items():
        torch.testing.assert_close(one.values()[name], value, rtol=1e-5, atol=1e-7)


@EVERY
def test_clipping_by_value_hides_no_overflow(mode: Any) -> None:
    gan = Gan(mode)
    before = gan.values()
    gan.backward("d", 0)
    for weight in gan.pair.d.parameters():
        weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))  # type: ignore[no-untyped-call]
    gan.policy.zero_grad()
    gan.backward("d", 0)
    gan.policy.unscale(gan.d)
    clip_grad_value_(gan.pair.d.parameters(), 1.0)
    assert not gan.policy.step(gan.d).applied
    assert all(torch.equal(value, before[name]) for name, value in gan.values().items())


@EVERY
def test_backward_after_unscale_is_refused(mode: Any) -> None:
    gan = Gan(mode)
    gan.backward("d", 0)
    gan.policy.unscale(gan.d)
    gan.policy.unscale(gan.d)  # twice does no harm
    with pytest.raises(UserError, match="unscale after the last backward pass"):
        gan.backward("d", 1)
    assert gan.policy.step(gan.d).applied
    gan.backward("d", 1)
    assert gan.policy.step(gan.d).applied


@pytest.mark.parametrize("mode", SCALED)
@pytest.mark.parametrize("line", ["norm", "value", "assigned", "backward"])
def test_a_line_left_over_that_changes_scaled_gradients_is_noticed(mode: Any, line: str) -> None:
    gan = Gan(mode)
    before = gan.values()
    gan.backward("d", 0)
    weights = list(gan.pair.d.parameters())
    if line == "norm":
        clip_grad_norm_(weights, 1.0)
    elif line == "value":
        clip_grad_value_(weights, 1.0)
    elif line == "assigned":
        weights[0].grad = weights[0].grad / 2 if weights[0].grad is not None else None
    else:
        with gan.policy.autocast():
            backward(gan.pair.loss_d(1))
    with pytest.raises(UserError, match=r"remove clip_grad_norm_ .* policy\.step\(optimizer, max_norm=\.\.\.\)"):
        gan.policy.step(gan.d)
    assert all(torch.equal(value, before[name]) for name, value in gan.values().items())
    gan.backward("d", 0)
    assert gan.policy.step(gan.d).applied


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_clipping_left_over_is_right_where_no_loss_is_scaled(mode: Any) -> None:
    gan = Gan(mode, make=SGD)
    gan.backward("d", 0, factor=100.0)
    clip_grad_norm_(gan.pair.d.parameters(), 0.5)
    assert gan.policy.step(gan.d).grad_norm == pytest.approx(0.5, rel=1e-5)


@EVERY
@pytest.mark.parametrize("known", [True, False])
def test_an_optimizer_step_left_over_is_noticed(mode: Any, known: bool) -> None:
    gan = Gan(mode)
    if known:
        gan.backward("d", 0)
        gan.policy.step(gan.d)
    before = gan.values()
    gan.backward("d", 1)
    with pytest.raises(UserError, match=r"^optimizer\.step\(\) was called after policy\.backward.*: remove the line"):
        gan.d.step()
    assert all(torch.equal(value, before[name]) for name, value in gan.values().items())
    assert gan.policy.step(gan.d).applied
    gan.d.step()  # after policy.step: it finds no gradient
    gan.backward("g", 1)
    assert gan.policy.step(gan.g).applied
    if gan.policy.trained.masters:
        return  # the masters of the discriminator have no gradient
    with pytest.raises(UserError, match="remove the line"):
        gan.d.step()  # on what the generator's loss has left there


def test_the_watch_ends_with_its_policy_and_meddles_with_nobody_else() -> None:
    gan, other = Gan("fp32"), Gan("fp32")
    stranger = nn.Linear(2, 1)
    steps = SGD(stranger.parameters(), lr=0.1)
    gan.backward("d", 0)
    backward(stranger(torch.ones(1, 2)).sum())
    steps.step()
    other.backward("d", 0)
    assert other.policy.step(other.d).applied
    assert gan.policy.step(gan.d).applied
    gan.backward("d", 1)
    optimizer = gan.d
    del gan
    gc.collect()
    optimizer.step()


@EVERY
def test_two_policies_in_one_process_do_not_meet(mode: Any) -> None:
    one, other, alone = Gan(mode), Gan("fp32"), Gan(mode)
    for step in range(3):
        one.backward("d", step)
        other.backward("d", step)
        assert one.policy.step(one.d, 1.0).applied
        assert other.policy.step(other.d, 1.0).applied
        alone.backward("d", step)
        alone.policy.step(alone.d, 1.0)
    assert all(torch.equal(value, alone.values()[name]) for name, value in one.values().items())


@EVERY
def test_a_step_that_accelerate_holds_back_is_noticed(mode: Any) -> None:
    class Held(SGD):
        """An optimizer as accelerate wraps it: `step` waits for the last micro-batch of accumulate()."""

        gradient_state = GradientState()

    gan = Gan(mode, make=Held)
    gan.backward("d", 0)
    GradientState._shared_state["sync_gradients"] = False
    try:
        with pytest.raises(UserError, match=r"accelerate would skip this step.*`if accelerator\.sync_gradients:"):
            gan.policy.step(gan.d)
    finally:
        GradientState._shared_state["sync_gradients"] = True
    gan.backward("d", 0)
    assert gan.policy.step(gan.d).applied


def test_a_policy_that_dies_while_torch_goes_through_its_hooks_disturbs_no_step() -> None:
    policies = [PrecisionPolicy("fp32")]
    policies[0].prepare(nn.Linear(2, 1))
    weight = nn.Parameter(torch.ones(2))

    def collect(*_: Any) -> None:
        policies.clear()
        gc.collect()

    handles = [register_optimizer_step_pre_hook(hook) for hook in (collect, lambda *_: None)]
    try:
        SGD([weight], lr=0.1).step()
    finally:
        for handle in handles:
            handle.remove()
    assert not policies


def test_a_mode_is_named_by_a_word_and_the_device_is_the_worlds() -> None:
    policy = PrecisionPolicy("bf16")
    assert (policy.name, policy.device, policy.world) == ("bf16", policy.world.device, World.current())
    with pytest.raises(UserError, match=r"precision\.mode is 'fp8': it must be auto, fp32"):
        PrecisionPolicy("fp8")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


@pytest.mark.usefixtures("launched")
def test_a_process_among_several_needs_their_world() -> None:
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, and torch\.distributed is not initialised"):
        PrecisionPolicy("fp32")
    with pytest.raises(UserError, match=r"a world of 1 process\(es\), and there are 2.*omit world="):
        PrecisionPolicy("fp32", world=World())


def test_data_parallel_is_refused() -> None:
    with pytest.raises(UserError, match=r"^the model is wrapped in DataParallel already.*call policy\.prepare"):
        PrecisionPolicy("fp32").prepare(nn.DataParallel(nn.Linear(2, 1)))


# -- two processes -----------------------------------------------------------------------------------------------------


class Rank:
    """A rank of a loop with DDP of one's own, or of `World.wrap`."""

    def __init__(self, world: World, mode: Any, wrap: Callable[..., Any]) -> None:
        torch.manual_seed(0)
        self.policy = PrecisionPolicy(mode, world=world)
        self.model = self.policy.prepare(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
        self.module: Any = wrap(self.model)
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.x = torch.full((2, 4), 1.0 + world.rank, dtype=next(self.model.parameters()).dtype)

    def backward(self, sync: bool = True, forward_only: bool = False) -> None:
        with no_sync(self.module, not sync) if forward_only else nullcontext(), self.policy.autocast():
            loss = self.module(self.x).float().square().mean()
        self.policy.backward(loss)

    def refused(self) -> str:
        try:
            self.policy.step(self.optimizer)
        except (UserError, TrainingError) as error:
            return str(error)
        return ""


def in_ddp(world: World) -> dict[str, Any]:
    ddp: Any = torch.nn.parallel.DistributedDataParallel
    found: dict[str, Any] = {}
    for mode in MODES:
        rank = Rank(world, mode, ddp)
        with rank.module.no_sync():
            rank.backward()
            found[f"{mode}: early"] = rank.refused()  # the whole iteration stands in accumulate()
        with rank.module.no_sync():
            rank.backward()
        rank.backward()
        found[f"{mode}: last"] = rank.refused()
        rank.backward()
        rank.policy.unscale(rank.optimizer)
        clip_grad_norm_(rank.model.parameters(), 0.1)
        found[f"{mode}: clipped"] = rank.refused()
        rank.backward()
        found[f"{mode}: after"] = rank.refused()
        found[f"{mode}: weights"] = {n: rank.policy.trained.value(n).clone() for n in rank.policy.trained.weights}
        for name, given in (("whole", rank.module), ("inner", rank.model)):
            try:
                PrecisionPolicy(mode, world=world).prepare(given)
            except UserError as error:
                found[f"{mode}: {name}"] = str(error)
        model = rank.model
        del rank, given
        PrecisionPolicy(mode, world=world).prepare(model)  # the wrapper has gone
    try:
        PrecisionPolicy("fp32", world=World())
    except UserError as error:
        found["alone"] = str(error)
    found["current"] = PrecisionPolicy("fp32").world.size
    return found


def test_ddp_of_ones_own(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(in_ddp)
    for mode in MODES:
        assert "not averaged over the ranks" in first[f"{mode}: early"]
        assert "`if accelerator.sync_gradients: policy.step(optimizer)`" in first[f"{mode}: early"]
        assert [first[f"{mode}: {case}"] for case in ("last", "clipped", "after")] == [""] * 3
        for case in ("whole", "inner"):
            assert first[f"{mode}: {case}"].startswith("the model is wrapped in DistributedDataParallel already")
        for name, value in first[f"{mode}: weights"].items():
            assert torch.equal(value, second[f"{mode}: weights"][name]), (mode, name)
    assert "a world of 1 process(es), and there are 2" in first["alone"]
    assert first["current"] == 2


class Branching(nn.Module):
    """A model whose second layer is used by positive inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        out: Tensor = self.second(self.first(x)) if whole else self.first(x)
        return out


def leaving_one_unused(world: World) -> list[str]:
    found = []
    ddp: Any = torch.nn.parallel.DistributedDataParallel
    for wrap in (lambda model: world.wrap(model, DDPConfig(find_unused_parameters=False)), ddp):
        for mode in MODES:
            torch.manual_seed(0)
            policy = PrecisionPolicy(mode, world=world)
            model = policy.prepare(Branching())
            module = wrap(model)
            optimizer = SGD(model.parameters(), lr=0.1)
            before = policy.trained.value("first.weight").clone()
            x = torch.ones(2, 4, dtype=model.get_parameter("first.weight").dtype)
            with policy.autocast():
                loss = module(x, False).float().square().mean()
            policy.backward(loss)
            try:
                policy.step(optimizer)
            except TrainingError as error:
                found.append(str(error))
            assert torch.equal(before, policy.trained.value("first.weight"))
    return found


def test_a_weight_without_a_gradient_is_named_under_ddp_of_ones_own(run_ranks: Callable[..., list[Any]]) -> None:
    for found in run_ranks(leaving_one_unused):
        assert len(found) == 2 * len(MODES)
        for message in found:
            assert message.startswith("2 trained weights got no gradient in this step (second.weight, second.bias)")
