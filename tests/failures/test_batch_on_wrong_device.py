"""Loss and model on different devices: a batch object stays on the CPU.

Expected all tensors to be on the same device, send_to_device, batch object, dataclass, collator, dummy loss.

Trainer and accelerate move tensors, and dicts, lists and tuples of them. A batch that is an object of its own is passed
on as it is. The "meta" device stands for a GPU here: it needs none, and a tensor is on it or not.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import Trainer

from rawloop.contracts import Batch, Labels

ELSEWHERE = torch.device("meta")


class BatchObject:
    """Attributes, `keys()` and `len()`; a model takes it as `model(**batch)`."""

    def __init__(self, **tensors: Tensor) -> None:
        self.__dict__.update(tensors)

    def keys(self) -> list[str]:
        return list(self.__dict__)

    def __getitem__(self, name: str) -> Tensor:
        return self.__dict__[name]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.__dict__)


def test_accelerate_moves_a_dict_and_not_an_object() -> None:
    tensors = {"input_ids": torch.arange(4)}
    assert send_to_device(tensors, ELSEWHERE)["input_ids"].device == ELSEWHERE
    assert send_to_device(BatchObject(**tensors), ELSEWHERE)["input_ids"].device == torch.device("cpu")


def test_trainer_hands_an_object_on_untouched(
    llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    trainer = Trainer(model=llama(), args=arguments(), train_dataset=rows)
    batch = BatchObject(input_ids=torch.arange(4)[None])
    assert trainer._prepare_inputs(batch) is batch
    moved = trainer._prepare_inputs({"input_ids": batch["input_ids"]})
    assert moved["input_ids"].device == trainer.args.device


def test_rawloop_moves_every_tensor_of_a_batch() -> None:
    labels = {"text": Labels(torch.arange(3), torch.arange(3)), "audio": Labels(torch.arange(2), torch.ones(2, 8))}
    batch = Batch({"input_ids": torch.arange(4)[None]}, labels, {"text": 3, "audio": 2}, ["one"])
    moved = batch.to(ELSEWHERE)
    tensors = [*moved.inputs.values(), *(tensor for pair in moved.labels.values() for tensor in pair)]
    assert len(tensors) == 5
    assert all(tensor.device == ELSEWHERE for tensor in tensors)
    assert (moved.targets, moved.ids) == (batch.targets, batch.ids)
