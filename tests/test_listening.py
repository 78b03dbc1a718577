"""Listening while it trains: it changes nothing of the training, measures what it hears, and no rank waits for ever."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.dist import World
from rawloop.errors import Preempted, RawloopError, UserError
from rawloop.listen.config import ListenConfig
from rawloop.listening import recogniser
from rawloop.records import TIMES, read_metrics
from rawloop.report import one
from rawloop.run import Run
from rawloop.settings import EvaluationConfig, SamplingConfig
from tests.kept_runs import go, trained


@pytest.fixture
def base(text_run: RunConfig, tmp_path: Path) -> RunConfig:
    """The run of the tiny Llama, evaluated before and after its 3 steps."""
    return replace(text_run, output=str(tmp_path / "run"), evaluation=EvaluationConfig(every=3))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run has recorded, without times and without what was heard."""
    return [
        {name: value for name, value in line.items() if name not in TIMES and not name.startswith("listen/")}
        for line in read_metrics(folder)
    ]


def heard_in(folder: Path) -> dict[int, dict[str, Any]]:
    lines = [line for line in read_metrics(folder) if "listen/stopped" in line]
    return {int(line["step"] or 0): {k: v for k, v in line.items() if k.startswith("listen/")} for line in lines}


def test_training_is_the_same_bit_for_bit_with_and_without(base: RunConfig, tmp_path: Path) -> None:
    silent = go(base)
    listen = ListenConfig(samples=5, sampling=SamplingConfig(temperature=1.0))
    heard = go(replace(base, output=str(tmp_path / "heard"), listen=listen))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "heard")
    assert trained(silent).keys() == trained(heard).keys()
    assert all(torch.equal(weight, trained(heard)[name]) for name, weight in trained(silent).items())
    assert list(heard_in(tmp_path / "heard")) == [0, 3]
    assert not heard_in(tmp_path / "run")
    page = one.report(tmp_path / "heard")
    assert "What it writes" in page
    assert "step 3" in page


