"""More training loops as people write them: transformers with and without LoRA, and images with a GradScaler."""

from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults.loops import Loop, Watching, seeded

VOCABULARY, PAD, EOS, IGNORE = 48, 0, 2, -100


def tiny_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


class Llama(Loop):
    """Fine-tunes a transformers model on prompts and answers; the labels go into the model."""

    batch_size = 4
    lr = 2e-3

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = self.make_model()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)

    def make_model(self) -> nn.Module:
        return tiny_llama()

    def sample(self, index: int) -> tuple[list[int], list[int]]:
        """A prompt and an answer, which ends with EOS."""
        first = 3 + index * 7 % 40
        prompt = [1, *((first + k * 3) % 44 + 4 for k in range(4 + index % 5))]
        return prompt, [(first + k) % 44 + 4 for k in range(5 + index % 4)] + [EOS]

    def labels(self, prompt: list[int], answer: list[int]) -> list[int]:
        return [IGNORE] * len(prompt) + answer

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        pairs = [self.sample(index) for index in indices]
        ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
        labels = [torch.tensor(self.labels(prompt, answer)) for prompt, answer in pairs]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(ids, batch_first=True, padding_value=PAD)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD).long(),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE),
        }

    def train(self, watch: Watching) -> None:
        self.model.train()
        for step in range(self.steps):
            indices = list(range(step * self.batch_size, (step + 1) * self.batch_size))
            batch = self.collate(indices)
            with watch.step(batch, ids=[f"doc-{index}" for index in indices]):
                loss = self.model(**batch).loss
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.on_step_end(step)


class Lora(Llama):
    """LoRA by peft, with two micro-batches for each update."""

    lr = 1e-2

    def make_model(self) -> nn.Module:
        model: nn.Module = get_peft_model(
            tiny_llama(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        )
        return model

    def train(self, watch: Watching) -> None:
        self.model.train()
        for step in range(self.steps):
            indices = list(range(step * self.batch_size, (step + 1) * self.batch_size))
            halves = [self.collate(indices[:2]), self.collate(indices[2:])]
            with watch.step(halves, ids=[f"doc-{index}" for index in indices]):
                for half in halves:
                    loss = self.model(**half).loss / len(halves)
                    loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.on_step_end(step)


class Images(Loop):
    """A classifier with BatchNorm under float16 autocast, with torch's GradScaler and clipping."""

    batch_size = 8
    dtype = torch.float16
    first_scale = 2.0**16

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model = self.make_model()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.first_scale)

    def make_model(self) -> nn.Module:
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1))
        return nn.Sequential(OrderedDict(stem=stem, body=body, pool=pool, fc=nn.Linear(16, 5)))

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", self.dtype)

    def images(self, step: int) -> tuple[Tensor, Tensor]:
        """(batch, 3, 8, 8), and classes (batch,): the class decides how bright an image is, and in which colour."""
        draw = seeded(step)
        classes = torch.randint(0, 5, (self.batch_size,), generator=draw)
        noise = torch.randn(self.batch_size, 3, 8, 8, generator=draw)
        noise[torch.arange(self.batch_size), classes % 3] += 1.0 + classes.view(-1, 1, 1) / 2
        return noise, classes

    def criterion(self, logits: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(logits, classes)

    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def train(self, watch: Watching) -> None:
        self.model.train()
        for step in range(self.steps):
            images, classes = self.images(step)
            with watch.step((images, classes), ids=[f"img-{step * self.batch_size + k}" for k in range(len(images))]):
                self.optimizer.zero_grad()
                with self.autocast():
                    loss = self.criterion(self.model(images), classes)
                self.scaler.scale(loss).backward()
                self.update()
            self.on_step_end(step)
