"""Batches on their way to a device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rawloop.contracts import Batch, Labels


@pytest.mark.parametrize("pinned", [True, False])
def test_only_a_copy_from_pinned_memory_does_not_block(monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    asked: list[tuple[Any, Any]] = []

    def to(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        asked.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: pinned)
    monkeypatch.setattr(Tensor, "to", to)
    batch = Batch({"x": torch.ones(2)}, {"text": Labels(torch.ones(2), torch.ones(2))}, {"text": 2}, ["a"])
    batch.to(torch.device("cpu"))
    assert asked == [(torch.device("cpu"), pinned)] * 3
