"""Turns collected state into a slot on the disk: all of it or nothing.

Order is everything: files, the manifest that vouches for them, all of it forced to the disk, the rename, and the rename
forced to the disk. A kill at any point leaves the slots as they were, or the finished one in its place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.disk import FileRecord, record_tree, remove_tree, sync_tree, write_packed
from rawloop.checkpoint.manifest import Manifest, write_manifest
from rawloop.checkpoint.pack import Packed
from rawloop.checkpoint.placing import put_in_place

STATE = "state"


@dataclass(frozen=True)
class Contents:
    """A checkpoint in memory: the states of rank 0, and the states that every rank has one of.

    `folders` has, by part, the name of its folder and what writes it.
    """

    step: int
    versions: dict[str, str | None]
    states: dict[str, Packed]
    per_rank: list[dict[str, Packed]]
    folders: dict[str, tuple[str, Callable[[Path], None]]]
    best: BestRecord | None = None  # the evaluation that makes it the best
    keep: bool = False  # never to be deleted
    gives_up: bool = False  # a slot of the same name is of another continuation

    def files(self) -> dict[str, Packed]:
        """Return every state by the name of its file, without suffix."""
        by_rank = {
            rank_file(name, rank): packed
            for rank, states in enumerate(self.per_rank)
            for name, packed in states.items()
        }
        return {**self.states, **by_rank}


def rank_file(name: str, rank: int) -> str:
    """Return the file name, without suffix, of a state that is stored once per rank."""
    return f"{name}-{rank:05d}"


def write_slot(slot: Path, contents: Contents) -> Manifest:
    """Write a whole slot and put it in place of whatever has its name. Returns its manifest.

    Raises:
        OSError, SafetensorError, RawloopError: it could not be written. `slot` is untouched, and what there is of the
            new one lies in the folder that `temporary_of` names.
    """
    temporary = temporary_of(slot)
    discard(temporary)
    temporary.mkdir(parents=True)
    files = _write_states(temporary / STATE, contents)
    for name, write in contents.folders.values():
        files |= _write_folder(temporary / name, write)
    manifest = Manifest(
        step=contents.step,
        world_size=len(contents.per_rank),
        states=sorted(contents.states),
        per_rank=sorted(contents.per_rank[0]),
        folders={part: name for part, (name, _) in contents.folders.items()},
        files=files,
        meta={
            **({"best": contents.best._asdict()} if contents.best else {}),
            **({"keep": True} if contents.keep else {}),
        },
        versions=contents.versions,
    )
    write_manifest(temporary, manifest)
    sync_tree(temporary)
    put_in_place(temporary, slot, gives_up=contents.gives_up, best=contents.best)
    return manifest


def temporary_of(slot: Path) -> Path:
    """Return the folder in which a slot is built."""
    return slot.with_name(f".tmp-{slot.name}")


def discard(temporary: Path) -> None:
    """Delete an unfinished slot, if there is one."""
    if temporary.exists():
        remove_tree(temporary)


def _write_states(folder: Path, contents: Contents) -> dict[str, FileRecord]:
    folder.mkdir()
    files: dict[str, FileRecord] = {}
    for name, packed in contents.files().items():
        files |= write_packed(packed, folder, name)
    return {f"{STATE}/{name}": record for name, record in files.items()}


def _write_folder(folder: Path, write: Callable[[Path], None]) -> dict[str, FileRecord]:
    folder.mkdir()
    write(folder)
    return {f"{folder.name}/{name}": record for name, record in record_tree(folder).items()}
