"""Writes rawloop's data files from a foreign source: train.jsonl, eval.jsonl, and import.json with what was left out.

Everything is written into a temporary folder beside the output first. So a kill leaves the old files, or no data files
at all, and never a mixture of two imports, in which a sample could be trained and evaluated.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rawloop.data.eval_share import Choice, choose
from rawloop.data.foreign.config import ImportConfig
from rawloop.data.foreign.detect import detect
from rawloop.data.foreign.gather import Gathered, Item, gather, speakers_of
from rawloop.errors import UserError
from rawloop.files import remove_tree, sync_tree, unfinished_folder

TRAIN, EVAL, REPORT, CLIPS = "train.jsonl", "eval.jsonl", "import.json", "clips"
WRITTEN = (TRAIN, EVAL, CLIPS, REPORT)


@dataclass(frozen=True)
class Imported:
    """What was written. `outside` says that clips lie outside the output folder."""

    gathered: Gathered
    choice: Choice | None
    output: Path
    share: float
    outside: bool


def import_data(config: ImportConfig) -> Imported:
    """Import a source.

    Raises:
        UserError: the source cannot be told or read, nothing in it can be used, or the output exists.
        OSError: the disk is full or refuses. The output is as it was.
    """
    source, output = Path(config.source).expanduser(), Path(config.output).expanduser()
    there = [name for name in WRITTEN if (output / name).exists()]
    if there and not config.force:
        raise UserError(f"{output} has {there[0]} already: name another --output, or replace it with --force")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output is '{output}', which is a file: name a folder")
    root = Path(config.root).expanduser() if config.root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--root is '{root}', which is no folder: name the folder of the audio")
    gathered = gather(detect(source), root)
    pairs = list(speakers_of(gathered.items))
    choice = choose(pairs, config.eval, config.split, config.seed) if config.eval else None
    with unfinished_folder(output) as folder:
        lines = [_line(item, folder, output, gathered.root, config.copy) for item in gathered.items]
        chosen = choice.chosen if choice else frozenset()
        _write_lines(folder / TRAIN, [line for index, line in enumerate(lines) if index not in chosen])
        if choice:
            _write_lines(folder / EVAL, [lines[index] for index in sorted(chosen)])
        report = json.dumps(_report(config, gathered, choice), indent=1, ensure_ascii=False)
        (folder / REPORT).write_text(report + "\n", encoding="utf-8", errors="backslashreplace")
        sync_tree(folder)
        _put_in_place(folder, output)
    base = Path(os.path.realpath(output))
    outside = any(item.audio and not config.copy and base not in item.audio.parents for item in gathered.items)
    return Imported(gathered, choice, output, config.eval, outside)


def _line(item: Item, folder: Path, output: Path, root: Path, copy: bool) -> str:
    """Return the record of an item as JSON. A clip without a path is written, and with `copy` every clip is copied."""
    values, base = dict(item.values), os.path.realpath(output)
    name = None
    if item.content is not None:
        name = f"{CLIPS}/{values['audio_file']}"
        (folder / CLIPS).mkdir(exist_ok=True)
        (folder / name).write_bytes(item.content)
    elif item.audio is not None and copy:
        name = f"{CLIPS}/{item.audio.relative_to(root).as_posix()}"
        target = folder / name
        if not target.exists():  # segments share their file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(item.audio, target)
    elif item.audio is not None and os.path.commonpath((base, item.audio)) == base:
        name = item.audio.relative_to(base).as_posix()
    if name is not None:
        values["audio_file"] = name
    return json.dumps(values, ensure_ascii=False)


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    with file.open("x", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def _report(config: ImportConfig, gathered: Gathered, choice: Choice | None) -> dict[str, object]:
    chosen = choice.chosen if choice else frozenset()
    return {
        "layout": gathered.layout.title,
        "settings": asdict(config),
        "train": len(gathered.items) - len(chosen),
        "eval": len(chosen),
        "split": choice.by if choice else None,
        "eval_speakers": sorted(
            {str(gathered.items[index].speaker) for index in chosen if gathered.items[index].speaker}
        ),
        "left_out": {reason: len(places) for reason, places in gathered.reasons().items()},
        "left_out_entries": [asdict(one) for one in gathered.left_out],
    }


def _put_in_place(folder: Path, output: Path) -> None:
    """Move the finished files to the output. Its other files stay, such as a cache of codes."""
    if not output.exists():
        folder.rename(os.path.realpath(output))
        return
    for name in WRITTEN:
        if (output / name).is_dir():
            remove_tree(output / name)
        else:
            (output / name).unlink(missing_ok=True)
    for name in reversed(WRITTEN):  # the data files last
        if (folder / name).exists():
            (folder / name).rename(output / name)
