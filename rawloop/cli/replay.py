"""`rawloop replay CAPSULE`: runs a kept step again, compares its bits, and narrows down what is wrong with it."""

import code
import sys
from os.path import expanduser
from pathlib import Path
from textwrap import fill
from typing import Any

from rawloop.dist import World, open_world
from rawloop.errors import UserError
from rawloop.parser import Parser
from rawloop.precision.modes import MODES
from rawloop.replay import Replay, load_run
from rawloop.replay_loop import load_loop
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
    parser.add_argument("--bisect", action="store_true", help="find the batch, sample, module and parameter")
    parser.add_argument("--shell", action="store_true", help="open a Python prompt with everything loaded")
    parser.add_argument("--model", type=str, help="package.module:function that builds the model of a foreign loop")
    options = parser.read_options(argv)
    if options.precision is not None and options.precision not in MODES:
        raise UserError(f"--precision is '{options.precision}': it is one of {', '.join(MODES)}")
    path = Path(expanduser(options.capsule))
    facts = read_facts(path)
    show(*about(facts))
    with open_world(options.device) as world:
        if world.size > 1:
            raise UserError("rawloop replay runs in one process: start it without torchrun")
        replay = load(path, facts, options.precision, options.model, world)
        show(*compared(replay, replay.run()))
        if options.bisect:
            show(*(fill(text, 120) for text in narrowed(replay)))
        if options.shell:
            shell(replay)


def show(*lines: str) -> None:
    """Print lines, at once."""
    print(*lines, sep="\n", flush=True)


def tell(line: str) -> None:
    """Print a line for the user to stderr."""
    print(f"rawloop replay: {line}", file=sys.stderr, flush=True)


def about(facts: dict[str, Any]) -> list[str]:
    """Return lines about a capsule, from its manifest alone."""
    rank, ranks = facts["rank"], facts["world_size"]
    others = "the replay has this rank's batches only; the other ranks' are in capsules of their own, if they wrote any"
    return [
        f"step {facts['step']}, rank {rank} of {ranks}, {facts['precision']}, {facts['device']}",
        f"kept because: {facts['why']}",
        *(f"finding: {finding['what']}" for finding in facts["findings"]),
        *([others] if ranks > 1 else []),
        *(f"left out: {name}: {why}" for name, why in facts["left_out"].items()),
    ]


def load(path: Path, facts: dict[str, Any], mode: str | None, function: str | None, world: World) -> Replay:
    """Make a capsule ready to run.

    Raises:
        UserError: an option does not fit the kind of capsule, or the model is not the one of the capsule.
        RawloopError: the capsule is damaged.
    """
    if facts["kind"] == "run":
        if function is not None:
            raise UserError("--model is for capsules of foreign loops: this one is of a run, whose config is in it")
        return load_run(path, facts, mode, world, tell)
    if mode is not None:
        raise UserError("--precision is for capsules of runs: in a foreign loop, dtypes are the loop's own")
    if function is None:
        raise UserError(
            f"{path} is a capsule of a foreign loop: name the function that builds its model ({facts['model']}), "
            "with --model package.module:function"
        )
    return load_loop(path, facts, function, world)


def shell(replay: Replay) -> None:
    """Open a Python prompt with the capsule's objects."""
    model, passes = replay.subject.model, replay.passes
    names = {"replay": replay, "facts": replay.facts, "model": model, "passes": passes, "again": replay.run}
    banner = f"{', '.join(names)} are loaded; again() runs the passes and returns roots and gradients"
    code.interact(banner=banner, local=names, exitmsg="")
