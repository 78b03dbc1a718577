"""The page of one run: its outcome, findings, settings, figures, events, checks, census, capsules and sounds.

What was said while it trained is in `heard.py`.
"""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

from rawloop.files import readable
from rawloop.report.heard import heard
from rawloop.report.outcome import facts, is_ordinary, outcome
from rawloop.report.page import Clip, Note, Section, Table, render
from rawloop.report.panels import figures
from rawloop.report.runs import RunData, read_run

MOST = 20  # findings, capsules, and incidents of a kind that are shown
INCIDENTS = ("fallback", "skip", "bad_sample", "warning", "restore", "stop")
SOUNDS = {".wav": "audio/wav", ".flac": "audio/flac"}
CLIP_BYTES, ALL_CLIPS_BYTES = 1_500_000, 6_000_000  # of the files; base64 makes them a third larger


def report(folder: Path, is_running: bool | None = None) -> str:
    """Return the page of a run.

    Args:
        folder: the run folder.
        is_running: whether a process trains it now; None if that is not known.

    Raises:
        UserError: the folder is no run, or has neither metrics nor events.
    """
    run = read_run(folder)
    sections = [_findings(run), heard(run), Section("Settings", tables=[facts(run)]), *figures({run.name: run})]
    sections += [part(run) for part in (_incidents, _checks, _census, _capsules, _sounds)]
    return render(run.name, sections, outcome(run, is_running))


def _findings(run: RunData) -> Section:
    """Return what a watch has found, alarms first."""
    notes = []
    for event in sorted(run.of_kind("finding"), key=is_ordinary):
        found = event.get("finding")
        kind = found.get("kind") if isinstance(found, dict) else "finding"
        notes.append(Note(str(event.get("reason")), "plain" if is_ordinary(event) else "alarm", f"{kind}:"))
    return Section("Findings", [*notes[:MOST], *_rest(len(notes), "findings")])


def _rest(number: int, what: str, where: str = "events.jsonl") -> list[Note]:
    return [Note(f"{number - MOST:,} more {what} are in {where}.")] if number > MOST else []


def _incidents(run: RunData) -> Section:
    """Return the warnings, and the events that changed the course of the run, as a table.

    One that is repeated stands once, with its number and its first step.
    """
    rows, notes = [], []
    for kind in INCIDENTS:
        steps: dict[str, list[int]] = {}
        for event in run.of_kind(kind):
            steps.setdefault(_told(event), []).append(max(0, event["step"]))
        rows += [(at[0], kind, len(at), told) for told, at in list(steps.items())[:MOST]]
        notes += _rest(len(steps), f"events of the kind '{kind}'")
    head = ("step", "event", "times", "reason")
    return Section("What happened", notes, tables=[Table(head, sorted(rows))])


def _told(event: dict[str, Any]) -> str:
    samples, rank = event.get("samples"), event.get("rank")
    names = f" (samples {', '.join(map(str, samples))})" if isinstance(samples, list) and samples else ""
    return f"{f'rank {rank}: ' if rank else ''}{event.get('reason')}{names}"


def _checks(run: RunData) -> Section:
    """Return the checks before step 0. A codebook is listed if its verdict differs from that of its stream."""
    events = run.of_kind("check")
    verdicts = [v for event in events for v in event.get("verdicts", ()) if isinstance(v, dict)]
    kinds = {str(v.get("name")): v.get("kind") for v in verdicts}
    streams = [str(v.get("name")).rpartition("/")[0] for v in verdicts]
    own = [v for v, of in zip(verdicts, streams, strict=True) if v.get("mismatch") or v.get("kind") != kinds.get(of)]
    table = _table("First loss", own, "name", "kind", "loss", "chance", "why", "mismatch")
    return Section("Checks before step 0", [Note(str(event.get("reason"))) for event in events], tables=[table])


def _census(run: RunData) -> Section:
    """Return the label census as tables."""
    found, notes = run.census, []
    if "samples" in found:
        notes = [Note(f"Counted in {found['samples']} samples.")]
    if isinstance(silent := found.get("without_targets"), list) and silent:
        notes.append(Note(f"{len(silent)} samples have no target: {', '.join(map(str, silent[:MOST]))}", "warning"))
    roles = _table("Targets by role", found.get("roles"), "role", "stream", "positions", "targets")
    specials = _table("Special tokens", found.get("specials"), "name", "stream", "required", "targets")
    return Section("Label census", notes, tables=[roles, specials])


def _table(title: str, objects: Any, *names: str) -> Table:
    """Return a table of the values of these names in JSON objects. The numbers of a list are those of codebooks."""
    found = [one for one in objects if isinstance(one, dict)] if isinstance(objects, list) else []
    rows = [[one.get(name, "") for name in names] for one in found]
    cells = [[", ".join(map(str, value)) if isinstance(value, list) else value for value in row] for row in rows]
    return Table(names, cells, title)


def _capsules(run: RunData) -> Section:
    """Return the kept steps, by name, with the reason of each and the command that runs it again."""
    folders = sorted(path for path in run.folder.glob("capsules/*") if path.is_dir() and path.name[0] != ".")
    rows = [(path.name, _why(path), f"rawloop replay {path}") for path in folders[:MOST]]
    table = Table(("capsule", "why it was kept", "to run it again"), rows)
    return Section("Capsules", _rest(len(folders), "capsules", "the folder"), tables=[table])


def _why(capsule: Path) -> str:
    try:
        return str(json.loads((capsule / "MANIFEST.json").read_bytes())["why"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its MANIFEST.json cannot be read: {type(error).__name__}"


def _sounds(run: RunData) -> Section:
    """Return the sounds in the run's folder, as far as they are small enough for a page."""
    clips, large, room = [], [], ALL_CLIPS_BYTES
    for path in sorted(run.folder.rglob("*")):
        kind, name = SOUNDS.get(path.suffix.lower()), path.relative_to(run.folder)
        if kind is None or name.parts[0] in ("checkpoints", "best", "listen") or not path.is_file():
            continue
        size = path.stat().st_size
        if size > min(CLIP_BYTES, room):
            large.append(f"{name} ({readable(size)})")
            continue
        room -= size
        clips.append(Clip(str(name), f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}"))
    more = f" and {len(large) - MOST:,} more" if len(large) > MOST else ""
    limit = f"A page holds sounds of at most {readable(CLIP_BYTES)} each and {readable(ALL_CLIPS_BYTES)} together"
    notes = [Note(f"{limit}. Not in it: {', '.join(large[:MOST])}{more}.")] if large else []
    return Section("Sounds", notes, clips=clips)
