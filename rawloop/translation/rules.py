"""A table of another program's settings: for each the keys of rawloop that it is here, or why there is none."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["flag", "number", "text", "list", "any"]
EMPTY: tuple[Any, ...] = (None, "", [], {}, ())


class Given(dict[str, Any]):
    """The values of all settings of a table: those that were given, and the defaults of the others.

    Attributes:
        named: the settings that were given.
        unread: the settings that were given and cannot be read.
    """

    named: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """What a value is here: the settings it makes, what is different in words, or that there is no counterpart."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    words: str = ""
    missing: bool = False


Convert = Callable[[Any, Given], Found]


def sets(words: str = "", **settings: Any) -> Found:
    """Return settings; a key's dot is written as two underscores, `optim__lr`."""
    return Found({name.replace("__", "."): value for name, value in settings.items()}, words)


def nothing(words: str = "") -> Found:
    """Return that a value needs no setting here, and why."""
    return Found(words=words)


def missing(words: str) -> Found:
    """Return that a value has no counterpart, and why."""
    return Found(words=words, missing=True)


@dataclass(frozen=True)
class Rule:
    """One setting of another program.

    Attributes:
        name: there.
        default: there; None also for a setting that has none.
        kind: of its values.
        keys: the keys here that it may set; empty if it has no counterpart.
        convert: gives the settings of a value.
        words: why there is no counterpart, or what is different here. Keys, and only they, are in quotes.
        renamed: whether it is the same setting by another name.
    """

    name: str
    default: Any
    kind: Kind
    keys: tuple[str, ...]
    convert: Convert
    words: str = ""
    renamed: bool = False


def kind_of(default: Any) -> Kind:
    """Return the kind of the values of a setting with this default."""
    if isinstance(default, bool):
        return "flag"
    return "number" if isinstance(default, int | float) else "text" if isinstance(default, str) else "any"


def same(name: str, key: str, default: Any = None, kind: Kind | None = None) -> Rule:
    """Return the rule of a setting that only has another name here. None is not set."""

    def convert(value: Any, _: Given) -> Found:
        return Found({} if value is None else {key: value})

    return Rule(name, default, kind or kind_of(default), (key,), convert, renamed=True)


def changed(name: str, keys: str, convert: Convert, words: str, default: Any = None, kind: Kind | None = None) -> Rule:
    """Return the rule of a setting whose value or meaning is another here. `keys` are separated by blanks."""
    return Rule(name, default, kind or kind_of(default), tuple(keys.split()), convert, words)


def without(words: str, **names: Any) -> tuple[Rule, ...]:
    """Return the rules of settings, name=default, that have no counterpart, all for one reason."""
    return tuple(
        Rule(name, default, kind_of(default), (), lambda *_: missing(words), words) for name, default in names.items()
    )


def many(words: str, names: str) -> tuple[Rule, ...]:
    """Return the rules of settings without a counterpart, whose default is none or false. Blanks separate names."""
    return without(words, **dict.fromkeys(names.split()))


def switch(words: str = "", **settings: Any) -> Convert:
    """Return the convert of a flag that makes settings if it is set; a key's dot is written as in `sets`."""
    return lambda value, _: sets(words, **settings) if value else nothing()


@dataclass(frozen=True)
class Table:
    """The settings of another program.

    Attributes:
        title: the program.
        rules: by name, in order.
        prefixes: beginnings of names -> why these have no counterpart.
        label: how a name is written, such as `--{}`.
        implied: gives what no single setting says, from the values of all.
    """

    title: str
    rules: Mapping[str, Rule]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    label: str = "{}"
    implied: Callable[[Given], Iterable[Found]] = lambda _: ()

    def rule(self, name: str) -> Rule | None:
        """Return the rule of a name, or None if the table does not know it."""
        if name in self.rules:
            return self.rules[name]
        words = next((words for prefix, words in self.prefixes.items() if name.startswith(prefix)), None)
        return None if words is None else without(words, **{name: None})[0]


def table(title: str, *parts: "Rule | Iterable[Rule]", based_on: Table | None = None, **more: Any) -> Table:
    """Return a table of rules and groups of rules. A later rule replaces an earlier one, and those of `based_on`."""
    rules = dict(based_on.rules) if based_on else {}
    for part in parts:
        rules |= {rule.name: rule for rule in ([part] if isinstance(part, Rule) else part)}
    return Table(title, rules, **more)


def with_defaults(source: Table, **defaults: Any) -> tuple[Rule, ...]:
    """Return rules of a table with other defaults."""
    return tuple(replace(source.rules[name], default=value) for name, value in defaults.items())


def shared(source: Table, names: str) -> list[Rule]:
    """Return rules of another table, by names that blanks separate."""
    return [source.rules[name] for name in names.split()]
