"""What a loss function may return: any of the usual forms becomes one `StreamLoss` per stream, or is refused."""

from typing import Any

import pytest
import torch

from rawloop.contracts import StreamLoss
from rawloop.errors import UserError
from rawloop.losses import as_stream_losses

SUM = torch.tensor(6.0)


@pytest.mark.parametrize(
    ("result", "streams"),
    [
        (StreamLoss(SUM, 3), ["loss"]),
        (StreamLoss.of_mean(torch.tensor(2.0), 3), ["loss"]),
        ((SUM, 3), ["loss"]),
        ({"text": (SUM, 3)}, ["text"]),
        ({"text": (SUM, 3), "audio": StreamLoss(SUM, 3)}, ["text", "audio"]),
    ],
)
def test_every_form_of_a_loss_becomes_a_sum_and_a_count(result: Any, streams: list[str]) -> None:
    losses = as_stream_losses(result)
    assert list(losses) == streams
    assert all(isinstance(loss, StreamLoss) and loss[:2] == (SUM, 3) for loss in losses.values())


def test_the_sum_of_a_mean_keeps_its_graph() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    torch.autograd.backward(as_stream_losses(StreamLoss.of_mean(weight * 1.0, 3))["loss"].total)
    assert weight.grad == 3.0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (SUM, r"gave a Tensor, .*return \(sum, targets\), or StreamLoss.of_mean.* for the stream 'loss'"),
        (None, r"gave a NoneType"),
        (
            (SUM, torch.tensor(3)),
            r"target counts \[tensor\(3\)\], which must be Python ints of 0 or more \(.*int\(c",
        ),
        ((SUM, -1), r"target counts \[-1\]"),
        ((3, SUM), r"gave a total that is a int"),
        ((torch.ones(2), 3), r"a total of shape \(2,\), where one number is needed"),
        ((SUM, 3, 1), r"gave a tuple"),
        ({"a": (SUM, 3), "b": SUM}, r"gave a Tensor, .* for the stream 'b'"),
        ({"a/0": (SUM, 3)}, r"a stream is called 'a/0'"),
    ],
)
def test_anything_else_is_refused_with_the_form_that_is_needed(result: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_stream_losses(result)
