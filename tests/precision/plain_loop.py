"""A plain training script: FP16 autocast and torch's GradScaler, written by hand, as one finds them everywhere.

`test_embedding.py` puts rawloop's precision policy into it, by changing three lines of its loop, and runs both.
"""

import sys

import torch
from torch import Tensor, nn
from torch.optim import AdamW

CHARACTERS = 29


def sentences(number: int) -> Tensor:
    """(number, 12) int64: counts upwards from a random start, in steps of 1 to 3."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(CHARACTERS, (number, 1), generator=generator)
    stride = torch.randint(1, 4, (number, 1), generator=generator)
    return (start + stride * torch.arange(12)) % CHARACTERS


class Speller(nn.Module):
    """Predicts each character from the two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 16)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        pairs = torch.cat([self.embed(text[:, :-2]), self.embed(text[:, 1:-1])], dim=-1)
        logits = self.head(torch.relu(self.hidden(pairs))).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 2:].flatten())


def main(steps: int) -> float:
    """Train, and return the mean loss of the last ten steps."""
    torch.manual_seed(0)
    model = Speller()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for text in sentences(16 * steps).chunk(steps):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(text)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


if __name__ == "__main__":
    print(main(int(sys.argv[1])))
