"""`rawloop verify RUN`: compares every file of a run's checkpoints with its digest.

It only reads, so it may run while the run is training.
"""

from os.path import expanduser
from pathlib import Path

from rawloop.checkpoint.audit import Found, examine, slots_to_examine
from rawloop.checkpoint.slots import find_best, points_nowhere
from rawloop.errors import CheckpointError
from rawloop.files import readable
from rawloop.parser import Parser


def run(argv: list[str]) -> None:
    """Print a line per checkpoint. A damaged checkpoint is an error, and so is a run without a whole one."""
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
        wrong.append("best points to a checkpoint that does not exist")
    whole = len(counts.get("whole", []))
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}, {whole} whole")
    if not whole:
        raise CheckpointError("there is no whole checkpoint yet: nothing was verified")
    print(f"{whole} whole, none damaged", flush=True)


def line(found: Found, best: bool) -> str:
    """Return the columns of the table after the slot's name."""
    step, manifest = str(found.step) if found.step >= 0 else "-", found.manifest
    files, size = (str(len(manifest.files)), readable(manifest.size)) if manifest else ("-", "-")
    verdict = f"{found.verdict}{', the best' if best else ''}{f': {found.reason}' if found.reason else ''}"
    return f"{step:>9} {files:>6} {size:>10} {found.seconds:>8.2f}  {verdict}"
