"""Padding that the loss scores is named; the stop token at a text's end, and losses that leave padding out, are not."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.watch.batches import Batches
from rawloop.watch.findings import Finding
from rawloop.watch.watch import Watch

PAD, EOS = 0, 2


def model_of(pad: int = PAD) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=pad, eos_token_id=EOS, **sizes))


def texts(pad: int = PAD) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((9, 7, 5, 8)):
        ids[row, length - 1], ids[row, length:] = EOS, pad
    lengths = torch.tensor([9, 7, 5, 8])
    mask = (torch.arange(9) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def found(batch: dict[str, Tensor], model: Any = None, loss: Any = None) -> list[Finding]:
    model = model or model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, detectors=[Batches()]) as watch, watch.step(batch, ("a", "b", "c", "d")):
        (loss or (lambda: model(**batch).loss))().backward()
        optimizer.step()
    return [one for one in watch.findings if one.kind == "padding_scored"]


def test_labels_that_are_scored_where_the_mask_hides_are_named() -> None:
    batch = texts()
    batch["labels"] = batch["input_ids"].clone()
    (one,) = found(batch)
    place = one.cause.place
    assert (one.cause.whose, place.tensor, place.sample, place.row, place.position) == ("data", "labels", "b", 1, 7)
    assert (one.cause.evidence["padding among targets"], one.cause.evidence["targets"]) == (7, 36)


def test_a_stop_token_that_is_also_padding_is_a_right_target_once() -> None:
    batch = texts(pad=EOS)
    model = model_of(pad=EOS)
    assert found(batch, model) == []
    batch["labels"] = batch["input_ids"].clone()
    (one,) = found(batch, model)
    assert (one.cause.place.sample, one.cause.evidence["padding among targets"]) == ("b", 7)


def test_a_mask_made_from_the_stop_token_hides_a_right_target() -> None:
    batch = texts(pad=EOS)
    batch["attention_mask"] = (batch["input_ids"] != EOS).long()
    assert found(batch, model_of(pad=EOS)) == []


def test_a_loss_that_leaves_padding_out_by_the_mask_is_sound() -> None:
    batch, model = texts(), model_of()
    batch["labels"] = batch["input_ids"].clone()

    def loss() -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        keep = batch["attention_mask"][:, 1:]
        return (each * keep).sum() / keep.sum()

    assert found(batch, model, loss) == []
