"""What a translation is told in: lines for a person, options for a command line, YAML for a config."""

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from rawloop.config import RunConfig
from rawloop.translation.translate import Line, Status, Translation
from rawloop.yaml_file import flattened

HEADS: Mapping[Status, str] = {
    "taken": "taken",
    "changed": "changed",
    "idle": "nothing to set",
    "without": "without counterpart",
    "unread": "not read, so rawloop's default stands",
    "unknown": "not known to rawloop",
    "assumed": "not given; the default there is written, as rawloop's is another",
    "default": "given at its default there, which needs no setting here",
}
LONGEST = 160  # characters of a value in a line


def our_defaults() -> dict[str, Any]:
    """Return the default of every key, dotted, in the order of the keys."""
    return dict(flattened(dataclasses.asdict(RunConfig())))


def told(translation: Translation, *statuses: Status, label: str = "{}") -> Iterator[str]:
    """Yield the lines of a translation, a group for each status. Groups without lines are left out."""
    for status in statuses:
        lines = translation.of(status)
        if not lines:
            continue
        yield f"{HEADS[status]}:"
        if status == "default":
            yield f"  {', '.join(label.format(line.name) for line in lines)}"
        else:
            yield from (f"  {_line(line, label)}" for line in lines)


def _line(line: Line, label: str) -> str:
    """Return a line such as `learning_rate 2e-05 -> optim.lr: 2e-05`."""
    name = label.format(line.name) if line.name else ""
    there = f"{name} {shown(line.value)}" if name and line.status != "assumed" else name
    if line.status == "unknown":
        return there
    here = ", ".join(
        key if line.status == "unread" else f"{key}: {shown(value)}" for key, value in line.settings.items()
    )
    if line.status == "assumed":
        return f"{here} ({name or line.words})"
    if not here:
        return f"{there}: {line.words.removeprefix('there is none; ')}" if line.words else there
    return f"{there} -> {here}{f' ({line.words})' if line.words else ''}"


def shown(value: Any) -> str:
    """Return a value as YAML writes it, in one line, cut if it is long."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def options(settings: Mapping[str, Any]) -> list[list[str]]:
    """Return settings as options of a command, each with its value: `--optim.lr`, `2e-05`."""
    return [[f"--{key}", _as_option(value)] for key, value in settings.items()]


def _as_option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_command(words: Iterable[str]) -> str:
    """Return a command for a shell, an option to a line."""
    return " ".join(f"\\\n  {shlex.quote(word)}" if word.startswith("--") else shlex.quote(word) for word in words)


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Return settings as nested YAML."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
