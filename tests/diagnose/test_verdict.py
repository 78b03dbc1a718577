"""The verdict on a first loss: what it takes for each, at its edges, and that measuring leaves no trace."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rawloop.contracts import IGNORE, Batch
from rawloop.diagnose.causality import probe
from rawloop.diagnose.verdict import CHANCE_FROM, LEAK_BELOW, VARIETY, Reading, Verdict, judge, lines, read_losses
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.losses import LossModule
from rawloop.seed import capture_rng

AUDIO, TEXT = math.log(1026), math.log(128256)


def reading(loss: float, entropy: float = 5.0) -> Reading:
    return Reading(nats=loss, targets=1, entropy=entropy)


@pytest.mark.parametrize(
    ("loss", "entropy", "chance", "kind"),
    [
        (CHANCE_FROM * AUDIO, 5.0, AUDIO, "CHANCE"),
        (CHANCE_FROM * AUDIO - 1e-6, 5.0, AUDIO, "OK"),
        (AUDIO / CHANCE_FROM, 5.0, AUDIO, "CHANCE"),
        (1000.0, 5.0, AUDIO, "CHANCE"),
        (LEAK_BELOW * 5.0, 5.0, AUDIO, "OK"),
        (LEAK_BELOW * 5.0 - 1e-6, 5.0, AUDIO, "LEAK"),
        (0.0, VARIETY, AUDIO, "LEAK"),
        (0.0, VARIETY - 1e-6, AUDIO, "OK"),
        (0.0, math.log(2), TEXT, "OK"),  # two tokens that always follow alike
        # what runs reported: taken for success at chance, and with labels that were not shifted
        (6.49, 6.0, AUDIO, "CHANCE"),
        (7.27, 6.0, AUDIO, "CHANCE"),
        (11.6, 5.0, TEXT, "CHANCE"),
        (12.4, 5.0, TEXT, "CHANCE"),
        (0.0028, 6.0, AUDIO, "LEAK"),
        (0.0011, 6.0, AUDIO, "LEAK"),
        (4.5, 6.0, AUDIO, "OK"),
        (2.0, 5.0, TEXT, "OK"),
        (math.nan, 5.0, AUDIO, "DEAD"),
        (math.inf, 5.0, AUDIO, "DEAD"),
    ],
)
def test_edges(loss: float, entropy: float, chance: float, kind: str) -> None:
    verdict = judge("audio", reading(loss, entropy), chance)
    assert verdict.kind == kind
    assert bool(verdict.why) == (kind != "OK")


def test_worse_than_guessing_is_told_from_guessing() -> None:
    edge = AUDIO / CHANCE_FROM
    assert judge("audio", reading(edge + 1e-6), AUDIO).why.startswith("worse than guessing")
    assert judge("audio", reading(edge - 1e-6), AUDIO).why.startswith("no better than guessing")


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (Reading(), "no target"),
        (replace(reading(4.0), gradient="its loss is detached"), "its loss is detached"),
        (replace(reading(4.0), logits="all zero"), "all zero"),
        (replace(reading(AUDIO), gradient="it is zero", logits="all zero"), "it is zero; all zero"),
        (replace(reading(0.0), logits="all zero"), "all zero"),
        (replace(reading(4.0), not_finite="its gradient is not", gradient="it is zero"), "its gradient is not"),
        (replace(reading(math.nan), not_finite="of x"), "of x"),
        (reading(math.nan), "its loss is not finite"),
    ],
)
def test_a_dead_stream_is_dead_whatever_its_loss(spoilt: Reading, why: str) -> None:
    verdict = judge("audio", spoilt, AUDIO)
    assert verdict.kind == "DEAD"
    assert why in verdict.why


def test_readings_of_two_ranks() -> None:
    both = reading(4.0) + Reading(nats=100.0, targets=50, entropy=50.0, gradient="none", logits="same")
    assert both == Reading(nats=104.0, targets=51, entropy=55.0)
    empty = Reading()
    dead = replace(reading(4.0), gradient="none")
    assert dead + empty == empty + dead == dead  # a rank that saw no target cannot vouch for the stream
    assert judge("audio", reading(4.0) + reading(math.nan), AUDIO).kind == "DEAD"
    ill = replace(reading(4.0), not_finite="of x")
    assert (reading(4.0) + ill).not_finite == (ill + reading(4.0)).not_finite == "of x"  # one rank is enough


# -- on the demo -------------------------------------------------------------------------------------------------


def verdicts(family: HiggsAudioV2, module: LossModule, batches: list[Batch]) -> dict[str, Verdict]:
    readings = read_losses(family, module, batches, nullcontext)
    chance = family.chance()
    return {name: judge(name, found, chance[name.split("/")[0]]) for name, found in readings.items()}


@pytest.fixture
def batches(family: HiggsAudioV2, examples: list[Any]) -> list[Batch]:
    return [family.collate(examples[:2]), family.collate(examples[2:5])]


def test_random_weights_are_at_chance(family: HiggsAudioV2, module: LossModule, batches: list[Batch]) -> None:
    found = verdicts(family, module, batches)
    assert list(found) == ["audio", *(f"audio/{k}" for k in range(8)), "text"]
    assert {verdict.kind for verdict in found.values()} == {"CHANCE"}
    with torch.no_grad():
        losses = [family.losses(module.model.eval(), batch) for batch in batches]
    for stream in family.streams:
        mean = sum(float(loss[stream].total) for loss in losses) / sum(loss[stream].targets for loss in losses)
        assert found[stream].loss == pytest.approx(mean, rel=1e-6)
    assert found["audio"].loss == pytest.approx(sum(found[f"audio/{k}"].loss for k in range(8)) / 8, rel=1e-6)


def test_entropy_is_that_of_the_targets(family: HiggsAudioV2, module: LossModule, batches: list[Batch]) -> None:
    readings = read_losses(family, module, batches[:1], nullcontext)
    assert readings["text"].entropy / readings["text"].targets == pytest.approx(math.log(2))
    column = batches[0].labels["audio"].targets[:, 3]
    shares = torch.unique(column[column != IGNORE], return_counts=True)[1] / (column != IGNORE).sum()
    entropy = -(shares * shares.log()).sum()
    assert readings["audio/3"].entropy / readings["audio/3"].targets == pytest.approx(float(entropy), rel=1e-5)


def kinds(found: dict[str, Verdict]) -> dict[str, str]:
    """The verdicts on the streams, and on those codebooks that have another one than their stream."""
    return {
        name: verdict.kind
        for name, verdict in found.items()
        if "/" not in name or verdict.kind != found[name.split("/")[0]].kind
    }


def test_a_head_that_is_zero_and_frozen_is_dead(family: HiggsAudioV2, module: LossModule, batches: list[Batch]) -> None:
    model: Any = module.model
    model.text_lm_head.weight.requires_grad_(False).zero_()
    found = verdicts(family, module, batches)
    assert kinds(found) == {"audio": "CHANCE", "text": "DEAD"}
    assert found["text"].why == "its gradient is zero in every trained weight; its logits are all zero"


def test_a_frozen_model_under_one_head_leaves_the_other_stream_dead(
    family: HiggsAudioV2, module: LossModule, batches: list[Batch]
) -> None:
    module.requires_grad_(False)
    model: Any = module.model
    model.audio_lm_head.weight.requires_grad_(True)
    found = verdicts(family, module, batches)
    assert kinds(found) == {"audio": "CHANCE", "text": "DEAD"}
    assert found["text"].why == "its loss is detached: it depends on no trained weight"


def test_a_detached_stream_is_dead(family: HiggsAudioV2, module: LossModule, batches: list[Batch]) -> None:
    def losses(model: nn.Module, batch: Batch) -> Any:
        result = family.losses(model, batch)
        return {**result, "audio": result["audio"]._replace(total=result["audio"].total.detach())}

    module.losses = losses
    found = verdicts(family, module, batches)
    assert {verdict.kind for name, verdict in found.items() if name.startswith("audio")} == {"DEAD"}
    assert found["audio"].why == "its loss is detached: it depends on no trained weight"
    assert found["text"].kind == "CHANCE"


def test_a_codebook_whose_logits_never_change_is_dead(
    family: HiggsAudioV2, module: LossModule, batches: list[Batch]
) -> None:
    model: Any = module.model
    with torch.no_grad():
        model.audio_lm_head.weight.view(8, 1026, -1)[3] = 0
    found = verdicts(family, module, batches)
    assert kinds(found) == {"audio": "CHANCE", "text": "CHANCE", "audio/3": "DEAD"}
    assert "same at every position" in found["audio/3"].why
    shown = "\n".join(lines(list(found.values()), 5, expect_chance=True))
    assert "audio/3  6.9334  6.9334  DEAD: its logits are the same" in shown
    assert "audio/2" not in shown
    assert "CHANCE (expected)\n" in shown


def test_a_loss_that_is_not_finite_is_dead(family: HiggsAudioV2, module: LossModule, batches: list[Batch]) -> None:
    model: Any = module.model
    with torch.no_grad():
        model.text_lm_head.weight[0] = math.inf
    found = verdicts(family, module, batches)
    assert kinds(found) == {"audio": "CHANCE", "text": "DEAD"}
    assert "not finite" in found["text"].why


def test_a_stream_without_targets_is_dead(family: HiggsAudioV2, module: LossModule, examples: list[Any]) -> None:
    for example in examples:
        example.labels[:] = IGNORE
    found = verdicts(family, module, [family.collate(examples[:2])])
    assert kinds(found) == {"audio": "CHANCE", "text": "DEAD"}
    assert "no target" in found["text"].why


def test_a_model_that_sees_its_targets_is_a_leak(
    family: HiggsAudioV2, module: LossModule, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is after training on labels that were not shifted: it copies. The text's two tokens prove nothing."""
    honest = family.logits

    def copying(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        rows = honest(model, batch)
        seen = {stream: labels.targets.clamp(min=0) for stream, labels in batch.labels.items()}
        return {stream: rows[stream] + 20 * F.one_hot(seen[stream], rows[stream].shape[-1]) for stream in rows}

    monkeypatch.setattr(family, "logits", copying)
    found = verdicts(family, module, batches)
    assert kinds(found) == {"audio": "LEAK", "text": "OK"}
    assert found["text"].loss < 0.01


def count_and_draw(module: nn.Module, _: Any) -> None:
    """What a forward pass may do besides: batch norm keeps statistics, dropout draws."""
    counter = module.get_buffer("counter")
    counter.add_(torch.rand(3))


@pytest.fixture
def watched(module: LossModule) -> Callable[[], tuple[Any, ...]]:
    """Give a function that tells all that measuring could change."""
    module.register_buffer("counter", torch.zeros(3))
    module.register_forward_pre_hook(count_and_draw)
    module.model.train()
    next(module.model.children()).eval()  # a part in another mode than its parent
    for parameter in list(module.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)

    def look() -> tuple[Any, ...]:
        return (
            [part.training for part in module.modules()],
            [None if p.grad is None else (id(p.grad), float(p.grad.sum())) for p in module.parameters()],
            [float(p.detach().sum()) for p in module.parameters()],
            module.get_buffer("counter").tolist(),
            capture_rng()["torch"].tolist(),
        )

    return look


def test_measuring_leaves_no_trace(
    family: HiggsAudioV2, module: LossModule, batches: list[Batch], watched: Callable[[], tuple[Any, ...]]
) -> None:
    before = watched()
    read_losses(family, module, batches, nullcontext)
    assert watched() == before


class NoFloat64(TorchFunctionMode):
    """Takes every tensor for one on a device without float64, as MPS is, until `cpu()` is called on it."""

    def __init__(self) -> None:
        super().__init__()
        self.host: dict[int, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in args if isinstance(value, Tensor)]
        if isinstance(result, Tensor):
            if func is Tensor.cpu or not given or any(id(tensor) in self.host for tensor in given):
                self.host[id(result)] = result
            elif result.dtype == torch.float64:
                raise TypeError(f"{func.__name__}: the device has no float64")
        return result


def test_no_check_needs_float64_on_the_device(family: HiggsAudioV2, module: LossModule, examples: list[Any]) -> None:
    batch = family.collate(examples[:2])
    with NoFloat64(), pytest.raises(TypeError, match="double: the device has no float64"):
        batch.labels["audio"].targets.double()
    with NoFloat64():
        readings = read_losses(family, module, [batch], nullcontext, [examples[:2]])
        movements = probe(family, module.model, batch, nullcontext)
    assert all(math.isfinite(reading.nats) for reading in readings.values())
    assert {movement.outcome() for movement in movements.values()} == {"PASS"}


def test_without_a_known_chance_only_chance_is_not_judged() -> None:
    assert judge("text", reading(1000.0), None).kind == "OK"
    assert judge("text", reading(0.001), None).kind == "LEAK"
    assert judge("text", reading(math.nan), None).kind == "DEAD"
    assert "unknown" in lines([judge("text", reading(5.0), None)], 1, False)[2]
