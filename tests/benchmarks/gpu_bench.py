"""Speed and memory of rawloop on one GPU, in one JSON file and one Markdown file.

    bash launch/gpu_check.sh                                           # the GPU tests, then this
    PYTHONPATH=. python tests/benchmarks/gpu_bench.py --output runs/gpu_check
    PYTHONPATH=. python tests/benchmarks/gpu_bench.py --output /tmp/gpu_check --cpu      # a rehearsal with tiny sizes

Four sections: the loop against its peers; how long a save holds training; memory and speed by precision mode; tokens
per second and MFU of LoRA on Llamas with 1 and 3 billion random weights and on a Higgs Audio v2 with 5.4, beside HF
Trainer and a loop by hand. If the time is over, a section is cut short, and the tables say so. An error ends its
section; the script then fails.

MFU counts the floating-point operations that the step needs: per token 4 x the frozen weights (forward, and backward
to the activations), 6 x the trained ones, and 6 x layers x length x hidden size for causal attention. Embeddings are
looked up and count nothing; of Higgs Audio v2's two MLPs a token uses one.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

# Both set the environment of torch when they are imported, so they come first.
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, LlamaConfig

from rawloop.cards import CARDS
from tests.benchmarks import checkpoint_stall, loop_overhead

# Dense tensor-core TFLOPS in 16 bits, by a part of the device's name; the first match counts. Cards that rawloop plan
# does not show are from the vendors' data sheets, too.
PEAK_TFLOPS = {"H100 PCIe": 756.0}
PEAK_TFLOPS |= {card.name.partition("GB")[0].removesuffix(" 40").removesuffix(" 80"): card.half for card in CARDS}
PEAK_TFLOPS |= {"A10": 125.0, "T4": 65.0}
Row = dict[str, Any]


class Size(NamedTuple):
    """A Llama with random weights; `lora` is the rank, 0 trains all of them."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    lora: int = 16
    stored: torch.dtype = torch.bfloat16

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            use_cache=False,
        )

    def model(self) -> Any:
        """Return the model on torch's default device."""
        model = AutoModelForCausalLM.from_config(self.config(), dtype=self.stored)
        return get_peft_model(model, LoraConfig(r=self.lora, target_modules="all-linear")) if self.lora else model


class HiggsSize(NamedTuple):
    """A Higgs Audio v2 with random weights and LoRA: by default the published size without text head, 5.4 billion."""

    hidden: int = 3072
    layers: int = 28
    heads: int = 24
    intermediate: int = 8192
    words: int = 128256
    vocab: int = 1026
    lora: int = 16

    def model(self) -> Any:
        """Return the model on torch's default device."""
        config = HiggsAudioV2Config(
            vocab_size=self.words,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 3),
            head_dim=self.hidden // self.heads,
            codebook_size=self.vocab,
            audio_token_id=self.words - 1,
            audio_bos_token_id=self.words - 2,
            audio_delay_token_id=self.words - 3,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=False,
        )
        model = HiggsAudioV2ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        return Speaking(get_peft_model(model, LoraConfig(r=self.lora, target_modules="all-linear")))


