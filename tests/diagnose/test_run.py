"""The checks in a whole run: a sound one passes and is not changed by them, wrong ones do not start."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rawloop.adapters import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.contracts import IGNORE, Labels
from rawloop.data import DataConfig
from rawloop.diagnose import ChecksConfig
from rawloop.dist import World
from rawloop.errors import RawloopError, TrainingError, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.families.higgs_examples import HiggsEncoder
from rawloop.loop import Run, TrainConfig, train
from rawloop.optim import OptimConfig
from rawloop.precision import PrecisionConfig
from rawloop.records import read_events, read_metrics


@pytest.fixture
def base(demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> RunConfig:
    """Two steps on the demo, checked, its weights known to be random."""
    return RunConfig(
        output=str(tmp_path / "run"),
        device="cpu",
        model=ModelConfig(path=str(demo_checkpoint / "model")),
        adapter=AdapterConfig(rank=4, dropout=0.1),
        data=DataConfig(train=str(demo_data / "train"), eval=str(demo_data / "eval"), codes=str(demo_data / "codes")),
        train=TrainConfig(batch_size=2, max_steps=2, log_every=1),
        optim=OptimConfig(lr=1e-3),
        precision=PrecisionConfig(mode="fp32"),
        evaluation=EvaluationConfig(enabled=False),
        checkpoint=CheckpointConfig(save_every=0),
        checks=ChecksConfig(expect_chance=True, batches=2),
    )


def go(config: RunConfig, said: list[str] | None = None, world: World | None = None) -> Run:
    run = build_run(config, world or World(), (said if said is not None else []).append)
    try:
        train(run)
    finally:
        run.records.close()
    return run


def test_a_sound_run_is_told_about_and_leaves_a_census(base: RunConfig, tmp_path: Path) -> None:
    said: list[str] = []
    go(base, said)
    text = "\n".join(said)
    for part in ("label census of 4 samples", "CHANCE (expected)", "causality probe", "PASS"):
        assert part in text
    census = json.loads((tmp_path / "run" / "census.json").read_text())
    required = {special["name"]: special["targets"] for special in census["specials"] if special["required"]}
    assert required["<|eot_id|>"] == [4]
    assert [4] * 8 in required.values()  # one stop token per clip in each codebook
    checks = [event["reason"] for event in read_events(tmp_path / "run") if event["kind"] == "check"]
    assert len(checks) == 3
    assert checks[0] == "census of 4 samples: every required token is a target"
    assert not [event for event in read_events(tmp_path / "run") if event["kind"] == "warning"]


def test_chance_that_nobody_expects_is_a_warning(base: RunConfig, tmp_path: Path) -> None:
    go(replace(base, checks=ChecksConfig(batches=1)))
    said = [event["reason"] for event in read_events(tmp_path / "run") if event["kind"] == "warning"]
    assert [reason.split()[3] for reason in said] == ["'audio'", "'text'"]
    assert all("set checks.expect_chance to true" in reason for reason in said)


def test_the_checks_change_nothing_that_is_trained(base: RunConfig, tmp_path: Path) -> None:
    losses = []
    for name, checks in (("on", base.checks), ("off", ChecksConfig(enabled=False))):
        run = go(replace(base, output=str(tmp_path / name), checks=checks))
        weights = [p.detach().clone() for _, p in run.policy.named_parameters()]
        losses.append(([line["loss"] for line in read_metrics(tmp_path / name)], weights))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))


def without_stop(self: HiggsEncoder, codes: Tensor, trained: bool, delayed: Any = HiggsEncoder.delayed) -> Any:
    """The labels of transformers' own processor: the stop token is masked."""
    inputs, labels = delayed(self, codes, trained)
    return inputs, labels.masked_fill(labels == self.settings.audio_stream_eos_id, IGNORE)


def test_a_masked_stop_token_stops_the_run_before_it_starts(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HiggsEncoder, "delayed", without_stop)
    with pytest.raises(UserError, match=r"in any codebook: never a target in 4 samples, .* generation never stops"):
        go(base)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    go(replace(base, checks=replace(base.checks, allow_missing_targets=True)))


def test_labels_that_are_not_shifted_are_a_leak(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = HiggsAudioV2._audio_labels

    def unshifted(self: HiggsAudioV2, padded: dict[str, Tensor]) -> Labels:
        positions, targets = shifted(self, padded)
        return Labels(positions + 1, targets)

    monkeypatch.setattr(HiggsAudioV2, "_audio_labels", unshifted)
    with pytest.raises(TrainingError, match=r"causality of 'audio': LEAK, .* labels not shifted"):
        go(base)
    go(replace(base, checks=replace(base.checks, allow=["leak"])))


def test_a_stream_that_trains_nothing_is_dead(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    load = HiggsAudioV2.load_model

    def zeroed(self: HiggsAudioV2, path: str | None = None) -> Any:
        model: Any = load(self, path)
        torch.nn.init.zeros_(model.text_lm_head.weight)
        return model

    monkeypatch.setattr(HiggsAudioV2, "load_model", zeroed)
    with pytest.raises(
        TrainingError, match=r"first loss of 'text' is .*: DEAD, .* \(to train all the same: --checks\.al"
    ):
        go(base)


def checked_on_ranks(world: World, config: RunConfig) -> str:
    """Rank 1 cannot make its examples."""
    if world.rank == 1:

        def broken(self: HiggsAudioV2, example: Any) -> Any:
            raise UserError("its pieces do not fit together")

        HiggsAudioV2.pieces = broken  # type: ignore[method-assign]
    try:
        go(config, world=world)
    except RawloopError as error:
        return str(error)
    return "trained"


def test_what_one_rank_cannot_check_is_raised_on_both(base: RunConfig, run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(checked_on_ranks, base, timeout=60)
    assert first == "rank 1: its pieces do not fit together"
    assert second == "its pieces do not fit together"
