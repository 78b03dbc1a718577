"""How long a save holds training, beside a bare `torch.save` of the same weights and optimizer state to the same disk.

    python tests/benchmarks/checkpoint_stall.py

Two models: a tiny Llama with LoRA, and one whose weights and AdamW state are 200 MB. The ways of saving take turns in
one process, in changing order, and every ratio is taken between neighbours in time. `torch.save` neither forces
anything to the disk nor hashes it; rawloop does both, asynchronously in a thread while training goes on. HF Trainer and
accelerate save the same training state, if they are installed; they write the whole base model's or the adapter's
weights as they do by default.

Then a training loop with a save every few steps beside the same loop without any: what the writing thread costs.
"""

import argparse
import importlib.metadata
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.files import ModelFiles
from rawloop.adapters.lora import add_adapter
from rawloop.checkpoint.best import BestTracker
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.checkpoint.manager import CheckpointManager
from rawloop.dist import World
from rawloop.optim import OptimConfig, build_optimizer
from rawloop.optim_state import NamedOptimizerState
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import Records, RecordsConfig
from rawloop.run import TrainState
from rawloop.seed import RngState

CPU = torch.device("cpu")
NOBODY = RecordsConfig(progress=False)


class Size(NamedTuple):
    """Of a Llama, and whether LoRA is trained beside it or all of it."""

    hidden: int
    layers: int
    vocabulary: int
    mode: Any


SIZES = {"lora": Size(64, 2, 256, "lora"), "full": Size(512, 5, 512, "full")}


