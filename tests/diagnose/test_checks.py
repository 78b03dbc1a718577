"""The checks as every new run has them: what stops it, on all ranks alike, and that training does not notice them."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.data.codes import CodeCache
from rawloop.data.samples import read_samples
from rawloop.diagnose.checks import run_checks
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import RawloopError, TrainingError, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig, load_family
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.loop import TrainConfig, train
from rawloop.losses import LossModule
from rawloop.optim import OptimConfig
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import TIMES, read_events, read_metrics


@pytest.fixture
def config(demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> RunConfig:
    """A run of 3 steps with dropout, so that a draw too many would show."""
    train, held_out, codes = (str(demo_data / name) for name in ("train", "eval", "codes"))
    data = DataConfig(train=train, eval=held_out, codes=codes)
    return RunConfig(
        output=str(tmp_path / "run"),
        device="cpu",
        model=ModelConfig(path=str(demo_checkpoint / "model")),
        adapter=AdapterConfig(rank=4, dropout=0.3),
        data=data,
        train=TrainConfig(batch_size=2, accumulation=2, max_steps=3, log_every=1),
        optim=OptimConfig(lr=1e-3),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(batches=3, expect_chance=True),
        evaluation=EvaluationConfig(enabled=False),
        checkpoint=CheckpointConfig(save_every=3),
    )


def go(config: RunConfig, world: World | None = None) -> list[str]:
    """What `rawloop train` does; returns what it said."""
    said: list[str] = []
    run = build_run(config, world or World(), said.append)
    try:
        train(run)
    finally:
        run.close()
    return said


def checks_of(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == "check"]


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def test_a_right_run_is_checked_and_trains_as_if_it_were_not(config: RunConfig, tmp_path: Path) -> None:
    said = go(config)
    without = replace(config, output=str(tmp_path / "without"), checks=ChecksConfig(enabled=False))
    assert "label census" not in "".join(go(without))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "without")
    slot = "checkpoints/step-00000003/adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / slot).read_bytes() == (tmp_path / "without" / slot).read_bytes()
    assert not checks_of(tmp_path / "without")
    assert not (tmp_path / "without" / "census.json").exists()

    shown = next(text for text in said if text.startswith("label census of 6 samples"))
    assert "first loss over 6 samples" in shown
    assert "causality probe" in shown
    events = checks_of(tmp_path / "run")
    assert [event["check"] for event in events] == ["census", "loss", "causality"]
    assert events[2]["reason"] == "causality: audio PASS, text PASS"
    assert all(event["step"] == 0 for event in events)
    assert json.loads((tmp_path / "run" / "census.json").read_text())["samples"] == 6
    assert not [event for event in read_events(tmp_path / "run") if event["kind"] == "warning"]


def test_a_resumed_run_is_not_checked_again(config: RunConfig, tmp_path: Path) -> None:
    go(config)
    longer = replace(config, train=replace(config.train, max_steps=4), resume="latest")
    assert not any("label census" in text for text in go(longer))
    assert len(checks_of(tmp_path / "run")) == 3


def test_chance_that_nobody_expects_is_a_warning_for_each_stream(config: RunConfig, tmp_path: Path) -> None:
    go(replace(config, checks=ChecksConfig(), train=replace(config.train, max_steps=1)))
    warnings = [event["reason"] for event in read_events(tmp_path / "run") if event["kind"] == "warning"]
    assert len(warnings) == 2
    assert warnings[0].startswith("first loss of 'audio' is ")
    assert "set checks.expect_chance to true" in warnings[0]


def mask_the_stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label as the processor of transformers does."""
    honest = HiggsAudioV2.example

    def example(self: HiggsAudioV2, *arguments: Any, **named: Any) -> Any:
        made = honest(self, *arguments, **named)
        made.audio_labels[made.audio_labels == 1025] = -100
        return made

    monkeypatch.setattr(HiggsAudioV2, "example", example)


