"""Two processes take the same decision in every mode: same skips, same scale, same weights to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from rawloop.contracts import Batch, StreamLoss
from rawloop.dist import DDPConfig, LossModule, World
from rawloop.precision import PrecisionConfig, PrecisionPolicy

MODES: list[Any] = ["fp32", "bf16", "amp_fp16", "native_fp16"]


def loss(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
    out = model(batch.inputs["x"].to(next(model.parameters()).dtype))
    return {"s": StreamLoss(out.float().square().mean(), 1)}


def train_modes(world: World) -> dict[str, tuple[list[bool], Any, list[torch.Tensor]]]:
    results = {}
    for mode in MODES:
        torch.manual_seed(0)
        policy = PrecisionPolicy(PrecisionConfig(mode=mode), world.device, agree=world.any)
        model = policy.prepare(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
        module = world.wrap(LossModule(model, loss), DDPConfig())
        optimizer = AdamW([p for _, p in policy.named_parameters()], lr=1e-2)
        applied = []
        for step in range(6):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + world.rank))
            with policy.autocast():
                total = module(Batch({"x": x}, {}, {"s": 1}, []))["s"].total
            infinite = step in (1, 3) and world.rank == 1
            policy.backward(total * (float("inf") if infinite else 1.0))
            applied.append(policy.step(optimizer, 1.0).applied)
        weights = [p.detach().clone() for _, p in policy.named_parameters()]
        results[mode] = (applied, policy.state_dict()["scaler"], weights)
    return results


def test_two_ranks_decide_alike_in_every_mode(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(train_modes)
    for mode in MODES:
        assert first[mode][0] == second[mode][0] == [True, False, True, False, True, True], mode
        assert first[mode][1] == second[mode][1], mode
        assert all(torch.equal(a, b) for a, b in zip(first[mode][2], second[mode][2], strict=True)), mode
    assert first["native_fp16"][1]["scale"] == 2.0**13
    assert first["amp_fp16"][1]["scale"] == pytest.approx(2.0**13)
