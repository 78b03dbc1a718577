"""The trial before DDP: an operation that the device lacks leads to the next mode, and the trial leaves no trace."""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop.errors import RawloopError, TrainingError, UserError
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.precision.preflight import is_lacking, preflight

CPU = torch.device("cpu")


class Scaled(nn.Module):
    """A layer with a function that no CPU computes in 16 bits, with dropout and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.norm(torch.special.erfcx(self.layer(x))), 0.5).square().mean()


def prepared(mode: Any, **settings: Any) -> tuple[PrecisionPolicy, nn.Module]:
    policy = PrecisionPolicy(PrecisionConfig(mode=mode, **settings), CPU)
    torch.manual_seed(0)
    return policy, policy.prepare(Scaled())


def test_an_operation_that_the_device_lacks_leads_to_the_next_mode() -> None:
    policy, model = prepared("amp_fp16", fallback=["bf16", "fp32"])
    unused = preflight(policy, lambda: model(torch.ones(8, 4))).unused
    assert policy.name == "fp32"
    assert [step["to"] for step in policy.chain.history] == ["bf16", "fp32"]
    assert "the cpu cannot run the model in it" in policy.chain.history[0]["reason"]
    assert "Half" in policy.chain.history[0]["reason"]
    assert "BFloat16" in policy.reason
    assert unused == ["spare.weight", "spare.bias"]


def test_without_a_chain_it_is_the_users_to_choose() -> None:
    policy, model = prepared("amp_fp16")
    message = (
        r"^precision\.mode is 'amp_fp16', in which the cpu cannot run this model \(.*Half.*\): "
        r"set another mode \(fp32, bf16, native_fp16\)"
    )
    with pytest.raises(UserError, match=message) as caught:
        preflight(policy, lambda: model(torch.ones(8, 4)))
    assert "Half" in str(caught.value.__cause__)  # with the line of the model that it comes from


def test_dtypes_that_do_not_fit_each_other_are_found() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16"), CPU)
    model = policy.prepare(nn.Linear(4, 1))
    with pytest.raises(UserError, match=r"'native_fp16', in which the cpu cannot run this model \(.*dtype"):
        preflight(policy, lambda: model(torch.ones(2, 4)).mean())  # float32 inputs of an FP16 model


def test_a_head_in_float32_beside_an_fp16_base_gets_the_advice_that_helps() -> None:
    model = nn.Sequential(nn.Linear(4, 64, bias=False), nn.Linear(64, 1, bias=False))
    model.get_submodule("0").requires_grad_(False)
    half = torch.ones(2, 4).half()
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16"), CPU)
    policy.prepare(model)
    with pytest.raises(UserError, match=r"set precision\.trainable_dtype to fp16 \(with masters\), or use another"):
        preflight(policy, lambda: model(half).mean())
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16", trainable_dtype="fp16"), CPU)
    policy.prepare(model)
    assert preflight(policy, lambda: model(half).mean()).unused == []


def test_it_leaves_no_trace() -> None:
    policy, model = prepared("fp32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    streams = torch.get_rng_state(), random.getstate()
    preflight(policy, lambda: model(torch.randn(8, 4) + random.random()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.tensor(0.0, requires_grad=True), "not connected to any trainable weight"),
        (lambda model: model(torch.ones(8, 4)).detach(), "not connected to any trainable weight"),
        (
            lambda model: torch.ones(1, requires_grad=True).exp().sum(),
            r"on 1 other tensors \(first of shape \(1,\)\)",
        ),
    ],
)
def test_a_loss_that_hangs_on_nothing_is_refused(make: Any, message: str) -> None:
    policy, model = prepared("fp32")
    with pytest.raises(TrainingError, match=message):
        preflight(policy, lambda: make(model))


def test_what_is_not_about_dtypes_stays_what_it_is() -> None:
    policy, model = prepared("fp32")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        preflight(policy, lambda: model(torch.ones(8, 5)))


class Counting(nn.Module):
    """A layer that puts another buffer in place of its own."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        out: Tensor = self.layer(x).mean()
        return out


def test_a_buffer_that_is_replaced_leaves_no_trace_either() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    model = policy.prepare(Counting())
    before = model.get_buffer("count")
    preflight(policy, lambda: model(torch.ones(2, 2)))
    assert model.get_buffer("count") is before
    assert float(before) == 0.0


def test_an_error_of_another_rank_ends_this_one_quietly(world_where: Any) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), world=world_where(lambda flags: [*flags[:2], True]))
    model = policy.prepare(nn.Linear(2, 1))
    with pytest.raises(RawloopError, match="another rank failed in its first pass") as caught:
        preflight(policy, lambda: model(torch.ones(2, 2)).mean())
    assert not caught.value.is_reporter


def test_another_ranks_lack_is_everybodys(world_where: Any) -> None:
    world = world_where(lambda flags: [policy.name == "bf16", *flags[1:]])
    policy: PrecisionPolicy = PrecisionPolicy(PrecisionConfig(mode="bf16", fallback=["fp32"]), world=world)
    model = policy.prepare(nn.Linear(2, 1))
    preflight(policy, lambda: model(torch.ones(2, 2)).mean())
    assert policy.name == "fp32"
    assert policy.reason.endswith("on another rank")


class Convolved(nn.Module):
    """A layer of a kind, fed with float32 whatever its weights are."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self) -> Tensor:
        out = self.layer(torch.ones(self.shape))
        loss: Tensor = (out[0] if isinstance(out, tuple) else out).float().square().mean()
        return loss


LAYERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "Input type (float) and bias type (c10::Half) should be the same": lambda: (nn.Conv1d(4, 4, 3), (2, 4, 8)),
    "Input type (torch.FloatTensor) and weight type (torch.HalfTensor) should be the same": lambda: (
        nn.ConvTranspose2d(4, 4, 3, bias=False),
        (2, 4, 8, 8),
    ),
    "mat1 and mat2 must have the same dtype": lambda: (nn.Linear(4, 4), (2, 4)),
    "mixed dtype (CPU): expect parameter to have scalar type of Float": lambda: (nn.GroupNorm(2, 4), (2, 4, 8)),
    "RNN input dtype (torch.float32) does not match weight dtype (torch.float16)": lambda: (nn.GRU(4, 4), (2, 4)),
}


@pytest.mark.parametrize("message", LAYERS)
def test_dtypes_that_no_layer_takes_lead_to_the_next_mode(message: str) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="native_fp16", fallback=["fp32"]), CPU)
    model = policy.prepare(Convolved(*LAYERS[message]()))
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        model()
    preflight(policy, model)
    assert policy.name == "fp32"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"),
        RuntimeError("FlashAttention only support fp16 and bf16 data type"),
        RuntimeError("FlashAttention only supports Ampere GPUs or newer, and fp16 and bf16."),
        NotImplementedError("No operator found for `attention_forward`: bf16 is only supported on A100+"),
        TypeError("BFloat16 is not supported on MPS"),
        RuntimeError("Expected query, key, and value to have the same dtype, but got query.dtype: float"),
        RuntimeError("\"erfcx\" not implemented for 'Half'"),
        RuntimeError("Input type (c10::BFloat16) and bias type (float) should be the same"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_errors_of_gpus_about_dtypes_are_known(error: Exception) -> None:
    assert is_lacking(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x5 and 4x4)"),
        ValueError("Expected input batch_size (8) to match target batch_size (4)."),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_no_reason_for_another_mode(error: Exception) -> None:
    assert not is_lacking(error)
