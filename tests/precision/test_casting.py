"""Frozen weights under autocast: cast once, with the same results to the bit and without copies in each pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.precision.casting import trainable_dtype
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy

CASES = [
    ("amp_fp16", torch.bfloat16, None, torch.float16),
    ("amp_fp16", torch.bfloat16, ["fp32"], torch.float16),
    ("amp_fp16", torch.float32, None, torch.float16),
    ("amp_fp16", torch.float32, ["fp32"], torch.float32),  # its digits are for the fallback
    ("bf16", torch.float32, None, torch.bfloat16),
    ("bf16", torch.float16, ["fp32"], torch.bfloat16),
    ("bf16", torch.bfloat16, None, torch.bfloat16),
    ("fp32", torch.bfloat16, None, torch.float32),
]
IDS = ["-".join(str(part).removeprefix("torch.") for part in case[:3]) for case in CASES]


def adapted(stored: torch.dtype, tied: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config).to(stored)
    torch.manual_seed(1)
    wanted = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    changed: nn.Module = inject_adapter_in_model(wanted, model)
    return changed


class Casts(TorchDispatchMode):
    """Counts the numbers of frozen weights that a pass casts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad and p.ndim == 2}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.frozen:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that the graph keeps until backward, beside the model's own weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def run(model: nn.Module, policy: PrecisionPolicy) -> tuple[Tensor, list[Tensor], int, int]:
    """Logits, gradients, the numbers of frozen weights that were cast, and the bytes that the graph has kept."""
    ids = torch.arange(24).view(2, 12) % 64
    with Casts(model) as casts, saved_bytes(model) as kept, policy.autocast():
        logits = model(input_ids=ids).logits
    policy.backward(logits.float().square().mean())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return logits.detach(), gradients, casts.count, sum(kept.values())


def by_autocast(model: nn.Module, policy: PrecisionPolicy, stored: torch.dtype) -> None:
    """Put the stored weights back, for autocast to cast."""
    original = dict(adapted(stored).named_parameters())
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            weight.data = original[name].data.to(weight.dtype if policy.name == "fp32" else stored)


@pytest.mark.parametrize(("mode", "stored", "fallback", "wanted"), CASES, ids=IDS)
def test_frozen_linear_weights_are_cast_once_with_the_same_results(
    mode: Any, stored: torch.dtype, fallback: Any, wanted: torch.dtype
) -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode, fallback=fallback))
    model = policy.prepare(adapted(stored))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    linear = {p.dtype for name, p in frozen.items() if "proj" in name or "lm_head" in name}
    others = {p.dtype for name, p in frozen.items() if "proj" not in name and "lm_head" not in name}
    assert (linear, others) == ({wanted}, {torch.float32 if mode == "fp32" else stored})
    logits, gradients, casts, kept = run(model, policy)
    assert (casts > 0) == (wanted == torch.float32 and mode != "fp32")
    policy.zero_grad()
    by_autocast(model, policy, stored)
    again, gradients_again, casts_before, kept_before = run(model, policy)
    assert torch.equal(logits, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    size = sum(p.numel() for name, p in frozen.items() if "proj" in name or "lm_head" in name)
    if stored not in (wanted, torch.float32) or (stored == torch.float32 and wanted != stored):
        assert casts_before == size or mode == "fp32"
        more = kept_before - kept  # the first layer's inputs need no gradient, so that some of its weights are not kept
        assert 0.8 * 2 * size < more <= 2 * size or mode == "fp32"


def test_weights_that_are_read_elsewhere_stay() -> None:
    tied = PrecisionPolicy("bf16").prepare(adapted(torch.float32, tied=True))
    head = tied.get_parameter("lm_head.weight")
    assert head is tied.get_parameter("model.embed_tokens.weight")
    assert head.dtype == torch.float32
    dora = PrecisionPolicy("bf16").prepare(adapted(torch.float32, use_dora=True))
    layer = "model.layers.0.self_attn"
    assert dora.get_parameter(f"{layer}.q_proj.base_layer.weight").dtype == torch.float32
    assert dora.get_parameter(f"{layer}.k_proj.weight").dtype == torch.bfloat16


def test_a_weight_that_fp16_cannot_hold_is_left_to_autocast() -> None:
    model = adapted(torch.bfloat16)
    weight = model.get_parameter("lm_head.weight")
    weight.data[0, 0] = 70000.0
    PrecisionPolicy("amp_fp16").prepare(model)
    assert weight.dtype == torch.bfloat16
    assert float(weight[0, 0]) == 70144.0


def test_a_model_that_is_trained_for_the_most_part_keeps_its_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 40))
    model.get_submodule("0").requires_grad_(False)
    PrecisionPolicy("bf16").prepare(model)
    assert model.get_parameter("0.weight").dtype == torch.float32


def test_a_fallback_has_the_float32_digits(training: Any) -> None:
    model = adapted(torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = training("bf16", ["fp32"], model=model, max_skips=1)
    run.step(float("inf"))
    assert run.policy.name == "fp32"
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
    assert trainable_dtype(model, "fp32", run.policy.config) == torch.float32
    assert run.step().applied


def test_what_16_bits_have_rounded_stays_rounded_after_a_fallback_and_a_resume(training: Any) -> None:
    run = training("amp_fp16", ["fp32"], model=adapted(torch.bfloat16), max_skips=1)
    run.step(float("inf"))
    resumed = training("amp_fp16", ["fp32"], model=adapted(torch.bfloat16), resume=run.policy.state_dict(), max_skips=1)
    for name, weight in run.model.named_parameters():
        assert weight.requires_grad or torch.equal(weight, resumed.model.get_parameter(name)), name
