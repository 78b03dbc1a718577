"""Slots: the folders of checkpoints, their manifests, which one is the newest, and which one `best` points to.

Nothing here has side effects, so it may read the folder of a run that is training; `placing.py` writes. Names that
begin with a dot are never checkpoints: `.tmp-` is being written, `.trash-` is being deleted, `.old-` is a slot moved
aside while another takes its place.

The manifest is written last: a slot is a whole checkpoint if it has a manifest and every digest matches. No format that
torch reads notices a flipped bit; the digests do, in the manifest too.

`best.json` names the best slot, and `best` is a relative link to it. Both are replaced atomically, best.json first: if
they differ, best.json is right, unless its slot is missing (a kill while a slot was moved).
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from stat import S_ISLNK, S_ISREG
from typing import Any, NamedTuple

from rawloop.checkpoint.best import BestRecord
from rawloop.errors import CheckpointError
from rawloop.files import FileRecord, sha256_file, signed_json, write_file

CHECKPOINTS = "checkpoints"
BEST = "best"
BEST_FILE = "best.json"
DISCARDED = "discarded"
POINTED = re.compile(rf"{CHECKPOINTS}/({DISCARDED}/)?\w[^/]*")  # where `best` may point
STATE = "state"
MANIFEST = "MANIFEST.json"
FORMAT = 1
LARGEST = 64 << 20  # bytes of a manifest; an entry has about 150


@dataclass(frozen=True)
class Manifest:
    """The contents of a slot.

    `states` lists the parts under `state/`, `per_rank` those of them with one state per rank, `folders` the parts with
    a folder. `meta` has `best`, the evaluation of this step if it was the best, and `keep`, if rotation never deletes
    the slot.
    """

    step: int
    world_size: int
    states: list[str]
    per_rank: list[str]
    folders: dict[str, str]
    files: dict[str, FileRecord]
    meta: dict[str, Any]
    versions: dict[str, str | None]
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


def write_manifest(slot: Path, manifest: Manifest) -> None:
    """Write the manifest into a slot whose other files are complete."""
    files = {name: record._asdict() for name, record in manifest.files.items()}
    write_file(slot / MANIFEST, [signed_json({**asdict(manifest), "files": files})])


def read_manifest(slot: Path) -> Manifest:
    """Read a slot's manifest, without looking at the other files.

    Raises:
        CheckpointError: there is no manifest, or it has changed since it was written.
    """
    path = slot / MANIFEST
    try:
        if not slot.is_dir():
            raise CheckpointError(f"{slot}: no such folder here; ranks on several machines need it on a shared disk")
        found = path.lstat()
        if not S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise CheckpointError(f"{path}: it is {_kind(found)}, not a manifest")
        raw = path.read_bytes()
        body = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(f"{slot}: there is no {MANIFEST}: the checkpoint was never completed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it cannot be read: {getattr(error, 'strerror', error)}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found_format = body.get("format") if isinstance(body, dict) else body
        raise CheckpointError(f"{path}: its format is {found_format!r}, this version of rawloop reads {FORMAT}")
    body.pop("sha256", None)
    # comparing the bytes with a second rendering notices every change, even one that does not change the JSON
    if signed_json(body) != raw:
        raise CheckpointError(f"{path}: its own digest does not match: the file has changed since it was written")
    try:
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        manifest = Manifest(files=files, **body)
        fault = _fault(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = str(error)
    if fault:
        raise CheckpointError(f"{path}: rawloop does not write such a manifest: {fault}")
    return manifest


def _fault(manifest: Manifest) -> str | None:
    """Describe content that rawloop never writes, although the digest of the manifest matches."""
    if type(manifest.step) is not int or type(manifest.world_size) is not int:
        return f"its step is {manifest.step!r}, its world_size {manifest.world_size!r}"
    texts = [*manifest.states, *manifest.per_rank, *manifest.folders.values()]
    if not all(type(text) is str and text not in ("", "..") and "/" not in text for text in texts):
        return f"its parts are {texts}"
    if type(manifest.meta) is not dict or type(manifest.versions) is not dict:
        return "its meta or its versions are not a JSON object"
    for name, record in manifest.files.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or str(inside) != name or name == MANIFEST:
            return f"it names {name!r}, which is not a file of a checkpoint"
        if type(record.size) is not int or type(record.sha256) is not str:
            return f"the size of {name} is {record.size!r}, its digest {record.sha256!r}"
    return None if manifest.files else "it names no file"


def verify(slot: Path) -> Manifest:
    """Compare every file of a slot with the manifest, by size and digest, and return the manifest.

    A file that is not in the manifest is damage, because loading might read it. So is a link in place of a file. Names
    that begin with a dot are ignored: systems leave such files (.DS_Store, .nfs...), and nothing loads them.

    Raises:
        CheckpointError: a file is missing, differs or is not in the manifest (the message names the first), or the
            folder has the name of another step.
    """
    manifest = read_manifest(slot)
    if step_of(slot) not in (-1, manifest.step):
        raise CheckpointError(f"{slot}: its manifest is that of step {manifest.step}: it was renamed, or copied")
    try:
        for name, problem in _problems(slot, dict(_entries(slot)), manifest):
            raise CheckpointError(f"{slot}: {name} {problem}")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(f"{slot}: it cannot be read: {error.strerror}{where}") from error
    return manifest


def _problems(slot: Path, found: dict[str, os.stat_result], manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield each file with a problem, and the problem; digests last, as they take long."""
    strangers = [name for name in found if name not in {*manifest.files, MANIFEST} and not re.search(r"(^|/)\.", name)]
    for name in [*strangers, *(found.keys() & manifest.files.keys())]:
        if not S_ISREG(found[name].st_mode):
            yield name, f"is {_kind(found[name])}, and rawloop writes plain files"
    for name, record in manifest.files.items():
        if name not in found:
            yield name, "is missing"
        elif found[name].st_size != record.size:
            yield name, f"has {found[name].st_size} bytes, {record.size} were written"
    for name in strangers:
        yield name, "is not in its manifest: somebody has put it there; move it away"
    for name, record in manifest.files.items():
        if sha256_file(slot / name) != record.sha256:
            yield name, "has changed since it was written (its SHA-256 differs)"