class Speaking(nn.Module):
    """Gives a Higgs Audio v2 the interface of a Llama: ids of the first codebook in, logits of it out.

    The first eighth of the positions is text, the others are frames of audio. Each codebook's logits are part of the
    sum that is returned, so all heads are trained.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        """Take ids of shape (batch, length), int64. Returns an object with logits of shape (batch, length, codes)."""
        config, (rows, length) = self.model.config, input_ids.shape
        codes = (input_ids[:, length // 8 :, None] + torch.arange(config.num_codebooks, device=input_ids.device)) % (
            config.codebook_size
        )
        ids = torch.cat([input_ids[:, : length // 8], torch.full_like(codes[..., 0], config.audio_token_id)], dim=1)
        logits = self.model(ids, audio_input_ids=codes, audio_input_ids_mask=torch.ones_like(codes[..., 0])).logits
        return SimpleNamespace(logits=logits.view(rows, length, config.num_codebooks, config.codebook_size).sum(2))


AnySize = Size | HiggsSize


def build(size: AnySize, work: loop_overhead.Work) -> Any:
    """Build a model on the device, where random numbers are fast."""
    torch.manual_seed(0)
    with torch.device(work.device):
        model = size.model()
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return model.train()


@dataclass(frozen=True)
class Plan:
    """The sizes of a check on a GPU, or of its rehearsal on the CPU."""

    device: torch.device
    rounds: int
    steps: int
    repetitions: int
    batch: int
    length: int
    saves: tuple[str, ...]
    by_mode: dict[str, Size]
    by_size: dict[str, AnySize]


GPU = Plan(
    torch.device("cuda"),
    rounds=6,
    steps=100,
    repetitions=8,
    batch=4,
    length=1024,
    saves=("lora", "full"),
    by_mode={
        "1.1B LoRA": Size(2048, 16, 32, 8192, 32000),
        "0.2B full": Size(1024, 12, 16, 4096, 8192, lora=0, stored=torch.float32),
    },
    by_size={
        "1.1B LoRA": Size(2048, 16, 32, 8192, 32000),
        "3.0B LoRA": Size(3072, 28, 24, 8192, 32000),
        "Higgs 5.4B LoRA": HiggsSize(),
    },
)
REHEARSAL = Plan(
    torch.device("cpu"),
    rounds=1,
    steps=2 * loop_overhead.TURN + 1,
    repetitions=1,
    batch=2,
    length=8,
    saves=("lora",),
    by_mode={
        "tiny LoRA": Size(32, 1, 4, 64, 64, lora=2),
        "tiny full": Size(32, 1, 4, 64, 64, lora=0, stored=torch.float32),
    },
    by_size={"tiny LoRA": Size(32, 1, 4, 64, 64, lora=2), "tiny Higgs LoRA": HiggsSize(48, 1, 3, 64, 64, 64, lora=2)},
)
MODES = ("fp32", "bf16", "amp_fp16", "native_fp16")


def peers() -> list[str]:
    """The loops whose packages are installed."""
    missing = {name for name, package in loop_overhead.PACKAGES.items() if not _installed(package)}
    return [name for name in loop_overhead.PEERS if name not in missing]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def loop(plan: Plan) -> Iterator[Row]:
    """The cost of the loop against a loop by hand, on a model whose step is short."""
    results: dict[str, list[Any]] = {name: [] for name in peers()}
    for number in range(plan.rounds):
        order = random.Random(number).sample(list(results), len(results))
        with tempfile.TemporaryDirectory() as folder:
            work = loop_overhead.Work(device=plan.device)
            for name, measured in loop_overhead.run_round(order, plan.steps, Path(folder), work).items():
                results[name].append(measured)
    for name, rounds in results.items():
        wall = loop_overhead.ratios(rounds, results["bare loop"], 0)
        milliseconds = 1000 * statistics.median(turn.wall for one in rounds for turn in one.turns)
        yield {
            "loop": name,
            "ms per step": round(milliseconds, 3),
            "against the bare loop": round(statistics.median(wall), 3),
            "least": round(min(wall), 3),
            "most": round(max(wall), 3),
            "loss after": round(rounds[0].loss, 4),
        }


def saves(plan: Plan) -> Iterator[Row]:
    """How long a save holds training."""
    for name in plan.saves:
        training = checkpoint_stall.Training(checkpoint_stall.SIZES[name], plan.device)
        with tempfile.TemporaryDirectory() as folder:
            held = checkpoint_stall.held(training, Path(folder), plan.repetitions)
        for way, seconds in held.items():
            pairs = zip(seconds, held["torch.save"], strict=True)
            yield {
                "saved": f"{name}, {training.bytes() / 1e6:.1f} MB",
                "way": way,
                "ms held": round(1000 * statistics.median(seconds), 2),
                "least": round(1000 * min(seconds), 2),
                "most": round(1000 * max(seconds), 2),
                "against torch.save": round(statistics.median(own / bare for own, bare in pairs), 2),
            }


def by_mode(plan: Plan) -> Iterator[Row]:
    """Speed and memory of rawloop by precision mode."""
    for name, size in plan.by_mode.items():
        for mode in MODES:
            yield speed(plan, name, size, "rawloop", mode)


def by_size(plan: Plan) -> Iterator[Row]:
    """Speed and memory of rawloop beside a loop by hand and HF Trainer, all in bf16 and with the same micro-batch."""
    for name, size in plan.by_size.items():
        batch, tokens = plan.batch, {}
        for peer in ("HF Trainer", "bare loop", "rawloop"):  # the one with the largest peak first
            row = speed(replace(plan, batch=batch), name, size, peer, "bf16")
            batch, tokens[peer] = int(row["batch"].split(" x ")[0]), row["tokens/s"]
            yield row | {"against HF Trainer": round(row["tokens/s"] / tokens["HF Trainer"], 3)}


def speed(plan: Plan, name: str, size: AnySize, peer: str, mode: str) -> Row:
    """Train for a few turns. The batch is halved until it fits into the device's memory."""
    batch = plan.batch
    while True:
        work = loop_overhead.Work(batch, plan.length, size.vocab, plan.device, mode)
        try:
            with tempfile.TemporaryDirectory() as folder:
                steps = 3 * loop_overhead.TURN + 1
                measured = loop_overhead.run_round([peer], steps, Path(folder), work, partial(build, size))[peer]
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        free()
    peak = torch.cuda.max_memory_allocated() if plan.device.type == "cuda" else 0
    free()
    seconds = statistics.median(turn.wall for turn in measured.turns)
    tokens = batch * plan.length / seconds
    flops, limit = operations_per_token(size, plan.length), peak_flops(plan.device)
    return {
        "model": name,
        "loop": peer,
        "mode": mode,
        "batch": f"{batch} x {plan.length}",
        "ms per step": round(1000 * seconds, 2),
        "tokens/s": round(tokens),
        "TFLOPS": round(tokens * flops / 1e12, 2),
        "MFU": round(tokens * flops / limit, 3) if limit else None,
        "peak GiB": round(peak / 2**30, 2) if peak else None,
    }


