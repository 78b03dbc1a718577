"""What a large data set costs: seconds to the first batch, memory of ranks and workers, file system calls.

    python tests/benchmarks/many_clips.py

Makes data sets of speech records with cached codes, without audio files and without running a codec. Then processes
build real runs of the demo checkpoint on them: a first start, a later start, and a resume at a late step, each with
data workers, from which batches are taken without training on them. Memory is read from /proc/self/smaps_rollup: PSS
counts a page that n processes share as 1/n in each of them.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

FRAMES, SHARD = 100, 4096  # of a clip of 4 s; clips in a shard
WORDS = [
    "voice",
    "river",
    "seven",
    "morning",
    "under",
    "quietly",
    "glass",
    "mountain",
    "letter",
    "often",
    "blue",
    "the",
]
LATE = 40_000  # the step of the checkpoint that is resumed
EVAL = 64


def records(clips: int, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield a record of speech for each clip, about 300 bytes."""
    rng = random.Random(0)
    for number in range(clips):
        words = " ".join(rng.choices(WORDS, k=12 + number % 9))
        yield {
            "id": f"{prefix}-{number:07d}",
            "audio_file": f"wavs/{number // 10_000:03d}/{prefix}-{number:07d}.wav",
            "transcript": f"{words.capitalize()}.",
            "duration": 4.0,
            "speaker_id": f"{number % 311}",
        }


