"""The translation of a set of another program's settings into keys of rawloop.

Nothing is dropped in silence: each setting that was given gets a line, and so does each default that is not ours.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rawloop.errors import UserError
from rawloop.translation.rules import Found, Given, Rule, Table

Status = Literal["taken", "changed", "idle", "without", "unread", "unknown", "default", "assumed"]
TRUTH = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True)
class Line:
    """What became of one setting.

    An `idle` one needs no setting here. An `assumed` one was not given: its default is written, as ours is another.
    """

    name: str
    value: Any
    status: Status
    settings: Mapping[str, Any] = field(default_factory=dict)
    words: str = ""


@dataclass(frozen=True)
class Translation:
    """The settings here, by dotted key, and a line for each setting there."""

    settings: dict[str, Any]
    lines: list[Line]

    def of(self, *statuses: Status) -> list[Line]:
        """Return the lines of some statuses."""
        return [line for line in self.lines if line.status in statuses]


def translate(
    source: Table,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    unread: Mapping[str, str] | None = None,
    implied: Iterable[Found] = (),
) -> Translation:
    """Translate settings of another program.

    Args:
        source: its table.
        given: the settings that were given.
        defaults: the defaults of rawloop, by dotted key.
        unread: settings whose value cannot be read, name -> the place and the expression. No default stands for them.
        implied: what else follows from where the settings stand.

    Raises:
        UserError: a value of a wrong type, or two settings that contradict each other.
    """
    unread = unread or {}
    values = Given({name: rule.default for name, rule in source.rules.items()})
    values |= {name: typed(value, source.rule(name), source.label) for name, value in given.items()}
    values.named, values.unread = frozenset(given), frozenset(unread)
    lines = [_unread(name, place, source.rule(name)) for name, place in unread.items()]
    lines += [Line(name, value, "unknown") for name, value in given.items() if source.rule(name) is None]
    known = [(name, source.rule(name)) for name in {**given, **source.rules} if name not in unread]
    lines += [_line(rule, values, defaults) for name, rule in known if rule is not None]
    lines += [
        Line("", None, "assumed", _differing(found, defaults), found.words)
        for found in (*implied, *source.implied(values))
    ]
    settings = _agreed(source, [line for line in lines if line.status in ("taken", "changed")])
    shown: list[Line] = []
    for line in lines:
        if line.status == "assumed":
            if not line.settings or settings.keys() & line.settings.keys():
                continue  # it is our default, or something that was given decides
            settings |= line.settings
        shown.append(line)
    return Translation(settings, shown)


def _differing(found: Found, defaults: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: _fitted(value, defaults[key]) for key, value in found.settings.items()}
    return {key: value for key, value in settings.items() if value != defaults[key]}


def _unread(name: str, place: str, rule: Rule | None) -> Line:
    if rule is not None and not rule.keys:
        return Line(name, place, "without", words=rule.words)
    return Line(name, place, "unread", dict.fromkeys(rule.keys if rule else ()))


def _line(rule: Rule, values: Given, defaults: Mapping[str, Any]) -> Line:
    value, named = values[rule.name], rule.name in values.named
    found = rule.convert(value, values)
    settings = {key: _fitted(item, defaults[key]) for key, item in found.settings.items()}
    ours = all(item == defaults[key] for key, item in settings.items())
    usual = value == rule.default or not (value or rule.default)
    if not named:
        return Line(rule.name, value, "assumed", _differing(found, defaults), found.words or rule.words)
    if usual and (ours or found.missing):
        return Line(rule.name, value, "default", settings)
    if found.missing:
        return Line(rule.name, value, "without", words=found.words)
    if not settings:
        return Line(rule.name, value, "idle", words=found.words)
    is_same = rule.renamed or (list(settings.values()) == [value] and not found.words)
    words = found.words or ("" if is_same else rule.words)
    return Line(rule.name, value, "taken" if is_same else "changed", settings, words)


def _agreed(source: Table, lines: list[Line]) -> dict[str, Any]:
    """Return the settings of the lines. Raise UserError for two that contradict each other."""
    settings: dict[str, Any] = {}
    setters: dict[str, Line] = {}
    for line in lines:
        for key, value in line.settings.items():
            if key in settings and settings[key] != value:
                first, second = ((source.label.format(one.name), one.value) for one in (setters[key], line))
                raise UserError(
                    f"{first[0]} is {first[1]!r} and {second[0]} is {second[1]!r}, and both decide '{key}': keep one"
                )
            settings[key], setters[key] = value, line
    return settings


def _fitted(value: Any, default: Any) -> Any:
    """Return a number as the type that the key has: 8.0 as 8, and 3 as 3.0."""
    if isinstance(value, bool) or isinstance(default, bool):
        return value
    if isinstance(value, float) and isinstance(default, int) and value.is_integer():
        return int(value)
    return float(value) if isinstance(value, int) and isinstance(default, float) else value


def typed(value: Any, rule: Rule | None, label: str) -> Any:
    """Return a value that is written as text as the flag or number that its setting has. YAML reads 2e-4 as text."""
    if rule is None or not isinstance(value, str) or rule.kind not in ("flag", "number"):
        return value
    if value.lower() in ("none", "null", ""):
        return None
    if rule.kind == "flag":
        if value.lower() not in TRUTH:
            raise UserError(f"{label.format(rule.name)} is '{value}': it must be true or false")
        return TRUTH[value.lower()]
    try:
        return number(value)
    except ValueError as error:
        raise UserError(f"{label.format(rule.name)} is '{value}': it must be a number") from error


def number(text: str) -> int | float:
    """Return a text as a whole number if it is one, else as a number. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        return float(text)
