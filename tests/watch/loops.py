"""Tiny models and a training loop of the usual form, under watch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.look import Look
from rawloop.watch.subject import Detector
from rawloop.watch.watch import Watch

WORDS = 29


class Block(nn.Module):
    """Attention with four heads of four channels, and an MLP, each beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.gates = torch.ones(4)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True) * self.gates[:, None, None].to(q.dtype)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm_2(x))))


class Model(nn.Module):
    """A language model of a few thousand weights."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, 16)
        self.layers: Any = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def looking(kind: Callable[[Look], Detector]) -> list[Detector]:
    """A detector of this kind, after the look that it judges."""
    look = Look()
    return [look, kind(look)]


def mean_loss(model: nn.Module, ids: Tensor, step: int) -> Tensor:
    """The mean loss of the next words."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def watched(
    model: nn.Module,
    detectors: list[Detector] | None = None,
    *,
    steps: int = 4,
    loss: Callable[[Any, Tensor, int], Tensor] = mean_loss,
    dtype: torch.dtype | None = None,
    scaler: Any = None,
    lr: float = 1e-3,
    every: int = 100,
) -> list[Finding]:
    """Train a model for a few steps, and return what a watch has found."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    with Watch(model, optimizer, scaler, config=WatchConfig(every=every), detectors=detectors) as watch:
        for step in range(steps):
            ids = torch.randint(WORDS, (2, 9), generator=torch.Generator().manual_seed(step))
            with watch.step(ids):
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    value = loss(model, ids, step)
                (scaler.scale(value) if scaler else value).backward()
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()
    return list(watch.findings)


class Double(torch.autograd.Function):
    """A function of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2
