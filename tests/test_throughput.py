"""The speed of a run: counted when batches are made, summed over ranks, and held against the card."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.contracts import Audio, Batch, Labels, Sample, Text, Turn
from rawloop.costs import forward_operations, rate_of, step_cost, trained_share
from rawloop.dist import World
from rawloop.families import ModelConfig, load_family
from rawloop.families.shared import TextFamily
from rawloop.losses import LossModule
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.throughput import Cost, Throughput


def batch_of(**work: float) -> Batch:
    return Batch({}, {}, {}, [], work)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its last entry is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr("rawloop.throughput.time.perf_counter", lambda: now[-1])
    return now


def test_what_is_done_per_second_since_the_clock_was_restarted(clock: list[float]) -> None:
    speed = Throughput(audio_rate=25.0, cost=Cost(operations=3e9, peak=1e12))
    speed.count(batch_of(positions=1000, tokens=999, audio=500))
    clock.append(100.0)
    speed.restart_clock(step=10, samples=40)
    speed.count(batch_of(positions=100, tokens=60, audio=50))
    speed.count(batch_of(positions=100, tokens=90))
    clock.append(102.0)
    assert speed.speed(12, 50, World()) == {
        "samples_per_second": 5.0,
        "step_seconds": 1.0,
        "data_wait": 0.0,
        "tokens_per_second": 75.0,
        "padding": 0.25,
        "mfu": pytest.approx(75 * 3e9 / 1e12),
        "audio_seconds_per_second": 1.0,
    }


def test_batches_of_a_family_that_counts_nothing_have_no_tokens(clock: list[float]) -> None:
    speed = Throughput(cost=Cost(1.0, 1.0))
    speed.count(batch_of())
    clock.append(1.0)
    assert list(speed.speed(1, 1, World())) == ["samples_per_second", "step_seconds", "data_wait"]


def speed_of_rank(world: World) -> dict[str, float]:
    speed = Throughput(cost=Cost(1e6, 1e9))
    speed.count(batch_of(positions=10, tokens=10 - 5 * world.rank, **({"audio": 3.0} if world.rank else {})))
    return speed.speed(1, 4, world)


def test_ranks_are_summed_and_mfu_is_that_of_all_devices(run_ranks: Callable[..., list[Any]]) -> None:
    for found in run_ranks(speed_of_rank):
        seconds = found["step_seconds"]
        assert found["padding"] == 0.25
        assert found["tokens_per_second"] == pytest.approx(15 / seconds)
        assert found["audio_seconds_per_second"] == pytest.approx(3 / seconds)
        assert found["mfu"] == pytest.approx(15 / seconds * 1e6 / 2e9)


# -- what is in a batch --------------------------------------------------------------------------------------------


def test_tokens_are_positions_without_padding(text_checkpoint: Path) -> None:
    family = load_family(ModelConfig(path=str(text_checkpoint)))
    texts = [Sample(words, (Turn("text", (Text(words),), trained=True),)) for words in ("a", "a longer one")]
    examples = [family.example(sample, lambda path: torch.zeros(0)) for sample in texts]
    lengths = [len(example.input_ids) for example in examples]
    batch = family.collate(examples)
    assert batch.work == {"positions": 2 * max(lengths), "tokens": sum(lengths)}
    assert batch.to(torch.device("cpu")).work == batch.work


@pytest.mark.parametrize("frames", [1, 30])
def test_audio_of_codes_is_counted_in_frames_whatever_the_delay_adds(demo_checkpoint: Path, frames: int) -> None:
    family = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    said = Turn("assistant", (Audio(Path("a")),), trained=True)
    sample = Sample("s", (Turn("user", (Text("One."),)), said, Turn("user", (Text("Two."),)), said))
    codes = torch.full((frames, family.settings.num_codebooks), 7)  # type: ignore[attr-defined]
    batch = family.collate([family.example(sample, lambda path: codes)])
    assert batch.work["audio"] == 2 * frames


# -- operations ----------------------------------------------------------------------------------------------------

HIDDEN, INNER, LAYERS, VOCABULARY, LENGTH = 32, 64, 2, 100, 16


def llama(lora: bool) -> LossModule:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    family = TextFamily(ModelConfig())
    family.vocabulary = VOCABULARY
    model = LlamaForCausalLM(config)
    return LossModule(add_adapter(model, AdapterConfig(rank=4), []) if lora else model, family.losses)


def text_of(length: int, targets: int) -> Batch:
    ids = torch.arange(length)[None] % VOCABULARY
    labels = Labels(torch.arange(targets), ids[0, 1 : targets + 1])
    return Batch(
        {"input_ids": ids}, {"text": labels}, {"text": targets}, ["t"], {"positions": length, "tokens": length}
    )


def test_operations_of_a_step_are_4_per_frozen_and_6_per_trained_weight() -> None:
    """Beside them are those of attention: two products of (length, length, hidden) in each layer."""
    layers = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    attention = LAYERS * 2 * 2 * LENGTH**2 * HIDDEN
    for targets in (LENGTH - 1, 3):  # the head is run at targets
        head = targets * HIDDEN * VOCABULARY
        found = forward_operations(llama(lora=False), text_of(LENGTH, targets), nullcontext())
        assert found.others == 2 * (layers * LENGTH + head)
        assert found.attention == pytest.approx(attention, rel=0.05)  # and rotary tables
    assert trained_share(llama(lora=False)) == 1.0
    adapted = llama(lora=True)
    added = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    frozen = layers + HIDDEN * VOCABULARY
    assert trained_share(adapted) == pytest.approx(added / (added + frozen))
    assert 2 * (added + frozen) * (2 + trained_share(adapted)) == pytest.approx(4 * frozen + 6 * added)


def test_of_experts_the_chosen_ones_count() -> None:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, vocab_size=VOCABULARY, num_hidden_layers=LAYERS, num_local_experts=4)
    family = TextFamily(ModelConfig())
    family.vocabulary = VOCABULARY
    found = forward_operations(LossModule(MixtralForCausalLM(config), family.losses), text_of(LENGTH, 3), nullcontext())
    layers = LAYERS * (4 * HIDDEN**2 + 4 * HIDDEN + 2 * 3 * HIDDEN * INNER)  # 4 scores for a token, and 2 experts
    assert found.others == 2 * (layers * LENGTH + 3 * HIDDEN * VOCABULARY)


@pytest.mark.parametrize("lora", [False, True])
def test_long_sequences_cost_what_their_step_takes(lora: bool) -> None:
    """Backward takes twice what forward does for attention, whatever is frozen: here three quarters of all."""
    module, batch, policy = llama(lora), text_of(512, 3), PrecisionPolicy(PrecisionConfig(mode="fp32"))
    module.model = policy.prepare(module.model)
    forward = forward_operations(module, batch, nullcontext())
    assert forward.attention > 0.7 * sum(forward)
    with FlopCounterMode(display=False) as counter:
        module(batch)["text"].total.backward()
    cost = step_cost(module, batch, 1e12, policy)
    assert cost is not None
    # LoRA in the first layer needs no gradient of the frozen embeddings below it
    assert cost.operations * 512 == pytest.approx(counter.get_total_flops(), rel=0.06 if lora else 0.01)


def test_counting_operations_changes_nothing() -> None:
    module, batch = llama(lora=True).train(), text_of(LENGTH, 3)
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    forward_operations(module, batch, nullcontext())
    assert torch.equal(torch.rand(1), before)
    assert module.training
    assert all(weight.grad is None for weight in module.parameters())


@pytest.mark.parametrize(
    ("name", "mode", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", None),  # slower
        ("NVIDIA H100 NVL", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H200 NVL", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("Tesla V100-SXM2-32GB", "amp_fp16", 125),
        ("Tesla V100-PCIE-32GB", "amp_fp16", None),
        ("Tesla V100S-PCIE-32GB", "amp_fp16", None),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A100-SXM4-40GB", "native_fp16", 312),
        ("NVIDIA A100-PCIE-40GB", "native_fp16", 312),
        ("NVIDIA A100 80GB PCIe", "amp_fp16", 312),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA TITAN RTX", "bf16", None),
        ("NVIDIA TITAN RTX", "amp_fp16", 130),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_the_rate_is_that_of_the_card_in_the_mode(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert rate_of(torch.device("cuda"), mode, tf32=False) == (tflops and tflops * 1e12)
    assert rate_of(torch.device("cpu"), mode, tf32=False) is None


def test_the_cost_of_a_step_is_per_position() -> None:
    module, batch, policy = llama(lora=False), text_of(LENGTH, 3), PrecisionPolicy(PrecisionConfig(mode="fp32"))
    module.model = policy.prepare(module.model)
    forward = forward_operations(module, batch, nullcontext())
    assert step_cost(module, batch, 1e12, policy) == Cost(3 * sum(forward) / LENGTH, 1e12)
    batch.work.clear()
    assert step_cost(module, batch, 1e12, policy) is None
