"""The sections of a run's page besides its figures: findings, events, checks, census, capsules, sounds."""

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rawloop.files import readable
from rawloop.report.outcome import is_ordinary
from rawloop.report.page import Clip, Note, Section, Table
from rawloop.report.runs import RunData

MOST = 20  # findings, warnings, capsules, and events of a kind that are shown
INCIDENTS = ("fallback", "skip", "bad_sample", "restore", "stop")
SOUNDS = {".wav": "audio/wav", ".flac": "audio/flac"}
CLIP_BYTES, ALL_CLIPS_BYTES = 1_500_000, 6_000_000  # of the files; base64 makes them a third larger


def findings(run: RunData) -> Section:
    """Return what a watch has found, alarms first."""
    events = sorted(run.of_kind("finding"), key=is_ordinary)
    notes = [
        Note(str(event.get("reason")), "plain" if is_ordinary(event) else "alarm", f"{_kind_of(event)}:")
        for event in events[:MOST]
    ]
    return Section("Findings", [*notes, *_rest(len(events), "findings")])


def _kind_of(event: dict[str, Any]) -> str:
    found = event.get("finding")
    return str(found.get("kind")) if isinstance(found, dict) else "finding"


def _rest(number: int, what: str, where: str = "events.jsonl") -> list[Note]:
    return [Note(f"{number - MOST:,} more {what} are in {where}.")] if number > MOST else []


def warnings(run: RunData) -> Section:
    """Return the warnings; one that is repeated stands once, with its number and its first step."""
    events = run.of_kind("warning")
    first = {str(event.get("reason")): event for event in reversed(events)}
    counts = Counter(str(event.get("reason")) for event in events)
    notes = [
        Note(reason, "warning", f"{_place(first[reason])}{f', {count} times' if count > 1 else ''}:")
        for reason, count in list(counts.items())[:MOST]
    ]
    return Section("Warnings", [*notes, *_rest(len(counts), "warnings")])


def _place(event: dict[str, Any]) -> str:
    step = f"step {event['step']:,}" if event["step"] >= 0 else "outside the steps"
    return f"{step}, rank {event['rank']}" if event.get("rank") else step


def incidents(run: RunData) -> Section:
    """Return the events that changed the course of the run as a table."""
    shown = [event for kind in INCIDENTS for event in run.of_kind(kind)[:MOST]]
    shown.sort(key=lambda event: event["time"])
    rows = [(max(0, event["step"]), event["kind"], _told(event)) for event in shown]
    left_out = [note for kind in INCIDENTS for note in _rest(len(run.of_kind(kind)), f"events of the kind '{kind}'")]
    return Section("What happened", left_out, tables=[Table(("step", "event", "reason"), rows)] if rows else [])


def _told(event: dict[str, Any]) -> str:
    samples = event.get("samples")
    names = f" (samples {', '.join(map(str, samples))})" if isinstance(samples, list) and samples else ""
    return f"{event.get('reason')}{names}"


def checks(run: RunData) -> Section:
    """Return the checks before step 0. A codebook is listed if its verdict differs from that of its stream."""
    events = run.of_kind("check")
    verdicts = [v for event in events for v in event.get("verdicts", ()) if isinstance(v, dict)]
    kinds = {v.get("name"): v.get("kind") for v in verdicts}
    rows = [
        (name, v.get("kind"), v.get("loss"), v.get("chance"), v.get("mismatch") or v.get("why"))
        for v in verdicts
        if "/" not in (name := str(v.get("name")))
        or v.get("kind") != kinds.get(name.split("/")[0])
        or v.get("mismatch")
    ]
    table = [Table(("stream", "verdict", "loss", "chance", "why"), rows, "First loss")] if rows else []
    return Section("Checks before step 0", [Note(str(event.get("reason"))) for event in events], tables=table)


def census(run: RunData) -> Section:
    """Return the label census as tables."""
    try:
        return Section("Label census", *_census(run.census)) if run.census else Section("Label census")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return Section("Label census", [Note(f"census.json is not as rawloop writes it: {error!r}.", "warning")])


def _census(found: dict[str, Any]) -> tuple[list[Note], tuple[()], list[Table]]:
    notes = [Note(f"Counted in {found['samples']:,} samples.")]
    silent = found["without_targets"]
    if silent:
        notes.append(Note(f"{len(silent)} samples have no target: {', '.join(silent[:MOST])}", "warning"))
    books = found["codebooks"]
    roles = [
        (one["role"], one["stream"], one["positions"], one["targets"], _share(one, books.get(one["stream"], 1)))
        for one in found["roles"]
    ]
    specials = [
        (one["name"], one["stream"], "yes" if one["required"] else "no", _counts(one["targets"]))
        for one in found["specials"]
    ]
    tables = [
        Table(("role", "stream", "positions", "targets", "of positions"), roles, "Targets by role"),
        Table(("token", "stream", "required", "times a target"), specials, "Special tokens"),
    ]
    return notes, (), [table for table in tables if table.rows]


def _share(one: dict[str, Any], codebooks: int) -> str:
    positions = one["positions"] * codebooks
    return f"{one['targets'] / positions:.1%}" if positions else "-"


def _counts(counts: Sequence[int]) -> str:
    if len(set(counts)) == 1:
        return f"{counts[0]:,} in each of {len(counts)} codebooks" if len(counts) > 1 else f"{counts[0]:,}"
    return ", ".join(f"{count:,}" for count in counts)


def capsules(run: RunData) -> Section:
    """Return the kept steps, by name, with the reason of each and the command that runs it again."""
    folders = sorted(path for path in run.folder.glob("capsules/*") if path.is_dir() and path.name[0] != ".")
    rows = [(path.name, _why(path), f"rawloop replay {path}") for path in folders[:MOST]]
    table = [Table(("capsule", "why it was kept", "to run it again"), rows)] if rows else []
    return Section("Capsules", _rest(len(folders), "capsules", "the folder"), tables=table)


def _why(capsule: Path) -> str:
    try:
        return str(json.loads((capsule / "MANIFEST.json").read_bytes())["why"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its MANIFEST.json cannot be read: {type(error).__name__}"


def sounds(run: RunData) -> Section:
    """Return the sounds in the run's folder, as far as they are small enough for a page."""
    clips: list[Clip] = []
    large: list[str] = []
    room = ALL_CLIPS_BYTES
    for path in _sound_files(run.folder):
        name, size = str(path.relative_to(run.folder)), path.stat().st_size
        if size > min(CLIP_BYTES, room):
            large.append(f"{name} ({readable(size)})")
            continue
        room -= size
        data = b64encode(path.read_bytes()).decode()
        clips.append(Clip(name, f"data:{SOUNDS[path.suffix.lower()]};base64,{data}"))
    more = f" and {len(large) - MOST:,} more" if len(large) > MOST else ""
    limit = f"A page holds sounds of at most {readable(CLIP_BYTES)} each and {readable(ALL_CLIPS_BYTES)} together"
    notes = [Note(f"{limit}. Not in it: {', '.join(large[:MOST])}{more}.")] if large else []
    return Section("Sounds", notes, clips=clips)


def _sound_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts[0] not in ("checkpoints", "best")
        if inside and path.suffix.lower() in SOUNDS and path.is_file():
            yield path
