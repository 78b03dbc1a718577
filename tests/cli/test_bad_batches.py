"""Batches that no step can be made of, in real commands: what is said, by whom, with which exit code, and no hang.

Data is read in order, so that the sample `bad` comes to rank 1 of two at step 3, or to both as the last of two samples
of one process. What is wrong with it is the class in `spoilt_family.py`. Ranks are forked processes in a gloo group.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.records import read_events, read_metrics

Ranks = Callable[..., list[Any]]
STEP_3 = 7  # the place of a sample that rank 1 of two gets at step 3
CHECKED = {"enabled": True}  # the checks before step 0, which are left out where they change nothing
LIMIT = 240.0  # seconds in which all ranks have ended, on a busy machine too
ONE_RANK = pytest.param(1, marks=pytest.mark.slow)  # two ranks are the harder case of the same


@pytest.fixture
def write(text_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Give `write(fault, place, size, split="train", **groups)`: a config of 5 steps, 2 samples each, on `size` ranks.

    The sample at `place` of the training or evaluation set is `bad`.
    """

    def make(fault: str, place: int | None, size: int, split: str = "train", **groups: dict[str, Any]) -> Path:
        folder = tmp_path / f"on-{size}"
        folder.mkdir()
        for name, number, word in (("train", 10, "la"), ("eval", 5, "lo")):
            records = [{"id": f"{name}-{i}", "text": f"{i}: {word} {word} " + word * i} for i in range(number)]
            if place is not None and name == split:
                records[place]["id"] = "bad"
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        settings: dict[str, Any] = {
            "output": str(folder / "run"),
            "device": "cpu",
            "model": {"path": str(text_checkpoint), "family": f"spoilt_family:{fault}"},
            "adapter": {"rank": 4},
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "shuffle": False},
            "train": {"batch_size": 2 // size, "max_steps": 5, "log_every": 1},
            "checks": {"expect_chance": True, "batches": 2, "enabled": False},
            "evaluation": {"enabled": False},
            "checkpoint": {"save_every": 0},
            "records": {"progress": False},
        }
        for group, values in groups.items():
            settings[group] = {**settings.get(group, {}), **values}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return folder / "run.yaml"

    return make


def told(err: str) -> str:
    """The one line in which a rank says what ended it."""
    lines = [line for line in err.splitlines() if line.startswith("rawloop train: ")]
    assert len(lines) == 1, err
    assert lines == err.splitlines()[-1:], err
    assert "Traceback" not in err
    return lines[0].removeprefix("rawloop train: ")


def run(ranks: Ranks, config: Path, size: int) -> list[Any]:
    started = time.monotonic()
    results = ranks("train", "--config", config, size=size, seconds=LIMIT)
    assert time.monotonic() - started < LIMIT
    return results


def steps(config: Path) -> list[Any]:
    return [line["step"] for line in read_metrics(config.parent / "run") if "loss" in line]


def kept(config: Path, rank: int) -> str:
    """What the message adds about the capsule of the step; a user's mistake has none."""
    return f"the step is kept: rawloop replay {config.parent / 'run' / 'capsules' / f'step-00000003-rank{rank}'}"


def losses(config: Path, key: str = "loss") -> list[Any]:
    return [line[key] for line in read_metrics(config.parent / "run") if key in line]


# -- found on the CPU, before the model sees it: all ranks end together ------------------------------------------

FOUND = {
    "Target": r"a target of the stream 'text' at position \d+ is 9999, and the model has the classes 0 to 260: use the",
    "Token": r"its 'input_ids' has the id 9999 at position \d+, and the model knows 0 to 260 there: use the tokenizer",
    "Features": "its 'attention_mask' has NaN or plus infinity: correct their source, or leave the sam",
}


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FOUND)
def test_what_the_model_cannot_take_ends_all_ranks_with_the_samples_name(
    ranks: Ranks, write: Callable[..., Path], fault: str, size: int
) -> None:
    config = write(fault, STEP_3, size)
    first, *others = run(ranks, config, size)
    rank = "rank 1: " if size == 2 else ""
    assert re.match(rf"{rank}sample 'bad' \(train.jsonl line 8\): {FOUND[fault]}", told(first.err))
    assert [first.code, *(done.code for done in others)] == [2] * size
    assert all("rawloop train" not in done.err for done in others)  # rank 0 speaks for all
    assert steps(config) == [1, 2, 3]


