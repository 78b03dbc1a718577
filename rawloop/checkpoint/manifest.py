"""The manifest is written last: a slot with a manifest whose digests agree is a whole checkpoint, any other is not.

No format that torch reads notices a flipped bit by itself; the digests here do, for the manifest too.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rawloop.checkpoint.disk import FileRecord, written
from rawloop.checkpoint.pack import Packed, pack, unpack
from rawloop.errors import CheckpointError

NAME = "MANIFEST.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a slot holds.

    `states` lists the parts under `state/`, `per_rank` those of them that are stored once per rank, `folders` the
    parts with a folder of their own. `meta` is what the caller wanted to keep with the step.
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
    body = {**asdict(manifest), "files": files, "meta": pack(manifest.meta).tree}
    with written(slot / NAME) as file:
        file.write(_render(body).encode())


def read_manifest(slot: Path) -> Manifest:
    """Read a slot's manifest, without looking at the other files.

    Raises:
        CheckpointError: there is none, or it is not as it was written.
    """
    path = slot / NAME
    if not slot.is_dir():
        raise CheckpointError(f"{slot}: no such folder here; ranks on several machines need it on a shared disk")
    try:
        raw = path.read_bytes()
        body = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(f"{slot}: there is no {NAME}: the checkpoint was never completed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it cannot be read: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else body
        raise CheckpointError(f"{path}: its format is {found!r}, this version of rawloop reads {FORMAT}")
    body.pop("sha256", None)
    # rendering again and comparing bytes notices every change, even one that JSON does not care about
    if _render(body).encode() != raw:
        raise CheckpointError(f"{path}: its own digest does not agree: the file has changed since it was written")
    try:
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        manifest = Manifest(files=files, meta=unpack(Packed(body.pop("meta"), {})), **body)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: rawloop has not written it so: {error}") from error
    if type(manifest.step) is not int:
        raise CheckpointError(f"{path}: rawloop has not written it so: its step is {manifest.step!r}")
    return manifest


def verify(slot: Path) -> Manifest:
    """Check every file of a slot against the manifest, by size and digest, and return the manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs, and how; or its name is another step's.
    """
    manifest = read_manifest(slot)
    if step_of(slot) not in (-1, manifest.step):
        raise CheckpointError(f"{slot}: its manifest is that of step {manifest.step}: it was renamed, or copied")
    for name, record in manifest.files.items():
        try:
            problem = _difference(slot / name, record)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            raise CheckpointError(f"{slot}: {name} {problem}")
    return manifest


def _difference(path: Path, record: FileRecord) -> str | None:
    if not path.exists():
        return "is missing"
    size = path.stat().st_size
    if size != record.size:
        return f"has {size} bytes, {record.size} were written"
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    return None if same else "has changed since it was written (its SHA-256 differs)"
