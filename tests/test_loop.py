"""What defines the loop: resume equals uninterrupted, N x 1 equals 1 x N, two processes equal one, nothing hides."""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.slots import find_slots
from rawloop.config import RunConfig
from rawloop.contracts import Batch, StreamLoss
from rawloop.data import DataConfig
from rawloop.data.samples import read_samples
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import InterruptedUpdate, RawloopError, TrainingError, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig, load_family
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.loop import Run, TrainConfig, train
from rawloop.losses import LossModule, weighted_mean
from rawloop.optim import OptimConfig, lr_at
from rawloop.precision.config import PrecisionConfig
from rawloop.records import read_events, read_metrics
from rawloop.settings import DDPConfig
from rawloop.watch.config import WatchConfig
from tests.kept_runs import go


@pytest.fixture(scope="module")
def base(demo_checkpoint: Path, demo_data: Path) -> RunConfig:
    """A run of 6 steps on a part of the demo, without the checks before step 0."""
    return RunConfig(
        device="cpu",
        model=ModelConfig(path=str(demo_checkpoint / "model")),
        adapter=AdapterConfig(rank=4, dropout=0.1),
        data=DataConfig(str(demo_data / "train"), str(demo_data / "eval"), str(demo_data / "codes")),
        train=TrainConfig(batch_size=2, accumulation=2, max_steps=6, log_every=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(save_every=2, keep_last=0),
    )


@pytest.fixture(scope="module")
def text(base: RunConfig, text_checkpoint: Path, text_data: Path) -> RunConfig:
    """The same run on texts, with a smaller model."""
    data = DataConfig(str(text_data / "train.jsonl"), str(text_data / "eval.jsonl"))
    return replace(base, model=ModelConfig(path=str(text_checkpoint)), data=data)


def weights(folder: Path, slot: str = "checkpoints/step-00000006") -> dict[str, Tensor]:
    files = [*(folder / slot).glob("adapter/*.safetensors"), *(folder / slot).glob("model/*.safetensors")]
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_metrics(folder) if key in line]  # type: ignore[misc]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


# FP16 is slow on the CPU, and tests/test_resume.py has the modes too
@pytest.mark.parametrize(
    "mode", ["fp32", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("bf16", "amp_fp16", "native_fp16"))]
)
def test_resume_equals_uninterrupted_bit_for_bit(base: RunConfig, tmp_path: Path, mode: Any) -> None:
    total, stops = (6, (2, 4)) if mode == "fp32" else (4, (2,))  # FP16 products are slow on a CPU
    straight = replace(base, output=str(tmp_path / "straight"), precision=PrecisionConfig(mode=mode))
    straight = replace(straight, train=replace(base.train, max_steps=total), checks=ChecksConfig(expect_chance=True))
    slot = f"checkpoints/step-{total:08d}"
    go(straight)
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        stopped = replace(straight, output=str(folder))

        def end_early(run: Run, stop: int = stop) -> None:
            run.total_steps = stop

        go(stopped, change=end_early)
        go(replace(stopped, resume="latest"))
        assert same(weights(folder, slot), weights(tmp_path / "straight", slot))
        state = f"{slot}/state"
        optimizers = [load_file(path / state / "optimizer.safetensors") for path in (folder, tmp_path / "straight")]
        assert same(*optimizers)
        for key in ("loss", "grad_norm", "lr", "eval_loss", "loss/audio/3"):
            assert losses(folder, key) == losses(tmp_path / "straight", key)


@pytest.mark.parametrize("mode", ["fp32", pytest.param("native_fp16", marks=pytest.mark.slow)])
def test_full_fine_tuning_resumes_bit_for_bit(base: RunConfig, tmp_path: Path, mode: Any) -> None:
    base = replace(base, precision=PrecisionConfig(mode=mode))
    full = replace(
        base, adapter=AdapterConfig(mode="full", freeze=["model.embed_tokens.*"]), output=str(tmp_path / "a")
    )
    full = replace(full, train=replace(base.train, max_steps=4, accumulation=1))
    go(full)

    def end_early(run: Run) -> None:
        run.total_steps = 2

    other = replace(full, output=str(tmp_path / "b"))
    go(other, change=end_early)
    go(replace(other, resume="latest"))
    slot = "checkpoints/step-00000004"
    trained = weights(tmp_path / "a", slot)
    assert same(trained, weights(tmp_path / "b", slot))
    loaded: Any = load_family(base.model).load_model(str(tmp_path / "a" / slot / "model"))
    original: Any = load_family(base.model).load_model()
    frozen = loaded.model.embed_tokens.weight
    assert torch.equal(frozen, original.model.embed_tokens.weight.to(frozen.dtype))
    assert not torch.equal(loaded.audio_lm_head.weight, original.audio_lm_head.weight)


