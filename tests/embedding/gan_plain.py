"""A small vocoder-like GAN: a generator and a discriminator, two optimizers, two schedulers, AMP and DDP."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Sequential):
    """Takes its input in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.to(next(self.parameters()).dtype))
        return x


def generator() -> nn.Module:
    first, last = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 1, 3, padding=1)
    return Net(first, nn.LeakyReLU(0.1), nn.Dropout(0.1), last)


def discriminator() -> nn.Module:
    return Net(nn.Conv1d(1, 8, 5, stride=2), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(48, 1))


def get_batch() -> tuple[Tensor, Tensor]:
    features = torch.randn(3, 4, 16)
    return features, features.cumsum(-1).sum(1, keepdim=True).sin()


def train(folder: str, total: int, mode: str = "amp_fp16") -> list[Tensor]:
    ddp = dist.is_initialized()
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": generator(), "d": discriminator()})
    torch.manual_seed(dist.get_rank() if ddp else 0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp_fp16": torch.float16}[mode]
    scaler_g, scaler_d = (torch.amp.GradScaler("cpu", enabled=mode == "amp_fp16") for _ in range(2))
    optim_g = torch.optim.AdamW(model["g"].parameters(), lr=2e-3, betas=(0.8, 0.99))
    optim_d = torch.optim.AdamW(model["d"].parameters(), lr=2e-3, betas=(0.8, 0.99))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optim, 0.9) for optim in (optim_g, optim_d)]
    state, path = {"step": 0}, os.path.join(folder, "checkpoint.pt")
    parts: dict[str, Any] = {
        "model": model,
        "g": optim_g,
        "d": optim_d,
        "schedule_g": schedules[0],
        "schedule_d": schedules[1],
    }
    if os.path.exists(path):
        saved = torch.load(path, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        state = saved["state"]
    g, d = (DistributedDataParallel(part) if ddp else part for part in model.values())
    for step in range(state["step"], total):
        features, real = get_batch()
        with torch.autocast("cpu", dtype=dtype, enabled=mode != "fp32"):
            fake = g(features)
            scores = d(torch.cat([real, fake.detach()])).float().chunk(2)
            loss_d = (scores[0] - 1).square().mean() + scores[1].square().mean()
        optim_d.zero_grad()
        scaler_d.scale(loss_d).backward()
        scaler_d.step(optim_d)
        scaler_d.update()
        with torch.autocast("cpu", dtype=dtype, enabled=mode != "fp32"):
            loss_g = (d(fake).float() - 1).square().mean() + 5 * l1_loss(fake.float(), real)
        optim_g.zero_grad()
        scaler_g.scale(loss_g).backward()
        scaler_g.step(optim_g)
        scaler_g.update()
        for schedule in schedules if (step + 1) % 4 == 0 else ():
            schedule.step()
        state["step"] = step + 1
        if (step + 1) % 5 == 0 and (not ddp or dist.get_rank() == 0):
            torch.save({**{name: part.state_dict() for name, part in parts.items()}, "state": state}, path)
    return [weight.detach().clone() for weight in model.parameters()]
