"""Small training loops as people write them: each class is one script, with its own model, data, loss and update.

A fault overrides one method of a loop. Batches are a function of the step, so that a loop is the same in every process.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.watch import Watch


class Watching(Protocol):
    """What a loop calls: a Watch, or nobody."""

    def step(self, batch: Any = None, ids: Sequence[str] = ()) -> AbstractContextManager[None]: ...


class Nobody:
    """Watches nothing."""

    @contextmanager
    def step(self, batch: Any = None, ids: Sequence[str] = ()) -> Iterator[None]:
        yield


class Loop:
    """What the exam needs of a loop: its objects are made by the constructor, `train` is the script's main part."""

    steps = 20
    ranks = 1
    model: nn.Module
    optimizer: Optimizer
    scaler: Any = None

    def train(self, watch: Watching) -> None:
        raise NotImplementedError

    def on_step_end(self, step: int) -> None:
        """The user's own code between steps."""

    def watched(self, config: WatchConfig, crash: type[Exception] | None) -> list[Finding]:
        """Train under a watch; return its findings. Only a crash of the expected kind is borne."""
        watch = Watch(self.model, self.optimizer, self.scaler, config=config)
        try:
            with watch:
                self.train(watch)
        except Exception as error:
            if crash is None or not isinstance(error, crash):
                raise
        return list(watch.findings)


def seeded(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


# ---------------------------------------------------------------------------------------------- a GPT of characters
CHARACTERS = 32
CONTEXT = 24


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5
        hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf")) if mask is None else scores + mask
        mixed: Tensor = self.out((F.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, t, c))
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(F.gelu(self.fc(x)))
        return x


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp, self.drop = Attention(width, 4), Mlp(width), nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x), mask))
        x = x + self.drop(self.mlp(self.ln2(x)))
        return x