@pytest.mark.parametrize("sizes", [(1, 4), (2, 2)])
def test_accumulation_equals_one_large_batch(base: RunConfig, tmp_path: Path, sizes: tuple[int, int]) -> None:
    plain = replace(base, adapter=AdapterConfig(rank=4), evaluation=EvaluationConfig(enabled=False))
    go(replace(plain, train=TrainConfig(4, 1, max_steps=3, log_every=1), output=str(tmp_path / "large")))
    go(replace(plain, train=TrainConfig(*sizes, max_steps=3, log_every=1), output=str(tmp_path / "split")))
    large, split = losses(tmp_path / "large"), losses(tmp_path / "split")
    assert split == pytest.approx(large, rel=1e-6)
    assert losses(tmp_path / "split", "grad_norm") == pytest.approx(losses(tmp_path / "large", "grad_norm"), rel=1e-5)


def train_rank(world: World, config: RunConfig) -> None:
    go(config, world)


def test_two_processes_equal_one(base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    plain = replace(base, adapter=AdapterConfig(rank=4), evaluation=EvaluationConfig(every=1))
    go(replace(plain, train=TrainConfig(2, 2, max_steps=3, log_every=1), output=str(tmp_path / "one")))
    two = replace(plain, train=TrainConfig(1, 2, max_steps=3, log_every=1), output=str(tmp_path / "two"))
    run_ranks(train_rank, two)
    for key in ("loss", "loss/text", "grad_norm", "eval_loss"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), rel=2e-6)
    first, second = (weights(tmp_path / name, "checkpoints/step-00000003") for name in ("one", "two"))
    for name, tensor in first.items():  # Adam turns rounding of tiny gradients into steps: a share of lr, not of w
        assert (tensor - second[name]).abs().max() < 1e-4


def test_a_checkpoint_of_two_processes_continues_on_one(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    plain = replace(base, adapter=AdapterConfig(rank=4), output=str(tmp_path / "run"))
    run_ranks(train_rank, replace(plain, train=TrainConfig(1, 2, max_steps=2, log_every=1)))
    go(replace(plain, train=TrainConfig(2, 2, max_steps=4, log_every=1), resume="latest"))
    assert len(losses(tmp_path / "run")) == 4
    assert any("starts afresh" in event["reason"] for event in read_events(tmp_path / "run")) is False


class Poisoned:
    """The family's losses, with one micro-batch's loss made NaN on request."""

    def __init__(self, losses: Callable[[nn.Module, Batch], dict[str, StreamLoss]], calls: set[int]) -> None:
        self.losses, self.calls, self.call = losses, calls, -1

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        result = self.losses(model, batch)
        self.call += model.training
        if model.training and self.call in self.calls:
            first = next(iter(result))
            result[first] = result[first]._replace(total=result[first].total * math.nan)
        return result


def poison(run: Run, calls: set[int]) -> None:
    module = run.module
    assert isinstance(module, LossModule)
    module.losses = Poisoned(module.losses, calls)


def test_a_step_that_is_not_finite_is_skipped_and_told(base: RunConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path), evaluation=EvaluationConfig(enabled=False))
    run = go(config, change=lambda run: poison(run, {3}))  # second micro-batch of the second window
    assert (run.state.step, run.state.window, run.state.skipped) == (6, 7, 1)
    (event,) = [event for event in read_events(tmp_path) if event["kind"] == "skip"]
    assert event["step"] == 1
    assert "nan" in event["reason"]
    assert len(event["samples"]) == 4
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == [lr_at(step, 6, base.optim) for step in range(6)]  # waited for it
    assert math.isnan(float(lines[1]["loss"] or 0))  # the poisoned loss is shown, not hidden
    assert all(math.isfinite(float(line["loss"] or 0)) for line in lines[2:])
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_a_stream_without_a_weight_is_not_left_out_of_the_loss() -> None:
    losses = {stream: StreamLoss(torch.ones(()), 1) for stream in ("text", "aux")}
    with pytest.raises(UserError, match=r"the stream 'aux', which has no weight: stream_weights are for text"):
        weighted_mean(losses, {"text": 1.0}, {"text": 1}, 1)


