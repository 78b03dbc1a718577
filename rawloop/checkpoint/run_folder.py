"""Claiming an output folder, so that one run never writes over another."""

from pathlib import Path

from rawloop.checkpoint.slots import BEST, CHECKPOINTS, find_slots
from rawloop.dist import World
from rawloop.errors import UserError

MARKS = ("config.yaml", "metrics.jsonl", "events.jsonl", "best.json", CHECKPOINTS, BEST)


def claim_run_folder(folder: Path, world: World, *, resume: bool) -> None:
    """Make `folder` if need be, and check that nothing of another run is in there. Call it on every rank.

    Raises:
        UserError: it holds a run and `resume` is false, it is a file, or it cannot be made.
    """
    world.together(lambda: _claim(folder, resume), only_main=True)


def _claim(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output is '{folder}', which is a file: name a folder")
    found = [name for name in MARKS if (folder / name).exists()]
    if found and not resume:
        advice = "pass --resume latest to go on with it, or another --output"
        if not find_slots(folder):
            advice = "it has no checkpoint to resume from: pass another --output, or delete the folder"
        raise UserError(f"output is '{folder}', which already holds a run ({', '.join(found)}): {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output is '{folder}', which cannot be made: {error.strerror}") from error
