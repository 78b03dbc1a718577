"""`rawloop import SOURCE`: writes rawloop's data files from recordings and chats in the layouts of others."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from rawloop.cli import read_options
from rawloop.data.foreign.importing import EVAL, REPORT, TRAIN, Imported, import_data
from rawloop.errors import first_few

CONFIGS = {False: "configs/higgs_lora.yaml", True: "configs/causal_lm_lora.yaml"}


def run(argv: list[str]) -> None:
    """Import, and print what was written, what was left out, and the next command."""
    for line in told(import_data(read_options("import", argv))):
        print(line, flush=True)


def told(done: Imported) -> Iterator[str]:
    """Yield the lines about an import; the last is the next command."""
    gathered, choice, output = done.gathered, done.choice, done.output
    number, kept = len(gathered.items), len(choice.chosen) if choice else 0
    unit = "conversations" if gathered.layout.is_text else "clips"
    speakers = len({item.speaker for item in gathered.items if item.speaker})
    of = f" of {speakers} speaker(s)" if speakers else ""
    yield f"imported {number} {unit}{of} from {gathered.layout.title}"
    yield f"  {number - kept} for training: {output / TRAIN}"
    if choice:
        how = "whole speakers or recordings" if choice.by == "speaker" else "single samples"
        yield f"  {kept} for evaluation, {how}: {output / EVAL}"
        if advice := choice.advice(number, done.share, "--split"):
            yield f"  {advice}"
    for reason, places in gathered.reasons().items():
        yield f"  left out, {reason}: {len(places)} ({first_few(places, '; ', 3)})"
    if gathered.left_out:
        yield f"  all {len(gathered.left_out)} that were left out: {output / REPORT}"
    yield f"next: {next_command(done)}"


def next_command(done: Imported) -> str:
    """Return the command that goes on from here."""
    is_text = done.gathered.layout.is_text
    here = Path(CONFIGS[is_text])
    own = Path(__file__).parents[2] / here  # of a clone
    config = own if own.is_file() and not here.is_file() else here
    words = ["rawloop", "train" if is_text else "prepare", "--config", str(config)]
    words += ["--data.train", str(done.output / TRAIN)]
    words += ["--data.eval", str(done.output / EVAL)] if done.choice else ["--data.eval", "null"]
    words += ["--evaluation.enabled", "false"] if not done.choice and is_text else []
    words += ["--data.allow_outside", "true"] if done.outside else []
    return shlex.join(words)