def _entries(slot: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Yield the path and status of everything in a slot except folders, without following links."""
    with os.scandir(slot / prefix) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(slot, f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)


def _kind(stat: os.stat_result) -> str:
    if S_ISREG(stat.st_mode):
        return f"a file of {stat.st_size:,} bytes"
    return "a link" if S_ISLNK(stat.st_mode) else "a special file"


class Latest(NamedTuple):
    """The newest whole checkpoint of a run, and the damaged newer ones, each with the reason."""

    slot: Path | None
    damaged: dict[Path, str]


def slot_name(step: int) -> str:
    """Return the folder name of a step's slot."""
    return f"step-{step:08d}"


def step_of(slot: Path) -> int:
    """Return the step in a slot's name; -1 if the name has none."""
    match = re.fullmatch(r"(?:\.old-)?step-(\d+)", slot.name)
    return int(match[1]) if match else -1


def rank_file(name: str, rank: int) -> str:
    """Return the file name, without suffix, of a part's state on one rank."""
    return f"{name}-{rank:05d}"


def is_slot_name(slot: Path) -> bool:
    """Whether a folder is named like a slot. Without a manifest, such a folder is a damaged checkpoint."""
    return step_of(slot) >= 0 or slot.name == BEST


def find_slots(run: Path) -> list[Path]:
    """Return the slots of a run, newest step first, whole or not.

    If a kill interrupted the replacement of a slot, the slot has its `.old-` name.
    """
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return []
    slots = {path.name: path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()}
    found = [path for name, path in slots.items() if not name.startswith(".old-") or name[5:] not in slots]
    return sorted(found, key=step_of, reverse=True)


def find_latest(run: Path) -> Latest:
    """Find the newest checkpoint whose files are all as they were written."""
    damaged: dict[Path, str] = {}
    for slot in find_slots(run):
        try:
            verify(slot)
        except CheckpointError as error:
            damaged[slot] = str(error)
            continue
        return Latest(slot, damaged)
    return Latest(None, damaged)


def find_best(run: Path) -> Path | None:
    """Return the slot that `best` points to, if it exists."""
    if best_is_folder(run):
        return run / BEST
    names = [name for name in (json_of_best(run).get("slot"), link_of_best(run)) if isinstance(name, str)]
    paths = [run / name for name in names if POINTED.fullmatch(name)]
    places = (place for path in paths for place in (path, path.with_name(f".old-{path.name}")))
    return next((place for place in places if place.is_dir()), None)


def resolve_best(path: Path) -> Path:
    """Return the slot that RUN/best points to, also on file systems without links; return any other path unchanged."""
    return (find_best(path.parent) if path.name == BEST else None) or path


def readable_best(run: Path) -> Path | None:
    """Return the slot that `best` points to if its manifest can be read, so that a message may name it."""
    slot = find_best(run)
    return slot if slot is not None and manifest_of(slot) is not None else None


def points_nowhere(run: Path) -> bool:
    """Whether `best` points to a slot that does not exist."""
    return find_best(run) is None and ((run / BEST_FILE).exists() or (run / BEST).is_symlink())


def best_record(run: Path) -> BestRecord | None:
    """Return the evaluation of the best slot, from the slot's manifest or else from best.json."""
    slot = find_best(run)
    if slot is None:
        return None
    manifest = manifest_of(slot)
    return BestRecord.read(manifest.meta.get("best") if manifest else None) or BestRecord.read(json_of_best(run))


def best_is_folder(run: Path) -> bool:
    """Whether `best` is a folder: the run was copied with its links followed, or an older version wrote it."""
    return (run / BEST).is_dir() and not (run / BEST).is_symlink()


def json_of_best(run: Path) -> dict[str, Any]:
    """Return the contents of best.json; an empty dict if it is missing or damaged."""
    try:
        content = json.loads((run / BEST_FILE).read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def link_of_best(run: Path) -> str | None:
    """Return the target of the link `best`, as it is written."""
    return os.readlink(run / BEST) if (run / BEST).is_symlink() else None


def manifest_of(slot: Path) -> Manifest | None:
    """Return a slot's manifest, or None if it cannot be read."""
    try:
        return read_manifest(slot)
    except CheckpointError:
        return None
