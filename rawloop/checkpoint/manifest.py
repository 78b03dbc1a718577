"""The manifest is written last: a slot with a manifest whose digests agree is a whole checkpoint, any other is not.

No format that torch reads notices a flipped bit by itself; the digests here do, for the manifest too.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from stat import S_ISLNK, S_ISREG
from typing import Any

from rawloop.checkpoint.disk import FileRecord, written
from rawloop.errors import CheckpointError

NAME = "MANIFEST.json"
FORMAT = 1
LARGEST = 64 << 20  # bytes of a manifest; an entry has about 150


@dataclass(frozen=True)
class Manifest:
    """What a slot holds.

    `states` lists the parts under `state/`, `per_rank` those of them that are stored once per rank, `folders` the
    parts with a folder of their own. `meta` has `best`, the evaluation for which it was written, and `keep`, if it is
    never to be deleted.
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


def step_of(slot: Path) -> int:
    """Return the step of a slot from its name; -1 for a name that is not a step's."""
    match = re.fullmatch(r"(?:\.old-)?step-(\d+)", slot.name)
    return int(match[1]) if match else -1


def installed_versions() -> dict[str, str | None]:
    """Return the versions of what wrote a checkpoint; None for what is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in ("rawloop", "torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _render(body: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


def write_manifest(slot: Path, manifest: Manifest) -> None:
    """Write the manifest into a slot that is otherwise complete."""
    files = {name: record._asdict() for name, record in manifest.files.items()}
    body = {**asdict(manifest), "files": files}
    with written(slot / NAME) as file:
        file.write(_render(body).encode())


def read_manifest(slot: Path) -> Manifest:
    """Read a slot's manifest, without looking at the other files.

    Raises:
        CheckpointError: there is none, or it is not as it was written.
    """
    path = slot / NAME
    try:
        if not slot.is_dir():
            raise CheckpointError(f"{slot}: no such folder here; ranks on several machines need it on a shared disk")
        found = path.lstat()
        if not S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise CheckpointError(f"{path}: it is {_kind(found)}, and no manifest")
        raw = path.read_bytes()
        body = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(f"{slot}: there is no {NAME}: the checkpoint was never completed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it cannot be read: {getattr(error, 'strerror', error)}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found_format = body.get("format") if isinstance(body, dict) else body
        raise CheckpointError(f"{path}: its format is {found_format!r}, this version of rawloop reads {FORMAT}")
    body.pop("sha256", None)
    # rendering again and comparing bytes notices every change, even one that JSON does not care about
    if _render(body).encode() != raw:
        raise CheckpointError(f"{path}: its own digest does not agree: the file has changed since it was written")
    try:
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        manifest = Manifest(files=files, **body)
        fault = _fault(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = str(error)
    if fault:
        raise CheckpointError(f"{path}: rawloop has not written it so: {fault}")
    return manifest


def _fault(manifest: Manifest) -> str | None:
    """Say what no manifest of ours holds, though its digest agrees."""
    if type(manifest.step) is not int or type(manifest.world_size) is not int:
        return f"its step is {manifest.step!r}, its world_size {manifest.world_size!r}"
    texts = [*manifest.states, *manifest.per_rank, *manifest.folders.values()]
    if not all(type(text) is str and text not in ("", "..") and "/" not in text for text in texts):
        return f"its parts are {texts}"
    if type(manifest.meta) is not dict or type(manifest.versions) is not dict:
        return "its meta or its versions are no object"
    for name, record in manifest.files.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or str(inside) != name or name == NAME:
            return f"it names {name!r}, which is no file of a checkpoint"
        if type(record.size) is not int or type(record.sha256) is not str:
            return f"the size of {name} is {record.size!r}, its digest {record.sha256!r}"
    return None if manifest.files else "it names no file"


def verify(slot: Path) -> Manifest:
    """Check every file of a slot against the manifest, by size and digest, and return the manifest.

    A file that the manifest does not name is damage, as loading might take it; so is a link, or what is no plain file.
    Names that begin with a dot are passed over: systems leave such files (.DS_Store, .nfs...), and nobody loads them.

    Raises:
        CheckpointError: names the first file that is missing, differs or does not belong there, and how; or its name is
            another step's.
    """
    manifest = read_manifest(slot)
    if step_of(slot) not in (-1, manifest.step):
        raise CheckpointError(f"{slot}: its manifest is that of step {manifest.step}: it was renamed, or copied")
    try:
        found = dict(_entries(slot))
        for name, problem in _problems(slot, found, manifest):
            raise CheckpointError(f"{slot}: {name} {problem}")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(f"{slot}: it cannot be read: {error.strerror}{where}") from error
    return manifest


def _problems(slot: Path, found: dict[str, os.stat_result], manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield what is wrong, by file; digests last, as they take long."""
    strangers = [name for name in found if name not in {*manifest.files, NAME} and not re.search(r"(^|/)\.", name)]
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
        with (slot / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                yield name, "has changed since it was written (its SHA-256 differs)"


def _entries(slot: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Yield all that lies in a slot but folders, by its path in there; no link is followed."""
    with os.scandir(slot / prefix) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(slot, f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)


def _kind(stat: os.stat_result) -> str:
    if S_ISREG(stat.st_mode):
        return f"a file of {stat.st_size:,} bytes"
    return "a link" if S_ISLNK(stat.st_mode) else "no plain file"
