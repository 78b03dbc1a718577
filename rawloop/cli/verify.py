"""`rawloop verify RUN`: is every checkpoint of a run still what was written? No format notices a flipped bit by itself.

Read-only, and safe beside a training that goes on.
"""

from os.path import expanduser
from pathlib import Path

from rawloop.checkpoint.audit import Found, examine, slots_to_examine
from rawloop.checkpoint.disk import readable
from rawloop.checkpoint.slots import find_best, points_nowhere
from rawloop.errors import CheckpointError
from rawloop.parser import Parser


def run(argv: list[str]) -> None:
    """Print a line per checkpoint as it is read. A damaged one, or none that is whole, is an error."""
    parser = Parser(prog="rawloop verify", description="Check every file of a run's checkpoints against its digest.")
    parser.add_argument("run", type=str, help="a run's folder, or the folder of one checkpoint")
    folder = Path(expanduser(parser.read_options(argv).run))
    slots = slots_to_examine(folder)
    names = [str(slot.relative_to(folder)) if slot != folder else slot.name for slot in slots]
    width = max(map(len, [*names, "checkpoint"]))
    print(f"{'checkpoint':<{width}} {'step':>9} {'files':>6} {'size':>10} {'seconds':>8}  verdict", flush=True)
    counts: dict[str, list[str]] = {}
    best = find_best(folder)
    for name, slot in zip(names, slots, strict=True):
        found = examine(slot)
        counts.setdefault(found.verdict, []).append(name)
        print(f"{name:<{width}} {line(found, slot == best)}", flush=True)
    wrong = [f"{len(counts[v])} {v.lower()} ({', '.join(counts[v])})" for v in ("DAMAGED", "unreadable") if v in counts]
    if points_nowhere(folder):
        wrong.append("best points to a checkpoint that is not there")
    whole = len(counts.get("whole", []))
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}, {whole} whole")
    if not whole:
        raise CheckpointError("there is no whole checkpoint yet, so that nothing was verified")
    print(f"{whole} whole, none damaged", flush=True)


def line(found: Found, best: bool) -> str:
    """What the table says of a slot, after its name."""
    step = str(found.step) if found.step >= 0 else "-"
    files, size = "-", "-"
    if found.manifest is not None:
        files, size = str(len(found.manifest.files)), readable(found.manifest.size)
    reason = f": {found.reason}" if found.reason else ""
    return (
        f"{step:>9} {files:>6} {size:>10} {found.seconds:>8.2f}  {found.verdict}{', the best' if best else ''}{reason}"
    )