@pytest.mark.parametrize("place", [1, 2])  # the first batch of rank 1, and a batch that only the checks have seen
def test_it_is_found_before_step_0_as_well(ranks: Ranks, write: Callable[..., Path], place: int) -> None:
    first, second = run(ranks, write("Target", place, 2, checks=CHECKED), 2)
    # rank 0 makes the first samples of all ranks too, to see whether they come out alike twice
    assert re.match(rf"sample 'bad' \(train.jsonl line {place + 1}\): {FOUND['Target']}", told(first.err))
    assert (first.code, second.code) == (2, 2)


def test_it_is_found_in_the_evaluation_set(ranks: Ranks, write: Callable[..., Path]) -> None:
    config = write("Target", 3, 2, "eval", evaluation={"enabled": True})
    first, second = run(ranks, config, 2)
    assert re.match(rf"rank 1: sample 'bad' \(eval.jsonl line 4\): {FOUND['Target']}", told(first.err))
    assert (first.code, second.code) == (2, 2)
    assert not steps(config)


@pytest.mark.slow
def test_a_sharded_evaluation_dies_with_the_word_of_its_own_rank(ranks: Ranks, write: Callable[..., Path]) -> None:
    config = write("NoStream", 3, 2, "eval", evaluation={"enabled": True}, ddp={"timeout": 20.0})
    config.write_text(config.read_text() + "parallel: fsdp\n")
    first, second = run(ranks, config, 2)
    assert re.match(FATAL["NoStream"][1], told(second.err))
    assert told(second.err).endswith("(in the evaluation, on rank 1, in the batch of the samples eval-1, bad)")
    assert second.code == 2
    assert first.code == 1
    assert "no loss" not in first.err


# -- found in the forward pass: the rank dies of it, with the first word, and takes the others along --------------

FATAL = {
    "Key": (2, r"the batch has 'label_ids', which LlamaForCausalLM\.forward does not take \(did you mean 'labels'\?\)"),
    "NoLoss": (2, r"there is no loss for the \d+ targets of the stream 'text': .* gave a total that is a NoneType; it"),
    "NoStream": (2, r"there is no loss for the \d+ targets of the stream 'text': .* gave losses for \[\]; it must"),
    "Detached": (1, r"the loss is not connected to any trainable weight \(it has no grad_fn\): it was detached"),
}
LOST = "another rank has ended, and its message says why ("


@pytest.mark.parametrize(
    ("fault", "unused"),
    [
        ("Key", "auto"),
        ("Detached", False),
        *(pytest.param(fault, "auto", marks=pytest.mark.slow) for fault in ("NoLoss", "NoStream", "Detached")),
        pytest.param("Detached", True, marks=pytest.mark.slow),
    ],
)
def test_a_forward_pass_that_fails_on_one_rank_ends_both(
    ranks: Ranks, write: Callable[..., Path], fault: str, unused: Any
) -> None:
    config = write(fault, STEP_3, 2, ddp={"find_unused_parameters": unused})
    first, second = run(ranks, config, 2)
    code, message = FATAL[fault]
    assert re.match(message, told(second.err)), second.err
    place = "(at step 3, on rank 1, in the micro-batch of the samples bad)"
    assert told(second.err).endswith(place + (f" ({kept(config, 1)})" if code == 1 else ""))
    assert told(first.err).startswith(LOST)
    assert (first.code, second.code) == (1, code)
    assert steps(config) == [1, 2, 3]


