"""The page of a data set: how long, fast, loud and silent its clips are, and the unusual ones to listen to."""

import unicodedata
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rawloop.report.page import Clip, Figure, Note, Section, Table, render
from rawloop.report.plots import draw_histogram

MOST = 12  # unusual clips of a kind that are listed,
PLAYED = 4  # and that can be listened to
ROOM = 6_000_000  # bytes of sound in a page, before base64 makes them a third larger
RARE = 3  # a letter that occurs so often at most may be a typing mistake
SHOWN = 200  # letters
DRAWN = {
    "seconds": ("Duration", "seconds"),
    "speed": ("Characters a second", "characters a second"),
    "rms": ("Loudness", "dBFS, root mean square"),
    "silence": ("Silence", "share of the clip"),
}
# What puts the worst clip of a kind first.
WORST: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "fast": lambda clip: -clip["speed"],
    "slow": lambda clip: clip["speed"],
    "clipped": lambda clip: -clip["clipped"],
    "silent": lambda clip: -clip["silence"],
    "edges": lambda clip: -max(clip["before"], clip["after"]),
    "loudness": lambda clip: clip["rms"],
}
Sound = Callable[[str], tuple[str, bytes] | None]


def data_page(title: str, report: Mapping[str, Any], sound: Sound) -> str:
    """Return the page.

    Args:
        title: of the page.
        report: from `rawloop.data.measure.measure_pairs`.
        sound: returns media type and bytes of a clip's beginning by its path, or None if it cannot be read.
    """
    clips, flags = report["clips"], report["flags"]
    marked = {kind: [clip for clip in clips if kind in clip["flags"]] for kind in flags}
    room = _Room(sound)
    sections = [_unusual(kind, flags[kind], found, room) for kind, found in marked.items() if found]
    figures = _figures(clips)
    lead = [Note(f"{len(clips):,} clips, {report['hours']:.3g} hours of speech.", head="All:")]
    number = sum(bool(clip["flags"]) for clip in clips)
    tone, said = ("warning", f"{number:,} clips are unusual. Listen to them before you train.") if number else (
        "good", "No clip is unusual."
    )  # fmt: skip
    lead.append(Note(said, tone))  # type: ignore[arg-type]
    counts = [(kind, len(found), flags[kind]) for kind, found in marked.items() if found]
    summary = Section("What is unusual", tables=[Table(("kind", "clips", "what it means"), counts)])
    usual = Section("What is usual", figures=figures, tables=[_usual(report["usual"])])
    return render(title, [summary, usual, *sections, _letters(report["letters"])], lead)


def _figures(clips: Sequence[Mapping[str, Any]]) -> list[Figure]:
    drawn = []
    for key, (title, unit) in DRAWN.items():
        values = [clip[key] for clip in clips if key in clip]
        if values:
            drawn.append(draw_histogram(title, values, unit))
    return drawn


def _usual(medians: Mapping[str, float]) -> Table:
    rows = [(DRAWN[key][0], float(f"{value:.4g}"), DRAWN[key][1]) for key, value in medians.items()]
    return Table(("median of", "value", "unit"), rows)


class _Room:
    """Takes the beginnings of clips into the page, as long as there is room."""

    def __init__(self, sound: Sound) -> None:
        self.sound, self.left = sound, ROOM
        self.taken: set[str] = set()

    def take(self, path: str) -> str | None:
        """Return a clip as a data: URI; None if it is in the page already, cannot be read or is too large."""
        found = None if path in self.taken else self.sound(path)
        if found is None or len(found[1]) > self.left:
            return None
        self.taken.add(path)
        self.left -= len(found[1])
        return f"data:{found[0]};base64,{b64encode(found[1]).decode()}"


def _unusual(kind: str, meaning: str, found: Sequence[Mapping[str, Any]], room: _Room) -> Section:
    """Return the section of a kind: its worst clips as a table, and the first of them to listen to."""
    ordered = sorted(found, key=WORST[kind])[:MOST] if kind in WORST else found[:MOST]
    notes = [Note(f"{meaning[0].upper()}{meaning[1:]}.")]
    if len(found) > MOST:
        notes.append(Note(f"The {MOST} worst of {len(found):,}; the JSON file beside this page has all."))
    if kind == "unread":
        rows = [(Path(clip["path"]).name, clip["unread"], clip["words"]) for clip in ordered]
        return Section(kind, notes, tables=[Table(("clip", "why", "words"), rows)])
    head = ("clip", "words", "seconds", "char/s", "dBFS", "silence")
    keys = ("seconds", "speed", "rms", "silence")
    rows = [(Path(c["path"]).name, c["words"], *(float(f"{c[key]:.3g}") for key in keys)) for c in ordered]
    clips = [(clip, room.take(clip["path"])) for clip in ordered[:PLAYED]]
    players = [Clip(f"{Path(clip['path']).name}: {clip['words']}", uri) for clip, uri in clips if uri]
    return Section(kind, notes, tables=[Table(head, rows)], clips=players)


def _letters(letters: Mapping[str, Sequence[Any]]) -> Section:
    """Return all letters as a line, and the rare ones as a table."""
    rare = [(name_of(letter), number, first) for letter, (number, first) in letters.items() if number <= RARE]
    line = " ".join(letter for letter in sorted(letters) if letter.isprintable() and not letter.isspace())
    notes = [Note(f"{len(letters):,} different letters: {line[: 2 * SHOWN]}")]
    title = f"Letters that occur at most {RARE} times, and may be typing mistakes"
    return Section("Letters", notes, tables=[Table(("letter", "times", "first in"), rare[:SHOWN], title)])


def name_of(letter: str) -> str:
    """Return a letter with its code and name, as some look alike or cannot be seen."""
    shown = letter if letter.isprintable() and not letter.isspace() else ""
    return f"{shown} U+{ord(letter):04X} {unicodedata.name(letter, '').lower()}".strip()
