"""`rawloop import SOURCE`: writes rawloop's data files from recordings and chats in the layouts of others."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from rawloop.data.foreign.importing import EVAL, REPORT, TRAIN, ImportConfig, Imported, import_data
from rawloop.errors import first_few
from rawloop.parser import Parser

CONFIGS = {False: "configs/higgs_lora.yaml", True: "configs/causal_lm_lora.yaml"}


def run(argv: list[str]) -> None:
    """Import, and print what was written, what was left out, and the next command."""
    parser = Parser(prog="rawloop import", description="Write data files for rawloop from another layout.")
    parser.add_argument("source", type=str, help="a folder or file; its layout is told by its content (docs/data.md)")
    parser.add_argument("--output", type=str, required=True, help="folder for train.jsonl, eval.jsonl and import.json")
    parser.add_argument("--eval", type=float, default=0.05, help="share of the samples for the evaluation; 0 for none")
    split = "speaker: evaluate on whole speakers, if there are several; sample: on single samples"
    parser.add_argument("--split", default="speaker", choices=["speaker", "sample"], help=split)
    parser.add_argument("--seed", type=int, default=0, help="another seed chooses other samples for the evaluation")
    root = "where relative paths of clips start, and the folder that they must not leave (default: the source's)"
    parser.add_argument("--root", type=str, help=root)
    parser.add_argument("--copy", action="store_true", help="copy the clips into the output")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier import")
    values = parser.read_options(argv).as_dict()
    for line in told(import_data(ImportConfig(**values))):
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