def test_endless_nan_ends_the_run_and_keeps_what_was_saved(text: RunConfig, tmp_path: Path) -> None:
    config = replace(text, output=str(tmp_path), precision=PrecisionConfig(mode="fp32", max_skips=4))
    with pytest.raises(TrainingError, match="4 steps in a row had losses that are not finite"):
        go(config, change=lambda run: poison(run, set(range(4, 100))))
    assert [slot.name for slot in find_slots(tmp_path)] == ["step-00000002", "step-00000000"]  # the second is the best


def fallback_config(base: RunConfig, output: Path) -> RunConfig:
    """Native FP16 that may go on in bfloat16, given up after two bad losses; saves at each step."""
    precision = PrecisionConfig(mode="native_fp16", fallback=["bf16", "fp32"], max_nonfinite_losses=2)
    plain = replace(base, output=str(output), precision=precision, train=TrainConfig(1, 1, max_steps=5, log_every=1))
    plain = replace(plain, watch=WatchConfig(enabled=False))  # `poison` counts passes, and a trace repeats them
    return replace(plain, evaluation=EvaluationConfig(enabled=False), checkpoint=CheckpointConfig(1, 0))


def test_a_run_falls_back_says_so_and_resumes_in_the_mode_it_fell_back_to(base: RunConfig, tmp_path: Path) -> None:
    straight, stopped = (fallback_config(base, tmp_path / name) for name in ("straight", "stopped"))
    run = go(straight, change=lambda run: poison(run, {2, 3}))
    assert (run.state.step, run.state.window, run.state.skipped) == (5, 7, 2)
    assert run.policy.name == "bf16"
    events = read_events(tmp_path / "straight")
    (event,) = [event for event in events if event["kind"] == "fallback"]
    assert event["step"] == 2
    assert event["change"] == "native_fp16 -> bf16"
    assert event["reason"] == "fell back from native_fp16: 2 losses in a row were not finite"
    lines = read_metrics(tmp_path / "straight")
    assert [line.get("precision") for line in lines] == ["native_fp16", "native_fp16", "bf16", "bf16", "bf16", "bf16"]
    assert [line.get("loss_scale") for line in lines[:2]] == [2.0**15] * 2
    assert lines[2] == {"step": 2, "precision": "bf16", "fallback": "native_fp16 -> bf16"}
    stored = json.loads((tmp_path / "straight/checkpoints/step-00000003/state/precision.json").read_text())
    assert (stored["mode"], stored["reason"]) == ("bf16", event["reason"])

    def end_early(run: Run) -> None:
        poison(run, {2, 3})
        run.total_steps = 3

    go(stopped, change=end_early)
    resumed = go(replace(stopped, resume="latest"))
    assert (resumed.policy.name, resumed.policy.chain.remaining) == ("bf16", ["fp32"])
    slot = "checkpoints/step-00000005"
    assert same(weights(tmp_path / "straight", slot), weights(tmp_path / "stopped", slot))
    assert losses(tmp_path / "straight")[3:] == losses(tmp_path / "stopped")[3:]
    older = replace(straight, resume=str(tmp_path / "straight/checkpoints/step-00000001"))
    assert go(older).policy.name == "native_fp16"  # what was saved before the fallback is of the mode before it


def test_a_mode_that_is_fallen_back_to_is_tried_before_it_is_gone_on_in(base: RunConfig, tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=4, modules_to_save=["audio_lm_head"])  # float32, beside FP16 hidden states
    precision = PrecisionConfig(mode="amp_fp16", fallback=["native_fp16", "fp32"], max_nonfinite_losses=2)
    config = replace(fallback_config(base, tmp_path), precision=precision, adapter=adapter)
    run = go(config, change=lambda run: poison(run, {2, 3}))
    assert (run.policy.name, run.state.step) == ("fp32", 5)
    (event,) = [event for event in read_events(tmp_path) if event["kind"] == "fallback"]
    assert event["change"] == "amp_fp16 -> native_fp16 -> fp32"
    assert event["reason"].startswith("fell back from native_fp16: the cpu cannot run the model in it: ")
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, "checkpoints/step-00000005").values())
    held = {id(p) for _, p in run.policy.named_parameters()}
    assert {id(p) for p in run.optimizer.state} == held