def refused(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        build_run(config, World(), lambda line: None)
    return str(caught.value)


def test_what_cannot_be_heard_is_refused_before_training(base: RunConfig, tmp_path: Path) -> None:
    some = ListenConfig(samples=1)
    assert "evaluation.enabled is false" in refused(
        replace(base, listen=some, evaluation=EvaluationConfig(enabled=False))
    )
    best = EvaluationConfig(every=1, best_metric="listen/stoped", best_mode="max")
    assert "there is no prompt: set listen.samples" in refused(replace(base, evaluation=best))
    assert "(did you mean 'listen/stopped'?)" in refused(replace(base, evaluation=best, listen=some))
    best = replace(best, best_metric="listen/stopped")
    assert "listen.every is 2: set it to 1" in refused(replace(base, evaluation=best, listen=replace(some, every=2)))
    assert "'no.txt' cannot be read" in refused(replace(base, listen=ListenConfig(prompts="no.txt")))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def listens_on_ranks(world: World, config: RunConfig, folder: str) -> tuple[list[dict[str, float]], list[str], str]:
    """Listen on two ranks: as it is; then with an error on rank 1; then with a stop that only rank 1 sees."""
    run: Run = build_run(replace(config, output=folder), world, lambda line: None)
    listener = run.listener
    assert listener is not None
    try:
        heard, clips = zip(*(listener.listen() for _ in range(2)), strict=True)
        assert [one.place for one in clips[0]] == list(range(5))
        reasons = []
        with pytest.raises(Preempted) as stopped:
            listener.listen(lambda: "a signal" if world.rank else None)
        reasons.append(str(stopped.value))
        if world.rank:
            listener.family.generate = lambda *_: 1 / 0  # type: ignore[method-assign, assignment]
        with pytest.raises((RawloopError, ZeroDivisionError)) as failed:
            listener.listen()
        reasons.append(f"{type(failed.value).__name__}: {failed.value}")
        return list(heard), reasons, str(world.sum([1.0]))  # the ranks are still in step
    finally:
        run.close()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_share_the_prompts_and_no_rank_waits_for_one_that_fails(
    base: RunConfig, run_ranks: Callable[..., list[Any]], tmp_path: Path, parallel: Any
) -> None:
    config = replace(
        base, parallel=parallel, listen=ListenConfig(samples=5), checkpoint=CheckpointConfig(save_every=1000)
    )
    (one_heard, one_said, one_sum), (two_heard, two_said, two_sum) = run_ranks(
        listens_on_ranks, config, str(tmp_path / "ranks")
    )
    assert one_heard == two_heard
    first, second = ({k: v for k, v in found.items() if k != "listen/seconds"} for found in one_heard)
    assert first == second  # the seed is the same at every evaluation
    assert one_said == ["a signal on rank 1", "RawloopError: rank 1 failed: ZeroDivisionError: division by zero"]
    assert two_said[0] == one_said[0]
    assert two_said[1].startswith("ZeroDivisionError")
    assert one_sum == two_sum == "[2.0]"
    alone = build_run(replace(config, output=str(tmp_path / "alone")), World(), lambda line: None)
    try:
        assert alone.listener is not None
        whole = alone.listener.listen()[0]
    finally:
        alone.close()
    # greedy, as the model's own settings are: the same on any number of ranks
    assert whole == {**first, "listen/seconds": pytest.approx(whole["listen/seconds"])}
    assert math.isfinite(whole["listen/length_ratio"])


def train_on_ranks(world: World, configs: Sequence[RunConfig]) -> None:
    for config in configs:
        go(config, world)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_sharded_run_hears_what_an_unsharded_one_does_and_trains_as_without(
    base: RunConfig, run_ranks: Callable[..., list[Any]], tmp_path: Path, mode: Any
) -> None:
    listen = ListenConfig(samples=5, sampling=SamplingConfig(temperature=1.0))
    base = replace(base, adapter=AdapterConfig(mode=mode, rank=4))
    runs = {
        "ddp": replace(base, listen=listen),
        "fsdp": replace(base, listen=listen, parallel="fsdp"),
        "silent": replace(base, parallel="fsdp"),
    }
    run_ranks(train_on_ranks, [replace(config, output=str(tmp_path / name)) for name, config in runs.items()])
    assert metrics_of(tmp_path / "fsdp") == metrics_of(tmp_path / "silent")
    heard = {name: [p.read_text() for p in sorted((tmp_path / name / "listen").rglob("*.json"))] for name in runs}
    assert heard["fsdp"] == heard["ddp"] != []
    first, second = (heard_in(tmp_path / name) for name in ("ddp", "fsdp"))
    assert list(first) == list(second) == [0, 3]
    for step, metrics in first.items():
        assert second[step] == {**metrics, "listen/seconds": second[step]["listen/seconds"]}


def test_a_model_of_transformers_transcribes_and_another_is_refused(text_checkpoint: Path, tmp_path: Path) -> None:
    """A tiny recogniser with random weights, which hears 16 kHz: the clip is resampled to that."""
    (tmp_path / "vocab.json").write_text(json.dumps({letter: k for k, letter in enumerate(["<pad>", "|", *"abc"])}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), unk_token="<pad>")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Wav2Vec2Config(vocab_size=5, conv_dim=[8] * 7, num_conv_pos_embeddings=4, pad_token_id=0, **sizes)
    config.num_conv_pos_embedding_groups = 2
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    recognised = recogniser(str(tmp_path), torch.device("cpu"))
    assert set(recognised(torch.randn(24_000), 24_000)) <= {*"abc "}
    with pytest.raises(UserError, match=r"listen\.transcriber is '.*', whose model cannot be loaded"):
        recogniser(str(text_checkpoint), torch.device("cpu"))


class StopsWhileListening:
    """Asks to stop at the first batch of prompts: after the two batches of the evaluation."""

    calls = 0

    def wanted(self) -> str | None:
        self.calls += 1
        return "a signal" if self.calls == 3 else None


def test_a_stop_while_listening_saves_and_the_resumed_run_listens_again(base: RunConfig, tmp_path: Path) -> None:
    config = replace(base, listen=ListenConfig(samples=2), checkpoint=CheckpointConfig(save_every=1000))
    whole = go(replace(config, output=str(tmp_path / "whole")))

    def stop(run: Run) -> None:
        run.preemption = StopsWhileListening()  # type: ignore[assignment]

    with pytest.raises(Preempted, match=r"stopped by a signal at step 0; checkpoint: .*step-00000000"):
        go(config, change=stop)
    assert not heard_in(tmp_path / "run")
    resumed = go(replace(config, resume="latest"))
    times = ("listen/seconds",)
    first, second = (heard_in(tmp_path / name) for name in ("run", "whole"))
    assert list(first) == [0, 3]
    for step, metrics in first.items():
        assert {k: v for k, v in metrics.items() if k not in times} == {
            k: v for k, v in second[step].items() if k not in times
        }
    assert all(torch.equal(weight, trained(resumed)[name]) for name, weight in trained(whole).items())
