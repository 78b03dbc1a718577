"""`rawloop launch-check`: whether the processes of a launch can train together, before a model is loaded.

Start it as training is started: `torchrun --nproc_per_node=N -m rawloop launch-check FILE.yaml`, or with
`COMMAND=launch-check` for the scripts in launch/. It compares settings and code like training, and the files of data
and model by what is cheap to read; training compares every sample and every weight. It writes nothing that stays.
"""

import os
import re
import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from os.path import expanduser
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch

from rawloop.changes import ADVICE, code_of_rank, settings_of
from rawloop.cli import read_config
from rawloop.config import RunConfig
from rawloop.data.reading import data_file
from rawloop.dist import World, open_world
from rawloop.errors import RawloopError, UserError
from rawloop.facts import as_text, differences
from rawloop.families import imported, source_of
from rawloop.files import existing, sha256_file, sketch_file
from rawloop.meeting import within

ROUNDS = 7  # measurements of the clocks and of the network
APART = 5.0  # seconds that clocks may differ
DRIVER = Path("/proc/driver/nvidia/version")
MEMORY = Path("/proc/meminfo")
KIND = "device type"
WRONG = ("DIFFERS", "FAILED")


class Row(NamedTuple):
    """A line of the table. `result` is equal, DIFFERS, FAILED, varies (which is allowed) or measured."""

    result: str
    name: str
    found: str


class Seen(NamedTuple):
    """What one rank sees. `code`, `settings` and `contents` must be the same on all; `missing` names contents."""

    host: str
    device: str
    code: Mapping[str, str]
    settings: Mapping[str, str]
    contents: Mapping[str, str]
    missing: Sequence[str]
    free: Mapping[str, int]  # bytes


def run(argv: list[str]) -> None:
    """Compare the ranks and print a table. Differences are an error, on all ranks."""
    parsed = read_config("launch-check", argv)
    with open_world(parsed.config.device, parsed.options.seconds) as world:
        rows = examine(parsed.config, world, parsed.options.seconds)
        if world.is_main:
            print("\n".join(f"{row.result:<8}  {row.name:<18}  {row.found}" for row in rows), flush=True)
        if wrong := [row.name for row in rows if row.result in WRONG]:
            what = f"{len(wrong)} of {len(rows)} checks failed: {', '.join(wrong)}"
            raise world.raised_on_all(UserError(f"{what}: {ADVICE}"))


def examine(config: RunConfig, world: World, seconds: float) -> list[Row]:
    """Compare and measure. Returns the rows of the table, the same on all ranks."""
    own = world.on_all_ranks(partial(look, config, world))
    assert own is not None
    seen = world.gather(own)
    settings = [share.settings for share in seen]
    missing = {name for share in seen for name in share.missing}
    return [
        varying("host", [share.host for share in seen]),
        varying("device", [share.device for share in seen]),
        *equal("code", [share.code for share in seen], ", ".join(f"{k} {v}" for k, v in own.code.items())),
        *equal("settings", settings, f"{len(own.settings)} keys"),
        *(one for share in [seen[0].contents] for name in share for one in content_rows(name, seen, missing)),
        *(amounts(name, [share.free[name] for share in seen]) for name in seen[0].free if all_have(name, seen)),
        output_row(config.output, world),
        clock_row(world),
        *network_rows(world, seconds, all(share.code[KIND] == "cuda" for share in seen)),
    ]


# -- what a rank sees --------------------------------------------------------------------------------------------


def look(config: RunConfig, world: World) -> Seen:
    """Return what this rank sees."""
    code, family = code_of_rank() | {"CUDA": torch.version.cuda or "none", KIND: world.device.type}, config.model.family
    if ":" in family:
        code["the family's source"] = source_of(imported(family, "model.family"))[:16]
    contents, missing = contents_of(config)
    free = {"free on the disk": shutil.disk_usage(existing(Path(expanduser(config.output)))).free}
    if world.device.type == "cuda":
        free["free on the GPU"] = torch.cuda.mem_get_info(world.device)[0]
    with suppress(OSError):  # the system does not tell
        if line := re.search(r"^MemAvailable:\s+(\d+) kB", MEMORY.read_text(), re.MULTILINE):
            free["free in memory"] = int(line[1]) * 1024
    device = device_of(world.device)
    return Seen(socket.gethostname(), device, as_text(code), as_text(settings_of(config)), contents, missing, free)


