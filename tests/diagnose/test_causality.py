"""The probe on the demo, right and spoilt: labels that were not shifted, a mask not causal, a model without eyes."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from rawloop.contracts import Batch
from rawloop.diagnose.causality import Movement, lines, probe
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.losses import LossModule


@pytest.fixture
def batch(family: HiggsAudioV2, examples: list[Any]) -> Batch:
    """A sample twice, for each stream to be probed in the middle."""
    return family.collate([examples[0], examples[0]])


def outcomes(family: HiggsAudioV2, module: LossModule, batch: Batch, autocast: Any = nullcontext) -> dict[str, str]:
    return {stream: moved.outcome() for stream, moved in probe(family, module.model, batch, autocast).items()}


def test_the_demo_passes_to_the_bit(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    moved = probe(family, module.model, batch, nullcontext)
    assert {stream: movement.outcome() for stream, movement in moved.items()} == {"audio": "PASS", "text": "PASS"}
    for movement in moved.values():
        assert movement.moved_earlier == 0.0
        assert movement.later["tokens and codes"][1] > 0.1
        assert movement.tolerance == 64 * torch.finfo(torch.float32).eps
    assert lines(moved)[2].split()[0] == "audio"
    assert lines(moved)[2].endswith("PASS")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tolerance_is_that_of_the_coarsest_dtype(
    family: HiggsAudioV2, module: LossModule, batch: Batch, dtype: torch.dtype
) -> None:
    autocast = partial(torch.autocast, "cpu", dtype=dtype)
    moved = probe(family, module.model, batch, autocast)
    assert {movement.tolerance for movement in moved.values()} == {torch.finfo(dtype).eps}
    assert {movement.outcome() for movement in moved.values()} == {"PASS"}
    half = probe(family, module.model.to(dtype), batch, nullcontext)
    assert {movement.tolerance for movement in half.values()} == {torch.finfo(dtype).eps}
    assert {movement.outcome() for movement in half.values()} == {"PASS"}


@pytest.mark.parametrize("spoilt", [("audio",), ("text",), ("audio", "text")])
def test_labels_that_were_not_shifted_are_a_leak(
    family: HiggsAudioV2, module: LossModule, batch: Batch, spoilt: tuple[str, ...]
) -> None:
    for stream in spoilt:
        labels = batch.labels[stream]
        batch.labels[stream] = labels._replace(positions=labels.positions + 1)
    expected = {stream: "LEAK" if stream in spoilt else "PASS" for stream in family.streams}
    assert outcomes(family, module, batch) == expected


def test_a_mask_that_is_not_causal_is_a_leak(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    model: Any = module.model
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # what scaled_dot_product_attention goes by where there is no mask
    assert outcomes(family, module, batch) == {"audio": "LEAK", "text": "LEAK"}


def test_a_model_that_does_not_see_its_inputs_is_blind(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    model: Any = module.model
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.model.embed_audio_tokens.embed_audio_tokens.weight):
            weight.fill_(0.5)
    assert outcomes(family, module, batch) == {"audio": "BLIND", "text": "BLIND"}


def test_a_model_without_attention_is_blind(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    """Each prediction still sees its own input, which alone would move it."""
    model: Any = module.model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    moved = probe(family, model, batch, nullcontext)
    assert {stream: movement.outcome() for stream, movement in moved.items()} == {"audio": "BLIND", "text": "BLIND"}
    assert "BLIND: no prediction moves when earlier tokens and codes change" in lines(moved)[2]


def shake(model: Any, amount: float, generator: torch.Generator | None) -> None:
    """Let both heads add noise, as a share of their largest logit, as kernels do that add in any order."""

    sizes: dict[Any, torch.Tensor] = {}

    def noise(head: Any, _: Any, made: torch.Tensor) -> torch.Tensor:
        size = sizes.setdefault(head, made.abs().max())
        return made + amount * size * torch.randn(made.shape, generator=generator)

    model.text_lm_head.register_forward_hook(noise)
    model.audio_lm_head.register_forward_hook(noise)


def no_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()


def not_causal(model: Any) -> None:
    """One head of one layer sees what comes after it."""
    model.model.layers[-1].self_attn.is_causal = False
    model.model.layers[-1].self_attn.o_proj.weight.data[:, 8:] = 0


NOISE = [
    (1e-7, lambda model: None, "PASS"),  # of a kernel: 7 eps of float32 at the most
    (1e-7, not_causal, "LEAK"),
    (1e-7, no_attention, "BLIND"),
    (1e-4, lambda model: None, "PASS"),  # larger than any rounding: measured
    (1e-4, not_causal, "LEAK"),
    (1e-4, no_attention, "BLIND"),
    (0.1, no_attention, "UNSEEN"),
]


@pytest.mark.parametrize(("amount", "spoil", "outcome"), NOISE)
def test_noise_is_no_leak_and_hides_none(
    family: HiggsAudioV2, module: LossModule, batch: Batch, amount: float, spoil: Any, outcome: str
) -> None:
    spoil(module.model)
    shake(module.model, amount, torch.Generator().manual_seed(0))
    assert outcomes(family, module, batch) == {"audio": outcome, "text": outcome}


def test_what_a_model_draws_is_no_noise(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    shake(module.model, 0.1, None)
    moved = probe(family, module.model, batch, nullcontext)
    assert [(m.outcome(), m.moved_earlier) for m in moved.values()] == [("PASS", 0.0), ("PASS", 0.0)]


def test_the_tolerance_grows_with_the_layers_in_float32_only(
    family: HiggsAudioV2, module: LossModule, batch: Batch
) -> None:
    module.model.deep = nn.ModuleList(nn.Identity() for _ in range(80))
    for dtype, units in ((torch.float32, 320), (torch.bfloat16, 1)):
        moved = probe(family, module.model.to(dtype), batch, nullcontext)
        assert {m.tolerance for m in moved.values()} == {units * torch.finfo(dtype).eps}


def test_what_is_not_finite_shows_nothing(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    model: Any = module.model
    with torch.no_grad():
        model.text_lm_head.weight[0] = math.nan
    assert outcomes(family, module, batch) == {"audio": "PASS", "text": "UNSEEN"}


def test_a_stream_without_a_turn_is_not_said_to_pass(
    family: HiggsAudioV2, module: LossModule, examples: list[Any]
) -> None:
    """One row only is cut in the middle of the audio, where no text target stands before it."""
    assert outcomes(family, module, family.collate(examples[:1])) == {"audio": "PASS", "text": "UNSEEN"}


def movement(earlier: int, moved_earlier: float, later: int, moved_later: float, **others: Any) -> Movement:
    return Movement(earlier, moved_earlier, {"tokens": (later, moved_later), **others}, 1e-6, 1e-7)


def test_edges() -> None:
    assert movement(5, 1e-6, 5, 1e-6 + 1e-9).outcome() == "PASS"
    assert movement(5, 1e-6 + 1e-9, 5, 1.0).outcome() == "LEAK"
    assert movement(5, 0.0, 5, 1e-7).outcome() == "BLIND"
    assert movement(0, 0.0, 5, 1e-7).outcome() == "BLIND"
    assert movement(5, 0.0, 5, 1e-6).outcome() == "UNSEEN"
    assert movement(5, 0.0, 5, 1e-6, clips=(1, 0.0)).outcome() == "BLIND"
    assert movement(5, 0.0, 5, 1e-6).why().startswith("other tokens move predictions by no more than this mode rounds")
    assert movement(0, 0.0, 5, 1.0).outcome() == "UNSEEN"
    assert movement(5, 0.0, 0, 0.0).outcome() == "UNSEEN"
    assert movement(5, 0.0, 5, 1.0, clips=(0, 0.0)).outcome() == "PASS"
    assert movement(5, 0.0, 5, 1.0, clips=(1, 0.0)).outcome() == "BLIND"
    assert "when earlier clips change" in movement(5, 0.0, 5, 1.0, clips=(1, 0.0)).why()
    assert "when earlier tokens or clips change" in movement(5, 0.0, 5, 0.0, clips=(1, 0.0)).why()


def test_movements_of_two_ranks() -> None:
    fine, leak = movement(5, 0.0, 5, 1.0), movement(2, 0.5, 3, 0.2)
    assert fine.join(leak) == leak.join(fine) == movement(7, 0.5, 8, 1.0)
    assert fine.join(leak).outcome() == "LEAK"
    assert fine.join(movement(0, 0.0, 0, 0.0)).outcome() == "PASS"
    deaf = movement(5, 0.0, 5, 1.0, clips=(2, 0.0))
    assert fine.join(deaf) == deaf.join(fine) == movement(10, 0.0, 10, 1.0, clips=(2, 0.0))
    assert fine.join(deaf).outcome() == "BLIND"


def test_probing_leaves_no_trace(family: HiggsAudioV2, module: LossModule, batch: Batch) -> None:
    model = module.model.train()
    before, state = {name: tensor.clone() for name, tensor in batch.inputs.items()}, torch.get_rng_state()
    probe(family, model, batch, nullcontext)
    assert all(part.training for part in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in batch.inputs.items())