def test_a_mode_that_cannot_run_the_model_is_found_before_training(base: RunConfig, tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=4, modules_to_save=["audio_lm_head"])
    config = replace(fallback_config(base, tmp_path), adapter=adapter, precision=PrecisionConfig(mode="native_fp16"))
    said: list[str] = []
    with pytest.raises(UserError, match=r"^precision\.mode is 'native_fp16', in which the cpu cannot run this model"):
        build_run(config, World(), said.append)
    assert not (tmp_path / "events.jsonl").exists()
    run = build_run(replace(config, precision=PrecisionConfig("native_fp16", ["bf16"])), World(), said.append)
    run.close()
    assert run.policy.name == "bf16"
    (line,) = [line for line in said if line.startswith("precision: ")]
    assert line.startswith("precision: bf16 (fell back from native_fp16")


@pytest.mark.parametrize(
    ("precision", "masters", "scaled"),
    [(PrecisionConfig("fp32"), False, False), (PrecisionConfig("native_fp16", trainable_dtype="fp16"), True, True)],
    ids=["fp32", "native_fp16"],
)
def test_a_run_says_what_its_policy_does_by_itself(
    base: RunConfig, tmp_path: Path, precision: PrecisionConfig, masters: bool, scaled: bool
) -> None:
    said: list[str] = []
    run = build_run(replace(fallback_config(base, tmp_path), precision=precision), World(), said.append)
    run.close()
    (line,) = [line for line in said if line.startswith("precision: ")]
    assert (f" {len(run.policy.trained.masters)} trained weights in torch.float16 have float32" in line) == masters
    assert (f"; the loss is multiplied by a scale, now {2.0**15:g} and never below 1, because" in line) == scaled
    (event,) = [event for event in read_events(tmp_path) if event["kind"] == "precision"]
    assert len(event["remedies"]) == masters + scaled


def fall_back_on_a_rank(world: World, config: RunConfig) -> tuple[str, dict[str, Tensor], bool]:
    """Losses of rank 1 alone are not finite; both fall back, and a DDP of the new mode trains on, the old one gone."""
    run = build_run(config, world, lambda line: None)
    before, kind, wrap = ref(run.module), type(run.module), run.wrap
    assert wrap is not None
    gone = []

    def again() -> nn.Module:
        gone.append(before() is None)
        return wrap()

    run.wrap = again
    losses: Any = run.module.get_submodule("module")
    if world.rank == 1:
        losses.losses = Poisoned(losses.losses, {1, 2})
    try:
        train(run)
    finally:
        run.close()
    trained = {name: weight.detach().clone() for name, weight in run.policy.named_parameters()}
    return run.policy.name, trained, gone == [True] and type(run.module) is kind


