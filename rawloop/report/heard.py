"""What a run has said while it trained: a player for each prompt and step, side by side, with its spectrogram."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

from rawloop.files import readable
from rawloop.report.page import Cell, Grid, Note, Section, Table
from rawloop.report.runs import RunData

STEPS, HEARD = "listen/step-*", "heard.json"
ROOM = 12_000_000  # bytes of all clips in a page; base64 makes them a third larger


def heard(run: RunData) -> Section:
    """Return the section of what was heard; empty if nothing was."""
    notes: list[Note] = []
    found: dict[int, tuple[Path, list[dict[str, Any]]]] = {}
    for folder in sorted(run.folder.glob(STEPS)):
        try:
            lines = json.loads((folder / HEARD).read_bytes())
            found[int(folder.name.removeprefix("step-"))] = folder, [line for line in lines if isinstance(line, dict)]
        except (OSError, ValueError, TypeError) as error:
            notes.append(Note(f"{folder.name}/{HEARD} cannot be read: {type(error).__name__}", "warning"))
    chosen = _chosen(found, run.best.get("step"))
    if len(chosen) < len(found):
        left = ", ".join(f"{step:,}" for step in found if step not in chosen)
        notes.append(Note(f"A page holds {readable(ROOM)} of clips. Those of other steps are in listen/: {left}."))
    names = dict.fromkeys(str(line.get("name")) for step in chosen for line in found[step][1])
    rows = []
    for name in names:
        shown = [next((x for x in found[step][1] if x.get("name") == name), None) for step in chosen]
        words = next((str(line["words"]) for line in shown if line and line.get("words")), "")
        cells = [_cell(found[step][0], line) for step, line in zip(chosen, shown, strict=True)]
        rows.append((f"{name}: {words}" if words else name, cells))
    head = [f"step {step:,}{' (best)' if step == run.best.get('step') else ''}" for step in chosen]
    if any(cell.audio for _, cells in rows for cell in cells):
        return Section("Listening", notes, grid=Grid(head, rows))
    texts = [(name, *(cell.text for cell in cells)) for name, cells in rows]  # of a model of text
    return Section("What it writes", notes, tables=[Table(("prompt", *head), texts)])


def _chosen(found: dict[int, tuple[Path, list[dict[str, Any]]]], best: Any) -> list[int]:
    """Return the steps whose clips fit into a page: the first, the last and the best, and others evenly between."""
    steps = sorted(found)
    sizes = {step: sum(path.stat().st_size for path in found[step][0].glob("*.[wp][an][vg]")) for step in steps}
    for number in range(len(steps), 1, -1):
        even = {steps[round(k * (len(steps) - 1) / (number - 1))] for k in range(number)}
        chosen = sorted(even | ({best} & set(steps)))
        if sum(sizes[step] for step in chosen) <= ROOM:
            return chosen
    return steps[-1:]


def _cell(folder: Path, line: dict[str, Any] | None) -> Cell:
    if line is None:
        return Cell("")
    end = "" if line.get("stopped") else ", did not stop"
    seconds, wav = line.get("seconds"), line.get("wav")
    if not isinstance(wav, str) or Path(wav).name != wav or not (folder / wav).is_file():
        return Cell(f"{line.get('text', '')}{end}")
    said = f'; heard as "{line["recognised"]}"' if line.get("recognised") else ""
    text = f"{seconds:.2f} s{end}{said}" if isinstance(seconds, float) else ""
    picture = (folder / wav).with_suffix(".png")
    return Cell(text, _uri(folder / wav, "audio/wav"), _uri(picture, "image/png") if picture.is_file() else "")


def _uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}"