class Gpt(nn.Module):
    def __init__(self, width: int = 32, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            hidden = block(hidden, mask)
        logits: Tensor = self.head(self.ln_f(hidden))
        return logits


class CharGpt(Loop):
    """As nanoGPT trains: the loss over flattened logits, clipping, AdamW, warm-up and decay by hand."""

    batch_size = 8
    lr = 3e-3

    def __init__(self) -> None:
        torch.manual_seed(1337)
        self.model = self.make_model()
        self.optimizer = self.make_optimizer()

    def make_model(self) -> nn.Module:
        return Gpt()

    def make_optimizer(self) -> Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def learning_rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / 5) * (1 - 0.5 * step / self.steps)

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Walks through the alphabet in strides of 1 to 3, with a slip now and then: something can be learnt."""
        draw = seeded(step)
        start = torch.randint(0, CHARACTERS, (self.batch_size, 1), generator=draw)
        stride = torch.randint(1, 4, (self.batch_size, 1), generator=draw)
        text = (start + stride * torch.arange(CONTEXT + 1)) % CHARACTERS
        slips = torch.rand(text.shape, generator=draw) < 0.05
        text = torch.where(slips, torch.randint(0, CHARACTERS, text.shape, generator=draw), text)
        return text[:, :-1], text[:, 1:]

    def extras(self) -> dict[str, Tensor]:
        """What the batch holds besides x and y."""
        return {}

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x)
        return F.cross_entropy(logits.view(-1, CHARACTERS), y.reshape(-1))

    def train(self, watch: Watching) -> None:
        self.model.train()
        for step in range(self.steps):
            x, y = self.get_batch(step)
            names = [f"text-{step * self.batch_size + row}" for row in range(len(x))]
            with watch.step({"x": x, "y": y, **self.extras()}, ids=names):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(step)
                with self.autocast():
                    loss = self.loss(x, y)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
            self.on_step_end(step)


# --------------------------------------------------------------------------------- log spectra of clips: a regression
class MelNet(nn.Module):
    def __init__(self, bands: int = 12) -> None:
        super().__init__()
        self.inward, self.middle = nn.Conv1d(bands, 24, 3, padding=1), nn.Conv1d(24, 24, 3, padding=1)
        self.norm, self.outward = nn.GroupNorm(4, 24), nn.Conv1d(24, bands, 1)

    def forward(self, noisy: Tensor) -> Tensor:
        hidden = F.silu(self.inward(noisy.transpose(1, 2)))
        clean: Tensor = self.outward(hidden + F.silu(self.norm(self.middle(hidden))))
        return clean.transpose(1, 2)


class Denoiser(Loop):
    """Predicts the log power of clean speech from noisy features: clips of different lengths, padded, with a mask."""

    batch_size = 4
    frames, bands = 20, 12

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = MelNet(self.bands)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)

    def batch(self, step: int) -> dict[str, Tensor]:
        """`noisy` and `power` (batch, frames, bands), `mask` (batch, frames)."""
        draw = seeded(step)
        shape = (self.batch_size, self.frames, self.bands)
        power = torch.rand(shape, generator=draw) + 0.1
        noisy = power.log() + 0.1 * torch.randn(shape, generator=draw)
        lengths = torch.randint(8, self.frames + 1, (self.batch_size, 1), generator=draw)
        return {"noisy": noisy, "power": power, "mask": (torch.arange(self.frames) < lengths).float()}

    def ids(self, step: int) -> list[str]:
        return [f"clip-{step * self.batch_size + row}" for row in range(self.batch_size)]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        target = torch.log(batch["power"].clamp_min(1e-5))
        error = (self.model(batch["noisy"]) - target).square().mean(-1)
        loss: Tensor = (error * batch["mask"]).sum() / batch["mask"].sum().clamp_min(1)
        return loss

    def train(self, watch: Watching) -> None:
        for step in range(self.steps):
            batch = self.batch(step)
            with watch.step(batch, ids=self.ids(step)):
                self.optimizer.zero_grad()
                loss = self.loss(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            self.on_step_end(step)


# ------------------------------------------------------------------------------------- eight codebooks of a codec
CODEBOOKS, CODES = 8, 66  # 64 codes, BOS and EOS


class CodecLm(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(CODES, width) for _ in range(CODEBOOKS))
        self.trunk = nn.GRU(width, width, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(width, CODES) for _ in range(CODEBOOKS))

    def forward(self, codes: Tensor) -> list[Tensor]:
        hidden = sum((table(codes[:, k]) for k, table in enumerate(self.embeddings)), torch.zeros(()))
        hidden, _ = self.trunk(hidden)
        return [head(hidden) for head in self.heads]


class Codec(Loop):
    """Predicts the next frame of codes: an embedding and a head for each codebook, the loss a mean over codebooks."""

    batch_size = 4

    def __init__(self) -> None:
        torch.manual_seed(11)
        self.model = CodecLm()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)

    def codes(self, step: int) -> Tensor:
        """(batch, codebooks, frames + 1)"""
        start = torch.randint(0, 64, (self.batch_size, CODEBOOKS, 1), generator=seeded(step))
        codes = (start + torch.arange(15) * 5) % 64
        edge = torch.ones(self.batch_size, CODEBOOKS, 1, dtype=torch.long)
        return torch.cat([64 * edge, codes, 65 * edge], -1)

    def losses(self, logits: list[Tensor], targets: Tensor) -> list[Tensor]:
        return [F.cross_entropy(part.flatten(0, 1), targets[:, k].flatten()) for k, part in enumerate(logits)]

    def train(self, watch: Watching) -> None:
        for step in range(self.steps):
            codes = self.codes(step)
            batch = {"codes": codes[..., :-1], "targets": codes[..., 1:]}
            with watch.step(batch, ids=[f"utt-{step * self.batch_size + row}" for row in range(self.batch_size)]):
                losses = self.losses(self.model(batch["codes"]), batch["targets"])
                torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.on_step_end(step)


# ------------------------------------------------------------- two ranks: the regression of clips, in DDP
class Ddp(Denoiser):
    """The clips of a step are shared between the ranks."""

    ranks = 2

    def __init__(self) -> None:
        super().__init__()
        self.bare = self.model
        self.model = DistributedDataParallel(self.bare)
        self.after_wrapping()

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank()

    def after_wrapping(self) -> None:
        """What the script does once DDP has made the ranks' weights equal."""

    def batch(self, step: int) -> dict[str, Tensor]:
        return super().batch(step * self.ranks + self.rank)

    def ids(self, step: int) -> list[str]:
        return super().ids(step * self.ranks + self.rank)