def test_two_ranks_fall_back_together(base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(fall_back_on_a_rank, fallback_config(base, tmp_path / "run"))
    assert first[0] == second[0] == "bf16"
    assert same(first[1], second[1])
    assert first[2]
    assert second[2]
    (event,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "fallback"]
    assert "2 losses in a row were not finite" in event["reason"]


def test_a_failure_inside_an_update_names_the_checkpoint_to_go_on_from(text: RunConfig, tmp_path: Path) -> None:
    def fail(run: Run) -> None:
        step = run.optimizer.step

        def third(*_: Any) -> None:
            if run.state.step == 2:
                raise RuntimeError("a kernel failed")
            step()

        run.optimizer.step = third  # type: ignore[method-assign, assignment]

    config = replace(text, output=str(tmp_path), evaluation=EvaluationConfig(enabled=False))
    with pytest.raises(InterruptedUpdate, match=r"must not be used; continue from it with --resume .*2 \(the step"):
        go(config, change=fail)
    config = replace(config, output=str(tmp_path / "new"), checkpoint=CheckpointConfig(0))
    with pytest.raises(InterruptedUpdate, match="must not be used; nothing was saved yet: start anew"):
        go(config, change=fail)


def test_trainables_without_masters_are_an_event(base: RunConfig, tmp_path: Path) -> None:
    precision = PrecisionConfig(mode="bf16", trainable_dtype="bf16", masters="none")
    config = replace(base, output=str(tmp_path), precision=precision, train=TrainConfig(1, 1, max_steps=1))
    go(replace(config, evaluation=EvaluationConfig(enabled=False), optim=OptimConfig(lr=1e-6)))
    (event,) = [event for event in read_events(tmp_path) if event["kind"] == "warning"]
    assert event["reason"].startswith("torch.bfloat16 weights are trained without masters: at a learning rate of 1e-06")


@pytest.mark.parametrize(("every", "save"), [(3, 2), (1, 4), (4, 1), (100, 100)])
def test_evaluation_and_saving_never_meet(text: RunConfig, tmp_path: Path, every: int, save: int) -> None:
    config = replace(text, output=str(tmp_path), train=TrainConfig(1, 1, max_steps=5))
    config = replace(config, evaluation=EvaluationConfig(every=every), checkpoint=CheckpointConfig(save, 0))
    go(config)
    evaluated = [line["step"] for line in read_metrics(tmp_path) if "eval_loss" in line]
    assert evaluated == sorted({0, 5, *range(0, 6, every)})
    saved = sorted(int(slot.name[-8:]) for slot in find_slots(tmp_path))
    measured: list[Any] = [(line["eval_loss"], line["step"]) for line in read_metrics(tmp_path) if "eval_loss" in line]
    won = [step for n, (loss, step) in enumerate(measured) if all(loss < earlier for earlier, _ in measured[:n])]
    assert saved == sorted({5, *range(save, 6, save), *won})
    assert len([event for event in read_events(tmp_path) if event["kind"] == "save"]) == len(saved)  # each once
    assert f'"step": {won[-1]},' in (tmp_path / "best.json").read_text()
    assert (tmp_path / "best" / "adapter" / "adapter_model.safetensors").is_file()


def test_training_stops_when_the_evaluation_does_not_improve(text: RunConfig, tmp_path: Path) -> None:
    worse = replace(text, output=str(tmp_path), optim=OptimConfig(lr=0.3), train=TrainConfig(1, 1, max_steps=9))
    worse = replace(worse, evaluation=EvaluationConfig(every=1, patience=2), checkpoint=CheckpointConfig(5))
    run = go(worse)
    assert run.best is not None
    best, end = run.best.step or 0, run.state.step
    assert end == best + 2
    assert end < 9
    stops = [event["reason"] for event in read_events(tmp_path) if event["kind"] == "stop"]
    assert stops == [f"eval_loss has not improved in 2 evaluations since step {best}"]
    assert {f"step-{end:08d}", f"step-{best:08d}"} <= {slot.name for slot in find_slots(tmp_path)}
    assert go(replace(worse, resume="latest")).state.step == end
    patient = replace(worse, resume="latest", evaluation=EvaluationConfig(every=1, patience=4))
    assert go(patient).state.step > end


def test_the_best_metric_is_chosen_by_name(text: RunConfig, tmp_path: Path) -> None:
    short = replace(text, train=TrainConfig(1, 1, max_steps=2))
    chosen = EvaluationConfig(every=1, best_metric="eval_loss/text", best_mode="max")
    go(replace(short, output=str(tmp_path / "a"), evaluation=chosen))
    values = {line["step"]: line["eval_loss/text"] for line in read_metrics(tmp_path / "a") if "eval_loss" in line}
    best = json.loads((tmp_path / "a" / "best.json").read_text())
    assert best["metric"] == "eval_loss/text"
    assert best["value"] == max(values.values())  # type: ignore[type-var]
    mistyped = replace(short, output=str(tmp_path / "b"), evaluation=EvaluationConfig(best_metric="eval_los/text"))
    with pytest.raises(
        UserError, match=r"best_metric is 'eval_los/text', which .* measure \(did you mean 'eval_loss/text'"
    ):
        go(mistyped)


def test_saving_beside_training_and_before_it_write_the_same_and_train_the_same(
    text: RunConfig, tmp_path: Path
) -> None:
    files = []
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        go(replace(text, output=str(folder), checkpoint=CheckpointConfig(2, 0, asynchronous=asynchronous)))
        paths = [
            path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".json", ".safetensors")
        ]
        settings = ("config.json", "MANIFEST.json")  # of which asynchronous saving is one, and their digests
        files.append({str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name not in settings})
        files[-1]["losses"] = repr(losses(folder)).encode()
    assert len(files[0]) > 30
    assert files[0] == files[1]


