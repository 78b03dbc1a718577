"""A small language model, as nanoGPT's script trains one: accumulation, a schedule, evaluation, AMP and DDP."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rawloop

VOCABULARY, BLOCK, BATCH, ACCUMULATION, EVAL_EVERY = 17, 8, 4, 2, 5
DATA = torch.arange(400).square() % 23 % VOCABULARY


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 16), nn.Embedding(BLOCK, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=x.device).triu(1)
        hidden = self.block(self.tokens(x) + self.places.weight, mask)
        return F.cross_entropy(self.head(hidden).flatten(0, 1).float(), y.flatten())


def get_batch(split: str, number: int | None = None) -> tuple[Tensor, Tensor]:
    data = DATA[:300] if split == "train" else DATA[300:]
    starts = torch.randint(len(data) - BLOCK, (BATCH,)) if number is None else torch.arange(BATCH) + number
    return torch.stack([data[i : i + BLOCK] for i in starts]), torch.stack(
        [data[i + 1 : i + 1 + BLOCK] for i in starts]
    )


def learning_rate(step: int) -> float:
    return 1e-2 * min((step + 1) / 4, 0.5 * (1 + math.cos(math.pi * step / 40)))


def train(folder: str, total: int, mode: str = "amp_fp16") -> list[Tensor]:
    ddp = dist.is_initialized()
    torch.manual_seed(0)
    model: Any = Gpt()
    raw_model = model
    torch.manual_seed(dist.get_rank() if ddp else 0)
    policy = rawloop.PrecisionPolicy(mode)
    policy.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    if ddp:
        model = DistributedDataParallel(model)
    batches = [get_batch("eval", number) for number in range(3)]
    score = rawloop.Evaluator(
        lambda model, batch: (model(*batch) * BATCH, BATCH), batches, policy=policy, every=EVAL_EVERY
    )
    checkpoints = rawloop.Checkpoints(folder, model=model, optimizer=optimizer, policy=policy, save_every=5)
    for step in range(checkpoints.resume_or_start(), total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for micro_step in range(ACCUMULATION):
            if ddp:
                model.require_backward_grad_sync = micro_step == ACCUMULATION - 1
            x, y = get_batch("train")
            with policy.autocast():
                loss = model(x, y) / ACCUMULATION
            policy.backward(loss)
        policy.step(optimizer, max_norm=1.0)
        checkpoints.save(step, score.run() if score.due(step + 1) else None)
    checkpoints.close()
    return [weight.detach().clone() for weight in raw_model.parameters()]