def free() -> None:
    """Give the memory of the run before back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def operations_per_token(size: AnySize, length: int) -> float:
    """Floating-point operations that a training step needs per token. Of a Higgs, an eighth of the tokens is text."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        model = size.model()
    looked_up = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    needed = 6.0 * size.layers * length * size.hidden
    for name, weight in model.named_parameters():
        share = 0.0 if id(weight) in looked_up else 1.0
        if isinstance(size, HiggsSize) and ".layers." in name and ".self_attn." not in name:
            share = 7 / 8 if ".audio_" in name else 1 / 8
        needed += (6.0 if weight.requires_grad else 4.0) * share * weight.numel()
    return needed


def peak_flops(device: torch.device) -> float:
    """The device's dense 16-bit rate, or 0 if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * tflops for part, tflops in PEAK_TFLOPS.items() if part in name), 0.0)


SECTIONS: dict[str, tuple[str, Callable[[Plan], Iterator[Row]]]] = {
    "loop": ("The cost of the loop", loop),
    "saves": ("How long a save holds training", saves),
    "by_mode": ("Memory and speed by precision mode", by_mode),
    "by_size": ("LoRA on large models, bf16", by_size),
}


def measure(plan: Plan, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all sections within a time, and return their rows, errors, and the names of those that were cut short."""
    found: dict[str, Any] = {"errors": {}, "cut_short": []}
    deadline = time.monotonic() + seconds
    for name, (title, section) in SECTIONS.items():
        found[name] = rows = []
        rows_of_section = section(plan)
        say(f"{title} ({deadline - time.monotonic():.0f} s left)")
        try:
            while True:
                if time.monotonic() > deadline:
                    found["cut_short"].append(name)
                    break
                row = next(rows_of_section, None)
                if row is None:
                    break
                rows.append(row)
                say(f"  {row}")
        except Exception:  # the other sections are measured all the same, and the script fails at its end
            found["errors"][name] = traceback.format_exc()
            say(found["errors"][name])
        free()
    return found


def machine(plan: Plan) -> dict[str, Any]:
    """Everything that figures depend on."""
    packages = ("torch", "transformers", "peft", *loop_overhead.PACKAGES.values())
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages if _installed(name)},
        "command": " ".join(["python", *sys.argv]),
        "rehearsal": plan is REHEARSAL,
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    found["commit"] = commit.stdout.strip() or None
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        found["device"] = properties.name
        found["memory GiB"] = round(properties.total_memory / 2**30, 1)
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
        found["16-bit TFLOPS"] = peak_flops(plan.device) / 1e12 or None
    else:
        found["device"] = platform.processor() or platform.machine()
    return found


def tests_of(file: Path | None) -> dict[str, Any] | None:
    """The counts and failures of a JUnit file of pytest; an incomplete file counts as a failure."""
    if file is None:
        return None
    if not file.exists():
        why = "the tests wrote no result: they crashed, or were ended after their time"
        return {"passed": 0, "failed": 1, "skipped": 0, "seconds": None, "failures": [why]}
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))  # our own file
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": float(suite.get("time", 0)),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join('-' if row[name] is None else str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    facts = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    memory = f", {facts['memory GiB']} GiB" if "memory GiB" in facts else ""
    parts = [
        f"# GPU check: {facts['device']}{memory}",
        f"{facts['date']}, Python {facts['python']}, {packages}; commit {facts['commit']}; `{facts['command']}`",
    ]
    if facts["rehearsal"]:
        parts.append("**A rehearsal on the CPU with tiny sizes: the figures mean nothing.**")
    if found["tests"] is not None:
        counts = found["tests"]
        line = f"GPU tests: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        parts.append("\n".join([line, *(f"- {name}" for name in counts["failures"])]))
    for name, (title, _) in SECTIONS.items():
        parts.append(f"## {title}")
        if found[name]:
            parts.append(table(found[name]))
        if name in found["cut_short"]:
            parts.append("Cut short: the time was used up.")
        if name in found["errors"]:
            parts.append(f"Failed:\n\n```text\n{found['errors'][name].strip()}\n```")
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write both files. Returns 1 if a test or a section failed."""
    parser = argparse.ArgumentParser(description="Measure speed and memory of rawloop on one GPU.")
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU, with tiny sizes")
    parser.add_argument("--seconds", type=float, default=300, help="no row is begun later (default: %(default)s)")
    parser.add_argument("--tests", type=Path, help="JUnit file of the GPU tests, to be reported as well")
    options = parser.parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        why = f"torch.cuda.is_available() is false (torch {torch.__version__}, {built})"
        print(f"gpu_bench: no GPU: {why}; run it where there is one, or rehearse with --cpu", file=sys.stderr)
        return 2
    plan = REHEARSAL if options.cpu else GPU
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    found = {"machine": machine(plan), "tests": tests_of(options.tests)}
    found |= measure(plan, options.seconds, partial(print, flush=True))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "gpu_check.md").write_text(report(found))
    print(f"results: {options.output / 'gpu_check.json'} and {options.output / 'gpu_check.md'}")
    return 1 if found["errors"] or (found["tests"] or {}).get("failed") else 0


if __name__ == "__main__":
    raise SystemExit(main())
