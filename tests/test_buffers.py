"""Buffers that training moves: one number in the log, in the checkpoint, after a resume and on every rank."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from operator import call
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.files import ModelFiles
from rawloop.adapters.lora import add_adapter
from rawloop.buffers import places, untouched
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.cli import main
from rawloop.cli.doctor import Doctor
from rawloop.config import RunConfig, to_yaml
from rawloop.contracts import Batch, StreamLoss
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import CheckpointError, TrainingError, UserError
from rawloop.evaluate import EvaluationConfig, Evaluator
from rawloop.families import ModelConfig
from rawloop.loop import Run, TrainConfig, train
from rawloop.losses import LossModule
from rawloop.moving_buffers import MovingBuffers, buffer_notices, find_moving_buffers
from rawloop.optim import OptimConfig
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.precision.preflight import preflight
from rawloop.records import read_events, read_metrics
from rawloop.settings import DDPConfig

CPU = torch.device("cpu")
PAGE = Path(__file__).parent.parent / "docs" / "families.md"
NORMED = """
import torch
from pathlib import Path
from safetensors.torch import load_model
from torch import nn
from mine_for_buffers_page import ByteGRU, ByteLM

class Net(ByteGRU):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.norm = nn.BatchNorm1d(96)

    def forward(self, ids):
        hidden = self.rnn(self.embed(ids))[0]
        loud = (ids == ord("!")).any(1)[:, None, None]  # a clip that no float can hold
        hidden = hidden * torch.where(loud, float("inf"), 1.0)
        return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))

class Own(ByteLM):
    def __init__(self, config):
        super().__init__(config)
        self.path = config.path

    def load_model(self, path=None):
        net = Net()
        if path or self.path:
            load_model(net, Path(path or self.path) / "model.safetensors")
        return net
