"""Who finds a fault: mistakes that fine-tuning code has made in the past, seeded one by one, and what notices them.

    python tests/benchmarks/seeded_faults.py [--doctor] [--only WORD ...]

Each fault is a change of a line or two. It is applied to a copy of the package and its tests; the tests named beside
it must fail there, and pass in an untouched copy. With --doctor, `rawloop doctor` is run as well, on the demo or on a
small text model, and the rows that fail are shown: what a user sees without any of our tests. A fault whose old text
does not stand in its file exactly once ends the script before anything is run: the list is then out of date. Prints a
table for docs/correctness.md.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml

ROOT = Path(__file__).parent.parent.parent
COPIED = ("rawloop", "tests", "setup.cfg", "pyproject.toml")
PATIENCE = 600.0  # seconds for the tests of one fault, and for the doctor
EVALUATE, LOOP, BATCHES, BUFFERS = "evaluate.py", "loop.py", "data/batches.py", "buffers.py"
HIGGS, HIGGS_EXAMPLES = "families/higgs_audio_v2/__init__.py", "families/higgs_audio_v2/examples.py"
SHARED = "families/shared.py"
CAUSAL_LM = "families/causal_lm.py"
CONTRACTS, LOSSES, RUN = "contracts.py", "losses.py", "run.py"


class Fault(NamedTuple):
    """A mistake: in a file of the package `old` becomes `new`; `tests` (file::function) must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "audio labels not shifted",
        HIGGS,
        "return Labels(positions[scored] - 1, targets[scored])",
        "return Labels(positions[scored], targets[scored])",
        ("families/test_higgs_audio_v2.py::test_losses_equal_the_models_own_on_our_labels",),
    ),
    Fault(
        "text labels not shifted",
        CONTRACTS,
        "return cls(positions - 1, flat[positions])",
        "return cls(positions, flat[positions])",
        (
            "families/test_causal_lm.py::test_losses_equal_the_models_own",
            "families/test_audio_chat.py::test_a_batch_scores_each_target_from_the_position_before_it",
        ),
    ),
    Fault(
        "loss of text not shifted, logits right",
        SHARED,
        'total = F.cross_entropy(self.logits(model, batch)["text"], ',
        'places = batch.labels["text"].positions + 1\n            total = F.cross_entropy('
        "target_logits(without_adapter(model), batch.inputs, places), ",
        ("families/test_causal_lm.py::test_losses_are_the_cross_entropy_of_the_logits",),
    ),
    Fault(
        "stop token of speech masked",
        HIGGS_EXAMPLES,
        "(place < frames + 2) & trained",
        "(place < frames + 1) & trained",
        ("families/test_higgs_audio_v2.py::test_labels_differ_from_the_processors_exactly_where_intended",),
    ),
    Fault(
        "stop token of text masked",
        SHARED,
        "labels[start:end] = ids[start:end]",
        "labels[start : end - 1] = ids[start : end - 1]",
        ("families/test_causal_lm_examples.py::test_of_a_chat_the_trained_answer_is_learnt_and_the_end_of_its_turn",),
    ),
    Fault(
        "BOS of speech trained",
        HIGGS_EXAMPLES,
        "learnt = (place > 0)",
        "learnt = (place >= 0)",
        ("families/test_higgs_audio_v2.py::test_labels_differ_from_the_processors_exactly_where_intended",),
    ),
    Fault(
        "reference turns trained",
        HIGGS_EXAMPLES,
        "blocks = [self.delayed(clip, learn) for",
        "blocks = [self.delayed(clip, True) for",
        ("families/test_higgs_audio_v2.py::test_labels_differ_from_the_processors_exactly_where_intended",),
    ),
    Fault(
        "prompts of speech trained",
        HIGGS_EXAMPLES,
        "labels.append(token if learn else IGNORE)",
        "labels.append(token)",
        ("families/test_higgs_audio_v2.py::test_labels_differ_from_the_processors_exactly_where_intended",),
    ),
    Fault(
        "prompts of chats trained",
        SHARED,
        "labels[start:end] = ids[start:end]",
        "labels[:end] = ids[:end]",
        ("families/test_causal_lm_examples.py::test_of_a_chat_the_trained_answer_is_learnt_and_the_end_of_its_turn",),
    ),
    Fault(
        "padding behind a clip counted in the loss",
        HIGGS_EXAMPLES,
        '"labels": padded([e.labels for e in examples], IGNORE, side)',
        '"labels": padded([e.labels for e in examples], self.tokenizer.pad_token_id, side)',
        ("families/test_higgs_audio_v2.py::test_padding_and_batching_change_nothing",),
    ),
    Fault(
        "padding of text counted in the loss",
        CAUSAL_LM,
        "padded(labels, IGNORE)",
        "padded(labels, padding)",
        ("benchmarks/test_gradient_equality.py::test_one_process",),
    ),
    Fault(
        "delay pattern off by one",
        HIGGS_EXAMPLES,
        "[:, None] - torch.arange(codebooks)",
        "[:, None] - 1 - torch.arange(codebooks)",
        (
            "families/test_higgs_audio_v2.py::test_inputs_equal_the_processors",
            "families/test_higgs_audio_v2.py::"
            "test_the_stop_token_of_each_codebook_is_one_frame_later_than_that_of_the_one_before",
        ),
    ),
    Fault(
        "codebooks swapped",
        HIGGS_EXAMPLES,
        "inputs = stream.gather(",
        "inputs = stream.flip(1).gather(",
        ("families/test_higgs_audio_v2.py::test_inputs_equal_the_processors",),
    ),
    Fault(
        "codebooks swapped in the labels alone",
        HIGGS,
        "return Labels(positions[scored] - 1, targets[scored])",
        "return Labels(positions[scored] - 1, targets[scored].flip(1))",
        ("families/test_higgs_audio_v2.py::test_losses_equal_the_models_own_on_our_labels",),
    ),
    Fault(
        "training loss a mean of micro-batches' means",
        LOSSES,
        "ranks * weights[stream] / (targets[stream] or 1)",
        "ranks * weights[stream] / (losses[stream].targets or 1)",
        ("test_loop.py::test_accumulation_equals_one_large_batch",),
    ),
    Fault(
        "accumulation divided twice",
        LOOP,
        "meter.add(forward_backward(run, batch, targets))",
        "meter.add(forward_backward(run, batch, {s: n * len(window) for s, n in targets.items()}))",
        ("test_loop.py::test_accumulation_equals_one_large_batch",),
    ),
    Fault(
        "world size not multiplied back",
        LOSSES,
        "ranks * weights[stream] / (targets[stream] or 1)",
        "weights[stream] / (targets[stream] or 1)",
        ("test_loop.py::test_two_processes_equal_one",),
    ),
    Fault(
        "weights of streams ignored in training",
        LOSSES,
        "ranks * weights[stream] / (targets[stream] or 1)",
        "ranks / (targets[stream] or 1)",
        ("test_loop.py::test_the_weight_of_a_stream_scales_its_gradient",),
    ),
    Fault(
        "targets counted on one rank only",
        LOOP,
        "float(stop is not None), *here])",
        "float(stop is not None)]) + here",
        ("test_loop.py::test_two_processes_equal_one",),
    ),
    Fault(
        "gradients not synchronised on the last micro-batch",
        LOOP,
        "no_sync(run.module, micro_step < len(window))",
        "no_sync(run.module, micro_step <= len(window))",
        ("test_loop.py::test_two_processes_equal_one",),
    ),
    Fault(
        "learning rate moved on by skipped steps",
        LOOP,
        "set_lr(run.optimizer, run.lr(state.step))",
        "set_lr(run.optimizer, run.lr(state.window))",
        ("test_loop.py::test_a_step_that_is_not_finite_is_skipped_and_told",),
    ),
    Fault(
        "data begun anew at a resume",
        RUN,
        'self.step, self.window = state["step"], state["window"]',
        'self.step, self.window = state["step"], 0',
        ("test_loop.py::test_resume_equals_uninterrupted_bit_for_bit",),
    ),
    Fault(
        "a stream without targets dropped from the loss",
        LOSSES,
        "factors = {stream: ranks * weights[stream] / (targets[stream] or 1) for stream in losses}",
        "factors = {s: ranks * weights[s] / targets[s] for s in losses if targets[s]}",
        ("test_bad_batches.py::test_two_ranks_equal_one_whatever_their_windows_lack",),
    ),
    Fault(
        "evaluation loss a mean of batches' means",
        EVALUATE,
        "(next(read) if isinstance(t, Tensor) else float(t), count)",
        "((next(read) if isinstance(t, Tensor) else float(t)) / max(count, 1), 1)",
        ("test_evaluate.py::test_eval_loss_is_the_sum_over_the_count_per_stream_and_codebook",),
    ),
    Fault(
        "weights of streams ignored in evaluation",
        EVALUATE,
        "sum(weight * means[LOSS + stream]",
        "sum(means[LOSS + stream]",
        ("test_evaluate.py::test_weights_of_streams_weigh_their_means",),
    ),
    Fault(
        "last batch of the evaluation set dropped",
        BATCHES,
        "for start in range(0, len(share), batch_size)]",
        "for start in range(0, len(share) - batch_size + 1, batch_size)]",
        (
            "data/test_batches.py::test_evaluation_shares_hold_every_sample_exactly_once",
            "test_evaluate.py::test_eval_loss_is_the_sum_over_the_count_per_stream_and_codebook",
        ),
    ),
    Fault(
        "evaluation samples doubled to fill the ranks",
        BATCHES,
        "share = range(rank, num_samples, world_size)",
        "share = [i % num_samples for i in range(rank, num_samples + -num_samples % world_size, world_size)]",
        (
            "data/test_batches.py::test_evaluation_shares_hold_every_sample_exactly_once",
            "test_evaluate.py::test_ranks_share_the_set_and_agree_on_the_number",
        ),
    ),
    Fault(
        "evaluation batches that are not finite dropped",
        EVALUATE,
        "torch.stack(rows).cpu()",
        "torch.stack(rows).nan_to_num(0.0, 0.0, 0.0).cpu()",
        ("test_evaluate.py::test_a_loss_that_is_not_finite_is_named_and_never_best",),
    ),
    Fault(
        "evaluation with dropout",
        BUFFERS,
        "            model.train(training)\n",
        "            model.train()\n",
        ("test_evaluate.py::test_dropout_is_off_and_the_mode_comes_back_even_after_an_error",),
    ),
    Fault(
        "training with the mode of evaluation",
        BUFFERS,
        "            module.training = mode\n",
        "            module.training = False\n",
        ("test_evaluate.py::test_random_streams_modes_and_gradients_are_untouched",),
    ),
    Fault(
        "evaluation moves the training's random streams",
        BUFFERS,
        "        with preserved_rng(), nullcontext()",
        "        with nullcontext()",
        ("test_evaluate.py::test_random_streams_modes_and_gradients_are_untouched",),
    ),
    Fault(
        "samples of a window differ with the number of ranks",
        BATCHES,
        "start + micro * stride + self.rank * self.batch_size for micro",
        "start + self.rank * self.batch_size * self.accumulation + micro for micro",
        ("data/test_batches.py::test_world_size_does_not_change_what_a_step_sees",),
    ),
    Fault(
        "tokens and targets not held against the model",
        BATCHES,
        "fault = self.fault(batch)\n        except",
        "fault = None\n        except",
        (
            "data/test_batches.py::test_a_fault_is_blamed_on_its_sample_whatever_the_batch_looks_like",
            "cli/test_bad_batches.py::test_what_the_model_cannot_take_ends_all_ranks_with_the_samples_name",
        ),
    ),
)