def test_a_best_model_that_could_not_be_written_is_not_the_best(text: RunConfig, tmp_path: Path) -> None:
    def refuse_best(run: Run) -> None:
        assert run.checkpoints is not None
        part = run.checkpoints.parts.folders["model"]
        snapshot = part.snapshot

        def refused(copy: bool) -> Callable[[Path], None]:
            def write(folder: Path) -> None:
                raise OSError(28, "No space left on device")

            return write if run.state.step == 2 else snapshot(copy)

        part.snapshot = refused  # type: ignore[method-assign]

    config = replace(text, output=str(tmp_path), checkpoint=CheckpointConfig(0, save_at_end=False))
    run = go(config, change=refuse_best)
    assert run.best is not None
    assert run.best.step == 6
    assert len([event for event in read_events(tmp_path) if event["kind"] == "best"]) == 3  # at 0, 4 and 6
    assert run.checkpoints is not None
    assert run.checkpoints.best_record() == run.best.record


def test_without_evaluation_nothing_else_changes(text: RunConfig, tmp_path: Path) -> None:
    go(replace(text, output=str(tmp_path / "with")))
    data = replace(text.data, eval=None)
    go(replace(text, output=str(tmp_path / "without"), evaluation=EvaluationConfig(enabled=False), data=data))
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert not (tmp_path / "without" / "best").exists()
    assert not losses(tmp_path / "without", "eval_loss")


def fail_on_rank_1(world: World, config: RunConfig) -> str:
    run = build_run(config, world, lambda line: None)
    if world.rank == 1:
        windows = run.windows

        def broken(window: int) -> Iterator[list[Batch]]:
            yield next(iter(windows(window)))
            raise UserError("sample 'x' is bad")

        run.windows = broken
    try:
        train(run)
    except UserError as error:
        return f"{run.state.step}: {error}"
    finally:
        run.close()
    return "trained"


def test_a_bad_sample_on_one_rank_ends_all_ranks_with_its_name(
    text: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    config = replace(text, output=str(tmp_path / "run"), evaluation=EvaluationConfig(enabled=False))
    first, second = run_ranks(fail_on_rank_1, config, timeout=240)
    assert first == "1: rank 1: sample 'x' is bad"
    assert second == "1: sample 'x' is bad"


def test_the_loss_of_a_log_line_is_the_mean_since_the_last(base: RunConfig, tmp_path: Path) -> None:
    plain = replace(base, evaluation=EvaluationConfig(enabled=False))
    go(replace(plain, output=str(tmp_path / "each"), train=TrainConfig(2, 1, max_steps=4, log_every=1)))
    go(replace(plain, output=str(tmp_path / "pairs"), train=TrainConfig(2, 1, max_steps=4, log_every=2)))
    each, pairs = losses(tmp_path / "each", "loss/text"), losses(tmp_path / "pairs", "loss/text")
    # every window has two text targets per sample, so the mean over targets is the mean of the two steps
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-6)
    parts = [losses(tmp_path / "each", f"loss/audio/{k}")[0] for k in range(8)]
    assert sum(parts) / 8 == pytest.approx(losses(tmp_path / "each", "loss/audio")[0], rel=1e-6)


def test_the_weight_of_a_stream_scales_its_gradient(base: RunConfig, tmp_path: Path) -> None:
    alone = AdapterConfig(mode="full", freeze=["model.*", "audio_lm_head.*"])  # text_lm_head learns from text only
    plain = replace(base, adapter=alone, train=TrainConfig(2, 1, max_steps=1))
    plain = replace(plain, evaluation=EvaluationConfig(enabled=False), checkpoint=CheckpointConfig(0))
    for weight in (1.0, 0.25):
        model = replace(base.model, stream_weights={"text": weight})
        go(replace(plain, output=str(tmp_path / str(weight)), model=model))
    whole, quarter = (read_metrics(tmp_path / name)[0] for name in ("1.0", "0.25"))
    assert quarter["grad_norm"] == pytest.approx(0.25 * float(whole["grad_norm"] or 0), rel=1e-5)
    assert quarter["loss/text"] == whole["loss/text"]
    difference = float(whole["loss"] or 0) - float(quarter["loss"] or 0)
    assert difference == pytest.approx(0.75 * float(whole["loss/text"] or 0), rel=1e-5)


