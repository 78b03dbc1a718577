"""The exam of the watch: faults planted in loops as people write them, and healthy loops.

    python tests/faults/exam.py                        # all faults and controls, and the score
    python tests/faults/exam.py --only sqrt --verbose  # one, with all that the watch says
    python tests/faults/exam.py --also-others          # beside DebugUnderflowOverflow and anomaly mode

A fault is found if one of the first three alarms gives the right answer to whose fault it is, names the mistake, and
names the place and the step. The answers stand beside the faults. A control fails with any alarm. More faults are a
file with a tuple FAULTS, like `first.py`, which FAULTS names here.

The faults and controls of `second*.py` were written without sight of the detectors, and scored once before anything
was mended for them: 16 of 24 found, 2 of 6 controls with an alarm (2026-11-30). The first half had 26 of 26 by
then. All 50 are found since, and the 15 controls are quiet.
"""

import argparse
import os
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
from torch.multiprocessing.spawn import start_processes

from rawloop.dist import World, open_world
from rawloop.watch.findings import Finding
from tests.faults import controls, first, first_data, others, runs, second
from tests.faults.form import Answer, Control, Fault, best_of_ranks, examine

FAULTS: tuple[Fault, ...] = (*first.FAULTS, *first_data.FAULTS, *runs.FAULTS, *second.FAULTS)
CONTROLS: tuple[Control, ...] = (*controls.CONTROLS, *runs.CONTROLS, *second.CONTROLS)
ALL: tuple[Fault | Control, ...] = (*FAULTS, *CONTROLS)
CASES = {case.name: case for case in ALL}
Ranks = Callable[..., list[list[Finding]]]


def on_rank(world: World, name: str) -> list[Finding]:
    """One rank of a case, for the fixture `run_ranks`."""
    return examine(CASES[name])


def ranks_of(case: Fault | Control) -> int:
    return getattr(case.loop, "ranks", 1)


def answer(case: Fault | Control, run_ranks: Ranks) -> list[list[Finding]]:
    """The findings of each rank."""
    if ranks_of(case) == 1:
        return [examine(case)]
    return run_ranks(on_rank, case.name, world_size=ranks_of(case))


def spawn_ranks(function: Callable[..., list[Finding]], name: str, world_size: int) -> list[list[Finding]]:
    """Like the fixture `run_ranks`, outside of pytest."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_rank_main, (name, world_size, port, queue), world_size)  # type: ignore[no-untyped-call]
    results = dict(queue.get() for _ in range(world_size))
    return [results[rank] for rank in range(world_size)]


def _rank_main(rank: int, name: str, world_size: int, port: int, queue: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open_world("cpu", timeout=120) as world:
        queue.put((rank, on_rank(world, name)))


def fault_row(fault: Fault, by_rank: Sequence[Sequence[Finding]]) -> tuple[Answer, str]:
    """The answer of a fault, and its line of the table."""
    result = best_of_ranks(fault, by_rank)
    said = "nothing"
    if result.finding:
        said = f"{result.finding.kind}: [{result.finding.cause.whose}] {result.finding.cause.place}"
    return result, f"{fault.name:44} {fault.group:10} {result.verdict:11} {said[:110]}"


def main() -> None:
    """Print the table and the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the names or groups of cases")
    parser.add_argument("--also-others", action="store_true", help="what two other tools say")
    parser.add_argument("--verbose", action="store_true", help="all that the watch says")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    verdicts: Counter[str] = Counter()
    for fault in FAULTS:
        if options.only in fault.name or options.only == fault.group:
            by_rank = answer(fault, spawn_ranks)
            result, row = fault_row(fault, by_rank)
            verdicts[result.verdict] += 1
            print(row, flush=True)
            show(by_rank, options.verbose)
            if options.also_others and ranks_of(fault) == 1:
                print(" " * 56 + ", ".join(f"{name}: {said}" for name, said in others.ask_others(fault).items()))
    alarms = 0
    for control in CONTROLS:
        if options.only in control.name or options.only == "control":
            by_rank = answer(control, spawn_ranks)
            wrong = [finding for findings in by_rank for finding in findings if not finding.ordinary]
            alarms += bool(wrong)
            print(f"{control.name:44} {'control':10} {'ALARM' if wrong else 'quiet':11}", flush=True)
            show([wrong], bool(wrong))
            show(by_rank, options.verbose and not wrong)
    print(f"found {verdicts['found']} of {verdicts.total()} {dict(verdicts)}; controls with an alarm: {alarms}")


def show(by_rank: Sequence[Sequence[Finding]], wanted: bool) -> None:
    for finding in (finding for findings in by_rank for finding in findings if wanted):
        print(f"    {finding.text()}")


if __name__ == "__main__":
    main()
