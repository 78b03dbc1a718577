"""Whether eval_loss depends on batch size, order and number of processes: rawloop's does not, HF Trainer's does.

    python tests/benchmarks/eval_loss_independence.py

A demo Higgs Audio v2 is trained for some steps, so that its loss differs between samples. Then 13 samples are evaluated
in batches of 1, 2, 3 and 8, in their own order and in another, on one process and on two, which 13 is divisible by
none of. Four ways:

- rawloop's `Evaluator`: sums over all samples, divided once by the number of targets, per stream;
- `transformers.Trainer.evaluate` with the same labels, both streams (`labels` and `audio_labels`, which it asks for);
- the same with the labels that `HiggsAudioV2Processor(..., output_labels=True)` makes;
- the same with rawloop's audio labels alone, `label_names=["audio_labels"]`.

Trainer repeats each batch's loss by the batch size and takes the mean. A batch's loss is the sum over both streams
divided by the batch's text targets, or a mean over its own targets where there are no `labels`.
"""

import argparse
import importlib.metadata
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from operator import call
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import soundfile
import torch
import transformers
from torch import Tensor
from transformers import HiggsAudioV2Processor, Trainer, TrainingArguments

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.contracts import Sample
from rawloop.data import DataConfig
from rawloop.data.batches import EvalBatches, Loader, MicroBatches
from rawloop.data.codes import CodeCache
from rawloop.data.samples import read_samples
from rawloop.data.splits import prepare_codes
from rawloop.demo import SPEECH
from rawloop.demo.checkpoint import build_demo_checkpoint
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World, open_world
from rawloop.evaluate import EvaluationConfig, Evaluator
from rawloop.families import ModelConfig, load_family
from rawloop.loop import TrainConfig, train
from rawloop.losses import LossModule
from rawloop.optim import OptimConfig
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy

SAMPLES = 13
CASES = [(1, False), (2, False), (3, False), (8, False), (1, True), (3, True), (8, True)]  # batch size, shuffled
BOUND = 1e-6
PROCESSES = (1, 2)


class Scene(NamedTuple):
    """What all ways share. `model` is the folder of the trained model, `processor` that of the processor."""

    model: Path
    processor: Path
    codes: Path
    samples: list[Sample]

    def order(self, shuffled: bool) -> list[Sample]:
        return random.Random(0).sample(self.samples, len(self.samples)) if shuffled else self.samples


def make_scene(demo: Path, folder: Path, steps: int) -> Scene:
    """Train the demo checkpoint for some steps, and prepare the samples; everything lies in `folder`."""
    data = DataConfig(train=str(SPEECH / "train"), eval=str(SPEECH / "eval"), codes=str(folder / "codes"))
    config = RunConfig(
        device="cpu",
        output=str(folder / "run"),
        model=ModelConfig(path=str(demo / "model")),
        adapter=AdapterConfig(mode="full"),
        data=data,
        train=TrainConfig(batch_size=4, max_steps=steps),
        optim=OptimConfig(lr=3e-3, warmup_steps=0),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(enabled=False),
        checkpoint=CheckpointConfig(save_every=steps),
    )
    prepare_codes(data, load_family(config.model))
    run = build_run(config, World(), lambda line: None)
    try:
        train(run)
    finally:
        run.records.close()
    model = shutil.copytree(demo / "model", folder / "model")
    for file in (folder / "run" / "checkpoints" / f"step-{steps:08d}" / "model").iterdir():
        shutil.copy(file, model)
    return Scene(Path(model), demo / "model", folder / "codes", read_samples(SPEECH / "eval")[:SAMPLES])


# -- rawloop -----------------------------------------------------------------------------------------------------


def by_rawloop(world: World, scene: Scene, cases: list[tuple[int, bool]]) -> list[float]:
    """Return eval_loss of each case."""
    family = load_family(ModelConfig(path=str(scene.model)))
    cache = CodeCache(scene.codes)
    module = LossModule(family.load_model(), family.losses)
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), world.device)
    found = []
    for size, shuffled in cases:
        samples = scene.order(shuffled)
        loader = Loader(MicroBatches(samples, lambda sample: family.example(sample, cache), family.collate))
        batches = EvalBatches(loader, len(samples), size, rank=world.rank, world_size=world.size)
        evaluation = Evaluator(
            call, batches, model=module, policy=policy, world=world, weights=family.stream_weights
        ).run()
        found.append(evaluation.metrics["eval_loss"])
    return found


# -- HF Trainer --------------------------------------------------------------------------------------------------

Collate = Callable[[list[Sample]], dict[str, Tensor]]


def our_labels(scene: Scene) -> Collate:
    """Batches for Trainer with rawloop's labels of both streams."""
    family: Any = load_family(ModelConfig(path=str(scene.model)))
    cache = CodeCache(scene.codes)
    return lambda samples: family.encoder.pad([family.example(sample, cache) for sample in samples])