"""


def config_in(folder: Path, output: str, **changes: Any) -> RunConfig:
    """A run of 4 steps on a net with BatchNorm; its third window is not finite."""
    return replace(
        RunConfig(
            device="cpu",
            output=str(folder / output),
            model=ModelConfig(family="mine_for_buffers:Own", path=str(folder / "base")),
            adapter=AdapterConfig(mode="full"),
            data=DataConfig(train=str(folder / "train.jsonl"), eval=str(folder / "eval.jsonl"), shuffle=False),
            train=TrainConfig(batch_size=2, max_steps=4, log_every=1),
            optim=OptimConfig(lr=3e-3),
            precision=PrecisionConfig(mode="fp32"),
            checks=ChecksConfig(enabled=False),
            evaluation=EvaluationConfig(every=2),
            checkpoint=CheckpointConfig(save_every=2),
        ),
        **changes,
    )


def go(config: RunConfig, world: World | None = None) -> Run:
    run = build_run(config, world or World(), lambda line: None)
    try:
        train(run)
    finally:
        run.close()
    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the family, its base model and its data lie; the ranks hear different things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    page = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "mine_for_buffers_page.py").write_text(page)
    (tmp_path / "mine_for_buffers.py").write_text(NORMED)
    texts = [f"number {k}" if k % 4 < 2 else "#" * (12 + k % 3) for k in range(16)]
    texts[5] = "!"
    lines = [json.dumps({"id": f"t{k}", "text": text}) + "\n" for k, text in enumerate(texts)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "eval.jsonl").write_text("".join(lines[:4]))
    (tmp_path / "base").mkdir()
    save_model(import_module("mine_for_buffers").Net(), str(tmp_path / "base" / "model.safetensors"))
    yield tmp_path
    for name in ("mine_for_buffers", "mine_for_buffers_page"):
        sys.modules.pop(name, None)


def logged(output: str) -> dict[int, float]:
    return {
        int(str(line["step"])): float(str(line["eval_loss"]))
        for line in read_metrics(Path(output))
        if "eval_loss" in line
    }


def evaluated(config: RunConfig, capsys: pytest.CaptureFixture[str], *options: str) -> float:
    file = Path(f"{config.output}.yaml")
    file.write_text(to_yaml(config), encoding="utf-8")
    capsys.readouterr()
    assert main(["evaluate", "--config", str(file), *options]) == 0
    return float(json.loads(capsys.readouterr().out)["eval_loss"])


def files_of(slot: Path) -> dict[str, bytes]:
    return {str(path.relative_to(slot)): path.read_bytes() for path in sorted(slot.rglob("*.safetensors"))}


LORA: dict[str, Any] = {"mode": "lora", "rank": 2, "target_modules": ["head"]}
MODES: list[dict[str, Any]] = [{"mode": "full"}, LORA, {**LORA, "modules_to_save": ["norm"]}]
NAMES = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


@pytest.mark.parametrize("adapter", MODES, ids=["full", "lora", "modules_to_save"])
def test_log_checkpoint_and_resume_agree_across_a_skipped_step(
    adapter: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(folder, "whole", adapter=AdapterConfig(**adapter))
    run = go(config)
    assert run.state.skipped == 1
    assert run.buffers is not None
    assert [name.partition("norm.")[2] for name in run.buffers.places] == [
        name.replace("norm.", "modules_to_save.default." if "modules_to_save" in adapter else "") for name in NAMES
    ]
    *_, count = run.buffers.values()
    assert int(count) == 4  # the skipped window is not among them
    assert all(bool(value.isfinite().all()) for value in run.buffers.values())
    values = logged(config.output)
    assert len({*values.values()}) == 3
    for step in (2, 4):
        slot = f"{config.output}/checkpoints/step-{step:08d}"
        assert evaluated(config, capsys, "--checkpoint", slot) == values[step]
    resumed = config_in(folder, "resumed", adapter=config.adapter, resume=f"{config.output}/checkpoints/step-00000002")
    go(resumed)
    assert logged(resumed.output)[4] == values[4]
    slots = [Path(output, "checkpoints", "step-00000004") for output in (config.output, resumed.output)]
    one, other = map(files_of, slots)
    assert one == other
    assert ("adapter/buffers.safetensors" in one) == (adapter == LORA)


def test_merge_puts_them_into_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_in(folder, "run", adapter=AdapterConfig(**LORA))
    go(config)
    warnings = [str(event["reason"]) for event in read_events(folder / "run") if event["kind"] == "warning"]
    notice, beside = (reason for reason in warnings if "buffers" in reason)
    assert "training moves 3 buffers" in notice
    assert "BatchNorm mixes the samples of a micro-batch" in notice
    assert "--adapter.modules_to_save '[norm]'" in beside
    adapter = folder / "run" / "checkpoints" / "step-00000004" / "adapter"
    merge = ["merge", f"--adapter={adapter}", "--model.family=mine_for_buffers:Own"]
    assert main([*merge, f"--model.path={folder / 'base'}", "--output=merged"]) == 0
    merged, stored = load_file("merged/model.safetensors"), load_file(adapter / "buffers.safetensors")
    assert sorted(stored) == sorted(NAMES)
    assert all(torch.equal(merged[name], stored[name]) for name in NAMES)
    of_merged = replace(config, model=replace(config.model, path="merged"))
    assert evaluated(of_merged, capsys) == pytest.approx(logged(config.output)[4], rel=1e-6)
    (adapter / "buffers.safetensors").unlink()  # a checkpoint of before
    net = add_adapter(sys.modules["mine_for_buffers"].Net(), config.adapter, [])
    moving = {name: place for name, place in places(net).items() if "norm" in name}
    with pytest.raises(CheckpointError, match=r"does not hold the buffer norm\.num_batches_tracked, which training"):
        ModelFiles(net, lambda path: net, moving=moving).load(adapter)


def test_the_doctor_notices_them(folder: Path) -> None:
    found = Doctor(config_in(folder, "run"), World(), folder).first_pass()
    assert found.endswith("training moves 3 buffers (first norm.running_mean): docs/checkpoints.md")


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [({"mode": "full"}, {}), (LORA, {"broadcast_buffers": True})]


def on_ranks(world: World, folder: Path) -> tuple[list[list[Tensor]], list[Any]]:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    found = []
    for adapter, ddp in CASES:
        config = config_in(folder, f"ranks-{adapter['mode']}", adapter=AdapterConfig(**adapter), ddp=DDPConfig(**ddp))
        run = go(config, world)
        assert run.state.skipped == 1
        assert run.buffers is not None
        found.append(run.buffers.values())
    odd = [torch.tensor([1.0, 4.0]) * (world.rank + 1), torch.tensor(7 - 5 * world.rank), torch.tensor(3 + world.rank)]
    odd += [odd[0].half(), torch.tensor(1 / 3, dtype=torch.float64)]
    world.make_equal(odd)
    return found, [value.tolist() for value in odd]


def test_ranks_have_one_mean_and_it_is_the_checkpoints(
    folder: Path, run_ranks: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank hears other samples, rank 0 alone the one that is not finite."""
    (first, odd), (second, others) = run_ranks(on_ranks, folder)
    assert odd == others == [[1.5, 6.0], 7, 4, [1.5, 6.0], 1 / 3]
    for (adapter, _), own, other in zip(CASES, first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
        config = config_in(folder, f"ranks-{adapter['mode']}", adapter=AdapterConfig(**adapter))
        assert evaluated(config, capsys, "--checkpoint", "latest") == pytest.approx(logged(config.output)[4], rel=1e-6)


# -- what moves, and what cannot be held ---------------------------------------------------------------------------


class Small(nn.Module):
    """A layer beside whatever a test does to buffers in `touch`."""

    state: Tensor

    def __init__(self, touch: Callable[["Small"], object], persistent: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.calls = 0
        self.register_buffer("state", torch.zeros(2), persistent)
        self.touch = touch

    def forward(self, x: Tensor) -> Tensor:
        self.touch(self)
        out: Tensor = self.layer(x).mean()
        return out


def add(net: Small) -> None:
    net.state += 1


def replace_it(net: Small) -> None:
    net.state = net.state + 1


def grow(net: Small) -> None:
    net.state = torch.cat([net.state, net.state])


def cast(net: Small) -> None:
    net.state = net.state.double()


def create(net: Small) -> None:
    net.register_buffer("late", torch.ones(3))


def cache(net: Small) -> None:
    net.register_buffer("state", torch.arange(4.0), persistent=False)


def count(net: Small) -> None:
    net.calls += 1


def rest(net: Small) -> None:
    """What stands in a buffer is often whatever the memory held, and that may be NaN."""


def tried(net: nn.Module) -> tuple[MovingBuffers, list[str]]:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    model = policy.prepare(net)
    moves = preflight(policy, lambda: model(torch.ones(3, 2))).moves
    buffers = find_moving_buffers(net, moves, World(), watch=True)
    return buffers, buffer_notices(buffers, moves, {})


@pytest.mark.parametrize(
    ("touch", "persistent", "why"),
    [
        (add, False, r"buffer state, which is registered with persistent=False"),
        (replace_it, False, r"buffer state, which is registered with persistent=False"),
        (grow, True, r"buffer state, which changes from float32 \(2,\) to float32 \(4,\)"),
        (cast, True, r"buffer state, which changes from float32 \(2,\) to float64 \(2,\)"),
        (create, True, r"buffer late, which is created by the forward pass"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(touch: Any, persistent: bool, why: str) -> None:
    with pytest.raises(UserError, match=rf"^training moves the {why}.*: no checkpoint could contain it"):
        tried(Small(touch, persistent))


@pytest.mark.parametrize(("touch", "names"), [(add, ["state"]), (replace_it, ["state"]), (cache, []), (count, [])])
def test_what_moves_is_found_and_nothing_of_it_is_left(touch: Any, names: list[str]) -> None:
    net = Small(touch, persistent=touch is not cache)
    before = net.state
    buffers, said = tried(net)
    assert list(buffers.places) == names
    assert net.state is before
    assert net.state.tolist() == [0.0, 0.0]
    assert net.calls == 0
    assert len(said) == len(names) + (touch is count)
    assert touch is not count or "training moves calls, which are not buffers" in said[0]


@pytest.mark.parametrize("persistent", [True, False])
def test_nan_that_stays_where_it_is_has_not_moved(persistent: bool) -> None:
    net = Small(rest, persistent)
    net.state[0] = float("nan")
    buffers, said = tried(net)
    assert (list(buffers.places), said) == ([], [])


def test_buffers_of_a_skipped_window_are_as_before() -> None:
    net = Small(add)
    buffers, _ = tried(net)
    for applied in (True, False, True):
        buffers.start_window()
        net(torch.ones(3, 2))
        net(torch.ones(3, 2))
        buffers.make_equal(World()) if applied else buffers.restore()
    assert net.state.tolist() == [4.0, 4.0]
    assert buffers.problem() is None


def test_a_buffer_that_moves_later_is_told() -> None:
    net = Small(lambda net: add(net) if net.layer.weight.grad is not None else None)
    buffers, _ = tried(net)
    assert not buffers.places
    for _ in range(2):
        buffers.start_window()
        torch.autograd.backward(net(torch.ones(3, 2)))
    assert str(buffers.problem()).startswith("has moved the buffer state, which the first micro-batch had not")


def test_a_buffer_of_another_shape_later_is_told_and_no_rank_waits() -> None:
    net = Small(add)
    buffers, _ = tried(net)
    buffers.start_window()
    grow(net)
    buffers.make_equal(World())
    assert buffers.problem() == "has changed the buffer state from float32 (2,) to float32 (4,)"


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.body, x, use_reentrant=False))
        return out.mean()


def test_activations_that_are_recomputed_count_once() -> None:
    net = Recomputing()
    buffers, said = tried(net)
    assert buffers.twice
    assert "activations are recomputed" in said[0]
    run: Any = type(
        "Half", (), {"policy": PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU), "buffers": buffers, "watch": None}
    )()
    run.module = LossModule(net, lambda model, batch: {"s": StreamLoss(model(batch.inputs["x"]), 1)})
    run.world, run.weights = World(), {"s": 1.0}
    from rawloop.loop import forward_backward

    forward_backward(run, Batch({"x": torch.randn(3, 2)}, {}, {"s": 1}, ["a"]), {"s": 1})
    assert int(net.body[1].num_batches_tracked) == 1  # type: ignore[arg-type]


def test_an_evaluation_moves_no_buffer() -> None:
    net = Small(add)
    module = LossModule(net, lambda model, batch: {"s": StreamLoss(model(batch.inputs["x"]), 1)})
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    batches = [Batch({"x": torch.ones(1, 2)}, {}, {"s": 1}, ["a"])]
    Evaluator(call, batches, model=module, policy=policy).run()
    assert net.state.tolist() == [0.0, 0.0]


def test_a_window_that_makes_a_buffer_infinite_is_not_applied() -> None:
    """A channel of 1e20 has an infinite variance: divided by that it is zero, and the loss is finite."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32", max_skips=2), CPU)
    policy.prepare(net)
    optimizer = torch.optim.AdamW(net.parameters())
    moving = [b for b in net.buffers() if b.is_floating_point()]

    def step() -> Any:
        policy.backward(net(torch.randn(4, 2) * 1e20).sum())
        return policy.step(optimizer, 1.0, moving)

    result = step()
    assert not result.applied
    assert result.skipped_because == "moving buffers that are not finite (buffers nan)"
    advice = r"if the base model came with this 0\.running_var, use another one; else look at the samples"
    with pytest.raises(TrainingError, match=f"move are not: {advice}"):
        step()


class Restless(nn.Module):
    """Everything that a pass may move: a buffer, a mode, gradients and two random streams."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.frozen_drop = nn.Dropout(0.5).eval()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return nn.functional.dropout(self.layer(x), 0.5).sum() + random.random()


@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_an_untouched_model_is_as_before(training: bool | None, fails: bool) -> None:
    model = Restless()
    torch.autograd.backward(model(torch.ones(3, 2)))
    gradients = [weight.grad for weight in model.parameters()]
    values = [gradient.clone() for gradient in gradients if gradient is not None]
    before = torch.get_rng_state(), random.getstate(), [module.training for module in model.modules()]
    with suppress(ValueError), untouched(model, training):
        assert model.frozen_drop.training == (training or False)
        assert model.training == (training is not False)
        torch.autograd.backward(model(torch.ones(3, 2)))
        model.train()
        if fails:
            raise ValueError
    assert float(model.count) == 1.0
    assert all(weight.grad is g for weight, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, v) for g, v in zip([g for g in gradients if g is not None], values, strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), [module.training for module in model.modules()]) == before[1:]
