"""Seconds from `torchrun` to the end of the first step: `rawloop train` beside a bare script.

    python tests/benchmarks/start_time.py

The bare script imports torch, transformers and peft, loads the same tokenizer and model, adds LoRA to the same layers,
wraps it with DDP if there are several processes, and takes one step on random ids. It reads no data and checks nothing.
`rawloop train` reads the bundled speech, and runs as a user starts it: with its checks before step 0, with the
rehearsal of the costliest batch, and without the evaluation at step 0. A second row has it without checks and
rehearsal. The ways take turns, and a ratio is taken within a turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[2]
BARE = """
import os, sys
import torch, transformers, peft
from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration
torch.manual_seed(0)
world = int(os.environ["WORLD_SIZE"])
if world > 1:
    torch.distributed.init_process_group("gloo")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = HiggsAudioV2ForConditionalGeneration.from_pretrained(sys.argv[1], use_text_head=True)
config = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
model = peft.get_peft_model(model, config)
if world > 1:
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
ids = torch.randint(0, 256, (4, 128))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print("step 1/1", flush=True)
if world > 1:
    torch.distributed.destroy_process_group()
"""
WITHOUT = ["--checks.enabled", "false", "--train.rehearse", "false"]
STEP = ["--train.max_steps", "1", "--train.log_every", "1"]
OPTIONS = [*STEP, "--evaluation.enabled", "false", "--records.report_to", "[]"]


def commands(demo: Path, folder: Path) -> dict[str, list[str]]:
    """Return what each way starts after `torchrun --nproc_per_node N`."""
    script = folder / "bare.py"
    script.write_text(BARE)
    train = ["-m", "rawloop", "train", "--config", str(ROOT / "configs" / "demo.yaml"), *OPTIONS]
    train += ["--model.path", str(demo / "model"), "--data.codes", str(demo / "codes")]
    train += ["--data.train", str(demo / "speech" / "train"), "--data.eval", str(demo / "speech" / "eval")]
    return {
        "bare script": [str(script), str(demo / "model")],
        "rawloop train": train,
        "rawloop train, no checks, no rehearsal": [*train, *WITHOUT],
    }


def first_step(command: Sequence[str], processes: int, folder: Path, port: int) -> float:
    """Start a command by torchrun, and return the seconds until it prints its first step. Wait for its end."""
    output = folder / f"run-{time.time_ns()}"
    own = ["--output", str(output)] if "rawloop" in command else []
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    began, found = time.perf_counter(), 0.0
    with subprocess.Popen(
        [*launch, "--master_port", str(port), *command, *own],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if not found and line.startswith("step 1/1"):
                found = time.perf_counter() - began
    if process.returncode or not found:
        raise SystemExit(f"a start failed:\n{''.join(lines[-20:])}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--demo", type=Path, required=True, help="folder that `rawloop demo --folder` has made")
    args = parser.parse_args(argv)
    print("| processes | start | s to the first step, median | least and most | ratio within a turn, median |")
    print("|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        folder = Path(name)
        ways = commands(args.demo.resolve(), folder)
        for processes in args.processes:
            found: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(args.rounds + 1):  # the first one warms up
                for way in list(ways)[:: 1 if turn % 2 else -1]:
                    seconds = first_step(ways[way], processes, folder, 29600 + turn)
                    found[way] += [seconds] if turn else []
            bare = found["bare script"]
            for way, times in found.items():
                ratio = statistics.median(one / other for one, other in zip(times, bare, strict=True))
                span = f"{min(times):.2f} to {max(times):.2f}"
                print(f"| {processes} | {way} | {statistics.median(times):.2f} | {span} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