class Training:
    """A model after a few steps, with its optimizer."""

    def __init__(self, size: Size, device: torch.device = CPU) -> None:
        torch.manual_seed(0)
        self.device = device
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_cache=False,
        )
        self.model = add_adapter(LlamaForCausalLM(config), AdapterConfig(mode=size.mode, rank=8), [])
        self.policy = PrecisionPolicy(PrecisionConfig("fp32"), device)
        self.model = self.policy.prepare(self.model)
        self.optimizer: Optimizer = build_optimizer(self.policy.named_parameters(), OptimConfig(lr=1e-3))
        self.ids = torch.randint(size.vocabulary, (2, 32), device=device)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        self.policy.backward(loss)
        self.policy.step(self.optimizer, 1.0)

    def trained(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def parts(self) -> dict[str, Any]:
        return {
            "model": ModelFiles(self.model, lambda path: nn.Module()),
            "optimizer": NamedOptimizerState(self.optimizer, self.policy.named_parameters),
            "precision": self.policy,
            "train": TrainState(),
            "best": BestTracker(),
            "rng": RngState(0, 0),
        }

    def bytes(self) -> int:
        return sum(3 * weight.numel() * weight.element_size() for weight in self.trained().values())


class Way:
    """A way of saving: `save` holds the loop, `settle` is what comes after it."""

    def save(self, step: int) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until nothing more is written."""

    def close(self) -> None:
        """Let go of what is open."""


class BareSave(Way):
    """`torch.save` of the trained weights and the optimizer's state."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.path = training, folder / "state.pt"

    def save(self, step: int) -> None:
        torch.save({"model": self.training.trained(), "optimizer": self.training.optimizer.state_dict()}, self.path)


class Managed(Way):
    """rawloop's `CheckpointManager`."""

    def __init__(self, training: Training, folder: Path, asynchronous: bool) -> None:
        config = CheckpointConfig(keep_last=1, asynchronous=asynchronous)
        self.records = Records(folder, World(), NOBODY)
        self.records.event = lambda *_, **__: None  # type: ignore[method-assign]
        self.manager = CheckpointManager(folder, config, World(), self.records, training.parts())
        self.manager.start(0)

    def save(self, step: int) -> None:
        self.manager.save(step)

    def settle(self) -> None:
        self.manager.finish()

    def close(self) -> None:
        self.records.close()


class HFTrainer(Way):
    """What HF Trainer does at a save."""

    def __init__(self, training: Training, folder: Path) -> None:
        folder.mkdir()
        arguments = TrainingArguments(
            str(folder), report_to=[], disable_tqdm=True, use_cpu=training.device == CPU, save_total_limit=1
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1.0)
        self.trainer = Trainer(training.model, arguments, optimizers=(training.optimizer, schedule))

    def save(self, step: int) -> None:
        self.trainer.state.global_step = step
        self.trainer._save_checkpoint(self.trainer.model, trial=None)


class Accelerate(Way):
    """accelerate's `save_state`."""

    def __init__(self, training: Training, folder: Path) -> None:
        from accelerate import Accelerator

        self.accelerator, self.folder = Accelerator(cpu=training.device == CPU), folder
        self.accelerator.prepare(training.model, training.optimizer)

    def save(self, step: int) -> None:
        self.accelerator.save_state(str(self.folder))


def ways(training: Training, folder: Path) -> dict[str, Way]:
    """Every way of saving that is installed."""
    found: dict[str, Way] = {
        "torch.save": BareSave(training, folder),
        "rawloop, asynchronous": Managed(training, folder / "later", True),
        "rawloop, synchronous": Managed(training, folder / "now", False),
        "HF Trainer": HFTrainer(training, folder / "trainer"),
    }
    try:
        found["accelerate save_state"] = Accelerate(training, folder / "accelerate")
    except ImportError:
        print("accelerate is not installed")
    return found


def held(training: Training, folder: Path, repetitions: int) -> dict[str, list[float]]:
    """Seconds for which each save holds the loop. The first round is not counted."""
    peers = ways(training, folder)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    order = random.Random(0)
    for number in range(1, repetitions + 2):
        for name in order.sample(list(peers), len(peers)):
            training.step()
            if training.device.type == "cuda":
                torch.cuda.synchronize()
            os.sync()  # what the one before has left to write is no business of this one
            begun = time.perf_counter()
            peers[name].save(number)
            seconds[name].append(time.perf_counter() - begun)
            peers[name].settle()
    for peer in peers.values():
        peer.close()
    return {name: values[1:] for name, values in seconds.items()}


def slowed(training: Training, folder: Path, every: int, turns: int) -> list[float]:
    """Seconds per step with an asynchronous save every so many steps, over those without, in turns of `every` steps."""
    managed = Managed(training, folder / "slowed", True)
    ratios = []

    def turn(step: int | None) -> float:
        begun = time.perf_counter()
        if step is not None:
            managed.save(step)
        for _ in range(every):
            training.step()
            managed.manager.poll()
        seconds = time.perf_counter() - begun
        managed.settle()
        return seconds

    for number in range(1, turns + 2):
        pair = [turn(None), turn(number)] if number % 2 else [turn(number), turn(None)][::-1]
        ratios.append(pair[1] / pair[0])
    managed.close()
    return ratios[1:]


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description="Time how long a save holds training.")
    parser.add_argument("--repetitions", type=int, default=15, help="of each way (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    options = parser.parse_args(arguments)
    if options.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{options.repetitions} repetitions, {versions}")
    for name in options.models:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            report(name, Training(SIZES[name]), folder, options.repetitions)
        finally:
            shutil.rmtree(folder)
    return 0


def report(name: str, training: Training, folder: Path, repetitions: int) -> None:
    """Print the table of one model."""
    print(f"\n{name}: {training.bytes() / 1e6:.1f} MB of trained weights and optimizer state\n")
    print("| way | ms held, median | least and most | against `torch.save` |\n|---|---|---|---|")
    seconds = held(training, folder, repetitions)
    for way, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["torch.save"], strict=True))
        low, middle, high = (f"{1000 * value:.1f}" for value in (min(own), statistics.median(own), max(own)))
        print(f"| {way} | {middle} | {low} to {high} | {ratio:.2f} |", flush=True)
    for every in (10, 50) if name == "lora" else (10,):
        ratios = slowed(training, folder, every, repetitions)
        low, middle, high = (f"{value:.3f}" for value in (min(ratios), statistics.median(ratios), max(ratios)))
        print(f"\nwith an asynchronous save every {every} steps, a step takes {middle} times as long ({low} to {high})")


if __name__ == "__main__":
    raise SystemExit(main())