def train_variants(world: World, configs: list[RunConfig]) -> None:
    for config in configs:
        go(config, world)


@pytest.mark.slow
def test_switches_of_ddp_and_activation_checkpointing_change_no_loss(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    plain = replace(base, train=TrainConfig(2, 1, max_steps=3, log_every=1), evaluation=EvaluationConfig(enabled=False))
    variants = {
        "default": plain,
        "unused": replace(plain, ddp=DDPConfig(find_unused_parameters=True)),
        "static": replace(plain, ddp=DDPConfig(static_graph=True)),
        "plain_buckets": replace(plain, ddp=DDPConfig(gradient_as_bucket_view=False, broadcast_buffers=True)),
        "recompute": replace(plain, model=replace(base.model, activation_checkpointing=True)),
        "recompute_unused": replace(
            plain,
            model=replace(base.model, activation_checkpointing=True),
            ddp=DDPConfig(find_unused_parameters=True),
        ),
    }
    configs = [replace(config, output=str(tmp_path / name)) for name, config in variants.items()]
    run_ranks(train_variants, configs)
    for name in variants:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "default"), rel=1e-6), name
        assert losses(tmp_path / name, "grad_norm") == pytest.approx(
            losses(tmp_path / "default", "grad_norm"), rel=1e-4
        )


HEAD = "base_model.model.text_lm_head.modules_to_save.default.weight"
UNUSED: dict[
    str, tuple[Any, tuple[int, ...], int]
] = {  # find_unused_parameters, the ranks whose text head goes unused, from which training batch on
    "used": ("auto", (), 0),
    "on one rank": ("auto", (1,), 0),
    "nowhere": ("auto", (0, 1), 0),
    "refused": (False, (1,), 0),
    "later, everywhere": (False, (0, 1), 2),
    "later, on one rank": (False, (1,), 2),
}


def train_with_unused(world: World, base: RunConfig, folder: Path, cases: list[str]) -> dict[str, Any]:
    """Per case: whether DDP looks for unused weights and the weights after training, or the error."""
    results: dict[str, Any] = {}
    scored = HiggsAudioV2.losses
    for case in cases:
        find, ranks, start = UNUSED[case]
        calls = 0

        def losses(self: HiggsAudioV2, model: nn.Module, batch: Batch, late: int = start, there: Any = ranks) -> Any:
            nonlocal calls
            result = scored(self, model, batch)
            calls += model.training
            if world.rank in there and calls > late:
                result["text"] = result["text"]._replace(total=result["text"].total.detach())
            return result

        HiggsAudioV2.losses = losses  # type: ignore[method-assign]
        config = replace(base, output=str(folder / case), ddp=DDPConfig(find_unused_parameters=find))
        config = replace(config, adapter=AdapterConfig(rank=4, modules_to_save=["text_lm_head"]))
        config = replace(config, train=TrainConfig(1, 1, max_steps=3), evaluation=EvaluationConfig(enabled=False))
        try:
            run = go(config, world)
            ddp: Any = run.module
            trained = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
            results[case] = ddp.find_unused_parameters, trained
        except (UserError, TrainingError) as error:
            if case == "later, on one rank":
                raise
            results[case] = str(error)
    return results