def make_data(folder: Path, clips: int, form: str) -> None:
    """Write the records and the codes of `clips` training clips and a few for the evaluation, unless they exist."""
    if (folder / "complete").exists():
        return
    for split, number in (("train", clips), ("eval", EVAL)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with open(folder / split / ("metadata.json" if form == "metadata" else "data.jsonl"), "w") as file:
            lines = map(json.dumps, records(number, split))
            if form == "metadata":
                file.write('{"samples": [\n' + ",\n".join(lines) + "\n]}\n")
            else:
                file.writelines(f"{line}\n" for line in lines)
    write_codes(folder, clips)
    (folder / "complete").touch()


def write_codes(folder: Path, clips: int) -> None:
    """Fill the cache of codes through the writer that `rawloop prepare` uses."""
    import torch

    from rawloop.data.shards import Index, Row, ShardWriter, open_cache
    from rawloop.families import ModelConfig, load_family

    family: Any = load_family(ModelConfig(path=str(folder.parent / "demo" / "model")))
    codec = family.load_codec(torch.device("cpu"))[0]
    pool = torch.randint(codec.codebook_size, (997, FRAMES, codec.codebooks))
    paths = [
        f"{os.path.realpath(folder / split)}/{record['audio_file']}"
        for split, number in (("train", clips), ("eval", EVAL))
        for record in records(number, split)
    ]
    with open_cache(folder / "codes", codec) as inside:
        index = Index(inside, 0)
        for shard, first in enumerate(range(0, len(paths), SHARD)):
            writer = ShardWriter(inside, codec, shard, index)
            for place, path in enumerate(paths[first : first + SHARD], first):
                sha256 = f"{zlib.crc32(path.encode()):08x}{place:056x}"
                writer.add(Row(path, 192_044, 1_700_000_000_000_000_000 + place, sha256), pool[place % len(pool)])
            writer.write()


def run_config(folder: Path, workers: int, output: Path) -> Any:
    """Return the config of a run on the data: the demo checkpoint with LoRA."""
    from rawloop.config import RunConfig

    config = RunConfig()
    model = replace(config.model, path=str(folder.parent / "demo" / "model"))
    data = replace(
        config.data,
        train=str(folder / "train"),
        eval=str(folder / "eval"),
        codes=str(folder / "codes"),
        num_workers=workers,
    )
    train = replace(config.train, batch_size=4, max_steps=10**6)
    checks = replace(config.checks, expect_chance=True)
    records = replace(config.records, progress=False)
    return replace(
        config, model=model, data=data, train=train, checks=checks, records=records, output=str(output), device="cpu"
    )


def count_calls(folder: Path) -> Counter[str]:
    """Count this process's stat, lstat and open calls on paths in `folder`, from now on."""
    counts: Counter[str] = Counter()
    inside = str(folder)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(path: Any, *args: Any, **keys: Any) -> Any:
            counts[name] += isinstance(path, str | os.PathLike) and str(path).startswith(inside)
            return call(path, *args, **keys)

        return run

    os.stat, os.lstat = counted("stat", os.stat), counted("lstat", os.lstat)
    sys.addaudithook(
        lambda event, args: counts.update(open=event == "open" and str(args[0]).startswith(inside)) if args else None
    )
    return counts


def memory(pid: int | str = "self") -> dict[str, float]:
    """Return a process's RSS, PSS and USS in MB."""
    found: dict[str, float] = defaultdict(float)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        found[name] += int(value.split()[0]) / 1000
    return {"rss": found["Rss"], "pss": found["Pss"], "uss": found["Private_Clean"] + found["Private_Dirty"]}


def peak() -> float:
    """Return the largest RSS of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def measure(folder: Path, workers: int, batches: int, output: Path, began: float, save: bool) -> dict[str, Any]:
    """Build a run in this process, take `batches` micro-batches, and return what it took."""
    from rawloop.build import build_run
    from rawloop.dist import open_world

    calls = count_calls(folder)
    config = run_config(folder, workers, output)
    imported = time.time() - began
    cpu = time.process_time()
    with open_world("cpu") as world:
        run = build_run(replace(config, resume=None if save else "latest"), world, lambda line: None)
        try:
            stream = iter(run.windows(run.state.window))
            next(stream)
            result: dict[str, Any] = {
                "imports": imported,
                "first": time.time() - began,
                "cpu": time.process_time() - cpu,
                "calls": dict(calls),
                "peak": peak(),
                "rank": memory(),
                "workers": [memory(pid) for pid in worker_pids(run)],
            }
            for _ in islice(stream, batches):
                pass
            result |= {"rank_later": memory(), "workers_later": [memory(pid) for pid in worker_pids(run)]}
            if save:
                assert run.checkpoints
                run.state.step = run.state.window = LATE
                run.state.samples = LATE * config.train.batch_size * world.size
                run.checkpoints.save(LATE)
                run.checkpoints.finish()
        finally:
            run.close()
    return result


def worker_pids(run: Any) -> list[int]:
    """Return the processes of the workers that make training batches."""
    workers = run.loaders[0].workers
    return [worker.pid for worker in workers.loader._iterator._workers] if workers else []


def launch(folder: Path, ranks: int, workers: int, batches: int, output: Path, save: bool) -> list[dict[str, Any]]:
    """Run `measure` in `ranks` processes and return their results, in order of rank."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = json.dumps([str(folder), workers, batches, str(output), time.time(), save])
    started = []
    for rank in range(ranks):
        ids = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
        command = [sys.executable, __file__, "--job", job]
        started.append(
            subprocess.Popen(command, env={**os.environ, **(ids if ranks > 1 else {}), **where}, stdout=subprocess.PIPE)
        )
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a rank has failed: {[process.returncode for process in started]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def lines_of(name: str, results: Sequence[dict[str, Any]], clips: int) -> str:
    """Return a row of the table: the slowest rank's seconds, the largest memory, the calls of all ranks."""

    def most(key: str, kind: str) -> str:
        found = [result[key] for result in results]
        flat = [one for each in found for one in (each if isinstance(each, list) else [each])]
        return f"{max((one[kind] for one in flat), default=0):.0f}"

    calls = sum(sum(result["calls"].values()) for result in results) / clips
    memories = [
        f"{most('rank', 'pss')} / {most('rank_later', 'pss')}",
        f"{most('workers', 'pss')} / {most('workers_later', 'pss')}",
        f"{most('workers', 'uss')} / {most('workers_later', 'uss')}",
    ]
    seconds = [f"{max(result[key] for result in results):.1f}" for key in ("first", "cpu")]
    largest = f"{max(result['peak'] for result in results):.0f}"
    return f"| {' | '.join([f'{clips:,}', name, *seconds, largest, *memories, f'{calls:.3f}'])} |"


HEAD = (
    "| clips | start | s to the first batch | s of processor time per rank, without imports | peak MB of a rank | "
    "PSS of a rank, MB, at the start / later | PSS of a worker | USS of a worker | file system calls per clip |"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, run every kind of start, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[87_500, 700_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=2000, help="micro-batches between the two looks at the memory")
    parser.add_argument("--form", choices=("metadata", "jsonl"), default="metadata")
    parser.add_argument("--folder", type=Path, default=Path(".many_clips"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        folder, workers, batches, output, began, save = json.loads(args.job)
        print(json.dumps(measure(Path(folder), workers, batches, Path(output), began, save)), flush=True)
        return
    base = args.folder.resolve()
    build_demo(base / "demo")
    print(HEAD, "|" + "---|" * HEAD.count(" | ") + "---|", sep="\n", flush=True)
    for clips in args.clips:
        folder = base / f"{args.form}-{clips}"
        make_data(folder, clips, args.form)
        for row in starts(folder, clips, args.ranks, args.workers, args.batches):
            print(row, flush=True)


def build_demo(folder: Path) -> None:
    """Build the demo checkpoint, unless it exists."""
    from rawloop.demo import SPEECH
    from rawloop.demo.checkpoint import build_demo_checkpoint, demo_is_built

    folder.mkdir(parents=True, exist_ok=True)
    if not demo_is_built(folder):
        build_demo_checkpoint(folder, Path(str(SPEECH)))


def starts(folder: Path, clips: int, ranks: Sequence[int], workers: int, batches: int) -> Iterator[str]:
    """Yield a row for each start: the first one, which builds the index, later ones, and resumes."""
    for file in (folder / "codes" / "index").glob("*"):
        file.unlink()
    for turn, size in enumerate(ranks):
        output = folder / f"run-{size}-{time.time_ns()}"
        many = f"{size} rank{'s' if size > 1 else ''}"
        if not turn:
            first = launch(folder, size, workers, batches, folder / f"first-{time.time_ns()}", True)
            yield lines_of(f"{many}, the first", first, clips)
        yield lines_of(f"{many}, a later one", launch(folder, size, workers, batches, output, True), clips)
        resumed = launch(folder, size, workers, batches, output, False)
        yield lines_of(f"{many}, resumed at step {LATE:,}", resumed, clips)


if __name__ == "__main__":
    main()
