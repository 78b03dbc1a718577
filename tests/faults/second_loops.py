"""Further small loops as people write them: a table, CTC, pairs of views, waveforms, and a GAN."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults.loops import Loop, Watching, seeded


class Table(Loop):
    """A regression of prices from ten columns; AdamW, no clipping."""

    batch_size = 16

    def __init__(self) -> None:
        torch.manual_seed(21)
        self.model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)

    def batch(self, step: int) -> dict[str, Tensor]:
        columns = torch.randn(self.batch_size, 10, generator=seeded(step))
        return {"columns": columns, "price": columns[:, :3].sum(1) + 0.5}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(self.model(batch["columns"]).squeeze(1), batch["price"])

    def train(self, watch: Watching) -> None:
        for step in range(self.steps):
            batch = self.batch(step)
            with watch.step(batch, ids=[f"row-{step * self.batch_size + k}" for k in range(self.batch_size)]):
                loss = self.loss(batch)
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            self.on_step_end(step)


class Recognizer(nn.Module):
    def __init__(self, bands: int = 8, letters: int = 12) -> None:
        super().__init__()
        self.encoder = nn.GRU(bands, 24, batch_first=True)
        self.letters = nn.Linear(24, letters)

    def forward(self, features: Tensor) -> Tensor:
        return F.log_softmax(self.letters(self.encoder(features)[0]), -1)


class Ctc(Loop):
    """Recognizes letters with CTC; the loss is a sum over the batch, the gradient's norm is clipped in each step."""

    batch_size = 4
    frames = 30

    def __init__(self) -> None:
        torch.manual_seed(22)
        self.model = Recognizer()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)

    def batch(self, step: int) -> dict[str, Tensor]:
        """`features` (batch, frames, bands), `text` (batch, 6), and how many of each are valid (batch,)."""
        draw = seeded(step)
        text = torch.randint(1, 12, (self.batch_size, 6), generator=draw)
        features = torch.randn(self.batch_size, self.frames, 8, generator=draw)
        features[..., 0] += text.repeat_interleave(self.frames // 6, 1) / 3
        frames = torch.randint(20, self.frames + 1, (self.batch_size,), generator=draw)
        return {"features": features, "frames": frames, "text": text, "letters": torch.full((self.batch_size,), 6)}

    def train(self, watch: Watching) -> None:
        for step in range(self.steps):
            batch = self.batch(step)
            with watch.step(batch, ids=[f"utt-{step * self.batch_size + k}" for k in range(self.batch_size)]):
                scores = self.model(batch["features"]).transpose(0, 1)
                loss = F.ctc_loss(scores, batch["text"], batch["frames"], batch["letters"], reduction="sum")
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
            self.on_step_end(step)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 16))
        self.text = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """The cosines of all pairs (batch, batch)."""
        return F.normalize(self.image(image), dim=-1) @ F.normalize(self.text(text), dim=-1).T


class Pairs(Loop):
    """Contrastive training of two towers; the temperature is the script's."""

    batch_size = 8

    def __init__(self) -> None:
        torch.manual_seed(23)
        self.model = TwoTowers()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def temperature(self, step: int) -> float:
        return 0.1

    def loss(self, cosines: Tensor, temperature: float) -> Tensor:
        return F.cross_entropy(cosines / temperature, torch.arange(len(cosines)))

    def train(self, watch: Watching) -> None:
        for step in range(self.steps):
            image = torch.randn(self.batch_size, 20, generator=seeded(step))
            batch = {"image": image, "text": image[:, :12] + 0.1}
            with watch.step(batch, ids=[f"pair-{step * self.batch_size + k}" for k in range(self.batch_size)]):
                loss = self.loss(self.model(**batch), self.temperature(step))
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            self.on_step_end(step)


class Waves(Loop):
    """Classifies waveforms in [-1, 1] by their frequency."""

    batch_size = 8

    def __init__(self) -> None:
        torch.manual_seed(24)
        conv = nn.Sequential(nn.Conv1d(1, 8, 16, stride=4), nn.GELU(), nn.Conv1d(8, 16, 8, stride=4), nn.GELU())
        self.model = nn.Sequential(conv, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 4))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)

    def waves(self, step: int) -> tuple[Tensor, Tensor]:
        """(batch, 1, 256), and classes (batch,)"""
        draw = seeded(step)
        classes = torch.randint(0, 4, (self.batch_size,), generator=draw)
        phase = torch.arange(256) * (classes[:, None] + 1) / 8
        noise = 0.05 * torch.randn(self.batch_size, 256, generator=draw)
        return (0.5 * phase.sin() + noise).unsqueeze(1), classes

    def train(self, watch: Watching) -> None:
        for step in range(self.steps):
            waves, classes = self.waves(step)
            batch = {"wave": waves, "class": classes}
            with watch.step(batch, ids=[f"wav-{step * self.batch_size + k}" for k in range(self.batch_size)]):
                loss = F.cross_entropy(self.model(waves), classes)
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            self.on_step_end(step)


class Gan(Loop):
    """A generator, which is watched, against a discriminator with an optimizer of its own."""

    batch_size = 16
    steps = 40

    def __init__(self) -> None:
        torch.manual_seed(25)
        self.model = nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(0.2), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-3, betas=(0.5, 0.999))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=2e-2, betas=(0.5, 0.999))

    def train(self, watch: Watching) -> None:
        for step in range(self.steps):
            draw = seeded(step)
            real = torch.randn(self.batch_size, 2, generator=draw) * 0.3 + 2
            latent = torch.randn(self.batch_size, 4, generator=draw)
            with watch.step({"real": real, "latent": latent}):
                fake = self.model(latent)
                self.critic_optimizer.zero_grad()
                critic_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake.detach())).mean()
                critic_loss.backward()  # type: ignore[no-untyped-call]
                self.critic_optimizer.step()
                self.optimizer.zero_grad()
                F.softplus(-self.critic(fake)).mean().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            self.on_step_end(step)
