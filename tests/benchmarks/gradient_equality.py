"""How far the gradient of one optimizer step depends on how its samples are cut up: not beyond rounding.

    python tests/benchmarks/gradient_equality.py

The same samples make one window as 1 x 8, 8 x 1 and 2 x 4 (samples of a micro-batch x micro-batches), padded in mixed
order, bucketed (ordered by length) and packed, on one process and on two, in float64 and in float32. Everything is
rawloop's own: `build_run` makes the run, `agree_on_window` counts its targets over all ranks, `accumulate` adds up its
gradients, in DDP or FSDP where there are two. Each gradient is held against that of one process with all samples in
one padded batch: the L2 norm of the difference over the L2 norm of that one, over all trained weights, which are all
there are.

In float64, norms and rotary tables are exchanged for modules that compute in float64: those of transformers go through
float32 whatever the weights are, and a number that falls on the other side of a rounding there is off by 6e-8 at once.
`--as-is` leaves them.
"""

import argparse
import importlib.metadata
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.config import RunConfig
from rawloop.contracts import Text
from rawloop.data import DataConfig
from rawloop.data.batches import BatchPlan, Loader, MicroBatches, TrainWindows
from rawloop.data.samples import read_samples
from rawloop.data.splits import prepare_codes
from rawloop.demo import SPEECH
from rawloop.demo.checkpoint import build_demo_checkpoint
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World, open_world
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig, load_family
from rawloop.loop import Run, TrainConfig, accumulate, agree_on_window, fetch
from rawloop.precision.config import PrecisionConfig
from rawloop.settings import DDPConfig
from rawloop.sharding import is_sharded, whole

FAMILIES = ("higgs_audio_v2", "causal_lm", "audio_chat")
PER_PROCESS = 8  # samples of a window
SHAPES = ((8, 1), (2, 4), (1, 8))
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}
PROCESSES = (1, 2)
WINDOW = 4  # seconds of features of a clip, where Whisper has 30
CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Layout(NamedTuple):
    """How a process's share of a window is cut up: `order` is padded, bucketed or packed."""

    batch_size: int
    accumulation: int
    order: str


class Measured(NamedTuple):
    """Relative difference from the reference, and which part of the positions that were computed is padding."""

    difference: float
    padding: float


def layouts(family: str) -> list[Layout]:
    return [Layout(*shape, order) for order in ("padded", "bucketed", "packed") for shape in SHAPES]


# -- models and data ---------------------------------------------------------------------------------------------


