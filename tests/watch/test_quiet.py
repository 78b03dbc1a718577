"""Healthy loops of many kinds: the detectors of data and jumps raise no alarm."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.watch.batches import Batches
from rawloop.watch.jumps import Jumps
from rawloop.watch.leaks import Leaks
from rawloop.watch.watch import Watch


def watched(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Watch:
    return Watch(model, list(optimizers), detectors=[Batches(), Leaks(), Jumps()])


def quiet(watch: Watch) -> None:
    assert watch.findings.alarms == [], str(watch.findings)


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def llama(**changes: Any) -> LlamaForCausalLM:
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def texts(rows: int = 4, longest: int = 12) -> Iterator[dict[str, Tensor]]:
    """Padded batches of a language with two-token rules, so that the loss falls."""
    while True:
        lengths = torch.randint(5, longest + 1, (rows,))
        ids = torch.randint(3, 64, (rows, int(lengths.max())))
        ids[:, 1::2] = (ids[:, : ids.shape[1] // 2 * 2 : 2] * 7 + 1) % 61 + 3
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        ids = ids.where(mask == 1, 0)
        ids[torch.arange(rows), lengths - 1] = 2
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def test_regression_whose_loss_falls_fast() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    weights = torch.randn(16, 1) * 20
    with watched(model, optimizer) as watch:
        for _ in range(250):
            x = torch.randn(8, 16)
            batch = {"x": x, "y": x @ weights + torch.randn(8, 1)}
            with watch.step(batch):
                loss = F.mse_loss(model(batch["x"]), batch["y"])
                update(loss, optimizer)
    quiet(watch)


def test_language_model_with_padding_warm_up_and_cosine() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, n / 20) * (0.5 + 0.5 * math.cos(math.pi * n / 80))
    )
    batches = texts()
    with watched(model, optimizer) as watch:
        for step in range(80):
            batch = next(batches)
            with watch.step(batch, ids=[f"s{4 * step + row}" for row in range(4)]):
                update(model(**batch).loss, optimizer)
                schedule.step()
    quiet(watch)


def test_accumulation_over_blocks_inside_a_step() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batches = texts(rows=2)
    with watched(model, optimizer) as watch:
        for step in range(40):
            window = [next(batches) for _ in range(2)]
            with watch.step(window, ids=[f"s{4 * step + row}" for row in range(4)]):
                for batch in window:
                    (model(**batch).loss / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
    quiet(watch)


@pytest.mark.parametrize("named", [True, False])
def test_classification_in_buckets_of_length(named: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(50, 16), nn.Linear(16, 5)

        def forward(self, words: Tensor) -> Tensor:
            scores: Tensor = self.head(self.table(words))
            return scores

    model = Reader()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watched(model, optimizer) as watch:
        for step in range(150):
            words = torch.randint(0, 50, (16, 4 + step % 7 * 3))
            classes = words[:, 0] % 5
            batch = {"words": words, "y": classes} if named else (words, classes)
            with watch.step(batch):
                loss = F.cross_entropy(model(words), classes)
                update(loss, optimizer)
    quiet(watch)


def test_contrastive_loss_with_smaller_last_batches() -> None:
    model = nn.Linear(24, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watched(model, optimizer) as watch:
        for step in range(150):
            rows = 16 if step % 5 < 4 else 6
            one = torch.randn(rows, 24)
            batch = {"one": one, "two": one + torch.randn(rows, 24) / 2, "labels": torch.arange(rows)}
            with watch.step(batch):
                one, two = model(batch["one"]), model(batch["two"])
                loss = F.cross_entropy(one @ two.T, batch["labels"])
                update(loss, optimizer)
    quiet(watch)


def test_two_networks_against_each_other() -> None:
    maker = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    judge = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    both = nn.ModuleDict({"maker": maker, "judge": judge})
    makes, judges = (torch.optim.Adam(m.parameters(), 1e-2, betas=(0.5, 0.9)) for m in (maker, judge))
    ones, zeros = torch.ones(32, 1), torch.zeros(32, 1)
    with watched(both, makes, judges) as watch:
        for _ in range(300):
            real = torch.randn(32, 2) + 3
            with watch.step(real):
                fake = maker(torch.randn(32, 4))
                scores = F.binary_cross_entropy_with_logits(judge(real), ones)
                loss = scores + F.binary_cross_entropy_with_logits(judge(fake.detach()), zeros)
                update(loss, judges)
                update(F.binary_cross_entropy_with_logits(judge(fake), ones), makes)
    quiet(watch)


def test_masked_language_model_and_pictures() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            scores: Tensor = self.head(self.table(input_ids) + pixel_values.mean((1, 2, 3))[:, None, None])
            return scores

    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with watched(model, optimizer) as watch:
        for step in range(80):
            ids = torch.randint(1, 40, (8, 20))
            hidden = torch.rand(8, 20) < 0.15
            hidden[:, 0] = True
            pixels = torch.randn(8, 3, 4, 4)
            pixels[step % 8] = 0  # a sample without a picture
            given = ids.masked_fill(hidden, 0)
            batch = {"input_ids": given, "labels": ids.masked_fill(~hidden, -100), "pixel_values": pixels}
            with watch.step(batch):

                def run(inputs: Any) -> Tensor:
                    logits = model(inputs["input_ids"], inputs["pixel_values"])
                    return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

                loss = run(batch)
                update(loss, optimizer)
    quiet(watch)


def test_additive_masks_with_rows_of_padding() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    with watched(layer, optimizer) as watch:
        for _ in range(40):
            x = torch.randn(4, 10, 16)
            hidden = torch.arange(10) >= torch.randint(1, 11, (4, 1))
            mask = torch.zeros(4, 10).masked_fill(hidden, -math.inf)
            with watch.step({"x": x, "attn_mask": torch.full((10, 10), -math.inf).triu(1), "attention_mask": mask}):
                loss = layer(x, src_key_padding_mask=mask).masked_fill(hidden[..., None], 0).square().mean()
                update(loss, optimizer)
    quiet(watch)


def test_the_same_tensors_in_each_step_are_meant() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = next(texts())
    with watched(model, optimizer) as watch:
        for _ in range(40):
            with watch.step(batch):
                update(model(**batch).loss, optimizer)
    quiet(watch)
    assert len(watch.findings) == 0
