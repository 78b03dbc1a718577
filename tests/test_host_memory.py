"""Copies in host memory: pinned where CUDA is available, waited for once, and made of no second model on the device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop.host_memory import copy_to_host, host_model, wait_for_copies
from rawloop.pack import pack


@pytest.mark.parametrize("cuda", [True, False])
def test_copies_are_pinned_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """There is no GPU here: what would be asked of it is recorded."""
    asked: list[Any] = []
    empty, copy = torch.empty, Tensor.copy_

    def recorded_empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append(("pin_memory", pin_memory))
        return empty(*size, **options)

    def recorded_copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        asked.append(("non_blocking", non_blocking))
        return copy(self, source)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch, "empty", recorded_empty)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: cuda)
    monkeypatch.setattr(Tensor, "copy_", recorded_copy)
    copies = pack({"a": torch.ones(3), "b": torch.zeros(2)}, copy=True).tensors
    wait_for_copies()
    made = [("pin_memory", cuda), ("non_blocking", cuda)]
    assert asked == made * 2 + ["synchronize"] * cuda
    asked.clear()
    again = pack({"a": torch.ones(3) * 2, "b": torch.zeros(2)}, copy=True, spare=copies).tensors
    assert asked == [("non_blocking", cuda)] * 2
    assert again["/a"].data_ptr() == copies["/a"].data_ptr()
    assert again["/a"].tolist() == [2.0] * 3


def test_a_copy_is_contiguous_and_fits() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    copied = copy_to_host(tensor, torch.zeros(2, 3))
    assert copied.is_contiguous()
    assert torch.equal(copied, tensor)
    assert torch.equal(copy_to_host(torch.ones(2, dtype=torch.complex64).conj()), torch.ones(2, dtype=torch.complex64))


def test_a_model_is_copied_without_a_second_one_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.add_module("tied", nn.Linear(2, 2))
    model.tied.weight = model[0].weight
    model[0].bias.requires_grad = False
    model.register_buffer("cache", torch.ones(3), persistent=False)
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refuse(*arguments: object) -> Any:
        raise AssertionError("a tensor is copied where it lies")

    monkeypatch.setattr(Tensor, "__deepcopy__", refuse)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    copy: Any = host_model(model, copies)
    assert copy[0].weight.data_ptr() == copies["0.weight"].data_ptr()
    assert copy.tied.weight is copy[0].weight
    assert not copy[0].bias.requires_grad
    assert copy.cache.tolist() == [1.0] * 3
    torch.testing.assert_close(copy.state_dict(), copies, rtol=0, atol=0)