def make_runs(demo: Path, folder: Path) -> dict[str, RunConfig]:
    """Write a tiny model and 16 samples of each family into `folder`; `demo` is the demo checkpoint."""
    count = PER_PROCESS * max(PROCESSES)
    data = {family: folder / family / "data" for family in FAMILIES}
    models = {family: folder / family / "model" for family in FAMILIES} | {"higgs_audio_v2": demo / "model"}
    shutil.copytree(SPEECH / "train", data["higgs_audio_v2"])
    metadata = json.loads((SPEECH / "train" / "metadata.json").read_text(encoding="utf-8"))["samples"]
    chosen = [metadata[k * len(metadata) // count] for k in range(count)]
    (data["higgs_audio_v2"] / "metadata.json").write_text(json.dumps({"samples": chosen}), encoding="utf-8")
    samples = read_samples(data["higgs_audio_v2"])
    said = ["".join(p.text for p in s.turns[-2].parts if isinstance(p, Text)) for s in samples]
    clips = [sample.audio_paths()[-1] for sample in samples]
    write_lines(data["causal_lm"], (text_record(k, said) for k in range(count)))
    write_lines(data["audio_chat"], (speech_record(k, said, clips) for k in range(count)))
    build_text_model(demo / "model", models["causal_lm"])
    build_audio_chat(demo / "model", models["audio_chat"])
    runs = {family: run_config(models[family], data[family], folder / family / "runs") for family in FAMILIES}
    prepare_codes(runs["higgs_audio_v2"].data, load_family(runs["higgs_audio_v2"].model))
    return runs


def run_config(model: Path, data: Path, output: Path) -> RunConfig:
    output.mkdir(parents=True)
    return RunConfig(
        device="cpu",
        output=str(output),
        model=ModelConfig(path=str(model)),
        adapter=AdapterConfig(mode="full"),
        data=DataConfig(train=str(data), allow_outside=True, shuffle=False),
        train=TrainConfig(batch_size=1, max_steps=1),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        ddp=DDPConfig(find_unused_parameters="audio_chat" in str(model)),  # some of its micro-batches have no clip
        evaluation=EvaluationConfig(enabled=False),
    )


def write_lines(folder: Path, records: Iterable[Any]) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")


def text_record(k: int, said: list[str]) -> dict[str, Any]:
    """Plain texts of one to five sentences, and chats, in turns."""
    words = " ".join(said[(k + i) % len(said)] for i in range(1 + 3 * k % 5))
    if k % 3:
        return {"text": words}
    return {"messages": [{"role": "user", "content": said[k - 1]}, {"role": "assistant", "content": words}]}


def speech_record(k: int, said: list[str], clips: list[Path]) -> dict[str, Any]:
    """A question about no clip, one or two, and an answer."""
    heard = [{"type": "audio", "path": str(clip)} for clip in clips[k : k + k % 3]]
    question = {"role": "user", "content": [*heard, {"type": "text", "text": "What is said?"}]}
    return {"messages": [question, {"role": "assistant", "content": " ".join(said[k : k + 1 + k % 4])}]}


def chat_tokenizer(demo_model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def build_text_model(demo_model: Path, folder: Path) -> None:
    tokenizer = chat_tokenizer(demo_model)
    tokenizer.save_pretrained(folder)
    save(LlamaForCausalLM, LlamaConfig(**sizes(tokenizer), dtype="float32"), folder)


def build_audio_chat(demo_model: Path, folder: Path) -> None:
    tokenizer = chat_tokenizer(demo_model)
    tokenizer.eos_token = "<|im_end|>"
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=WINDOW)
    processor = Qwen2AudioProcessor(extractor, tokenizer)
    processor.chat_template = processor.default_chat_template
    processor.save_pretrained(folder)
    encoder = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = Qwen2AudioConfig(
        audio_config={"num_mel_bins": 16, "max_source_positions": 50 * WINDOW, **encoder},
        text_config={"model_type": "qwen2", **sizes(tokenizer)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        dtype="float32",
    )
    save(Qwen2AudioForConditionalGeneration, config, folder)


def sizes(tokenizer: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    return {"vocab_size": len(tokenizer), "pad_token_id": None, **layers, **heads}


def save(model_class: Any, config: Any, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)


# -- float64 -----------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Rotary tables in the dtype of what they turn."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.frequencies, self.scaling = theirs.inv_freq.double(), theirs.attention_scaling

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * self.frequencies
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * self.scaling).to(x.dtype), (both.sin() * self.scaling).to(x.dtype)


def float64_throughout(model: nn.Module) -> None:
    """Exchange the modules of transformers that compute in float32 whatever the weights are."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            kind = type(module).__name__
            if kind.endswith("RMSNorm"):
                theirs: Any = module
                norm = nn.RMSNorm(theirs.weight.shape, eps=theirs.variance_epsilon)
                norm.weight = theirs.weight
                setattr(parent, name, norm)
            elif kind.endswith("RotaryEmbedding"):
                setattr(parent, name, Rotary(module))


# -- gradients ---------------------------------------------------------------------------------------------------


def open_run(config: RunConfig, world: World, dtype: torch.dtype, as_is: bool) -> Run:
    """What `rawloop train` builds; for float64 the weights are widened afterwards, and DDP is built anew."""
    folder = world.from_main(tempfile.mkdtemp(dir=config.output))
    run = build_run(replace(config, output=str(Path(folder) / "run")), world, lambda line: None)
    if dtype == torch.float64:
        assert run.policy.model is not None
        assert run.wrap is not None
        if not as_is:
            float64_throughout(run.policy.model)
        run.policy.model.double()
        run.module = run.wrap()
        run.module.train()
    return run


def cut(run: Run, layout: Layout) -> TrainWindows:
    """The run's first samples as a window of this layout."""
    assert isinstance(run.windows, TrainWindows)
    batches = run.windows.loader.batches
    world = run.world
    samples = list(batches.samples[: layout.batch_size * layout.accumulation * world.size])
    if layout.order == "bucketed":
        samples.sort(key=lambda sample: len(batches.example(sample).input_ids))
    plan = BatchPlan(len(samples), layout.batch_size, layout.accumulation, world.size, world.rank, shuffle=False)
    return TrainWindows(Loader(MicroBatches(samples, batches.example, batches.collate)), plan)


def gradient(run: Run, layout: Layout) -> tuple[dict[str, Tensor], float]:
    """The gradient of the window, by weight, and its share of padding over all ranks."""
    windows = cut(run, layout)
    window, targets, _ = agree_on_window(run, fetch(windows(0), run.throughput))
    accumulate(run, window, targets)
    found = {
        name: torch.zeros_like(p) if p.grad is None else whole(p.grad).clone()
        for name, p in run.policy.named_parameters()
    }
    run.policy.zero_grad(run.optimizer)
    groups = [windows.loader.batches.made(indices)[0] for indices in windows.plan.micro_batches(0)]
    own = sum(len(example.input_ids) for group in groups for example in group)
    filled, computed = run.world.sum([float(own), float(sum(batch.inputs["input_ids"].numel() for batch in window))])
    return found, 1 - filled / computed


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """L2 norm of the difference over the L2 norm of `other`, over all weights."""
    assert set(one) == set(other)
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in other)
    return float((apart / sum(float(weight.double().square().sum()) for weight in other.values())) ** 0.5)


def measure(
    world: World, config: RunConfig, dtype: torch.dtype, wanted: list[Layout], as_is: bool = False
) -> dict[Layout, Measured]:
    """Hold the gradients of layouts against that of one process with all samples in one padded batch.

    All ranks call this together, and each makes the reference on its own.
    """
    results: dict[Layout, Measured] = {}
    with ExitStack() as stack:

        def opened(world: World, packing: bool) -> Run:
            run = open_run(replace(config, data=replace(config.data, packing=packing)), world, dtype, as_is)
            stack.enter_context(closing(run.records))
            return run

        # The policy refuses a world of one process among several, which is what the reference must be.
        with mock.patch("rawloop.precision.casting.num_processes", return_value=1):
            reference, _ = gradient(opened(World(), False), Layout(PER_PROCESS * world.size, 1, "padded"))
        for packing in sorted({layout.order == "packed" for layout in wanted}):
            run = opened(world, packing)
            for layout in wanted:
                if (layout.order == "packed") == packing:
                    found, padding = gradient(run, layout)
                    apart = 0.0 if is_sharded(run.module) and world.rank else distance(found, reference)
                    results[layout] = Measured(max(run.world.gather(apart)), padding)
    return results


# -- the table ---------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One number of the table, and where it stands."""

    family: str
    layout: Layout
    processes: int
    dtype: str
    measured: Measured


def measure_all(
    world: World, runs: dict[str, RunConfig], wanted: dict[str, list[Layout]], as_is: bool = False
) -> list[Cell]:
    """Measure the wanted layouts of each family in both dtypes. All ranks call this together."""
    return [
        Cell(family, layout, world.size, str(dtype).removeprefix("torch."), measured)
        for family, config in runs.items()
        for dtype in BOUNDS
        if config.parallel == "ddp" or dtype == torch.float32  # sharded weights cannot be widened afterwards
        for layout, measured in measure(world, config, dtype, wanted[family], as_is).items()
    ]


def measure_here(folder: Path) -> None:
    """Measure everything in the world that the environment describes; rank 0 writes its part of the table."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    runs, as_is = pickle.loads((folder / "job.pickle").read_bytes())
    with open_world("cpu") as world:
        cells = measure_all(world, runs, {family: layouts(family) for family in runs}, as_is)
        if world.is_main:
            (folder / f"cells-{world.size}.json").write_text(json.dumps(cells))


def measure_in_processes(folder: Path, processes: int) -> list[Cell]:
    """Measure in so many processes, as torchrun starts them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--job", str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # a run's records go there
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{processes} processes: exit code {done.returncode}")
    cells = json.loads((folder / f"cells-{processes}.json").read_text())
    return [
        Cell(family, Layout(*layout), size, dtype, Measured(*measured))
        for family, layout, size, dtype, measured in cells
    ]


def table(cells: list[Cell]) -> str:
    columns = [(processes, str(dtype).removeprefix("torch.")) for processes in PROCESSES for dtype in BOUNDS]
    names = [f"{dtype}, {processes} process{'es' * (processes > 1)}" for processes, dtype in columns]
    lines = ["| family | order | batch x accumulation | padding | " + " | ".join(names) + " |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for family, layout in dict.fromkeys((cell.family, cell.layout) for cell in cells):
        own = {(c.processes, c.dtype): c.measured for c in cells if (c.family, c.layout) == (family, layout)}
        padding = " / ".join(f"{own[processes, 'float64'].padding:.0%}" for processes in PROCESSES)
        numbers = " | ".join(f"{own[column].difference:.1e}" for column in columns)
        shape = f"{layout.batch_size} x {layout.accumulation}"
        lines.append(f"| {family} | {layout.order} | {shape} | {padding} | {numbers} |")
    return "\n".join(lines)


def too_far(cells: list[Cell]) -> list[str]:
    """A sentence for every number that is beyond its bound."""
    bounds = {str(dtype).removeprefix("torch."): bound for dtype, bound in BOUNDS.items()}
    return [
        f"{c.family}, {c.layout.batch_size} x {c.layout.accumulation} {c.layout.order}, {c.processes} process(es), "
        f"{c.dtype}: the gradient is off by {c.measured.difference:.2e}, more than {bounds[c.dtype]:.0e}"
        for c in cells
        if not c.measured.difference <= bounds[c.dtype]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a gradient is further off than its bound."""
    parser = argparse.ArgumentParser(description="Compare gradients of the same samples, cut up in different ways.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--as-is", action="store_true", help="leave what transformers computes in float32 as it is")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # one of the processes that measure
    options = parser.parse_args(arguments)
    if options.job:
        measure_here(options.job)
        return 0
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_demo_checkpoint(folder / "demo", SPEECH)
        runs = make_runs(folder / "demo", folder)
        job = {family: runs[family] for family in options.families}, options.as_is
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        cells = [cell for processes in PROCESSES for cell in measure_in_processes(folder, processes)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"Relative difference of the gradient, {versions}\n\n{table(cells)}")
    problems = too_far(cells)
    print("\n".join(problems), file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