@pytest.mark.parametrize("fault", FATAL)
def test_a_forward_pass_that_fails_in_one_process(ranks: Ranks, write: Callable[..., Path], fault: str) -> None:
    config = write(fault, STEP_3, 1)
    (done,) = run(ranks, config, 1)
    code, message = FATAL[fault]
    assert re.match(message, told(done.err)), done.err
    place = "(at step 3, on rank 0, in the micro-batch of the samples train-6, bad)"
    assert told(done.err).endswith(place + (f" ({kept(config, 0)})" if code == 1 else ""))
    assert done.code == code
    assert steps(config) == [1, 2, 3]


def test_the_trial_of_one_pass_names_its_samples(ranks: Ranks, write: Callable[..., Path]) -> None:
    first, second = run(ranks, write("NoLoss", 1, 2), 2)
    assert told(second.err).endswith("(in the trial of one pass, on the samples bad)")
    assert "rawloop train" not in first.err  # it is told that another rank has more to say
    assert (first.code, second.code) == (1, 2)


@pytest.mark.parametrize(("fault", "rows"), [("NoLoss", "bad"), pytest.param("Key", "bad", marks=pytest.mark.slow)])
def test_an_evaluation_that_fails_on_one_rank_is_told_by_both(
    ranks: Ranks, write: Callable[..., Path], fault: str, rows: str
) -> None:
    config = write(fault, 3, 2, "eval", evaluation={"enabled": True, "batch_size": 1})
    first, second = run(ranks, config, 2)
    assert re.match(f"rank 1: {FATAL[fault][1]}", told(first.err)), first.err
    assert told(first.err).endswith(f"(in the evaluation, on rank 1, in the batch of the samples {rows})")
    assert (first.code, second.code) == (2, 2)
    assert "rawloop train" not in second.err


@pytest.mark.parametrize(
    ("fault", "note", "others"),
    [
        ("Crash", "at step 3, on rank 1, in the micro-batch of the samples bad", LOST),
        (
            "CrashInData",
            "while making a batch of the samples bad",
            "rank 1 failed: IndexError: list index out of range",
        ),
    ],
)
def test_a_bug_on_one_rank_keeps_its_traceback_and_names_the_samples(
    ranks: Ranks, write: Callable[..., Path], fault: str, note: str, others: str
) -> None:
    config = write(fault, STEP_3, 2)
    first, second = run(ranks, config, 2)
    expected = ["IndexError: list index out of range", note, *([kept(config, 1)] if fault == "Crash" else [])]
    lines = [line.removeprefix("[rank1]: ") for line in second.err.splitlines()]
    assert lines[-len(expected) :] == expected
    assert "Traceback" in second.err
    assert told(first.err).startswith(others)
    assert (first.code, second.code) == (1, 1)
    assert steps(config) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["Detached", "Crash", "Key"])
def test_under_torchrun_the_first_cause_is_on_the_console(write: Callable[..., Path], fault: str) -> None:
    config = write(fault, STEP_3, 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*torchrun, "-m", "rawloop", "train", "--config", str(config)]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 60  # of which the start takes most
    assert done.returncode == 1
    message = "IndexError: list index out of range" if fault == "Crash" else FATAL[fault][1]
    cause = re.search(message, done.stderr)
    assert cause, done.stderr
    said = done.stderr.find(f"rawloop train: {LOST}")  # if the launcher gave it the time
    assert said == -1 or cause.start() < said


# -- no reason to end: what is done instead -----------------------------------------------------------------------