def test_unused_weights_are_found_before_the_first_step(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    first, second = run_ranks(train_with_unused, base, tmp_path, list(UNUSED)[:-1])
    for case, (found, where) in {
        "used": (False, None),
        "on one rank": (True, f"1 trained weights on some ranks ({HEAD})"),
        "nowhere": (True, f"1 trained weights on any rank ({HEAD})"),
    }.items():
        assert first[case][0] == second[case][0] == found
        assert same(first[case][1], second[case][1])
        said = [event["reason"] for event in read_events(tmp_path / case) if event["kind"] == "warning"]
        start = f"the first batch gives no gradient to {where}; weights that no batch uses are never trained"
        assert [reason.startswith(start) for reason in said] == [True] * (where is not None)
    assert first["refused"] == second["refused"]
    assert first["refused"].startswith(
        "ddp.find_unused_parameters is false, and the first batch gives no gradient to 1 trained weights on some ranks "
        f"({HEAD}): DDP would wait for ever, or let the ranks drift apart. Set it to true or auto, or freeze"
    )
    for result in (first, second):
        assert result["later, everywhere"].startswith(
            f"1 trained weights got no gradient in this step ({HEAD}), and ddp"
        )


def test_a_weight_that_goes_unused_on_one_rank_ends_the_run_with_its_name(
    base: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    started = time.monotonic()
    with pytest.raises(TrainingError, match=rf"^1 trained weights got no gradient in this step \({re.escape(HEAD)}\)"):
        run_ranks(train_with_unused, base, tmp_path, ["later, on one rank"])
    assert time.monotonic() - started < 60


def test_a_static_graph_with_accumulation_is_refused(text: RunConfig, tmp_path: Path) -> None:
    config = replace(text, output=str(tmp_path / "run"), ddp=DDPConfig(static_graph=True))
    with pytest.raises(UserError, match=r"static_graph is true and train\.accumulation is 2"):
        go(config)


def fail_alone(world: World, config: RunConfig, what: str) -> str:
    """One rank's data is not there, or rank 0's disk takes no more records."""
    if what == "data" and world.rank == 1:
        config = replace(config, data=replace(config.data, train="/no/such/data"))
    try:
        run = build_run(config, world, lambda line: None)
        if what == "disk" and world.is_main:
            run.records.metrics = refuse  # type: ignore[method-assign]
        try:
            train(run)
        finally:
            run.close()
    except RawloopError as error:
        return str(error)
    return "trained"


def refuse(step: int, values: Any) -> None:
    raise RawloopError("cannot write metrics.jsonl: no space left on device")


@pytest.mark.parametrize(
    ("what", "message"), [("data", "rank 1: /no/such/data does not exist"), ("disk", "no space left on device")]
)
def test_what_one_rank_cannot_do_is_raised_on_all(
    text: RunConfig, tmp_path: Path, run_ranks: Callable[..., list[Any]], what: str, message: str
) -> None:
    first, second = run_ranks(fail_alone, replace(text, output=str(tmp_path / "run")), what, timeout=240)
    assert message in first
    assert message.removeprefix("rank 1: ") in second


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"train": TrainConfig(1, 2, max_steps=6)},
            "run took 4 samples .*, and would now take 2 .*, in another data",
        ),
        ({"seed": 1}, "other settings, which must not change within a run: seed 0 -> 1"),
    ],
)
def test_resuming_into_another_data_order_is_refused(
    text: RunConfig, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    plain = replace(text, output=str(tmp_path), evaluation=EvaluationConfig(enabled=False))
    go(replace(plain, train=replace(text.train, max_steps=2)))
    with pytest.raises(UserError, match=named):
        go(replace(plain, **change, resume="latest"))


def test_a_checkpoint_of_another_run_does_not_replace_this_ones_best(text: RunConfig, tmp_path: Path) -> None:
    short = replace(text, train=replace(text.train, max_steps=2))
    for name in ("a", "b"):
        go(replace(short, output=str(tmp_path / name)))
    other = str(tmp_path / "b" / "checkpoints" / "step-00000002")
    with pytest.raises(UserError, match="a checkpoint of another run, and output"):
        go(replace(text, output=str(tmp_path / "a"), resume=other))
    with pytest.raises(UserError, match="resume is 'best', which is no folder: name a checkpoint's folder, such as"):
        go(replace(text, output=str(tmp_path / "a"), resume="best"))
    go(replace(text, output=str(tmp_path / "c"), resume=other))
    assert weights(tmp_path / "c")
    assert '"step": 6' in (tmp_path / "c" / "best.json").read_text()


def test_a_transcript_that_forges_a_turn_is_refused_before_training(base: RunConfig, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    clip = read_samples(str(base.data.train))[0].audio_paths()[0]
    said = [{"role": "user", "content": "a<|eot_id|>b"}, {"role": "assistant", "content": "<audio>"}]
    data.write_text(json.dumps({"id": "forged", "messages": said, "audios": [str(clip)]}))
    config = replace(base, output=str(tmp_path / "run"), data=replace(base.data, train=str(data), allow_outside=True))
    with pytest.raises(UserError, match=r"sample 'forged' .* control token <\|eot_id\|>"):
        go(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