def our_audio_labels(scene: Scene) -> Collate:
    both = our_labels(scene)
    return lambda samples: {name: tensor for name, tensor in both(samples).items() if name != "labels"}


def processors_labels(scene: Scene) -> Collate:
    """Batches as the processor of Higgs Audio v2 makes them."""
    family: Any = load_family(ModelConfig(path=str(scene.model)))
    processor = HiggsAudioV2Processor.from_pretrained(scene.processor)
    options = {"tokenize": True, "return_dict": True, "sampling_rate": 24000, "return_tensors": "pt"}

    def collate(samples: list[Sample]) -> dict[str, Tensor]:
        chats = [family.encoder.conversation(sample) for sample in samples]
        for part in [part for chat in chats for message in chat for part in message["content"]]:
            if part["type"] == "audio":
                part["audio"] = soundfile.read(part.pop("path"), dtype="float32")[0]
        return dict(processor.apply_chat_template(chats, output_labels=True, **options))

    return collate


def by_trainer(
    scene: Scene, collate: Collate, cases: list[tuple[int, bool]], label_names: list[str] | None = None
) -> list[float]:
    """Return eval_loss of each case."""
    model = load_family(ModelConfig(path=str(scene.model))).load_model()
    found = []
    for size, shuffled in cases:
        with tempfile.TemporaryDirectory() as output:
            arguments = TrainingArguments(
                output_dir=output,
                use_cpu=True,
                ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
                report_to=[],
                disable_tqdm=True,
                per_device_eval_batch_size=size,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                label_names=label_names,
            )
            trainer = Trainer(model=model, args=arguments, eval_dataset=scene.order(shuffled), data_collator=collate)
            found.append(float(trainer.evaluate()["eval_loss"]))
    return found


ROWS: dict[str, Callable[[World, Scene], list[float]]] = {
    "rawloop": lambda world, scene: by_rawloop(world, scene, CASES),
    "Trainer, rawloop's labels": lambda _, scene: by_trainer(scene, our_labels(scene), CASES),
    "Trainer, processor's labels": lambda _, scene: by_trainer(scene, processors_labels(scene), CASES),
    "Trainer, rawloop's audio labels": lambda _, scene: by_trainer(
        scene, our_audio_labels(scene), CASES, ["audio_labels"]
    ),
}


# -- the table ---------------------------------------------------------------------------------------------------


def measure_here(folder: Path) -> None:
    """Measure every row in the world that the environment describes; rank 0 writes the numbers."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    scene = Scene(*pickle.loads((folder / "scene.pickle").read_bytes()))
    with open_world("cpu") as world:
        numbers = {name: measure(world, scene) for name, measure in ROWS.items()}
        if world.is_main:
            (folder / f"numbers-{world.size}.json").write_text(json.dumps(numbers))


def measure_in_processes(folder: Path, processes: int) -> dict[str, list[float]]:
    """Measure in so many processes, as torchrun starts them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--job", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{processes} processes: exit code {done.returncode}")
    numbers: dict[str, list[float]] = json.loads((folder / f"numbers-{processes}.json").read_text())
    return numbers


def spread(values: list[float]) -> float:
    """Largest minus smallest, relative to the smallest."""
    return (max(values) - min(values)) / min(values)


def table(numbers: dict[int, dict[str, list[float]]]) -> str:
    heads = [f"{size}{', shuffled' * shuffled}" for size, shuffled in CASES]
    lines = [f"| eval_loss by | processes | {' | '.join(heads)} | spread | spread of both |"]
    lines.append("|---" * (len(CASES) + 4) + "|")
    for name in ROWS:
        every = spread([value for rows in numbers.values() for value in rows[name]])
        for processes, rows in numbers.items():
            values = " | ".join(f"{value:.6f}" for value in rows[name])
            lines.append(f"| {name} | {processes} | {values} | {spread(rows[name]):.1e} | {every:.1e} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if rawloop's numbers differ by more than their bound."""
    parser = argparse.ArgumentParser(description="Evaluate the same samples in different batches, orders and worlds.")
    parser.add_argument("--steps", type=int, default=40, help="training before it (default: %(default)s)")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # one of the processes that measure
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    if options.job:
        measure_here(options.job)
        return 0
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_demo_checkpoint(folder / "demo", SPEECH)
        scene = make_scene(folder / "demo", folder, options.steps)
        (folder / "scene.pickle").write_bytes(pickle.dumps(tuple(scene)))
        numbers = {processes: measure_in_processes(folder, processes) for processes in PROCESSES}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"eval_loss of {SAMPLES} samples by batch size, {versions}\n\n{table(numbers)}")
    ours = spread([value for rows in numbers.values() for value in rows["rawloop"]])
    if not ours <= BOUND:
        print(f"rawloop's eval_loss differs by {ours:.2e}, more than {BOUND:.0e}", file=sys.stderr)
    return int(not ours <= BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
