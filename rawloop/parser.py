"""Settings from YAML files and a command line become config dataclasses. All mistakes in them are told together."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from rawloop.errors import Mistakes, UserError
from rawloop.keys import REQUIRED, Key, options_of, suggest
from rawloop.values import WrongValue, in_words, items_of_text, kinds_of, of_text, shown, typed

COMMAND_LINE = "the command line"
NOTHING: Mapping[str, str] = MappingProxyType({})


class Option(NamedTuple):
    """An option of a command line with its values, or, without a name, a word that stands alone."""

    name: str
    values: list[str]


def split(words: Sequence[str], keys: Mapping[str, Key]) -> list[Option]:
    """Divide a command line into options with their values, and words that stand alone."""
    found, rest = list[Option](), [*reversed(words)]
    while rest:
        name, equals, value = rest.pop().partition("=")
        if not name.startswith("--"):
            found.append(Option("", [name + equals + value]))
            continue
        key, values = keys.get(name[2:].removesuffix("+")), [value] if equals else []
        most = 0 if equals or is_flag(key) else len(rest) if takes_several(key) else 1
        while rest and len(values) < most and not rest[-1].startswith("--"):
            if key is None and Path(rest[-1]).suffix in (".yaml", ".yml"):
                break  # nobody knows whether an unknown option has a value
            values.append(rest.pop())
        found.append(Option(name[2:], values))
    return found


def is_flag(key: Key | None) -> bool:
    """Return whether a key is an option without a value."""
    return key is not None and key.own and key.hint is bool


def takes_several(key: Key | None) -> bool:
    """Return whether a key is an option whose values stand one after the other."""
    return key is not None and key.own and get_origin(key.hint) is list


class Reader:
    """Gathers the values of keys, where they come from, and the mistakes in them.

    Args:
        prog: the command, such as `rawloop train`.
        keys: the keys by name.
        unread: keys that this command does not read. A file may have them, the command line may not.
        meant: options of other commands -> the option of this command.
        aliases: further options, which others read.
    """

    def __init__(
        self,
        prog: str,
        keys: Mapping[str, Key],
        unread: Collection[str] = (),
        meant: Mapping[str, str] = NOTHING,
        aliases: Collection[str] = (),
    ) -> None:
        self.prog, self.keys, self.unread, self.meant, self.aliases = prog, keys, unread, meant, aliases
        self.dashes = "" if "config" in keys else "--"  # before the names of options, where there are no keys
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}  # of the keys that are set
        self.wrong: set[str] = set()  # keys with a wrong value
        self.given: set[str] = set()  # options, right or wrong
        self.mistakes: list[str] = []
        self.has_unknown = False  # options

    def take_settings(self, settings: Mapping[str, Any], file: str) -> None:
        """Take the values of a file, given by dotted keys."""
        fresh: set[str] = set()  # the dicts of this file, which replace those of earlier files
        for name, value in settings.items():
            key = self._key(name)
            if key is None or key.own:
                self._refuse(name, f"in {file}", [one.name for one in self.keys.values() if not one.own])
                continue
            if key.name not in {name, *fresh}:
                fresh.add(key.name)
                self.values[key.name] = {}
            self._take(key, name, value, file)

    def take_options(self, options: Iterable[Option]) -> None:
        """Take the options of a command line."""
        unread: list[str] = []
        for option in options:
            self.given.add(option.name)
            key = self._key(option.name)
            if key and key.name in self.unread:
                unread.append(option.name)
            elif key is None:
                known = [one.name for one in self.keys.values() if one.name not in self.unread and not one.hidden]
                self._refuse(option.name, "on the command line", [*known, *self.aliases])
                self.has_unknown |= self.mistakes[-1].startswith("unknown")
            elif is_flag(key) and option.values:
                self.fail(f"--{option.name} takes no value: write it alone")
            elif is_flag(key):
                self.values[key.name] = True
            elif not option.values:
                kinds = f": {in_words(key.hint)}" if key.hint is bool or get_origin(key.hint) is Literal else ""
                self.fail(f"--{option.name} needs a value after it{kinds}")
            elif takes_several(key):
                self.values[key.name] = option.values
            else:
                self._take(key, option.name, option.values[-1], COMMAND_LINE)
        if unread:
            names, them = list(dict.fromkeys(f"--{name}" for name in unread)), "them" if len({*unread}) > 1 else "it"
            way_on = f"leave {them} out here; a YAML file may have {them}, for all commands"
            self.fail(f"`{self.prog}` does not read {', '.join(names)}: {way_on}")

    def fail(self, text: str) -> None:
        """Note a mistake."""
        self.mistakes.append(text)

    def _take(self, key: Key, name: str, value: Any, origin: str) -> None:
        """Take the value of a key, or of an entry of its dict (model.stream_weights.text), or items of its list."""
        before, read = self.values.get(key.name, key.default), of_text if origin == COMMAND_LINE else typed
        try:
            if name == key.name:
                self.values[key.name] = read(value, key.hint)
            elif name.endswith("+"):
                self.values[key.name] = [*(before or ()), *items_of_text(value, key.hint)]
            else:
                entry = name.removeprefix(f"{key.name}.")
                self.values[key.name] = {**before, entry: read(value, get_args(key.hint)[1])}
        except WrongValue as error:
            self._refuse_value(key, name, value, origin, str(error))
        if not key.own:
            self.origins[name.removesuffix("+")] = origin

    def _key(self, name: str) -> Key | None:
        """Return the key of this name, or the one whose dict has this entry or whose list gets items by it."""
        for parent, kind in ((name.rpartition(".")[0], dict), (name.removesuffix("+"), list)):
            key = self.keys.get(parent)
            if key and not key.own and name != parent and kind in kinds_of(key.hint):
                return key
        return self.keys.get(name)

    def _refuse(self, name: str, place: str, known: Iterable[str]) -> None:
        members = sorted(key for key in self.keys if key.startswith(name + "."))
        if name in self.meant:
            self.fail(f"unknown option '--{name}' (did you mean '--{self.meant[name]}'?)")
        elif members:
            self.fail(f"'{name}' {place} is a group: give values to its keys, such as {', '.join(members[:3])}")
        elif self.dashes:
            self.fail(f"unknown option '--{name}'{suggest(name, known, self.dashes)}")
        else:
            self.fail(f"unknown key '{name}' {place}{suggest(name, known)}")

    def _refuse_value(self, key: Key, name: str, value: Any, origin: str, why: str) -> None:
        self.wrong.add(key.name)
        if value is None and name == key.name:
            self.fail(f"{name} is null (from {origin}): {why}; leave the key out for its default, {key.default!r}")
        elif value is None:
            self.fail(f"{name} is null (from {origin}): {why}")
        elif key.own:
            self.fail(f"--{name} is {shown(value)}: {why}")
        else:
            self.fail(f"{name} is {shown(value)} (from {origin}): {why}")

    def build(self, owner: type, group: str = "") -> Any:
        """Build a config dataclass from the values; None if that is impossible, which is among the mistakes."""
        hints, values, is_whole = get_type_hints(owner), dict[str, Any](), True
        for item in dataclasses.fields(owner):
            name, hint = f"{group}.{item.name}" if group else item.name, hints[item.name]
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                values[item.name] = self.build(hint, name)
                is_whole &= values[item.name] is not None
            elif name in self.values:
                values[item.name] = self.values[name]
                is_whole &= name not in self.wrong
            else:
                is_whole &= name not in self.wrong and self.keys[name].default is not REQUIRED
        has_misspelt = self.dashes and self.has_unknown and not group  # what an option lacks may be this
        if not is_whole or has_misspelt:
            return None
        try:
            return owner(**values)
        except UserError as error:
            named = [f"{key} from {origin}" for key, origin in self.origins.items() if _names(str(error), key)]
            self.fail(f"{error} ({', '.join(named)})" if named else str(error))
            return None

    def check(self) -> None:
        """Raise UserError for the mistakes: the only one in one line, or several with a line each."""
        where = f"`{self.prog} --help all` lists all {'options' if self.dashes else 'keys'}"
        # A key may have several lines, and an option may be given twice.
        lines = list(dict.fromkeys(" ".join(line.splitlines()) for line in self.mistakes))
        if len(lines) == 1:
            raise UserError(f"{lines[0]}{f': {where}' if self.has_unknown else ''}")
        if lines:
            head = f"{len(lines)} mistakes{f' ({where})' if self.has_unknown else ''}:"
            raise Mistakes("\n  ".join([head, *lines]))


def _names(text: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}\b", text) is not None


def read_options(
    prog: str, owner: type, words: Sequence[str], alone: str = "", meant: Mapping[str, str] = NOTHING
) -> Any:
    """Read the options of a command that has no config into the dataclass `owner`.

    `alone` is the option whose value, or values, stand without a name, such as `runs/x` in `rawloop verify runs/x`.

    Raises:
        UserError: the mistakes in them.
    """
    keys = options_of(owner)
    reader = Reader(prog, keys, meant=meant)
    options = split(words, keys)
    texts = [option.values[0] for option in options if not option.name]
    most = 0 if not alone else len(texts) if takes_several(keys[alone]) else 1
    reader.take_options([Option(alone, texts[:most])] if texts[:most] else [])
    reader.take_options(option for option in options if option.name)
    for text in texts[most:]:
        reader.fail(f"{shown(text)} stands alone on the command line: an option has a name, --NAME VALUE")
    missing = [key.name for key in keys.values() if key.default is REQUIRED and key.name not in reader.given]
    if missing:
        names = " and ".join(name.upper() if name == alone else f"--{name}" for name in missing)
        reader.fail(f"{names} must be given; `{prog} --help` lists all options")
    built = reader.build(owner)
    reader.check()
    return built