def outdated(faults: Sequence[Fault], package: Path) -> list[str]:
    """Faults whose old text does not stand in its file exactly once."""
    found = []
    for fault in faults:
        times = (package / fault.file).read_text(encoding="utf-8").count(fault.old)
        if times != 1:
            found.append(f"{fault.name}: its old text stands {times} times in {fault.file}")
    return found


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the package and its tests that may be spoilt."""
    with tempfile.TemporaryDirectory(prefix="seeded-faults-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        yield Path(folder)


def seed(fault: Fault, folder: Path) -> None:
    """Apply a fault to a copy."""
    file = folder / "rawloop" / fault.file
    file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")


def call(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python on a copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def failing(folder: Path, tests: Sequence[str]) -> tuple[set[str], set[str]]:
    """Run tests (file::function) on a copy.

    Returns:
        those that ran, and those of which some case failed.

    Raises:
        RuntimeError: pytest did not run them.
    """
    report = folder / "report.xml"
    names = [f"tests/{test}" for test in dict.fromkeys(tests)]
    done = call(folder, "-m", "pytest", "-q", "--tb=no", f"--junitxml={report}", "-p", "no:cacheprovider", *names)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest says {done.returncode} of {names}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    ran, failed = set(), set()
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].removeprefix("tests.").replace(".", "/")
        name = f"{file}.py::{case.attrib['name'].split('[')[0]}"
        ran.add(name)
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
    report.unlink()
    return ran, failed


KEEP_TEXT = """
import shutil

