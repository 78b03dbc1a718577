"""Turns the entries of a source into records that training accepts, and keeps the reason for every other entry."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rawloop.data.config import DataConfig
from rawloop.data.foreign.entries import Entry, Layout, LeftOut, Unusable
from rawloop.data.keys import TIMES, KeyCheck
from rawloop.data.messages import MessagesReader
from rawloop.data.metadata import MetadataReader
from rawloop.data.record import Files, Record
from rawloop.errors import UserError

NO_NAME = "a name that is not UTF-8"


@dataclass(frozen=True)
class Item:
    """A record for rawloop, without its clip: a file of the source, or bytes."""

    values: dict[str, Any]
    speaker: str | None
    audio: Path | None
    content: bytes | None

    @property
    def id(self) -> str:
        """The id of the sample."""
        return str(self.values["id"])


@dataclass
class Gathered:
    """The items of a source, in its order, and the entries that are left out.

    `root` is the folder that clips must not leave; relative paths start in the folder of the layout, or in `root`.
    """

    layout: Layout
    root: Path
    items: list[Item] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def reasons(self) -> dict[str, list[str]]:
        """Return the places of the entries that are left out, by reason, the most frequent first."""
        found: dict[str, list[str]] = {}
        for one in self.left_out:
            found.setdefault(one.reason, []).append(one.place + (f" ({one.detail})" if one.detail else ""))
        return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))


def gather(layout: Layout, root: Path | None = None) -> Gathered:
    """Read a source, and check every entry as training would.

    Args:
        layout: from `detect`.
        root: where relative paths start, and the folder that clips must not leave. Default: the layout's folder.

    Raises:
        UserError: no entry can be used.
    """
    gathered = Gathered(layout, Path(os.path.realpath(root or layout.root)))
    check = Check(gathered.root)
    for entry in layout.read():
        try:
            if isinstance(entry, LeftOut):
                gathered.left_out.append(entry)
            else:
                gathered.items.append(check(entry))
        except Unusable as error:
            gathered.left_out.append(LeftOut(entry.place, error.reason, error.detail))
    if not gathered.items:
        raise UserError(
            f"none of the {len(gathered.left_out)} entries of {layout.title} can be used: {_told(gathered)}"
        )
    return gathered


def _told(gathered: Gathered) -> str:
    told = (f"{len(places)} {reason} (first: {places[0]})" for reason, places in gathered.reasons().items())
    return "; ".join(told) or "it is empty"


class Check:
    """Checks entries one after another, and makes their items."""

    def __init__(self, root: Path) -> None:
        self.root = root
        config, keys = DataConfig(allow_outside=True), KeyCheck()
        files = Files(root, allow_outside=True, check=False)
        self.clip, self.chat = MetadataReader(config, files, keys), MessagesReader(config, files, keys)
        self.seen: dict[str, str] = {}

    def __call__(self, entry: Entry) -> Item:
        """Return the item of an entry. Raises Unusable if training would refuse it."""
        for name in (entry.id, entry.audio or "", entry.speaker or ""):
            if name.encode(errors="ignore").decode() != name or "\0" in name:
                raise Unusable(NO_NAME, repr(name))
        if entry.id in self.seen:
            raise Unusable("an id that occurs twice", f"'{entry.id}', like {self.seen[entry.id]}")
        audio = None if entry.audio is None or entry.content is not None else locate(self.root, entry.audio)
        speaker = {"speaker_id": entry.speaker} if entry.speaker is not None else {}
        clip = {} if entry.audio is None else {"audio_file": str(audio or entry.audio)}
        values = {"id": entry.id, **clip, **entry.values, **speaker}
        record = Record(values, self.root, entry.place)
        try:
            (self.clip if clip else self.chat).sample(record, entry.id)
        except UserError as error:
            raise Unusable("training would refuse it", str(error).removeprefix(f"{record}: ")) from error
        self.seen[entry.id] = entry.place
        return Item(values, entry.speaker, audio, entry.content)


def locate(root: Path, value: str) -> Path:
    """Return the resolved path of a clip inside `root`. Raises Unusable if it is no file with something in it there."""
    path = os.path.realpath(os.path.join(root, value))
    if os.path.commonpath((root, path)) != str(root):
        raise Unusable("audio outside the folder", f"{value} is not in {root}: name the audio's folder with --root")
    try:
        found = os.stat(path)
    except OSError as error:
        raise Unusable("audio is missing", f"{value}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise Unusable("audio is no file", value)
    if not found.st_size:
        raise Unusable("audio is an empty file", value)
    return Path(path)


def speakers_of(items: list[Item]) -> Iterator[tuple[str, str | None]]:
    """Yield id and speaker of each item; without a speaker, the recording that it is a segment of."""
    for item in items:
        recording = None if item.values.keys().isdisjoint(TIMES) else str(item.audio)
        yield item.id, item.speaker or recording
