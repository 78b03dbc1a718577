"""Which clips are encoded into which shard. The plan depends only on the data and on what the cache had before.

Every shard of a plan has fixed clips in a fixed order, whoever makes it. So one process or many, undisturbed or killed
and started again, write the same files. The plan is stored until all of its shards are there.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rawloop.audio import segment_of
from rawloop.data.config import DataConfig
from rawloop.data.shards import PART, Index, next_number, read_rows, rows_file, shard_file, write_file
from rawloop.family_protocols import CodecInfo

PLAN_FILE = "plan.json"
MOST_SHARDS, FEWEST, MOST = 256, 16, 4096  # clips of a shard, so that a plan has about so many shards


@dataclass(frozen=True)
class Plan:
    """The clips without usable codes, by their index, in shards of `size` clips; the first has the number `first`.

    `done` has the shards that are written.
    """

    first: int
    size: int
    clips: tuple[int, ...]
    done: frozenset[int]

    def shards(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return number and clips of each shard that is not written yet."""
        starts = range(0, len(self.clips), self.size)
        pairs = [(self.first + place, self.clips[start : start + self.size]) for place, start in enumerate(starts)]
        return [(number, clips) for number, clips in pairs if number not in self.done]


def start_plan(folder: Path, paths: Sequence[str], codec: CodecInfo, config: DataConfig, size: int | None) -> Plan:
    """Return the plan for the clips at `paths`: the one that was begun, if it is for the same data, or a new one.

    Args:
        folder: of the codec; it is locked.
        paths: absolute.
        codec: of the codes.
        config: its limits and `on_bad_sample` are read.
        size: clips of a shard of a new plan; None for a number that depends on how many clips there are.
    """
    stored = _read(folder)
    if stored is not None:
        plan, digest = _make(folder, stored["first"], paths, codec, config, stored["size"])
        if digest == stored["digest"]:
            return plan
    end_plan(folder)
    plan, digest = _make(folder, next_number(folder), paths, codec, config, size)
    if plan.clips:
        write_file(folder / PLAN_FILE, json.dumps({"first": plan.first, "size": plan.size, "digest": digest}).encode())
    return plan


def end_plan(folder: Path) -> None:
    """Remove the plan, and parts of shards."""
    for part in folder.glob(f"{PART}*"):
        part.unlink()
    (folder / PLAN_FILE).unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the stored plan. If there is none, or a damaged one, clips are encoded into new shards."""
    try:
        stored = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = {"first": int, "size": int, "digest": str}
    whole = isinstance(stored, dict) and all(type(stored.get(key)) is kind for key, kind in kinds.items())
    return stored if whole and stored["first"] >= 0 and stored["size"] > 0 else None


def _make(
    folder: Path, first: int, paths: Sequence[str], codec: CodecInfo, config: DataConfig, size: int | None
) -> tuple[Plan, str]:
    index = Index(folder, first)
    clips = tuple(place for place, path in enumerate(paths) if not _is_settled(index, path, codec, config))
    size = size or min(max(-(-len(clips) // MOST_SHARDS), FEWEST), MOST)
    settings = [config.on_bad_sample, config.min_seconds, config.max_seconds]
    digest = sha256(json.dumps([settings, [paths[place] for place in clips]]).encode()).hexdigest()
    return Plan(first, size, clips, _written(folder, first)), digest


def _is_settled(index: Index, path: str, codec: CodecInfo, config: DataConfig) -> bool:
    """Return whether the cache has usable codes of the current file. A bad clip is looked at again each time."""
    row = index.rows.get(path)
    if row is None or row.bad or row.sha256 not in index.contents:
        return False
    try:
        now = os.stat(segment_of(path).file)
    except OSError:
        return False
    same = (row.size, row.mtime_ns) == (now.st_size, now.st_mtime_ns)
    return same and config.fault_of_length(row.frames, codec.frame_rate) is None


def _written(folder: Path, first: int) -> frozenset[int]:
    """Return the numbers from `first` on of the shards with rows, whose codes are there."""
    rows = read_rows(folder).values()
    lost = {row.shard for row in rows if row.shard >= first and not shard_file(folder, row.shard).is_file()}
    numbers = range(first, next_number(folder))
    return frozenset(number for number in numbers if number not in lost and rows_file(folder, number).is_file())
