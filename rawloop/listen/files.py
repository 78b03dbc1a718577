"""What was heard at a step, in the run's folder: `listen/step-00000500/` with clips, pictures and heard.json."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rawloop.files import remove_tree, replace_file
from rawloop.listen.listener import Heard

LISTEN, HEARD = "listen", "heard.json"


def write_heard(run: Path, step: int, heard: Sequence[Heard]) -> dict[str, Path]:
    """Write what was heard at a step. What an earlier process has heard there is deleted.

    Returns the wav files by a name for each prompt, such as `listen/line 1`, which is the same at all steps.
    """
    folder = run / LISTEN / f"step-{step:08d}"
    if folder.exists():
        remove_tree(folder)
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    wavs: dict[str, Path] = {}
    for one in heard:
        stem = f"{one.place + 1:02d}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', one.name)[:60]}"
        line = {"name": one.name, **one.facts}
        if one.text is not None:
            line["text"] = one.text
        if one.wav:
            replace_file(folder / f"{stem}.wav", one.wav)
            replace_file(folder / f"{stem}.png", one.picture)
            line["wav"] = f"{stem}.wav"
            wavs[f"{LISTEN}/{one.name}"] = folder / line["wav"]
        lines.append(line)
    replace_file(folder / HEARD, json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
    return wavs