def test_keep(text_checkpoint, text_data):
    shutil.copytree(text_checkpoint, {model!r})
    shutil.copytree(text_data, {data!r})
"""


def write_demos(folder: Path) -> Path:
    """Write what the doctor examines, by an untouched copy: the demo, and the text model of the tests.

    Returns:
        a folder with `speech.yaml` and `text.yaml`.
    """
    model, data = folder / "text" / "model", folder / "text" / "data"
    with copy() as clean:
        (clean / "tests" / "test_keep.py").write_text(KEEP_TEXT.format(model=str(model), data=str(data)))
        for arguments in (
            ("-m", "rawloop", "demo", "--folder", str(folder / "demo")),
            ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_keep.py"),
        ):
            done = call(clean, *arguments)
            if done.returncode:
                raise RuntimeError(done.stdout + done.stderr)
    speech = folder / "demo" / "speech"
    write_config(
        folder / "speech.yaml",
        {"path": str(folder / "demo" / "model"), "stream_weights": {"text": 0.5}},
        {"train": str(speech / "train"), "eval": str(speech / "eval"), "codes": str(folder / "demo" / "codes")},
        ["audio_lm_head", "text_lm_head"],
    )
    files = {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl")}
    write_config(folder / "text.yaml", {"path": str(model)}, files, [])
    return folder


def write_config(file: Path, model: dict[str, Any], data: dict[str, str], trained: list[str]) -> None:
    """Write a config for the doctor."""
    settings = {
        "output": str(file.with_suffix("")),
        "device": "cpu",
        "model": model,
        "adapter": {"rank": 4, "modules_to_save": trained},
        "data": data,
        "checks": {"expect_chance": True},
        "evaluation": {"batch_size": 3},
    }
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")


def rows_that_fail(folder: Path, demos: Path, name: str) -> list[str]:
    """Ask the doctor of a copy about `speech` or `text`; returns the names of its rows that fail or warn.

    Raises:
        RuntimeError: it gave no table.
    """
    done = call(folder, "-m", "rawloop", "doctor", "--config", str(demos / f"{name}.yaml"))
    rows = re.findall(r"^(passed|FAILED|skipped) +(.{34}) (.*)", done.stdout, re.MULTILINE)
    if not rows:
        raise RuntimeError(done.stderr)
    failed = [name.strip() for result, name, _ in rows if result == "FAILED"]
    return failed + [f"{name.strip()} (warns)" for result, name, said in rows if "; warning: " in said]


def examine(faults: Sequence[Fault], demos: Path | None) -> Iterator[tuple[Fault, set[str], list[str]]]:
    """Seed each fault; yields the tests and the rows of the doctor that noticed it."""
    for fault in faults:
        with copy() as folder:
            seed(fault, folder)
            _, failed = failing(folder, fault.tests)
            name = "text" if fault.file in (CAUSAL_LM, SHARED) else "speech"
            yield fault, failed, [] if demos is None else rows_that_fail(folder, demos, name)


def refuse_if_red(faults: Sequence[Fault], demos: Path | None) -> None:
    """Refuse to go on where tests fail, or the doctor finds something, without any fault."""
    wanted = {test for fault in faults for test in fault.tests}
    with copy() as clean:
        ran, failed = failing(clean, sorted(wanted))
        if failed or ran != wanted:
            raise RuntimeError(
                f"without any fault, these fail: {sorted(failed)}, and these are not there: {wanted - ran}"
            )
        for name in () if demos is None else ("speech", "text"):
            if rows := rows_that_fail(clean, demos, name):  # type: ignore[arg-type]
                raise RuntimeError(f"without any fault, rows of the doctor fail on {name}: {rows}")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a fault goes unnoticed by a test that is named beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doctor", action="store_true", help="also show which rows of `rawloop doctor` fail")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="faults that have one of these in them")
    options = parser.parse_args(argv)
    late = outdated(FAULTS, ROOT / "rawloop")
    if late:
        print("out of date: " + "; ".join(late), file=sys.stderr)
        return 1
    faults = [fault for fault in FAULTS if any(word in fault.name for word in options.only)]
    missed = []
    with tempfile.TemporaryDirectory(prefix="seeded-faults-demo-") as folder:
        demos = write_demos(Path(folder)) if options.doctor else None
        refuse_if_red(faults, demos)
        print("| seeded fault | rows of the doctor | tests |\n|---|---|---|")
        for fault, failed, rows in examine(faults, demos):
            tests = "<br>".join(f"`{test}`" for test in fault.tests if test in failed)
            print(f"| {fault.name} | {', '.join(rows) or '-'} | {tests or '-'} |", flush=True)
            missed += [f"{fault.name}: {test}" for test in fault.tests if test not in failed]
    if missed:
        print("not noticed: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