def device_of(device: torch.device) -> str:
    """Return the name of a device, and the version of its driver."""
    if device.type != "cuda":
        return f"{device.type}, {os.cpu_count()} cores"
    driver = re.search(r"Kernel Module[^\d]*([\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    return f"{torch.cuda.get_device_name(device)}, driver {driver[1] if driver else 'unknown'}"


def contents_of(config: RunConfig) -> tuple[dict[str, str], list[str]]:
    """Return the content of each path of data and model, and the keys of those that cannot be read."""
    data, model = config.data, config.model
    paths: dict[str, tuple[str | None, Callable[[Path], str]]] = {
        "model.path": (model.path, sketch_folder),
        "model.codec": (model.codec, sketch_folder),
        "data.train": (data.train, digest_data),
        "data.eval": (data.eval, digest_data),
        "data.codes": (data.codes, partial(sketch_folder, pattern="*/shard-*.safetensors")),
    }
    contents, missing = {}, []
    for key, (path, digest) in paths.items():
        if path is None:
            continue
        place = Path(expanduser(path))
        if not place.exists() and key.startswith("model.") and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            contents[key] = f"{path}, on the hub"
            continue
        try:
            contents[key] = digest(place)
        except (OSError, UserError) as error:
            contents[key] = str(error)
            missing.append(key)
    return contents, missing


def digest_data(path: Path) -> str:
    """Return the size and the digest of a data file, or of the data file in a folder."""
    file = data_file(path)
    return f"{file.name}, {file.stat().st_size:,} bytes, digest {sha256_file(file)[:16]}"


def sketch_folder(folder: Path, pattern: str = "*") -> str:
    """Return the number of files in a folder, and a digest of their names, their sizes and 4 KB of each."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    files = sorted(file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith("."))
    lines = "".join(f"{file.relative_to(folder)} {sketch_file(file)}\n" for file in files)
    return f"{len(files)} files, digest {sha256(lines.encode()).hexdigest()[:16]}"


# -- rows of the table -------------------------------------------------------------------------------------------


def equal(name: str, shares: Sequence[Mapping[str, str]], summary: str) -> list[Row]:
    """Return one row of facts that must be equal, or a row for each that differs."""
    apart = differences(shares)
    return [Row("DIFFERS", key, by_rank(values)) for key, values in apart.items()] or [Row("equal", name, summary)]


def content_rows(name: str, seen: Sequence[Seen], missing: set[str]) -> list[Row]:
    """Return the row of one content, which must be equal on all ranks, and must not be missing."""
    rows = equal(name, [{name: share.contents[name]} for share in seen], seen[0].contents[name])
    return [row._replace(result="FAILED") if row.result == "equal" and name in missing else row for row in rows]


def varying(name: str, values: Sequence[str]) -> Row:
    """Return the row of a fact that may differ."""
    return Row("equal" if len(set(values)) == 1 else "varies", name, by_rank(values))


def by_rank(values: Sequence[str]) -> str:
    """Return each value with its ranks: `a (ranks 0-7), b (rank 8)`, or the value alone if all ranks have it."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return values[0]
    return ", ".join(
        f"{value} (rank{'s' if len(those) > 1 else ''} {runs_of(those)})" for value, those in ranks.items()
    )


def runs_of(numbers: Sequence[int]) -> str:
    """Return rising numbers with their runs joined: `0-7, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def all_have(name: str, seen: Sequence[Seen]) -> bool:
    """Return whether every rank has measured this amount."""
    return all(name in share.free for share in seen)


def amounts(name: str, sizes: Sequence[int]) -> Row:
    """Return a row with the least number of bytes over all ranks, and the most."""
    least, most = (f"{size / 1e9:,.1f} GB" for size in (min(sizes), max(sizes)))
    spread = "" if least == most else f" (rank {sizes.index(min(sizes))}) to {most}"
    return Row("measured", name, f"{least}{spread}")


def output_row(output: str, world: World) -> Row:
    """Find out whether every rank can write where the output is, and sees there what rank 0 writes."""
    folder = existing(Path(expanduser(output)))
    mark = folder / world.from_main(f".launch-check-{uuid.uuid4().hex}")

    def attempt() -> str:
        try:
            with TemporaryFile(dir=folder):
                if world.is_main:
                    mark.touch()
        except OSError as error:
            return f"nothing can be written into {folder}: {error.strerror}"
        return ""

    told = attempt()
    if world.from_main(told) == "" and not mark.exists():  # after rank 0 has made it
        told = told or f"{folder} is not the folder of rank 0: a run needs a file system that all machines share"
    found = world.gather(told)
    if world.is_main:
        mark.unlink(missing_ok=True)
    wrong = [f"{text} (rank {rank})" for rank, text in enumerate(found) if text]
    return Row("FAILED" if wrong else "equal", "output", "; ".join(wrong) or f"{output} is shared and writable")


def clock_row(world: World) -> Row:
    """Compare the clocks, as exactly as the ranks leave a sum at the same time."""
    gaps = []
    for _ in range(ROUNDS):
        world.sum([0.0])
        now = world.gather(time.time())
        gaps.append([there - now[0] for there in now])
    apart = [statistics.median(rank) for rank in zip(*gaps, strict=True)]
    earliest, latest = min(apart), max(apart)
    shown = f"within {latest - earliest:.3g} s"
    if latest - earliest <= APART:
        return Row("measured", "clocks", shown)
    ranks = f"the earliest is rank {apart.index(earliest)}'s, the latest rank {apart.index(latest)}'s"
    return Row("FAILED", "clocks", f"{latest - earliest:,.1f} s apart ({ranks}): set them by NTP")


def network_rows(world: World, seconds: float, on_gpus: bool) -> list[Row]:
    """Sum a number over all ranks, by gloo and, if all ranks are on GPUs, by NCCL, and measure how long that takes."""
    rows = [timed("gloo", lambda: world.sum([1.0]), world)]
    if on_gpus:
        number = torch.ones(1, device=world.device)

        def mean() -> float:
            world.make_equal([number])
            return number.item()

        try:
            within(seconds, mean)  # builds the connections
        except TimeoutError as error:
            advice = (
                "run it again with NCCL_DEBUG=INFO, and set NCCL_SOCKET_IFNAME to the interface between the machines"
            )
            raise RawloopError(f"NCCL has not summed a number over the ranks within {seconds:g} s: {advice}") from error
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        rows.append(timed(f"NCCL {version}", mean, world))
    return rows if world.size > 1 else []


def timed(name: str, work: Callable[[], object], world: World) -> Row:
    """Return the row of a sum over the ranks, with the median of its times."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    slowest = max(world.gather(statistics.median(times)))
    return Row("measured", name, f"a sum over {world.size} ranks takes {1000 * slowest:.2g} ms")
