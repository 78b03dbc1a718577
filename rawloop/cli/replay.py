"""`rawloop replay CAPSULE`: runs a kept step again, compares its bits, and narrows down what is wrong with it."""

import code
import sys
from os.path import expanduser
from pathlib import Path
from textwrap import fill
from typing import Any

from rawloop.dist import open_world
from rawloop.errors import UserError
from rawloop.parser import Parser
from rawloop.precision.modes import MODES
from rawloop.replay import Replay
from rawloop.replay_loop import load
from rawloop.replayed import compared, narrowed
from rawloop.watch.capsule import read_facts


def run(argv: list[str]) -> None:
    """Print what the capsule is about, and how its losses and gradients compare with the recorded ones."""
    parser = Parser(prog="rawloop replay", description="Run a kept step again, in one process, and compare.")
    parser.add_argument("capsule", type=str, help="a folder such as RUN/capsules/step-00000041-rank0")
    parser.add_argument(
        "--precision", type=str, help=f"another mode, to see whether the mode is to blame: {', '.join(MODES)}"
    )
    parser.add_argument(
        "--device", type=str, default="auto", choices=["auto", "cuda", "mps", "cpu"], help="where to run it"
    )
    parser.add_argument("--bisect", type=bool, default=False, help="true: find the batch, sample, module and parameter")
    parser.add_argument("--shell", type=bool, default=False, help="true: open a Python prompt with everything loaded")
    parser.add_argument("--model", type=str, help="package.module:function that builds the model of a foreign loop")
    options = parser.read_options(_flags(argv))
    if options.precision is not None and options.precision not in MODES:
        raise UserError(f"--precision is '{options.precision}': it is one of {', '.join(MODES)}")
    path = Path(expanduser(options.capsule))
    facts = read_facts(path)
    for line in about(facts):
        print(line, flush=True)
    with open_world(options.device) as world:
        if world.size > 1:
            raise UserError("rawloop replay runs in one process: start it without torchrun")
        replay = load(path, facts, options.precision, options.model, world, tell)
        again = replay.run()
        for line in compared(replay, again):
            print(line, flush=True)
        if options.bisect:
            for text in narrowed(replay):
                print(fill(text, 120), flush=True)
        if options.shell:
            shell(replay)


def _flags(argv: list[str]) -> list[str]:
    """Let `--bisect` and `--shell` stand alone."""
    alone = ("--bisect", "--shell")
    return [f"{word}=true" if word in alone else word for word in argv]


def tell(line: str) -> None:
    """Print a line for the user to stderr."""
    print(f"rawloop replay: {line}", file=sys.stderr, flush=True)


def about(facts: dict[str, Any]) -> list[str]:
    """Return lines about a capsule, from its manifest alone."""
    lines = [
        f"step {facts['step']}, rank {facts['rank']} of {facts['world_size']}, {facts['precision']}, {facts['device']}"
    ]
    lines.append(f"kept because: {facts['why']}")
    lines += [f"finding: {finding['what']}" for finding in facts["findings"]]
    if facts["world_size"] > 1:
        lines.append(
            "the replay has this rank's batches only; the other ranks' are in capsules of their own, if they wrote any"
        )
    lines += [f"left out: {name}: {why}" for name, why in facts["left_out"].items()]
    return lines


def shell(replay: Replay) -> None:
    """Open a Python prompt with the capsule's objects."""
    names = {
        "replay": replay,
        "facts": replay.facts,
        "model": replay.subject.model,
        "passes": replay.passes,
        "again": replay.run,
    }
    banner = f"{', '.join(names)} are loaded; again() runs the passes and returns roots and gradients"
    code.interact(banner=banner, local=names, exitmsg="")
