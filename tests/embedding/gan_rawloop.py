"""A small vocoder-like GAN: a generator and a discriminator, two optimizers, two schedulers, AMP and DDP."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torch.nn.parallel import DistributedDataParallel

import rawloop


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
    policy = rawloop.PrecisionPolicy(mode)
    policy.prepare(model)
    optim_g = torch.optim.AdamW(model["g"].parameters(), lr=2e-3, betas=(0.8, 0.99))
    optim_d = torch.optim.AdamW(model["d"].parameters(), lr=2e-3, betas=(0.8, 0.99))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optim, 0.9) for optim in (optim_g, optim_d)]
    given: dict[str, Any] = {"optimizer": [optim_g, optim_d], "scheduler": schedules, "policy": policy, "save_every": 5}
    checkpoints = rawloop.Checkpoints(folder, model=model, **given)
    g, d = (DistributedDataParallel(part) if ddp else part for part in model.values())
    for step in range(checkpoints.resume_or_start(), total):
        features, real = get_batch()
        with policy.autocast():
            fake = g(features)
            scores = d(torch.cat([real, fake.detach()])).float().chunk(2)
            loss_d = (scores[0] - 1).square().mean() + scores[1].square().mean()
        policy.backward(loss_d)
        policy.step(optim_d)
        with policy.autocast():
            loss_g = (d(fake).float() - 1).square().mean() + 5 * l1_loss(fake.float(), real)
        policy.backward(loss_g)
        policy.step(optim_g)
        for schedule in schedules if (step + 1) % 4 == 0 else ():
            schedule.step()
        checkpoints.save(step)
    checkpoints.close()
    return [weight.detach().clone() for weight in model.parameters()]