def test_a_sample_without_targets_adds_nothing_on_one_process_and_on_two(
    ranks: Ranks, write: Callable[..., Path]
) -> None:
    alone, shared = write("Masked", STEP_3, 1), write("Masked", STEP_3, 2)
    assert [done.code for done in (*run(ranks, alone, 1), *run(ranks, shared, 2))] == [0, 0, 0]
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(shared, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("size", [ONE_RANK, 2])
def test_a_sample_without_targets_among_the_first_is_a_warning(
    ranks: Ranks, write: Callable[..., Path], size: int
) -> None:
    config = write("Masked", 1, size, checks=CHECKED)
    assert [done.code for done in run(ranks, config, size)] == [0] * size
    warnings = [event["reason"] for event in read_events(config.parent / "run") if event["kind"] == "warning"]
    assert warnings == [
        "1 of 4 samples have no target in any stream, so nothing is learnt from them: bad; correct their labels, or "
        "leave them out"
    ]


@pytest.mark.parametrize("size", [ONE_RANK, 2])
def test_a_window_without_any_target_ends_all_ranks_with_its_samples(
    ranks: Ranks, write: Callable[..., Path], size: int
) -> None:
    config = write("WindowMasked", STEP_3, size)
    first, *others = run(ranks, config, size)
    assert told(first.err) == (
        "window 3 has no target in any stream: every label of its samples (train-6, bad) is masked; look at them with "
        "`rawloop inspect --sample ID`, mend their labels, or leave them out"
    )
    assert [first.code, *(done.code for done in others)] == [2] * size
    assert all("rawloop train" not in done.err for done in others)


@pytest.mark.parametrize("size", [ONE_RANK, 2])
def test_all_labels_masked_ends_the_run_before_step_0(ranks: Ranks, write: Callable[..., Path], size: int) -> None:
    config = write("AllMasked", None, size, checks=CHECKED)
    first, *others = run(ranks, config, size)
    assert re.search(r"'</s>' \(id \d+ of the stream 'text'\): never a target in 4 samples", told(first.err))
    assert "first loss of 'text' is nan, chance is 5.5645: DEAD, it has no target: all its" in told(first.err)
    assert [first.code, *(done.code for done in others)] == [2] * size


@pytest.mark.parametrize("size", [ONE_RANK, 2])
def test_an_evaluation_set_without_targets_is_refused(ranks: Ranks, write: Callable[..., Path], size: int) -> None:
    config = write("EvaluationMasked", None, size, evaluation={"enabled": True})
    first, *others = run(ranks, config, size)
    assert told(first.err) == (
        "the evaluation set has no target in the stream 'text': its loss does not exist; correct data.eval, or set "
        "evaluation.enabled to false"
    )
    assert [first.code, *(done.code for done in others)] == [2] * size
    assert all("rawloop train" not in done.err for done in others)
    assert not steps(config)


@pytest.mark.parametrize("size", [ONE_RANK, 2])
def test_a_step_that_is_not_finite_is_skipped_with_the_names_of_all_ranks(
    ranks: Ranks, write: Callable[..., Path], size: int
) -> None:
    config = write("NotFinite", STEP_3, size)
    assert [done.code for done in run(ranks, config, size)] == [0] * size
    (event,) = [event for event in read_events(config.parent / "run") if event["kind"] == "skip"]
    assert (event["step"], event["samples"]) == (3, ["train-6", "bad"])


@pytest.mark.parametrize("size", [ONE_RANK, 2])
def test_an_evaluation_batch_that_is_not_finite_is_named_and_never_best(
    ranks: Ranks, write: Callable[..., Path], size: int
) -> None:
    config = write("NotFinite", 3, size, "eval", evaluation={"enabled": True, "batch_size": 1})
    assert [done.code for done in run(ranks, config, size)] == [0] * size
    folder = config.parent / "run"
    warnings = [
        event["reason"] for event in read_events(folder) if event["kind"] == "warning" and "bad" in event["reason"]
    ]
    assert warnings == ["evaluation is not finite in the batches of bad: it is never the best"] * 2
    assert [math.isnan(value) for value in losses(config, "eval_loss")] == [True, True]
    assert not (folder / "best").exists()
    assert len(steps(config)) == 5


def test_an_evaluation_set_smaller_than_the_world(ranks: Ranks, write: Callable[..., Path]) -> None:
    alone, shared = (write("Spoilt", None, size, evaluation={"enabled": True}) for size in (1, 2))
    for config, size in ((alone, 1), (shared, 2)):
        file = config.parent / "eval.jsonl"
        file.write_text(file.read_text().splitlines()[0] + "\n")
        assert [done.code for done in run(ranks, config, size)] == [0] * size
    assert losses(shared, "eval_loss") == pytest.approx(losses(alone, "eval_loss"), rel=1e-5)
    assert (shared.parent / "run" / "best").is_dir()
