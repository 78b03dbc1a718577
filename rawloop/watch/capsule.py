"""Capsules: folders with what is needed to run one bad step again. Safetensors, JSON and YAML; no pickle.

The flight recorder keeps the last steps by reference, so that a capsule can show how a bad step came about.

A capsule is written under a temporary name and renamed, so one with its name is whole. Its manifest has the size and
the digest of every file, and its own digest.
"""

import json
import platform
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rawloop.dist import World
from rawloop.errors import RawloopError, UserError
from rawloop.files import FileRecord, in_words, readable, remove_tree, sha256_file, signed_json, sync_tree, write_file
from rawloop.pack import pack, read_state, write_packed
from rawloop.records import json_value
from rawloop.versions import installed_versions
from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.subject import StepRecord

FORMAT = 1
MANIFEST = "MANIFEST.json"
FOLDER = "capsules"
LEFT_OUT_FIRST = ("optimizer", "earlier", "frozen", "weights", "passes")  # if a capsule would be too large
SAID = ("step", "ids", "scale", "loss", "grad_norm", "applied")  # of each step before


class Kept(NamedTuple):
    """A step that has passed, without its passes; the random streams before it, and its largest learning rate."""

    record: StepRecord
    rng: dict[str, Any]
    lr: float


class FlightRecorder:
    """Keeps the last steps of a loop. Nothing is copied, and nothing is read from the device."""

    def __init__(self, steps: int) -> None:
        self.steps: deque[Kept] = deque(maxlen=steps)

    def keep(self, record: StepRecord, rng: dict[str, Any], lr: float) -> None:
        """Keep a step that has ended."""
        self.steps.append(Kept(replace(record, passes=[]), rng, lr))

    def state(self, batch_state: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the steps as nested values that can be stored, each batch as `batch_state` makes it."""
        return {
            "steps": [{"step": one.step, "rng": rng, "batch": batch_state(one.batch)} for one, rng, _ in self.steps]
        }

    def facts(self, record: StepRecord, world: World, why: str, alarms: Iterable[Finding]) -> dict[str, Any]:
        """Return what the manifest of every capsule says: of this step, why it is kept, and of the steps before."""
        return {
            "why": why,
            "step": record.step,
            "rank": world.rank,
            "world_size": world.size,
            "threads": torch.get_num_threads(),  # sums on the CPU depend on it
            "scale": record.scale,
            "versions": {**installed_versions(), "python": platform.python_version(), "platform": sys.platform},
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "findings": [finding.as_json() for finding in alarms],
            "history": [{"lr": lr, **{name: getattr(one, name) for name in SAID}} for one, _, lr in self.steps],
        }


@dataclass
class Capsule:
    """The contents of a capsule: JSON values, nested states by the name of their files, and text files by name."""

    facts: dict[str, Any]
    states: dict[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


class Capsules:
    """The capsules of one rank, limited in number and in size. Those of earlier starts of a run count."""

    def __init__(self, folder: Path, config: WatchConfig, rank: int) -> None:
        self.folder, self.config, self.rank = folder / FOLDER, config, rank

    def has_room(self) -> bool:
        """Whether another capsule may be written."""
        return len(self._names(r"step-\d+")) < self.config.capsules

    def _names(self, step: str) -> list[str]:
        """Return the names of this rank's capsules of a step, given as a regular expression."""
        mine = re.compile(rf"{step}-rank{self.rank}(-\d+)?")
        return [path.name for path in self.folder.glob("step-*") if mine.fullmatch(path.name)]

    def write(self, step: int, make: Callable[[], Capsule]) -> tuple[Path | None, str]:
        """Write a capsule, and return its folder; or None, and why not: that must not hide what is wrong with the step.

        Nothing is left of a capsule that cannot be written.
        """
        name = f"step-{step:08d}-rank{self.rank}"
        taken = len(self._names(f"step-{step:08d}"))
        path = self.folder / (f"{name}-{taken + 1}" if taken else name)
        try:
            return write_capsule(path, make(), self.config.capsule_mb * 10**6), ""
        except OSError as error:
            return None, f"a capsule could not be written: {in_words(error)}"
        except (RuntimeError, TypeError) as error:  # the device has failed, or a batch has other values
            return None, f"a capsule could not be made: {type(error).__name__}: {error}"


def write_capsule(path: Path, capsule: Capsule, most: int) -> Path:
    """Write a capsule of at most `most` bytes. What does not fit is left out, and the manifest says so.

    Raises:
        OSError: it cannot be written.
    """
    states, left_out = _fitting(capsule.states, most)
    temporary = path.with_name(f".tmp-{path.name}")
    if temporary.exists():
        remove_tree(temporary)
    temporary.mkdir(parents=True)
    try:
        files: dict[str, FileRecord] = {}
        for name, state in states.items():
            files |= write_packed(pack(state), temporary, name)
        for name, text in capsule.texts.items():
            files[name] = write_file(temporary / name, [text.encode()])
        facts = {**capsule.facts, "left_out": {**capsule.facts.get("left_out", {}), **left_out}}
        body = {"format": FORMAT, "files": {name: record._asdict() for name, record in files.items()}, **facts}
        write_file(temporary / MANIFEST, [signed_json(json_value(body))])
        sync_tree(temporary)
        temporary.rename(path)
    except BaseException:
        remove_tree(temporary)
        raise
    return path


def _fitting(states: Mapping[str, Any], most: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the states that fit, and the sizes of the others."""
    sizes = {name: sum(t.nbytes for t in pack(state, dry=True).tensors.values()) for name, state in states.items()}
    kept, left_out = dict(states), {}
    for name in LEFT_OUT_FIRST:
        if name in kept and sum(sizes[one] for one in kept) > most:
            del kept[name]
            left_out[name] = f"it has {readable(sizes[name])}, and watch.capsule_mb is {most // 10**6}"
    return kept, left_out


def read_facts(path: Path) -> dict[str, Any]:
    """Read a capsule's manifest, without looking at the other files.

    Raises:
        UserError: there is no capsule, or one of another format.
        RawloopError: the manifest has changed since it was written.
    """
    file = path / MANIFEST
    if not file.is_file():
        inside = sorted(found.parent.name for found in path.glob(f"*/{MANIFEST}")) if path.is_dir() else []
        advice = f"; it has {', '.join(inside)}: name one of them" if inside else ""
        raise UserError(
            f"there is no capsule at '{path}' (no {MANIFEST}): name a folder such as "
            f"RUN/capsules/step-00000041-rank0{advice}"
        )
    raw = file.read_bytes()
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise RawloopError(f"{file} cannot be read: {error}; the capsule is damaged") from error
    found, versions = (body.get(name) if isinstance(body, dict) else None for name in ("format", "versions"))
    if found != FORMAT:
        writer = versions.get("rawloop") if isinstance(versions, dict) else None
        raise UserError(
            f"the capsule {path} has format {found!r}, and this version of rawloop reads {FORMAT}: replay it with the "
            f"version that wrote it ({f'rawloop {writer}' if writer else 'not known'})"
        )
    body.pop("sha256", None)
    if signed_json(body) != raw:
        raise RawloopError(f"{file}: its own digest does not match: the file has changed since it was written")
    facts: dict[str, Any] = body
    return facts


def read_states(path: Path, facts: Mapping[str, Any]) -> Callable[[str], Any]:
    """Compare all files of a capsule with its manifest. Return a function from a state's name to the state, or None.

    Raises:
        RawloopError: a file is missing or has changed.
    """
    for name, record in facts["files"].items():
        file = path / name
        if not file.is_file():
            raise RawloopError(f"the capsule {path} is damaged: {name} is missing")
        if file.stat().st_size != record["size"] or sha256_file(file) != record["sha256"]:
            raise RawloopError(f"the capsule {path} is damaged: {name} has changed since it was written")
    return lambda name: read_state(path, name) if f"{name}.json" in facts["files"] else None