def test_labels_without_a_stop_token_stop_the_run_until_they_are_let_pass(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask_the_stop_token(monkeypatch)
    with pytest.raises(UserError) as caught:
        go(config)
    assert str(caught.value).startswith("checks before step 0: 'EOS' (id 1025 of the stream 'audio') in any codebook:")
    assert "never a target in 6 samples" in str(caught.value)
    assert "generation never stops" in str(caught.value)
    assert "--checks.allow_missing_targets true" in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["census.json"]
    go(replace(config, checks=replace(config.checks, allow_missing_targets=True)))
    assert "missing among the targets: 'EOS'" in checks_of(tmp_path / "run")[0]["reason"]


def test_labels_that_were_not_shifted_stop_the_run_until_they_are_let_pass(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HiggsAudioV2.collate

    def collate(self: HiggsAudioV2, examples: list[Any]) -> Any:
        batch = honest(self, examples)
        batch.labels = {s: pair._replace(positions=pair.positions + 1) for s, pair in batch.labels.items()}
        return batch

    monkeypatch.setattr(HiggsAudioV2, "collate", collate)
    with pytest.raises(
        TrainingError, match=r"causality of 'audio': LEAK, .*labels not shifted.*--checks\.allow '\[lea"
    ):
        go(config)
    go(replace(config, checks=replace(config.checks, allow=["leak"])))
    assert checks_of(tmp_path / "run")[2]["reason"] == "causality: audio LEAK, text LEAK"


def test_a_head_that_learns_nothing_stops_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HiggsAudioV2.load_model

    def load_model(self: HiggsAudioV2, *arguments: Any) -> Any:
        model: Any = honest(self, *arguments)
        torch.nn.init.zeros_(model.text_lm_head.weight)
        return model

    monkeypatch.setattr(HiggsAudioV2, "load_model", load_model)
    with pytest.raises(TrainingError) as caught:
        go(config)
    assert "first loss of 'text' is 6.6619, chance is 6.6619: DEAD, its gradient is zero in every" in str(caught.value)
    assert "trained weight; its logits are all zero (to train anyway" in str(caught.value)
    assert "causality of 'text': BLIND" in str(caught.value)
    assert "'audio'" not in str(caught.value)
    with pytest.raises(TrainingError, match="BLIND"):
        go(replace(config, checks=replace(config.checks, allow=["dead"])))
    go(replace(config, checks=replace(config.checks, allow=["dead", "blind"])))


@pytest.mark.parametrize("number", [0, -1])
def test_too_few_batches_are_refused(number: int) -> None:
    with pytest.raises(UserError, match=rf"checks\.batches is {number}: .* set checks\.enabled to false"):
        ChecksConfig(batches=number)


# -- on two ranks ------------------------------------------------------------------------------------------------


def check_rank(world: World, model: str, data: str, spoilt: str) -> tuple[str, str]:
    """Check four examples of this rank's own, something being wrong on rank 1 only."""
    family = load_family(ModelConfig(path=model))
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), world=world)
    loaded = policy.prepare(family.load_model().train())
    cache = CodeCache(Path(data) / "codes")
    samples = read_samples(str(Path(data) / "train"), DataConfig())[world.rank :: 2]
    bad = world.rank == 1

    def examples(start: int, stop: int) -> list[list[Any]]:
        if spoilt == "sample" and bad:
            raise UserError("sample 'x' is bad")
        made = [deepcopy(family.example(sample, cache)) for sample in samples]
        for example in made:
            if spoilt == "all" or (spoilt == "labels" and bad):
                example.audio_labels[example.audio_labels == 1025] = -100
        return [made[:2], made[2:]][start:stop]

    if spoilt == "weights" and bad:
        weight: Any = loaded.get_parameter("text_lm_head.weight")
        torch.nn.init.constant_(weight, float("nan"))
    config = ChecksConfig(expect_chance=True)
    module = LossModule(loaded, family.losses)
    try:
        report = run_checks(config, family, module, examples, policy.autocast, world)
        world.on_all_ranks(report.stop_if_wrong, only_main=True)
    except RawloopError as error:
        return type(error).__name__, str(error)
    return "passed", report.text()


WRONG_ON_ONE = {
    "nothing": ("passed", "label census of 8 samples"),
    "sample": ("UserError", "sample 'x' is bad"),
    "weights": ("TrainingError", "first loss of 'text' is nan, chance is 6.6619: DEAD, its loss is not finite"),
    "labels": ("passed", "4 in each of 8"),  # half the targets of the other rank's samples: decided together
    "all": ("UserError", "'EOS' (id 1025 of the stream 'audio') in any codebook: never a target in 8 samples"),
}


def train_rank(world: World, config: RunConfig, spoil: bool) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if spoil:
            mask_the_stop_token(monkeypatch)
        try:
            go(config, world)
        except RawloopError as error:
            return str(error)
    return "trained"


def check_all(world: World, config: RunConfig, data: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    checked = {spoilt: check_rank(world, config.model.path, data, spoilt) for spoilt in WRONG_ON_ONE}
    return checked, [train_rank(world, config, spoil) for spoil in (True, False)]


def test_two_ranks_decide_together(
    config: RunConfig, demo_data: Path, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    config = replace(config, train=TrainConfig(1, 2, max_steps=2, log_every=1))
    both = run_ranks(check_all, config, str(demo_data), timeout=240)
    for spoilt, (kind, message) in WRONG_ON_ONE.items():
        for found in (checked[spoilt] for checked, _ in both):
            assert found[0] == kind, spoilt
            assert message in found[1], spoilt
    assert both[0][0]["sample"][1] == "rank 1: sample 'x' is bad"
    for _, (stopped, trained) in both:
        assert "'EOS' (id 1025" in stopped
        assert trained == "trained"
    assert len(checks_of(tmp_path / "run")) == 3  # rank 0 speaks for all


@pytest.mark.parametrize("method", ["losses", "logits", "pieces", "perturb"])
def test_an_error_inside_the_checks_names_the_samples(
    method: str,
    family: HiggsAudioV2,
    module: LossModule,
    trained_samples: list[Any],
    cache: CodeCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise IndexError("index 9 is out of bounds")

    monkeypatch.setattr(family, method, broken)
    monkeypatch.setattr(module, "losses", family.losses)
    chosen = trained_samples[2]
    examples = [[family.example(chosen, cache)]]
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), torch.device("cpu"))
    with pytest.raises(IndexError) as caught:
        run_checks(
            ChecksConfig(batches=1), family, module, lambda start, stop: examples[start:stop], policy.autocast, World()
        )
    assert caught.value.__notes__ == [f"in the checks before step 0, on the samples {chosen.id}"]


class NoFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to make float64 of other numbers, as Apple GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if given and all(value.dtype != torch.float64 for value in given):
            made = [value.dtype for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
            assert torch.float64 not in made, f"{func} makes float64, which no Apple GPU has"
        return out


def test_a_run_asks_no_device_for_float64(config: RunConfig) -> None:
    with NoFloat64():  # type: ignore[no-untyped-call]
        with pytest.raises(AssertionError, match="no Apple GPU has"):
            torch.ones(1).double()
        assert "CHANCE" in "".join(go(replace(config, evaluation=EvaluationConfig(every=2))))
