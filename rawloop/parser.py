"""jsonargparse's parser for rawloop's settings: options from config dataclasses, and one line for every complaint."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from rawloop.errors import UserError, nearest
from rawloop.yaml_file import check_node, nested


class Parser(ArgumentParser):
    """jsonargparse's parser. Every complaint is a `UserError` of one line that names the value's origin."""

    origin = "the command line"
    meant: Mapping[str, str] = MappingProxyType({})  # options of other commands -> the one of this command

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.hints: dict[str, Any] = {}  # the type of each setting

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        required = re.match(r"the following arguments are required: (.*)", message)
        if required:
            missing = [f"--{name.strip()}" for name in required[1].split(",")]
            raise UserError(f"{' and '.join(missing)} must be given; `{self.prog} --help` lists all options")
        names = [name for action in self._actions for name in action.option_strings]
        hint = nearest(self.meant.get(unknown[1], unknown[1]), names) if unknown else ""
        raise UserError(explain(message, self.origin, self.hints) + hint)

    def read_settings(self, values: Mapping[str, Any], before: Any = None) -> Any:
        """Return settings, given by dotted keys, in their types. They override the settings read `before`."""
        with self._within_bounds():
            return self._checked(self.parse_object(nested(dict(values)), namespace=before))

    def read_options(self, arguments: list[str], before: Any = None) -> Any:
        """Return the settings of a command line, in their types. They override the settings read `before`."""
        with self._within_bounds():
            for word in arguments:
                _check_aliases(word, self.origin)
            return self._checked(self.parse_args(arguments, namespace=before))

    @contextmanager
    def _within_bounds(self) -> Iterator[None]:
        try:
            yield
        except RecursionError as error:
            raise UserError(f"a value in {self.origin} is nested too deep: they are one or two levels deep") from error
        except OverflowError as error:
            raise UserError(f"a number in {self.origin} is too large: {error}") from error

    def _checked(self, values: Any) -> Any:
        """Refuse values that jsonargparse lets through: a null, too large a number, characters that are no text."""
        for key, hint in self.hints.items():
            value = values[key]
            if value is None and type(None) not in get_args(hint):
                raise UserError(
                    f"{key} is null (from {self.origin}): it must be {in_words(hint)}; leave the key out for its "
                    f"default, {self.get_default(key)!r}"
                )
            for item in _parts(value):
                self._check_item(key, item)
        return values

    def _check_item(self, key: str, item: Any) -> None:
        if isinstance(item, int) and abs(item) >= 2**63:
            raise UserError(f"{key} is {item:.3e} (from {self.origin}): a whole number has at most 63 bits")
        if isinstance(item, str) and ("\0" in item or not _is_text(item)):
            raise UserError(f"{key} is {short(repr(item))} (from {self.origin}): it has characters that no text has")


WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[^"]+)":?;? (?:.*; )?Expected an? (?P<type>.+?)\. Got value:(?P<value>.*)'
)
WRONG_LIST = re.compile(
    r'Parser key "(?P<key>[^"]+)":; Does not .*?list\[(?P<type>.*?)\]+, .*; Given value: (?P<value>.*)'
)
WRONG = re.compile(r'Parser key "(?P<key>[^"]+)":?;? (?P<why>.*?)(?:; Given value:(?P<value>.*))?$')
IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string: put it in quotes",
    "list": "a list such as '[a, b]'",
    "dict": "keys and values such as '{a: 1, b: 2}'",
}
SHOWN = 120  # characters of a value in a message


def explain(message: str, origin: str, hints: Mapping[str, Any]) -> str:
    """Say in one line what type a value must have. Other messages of jsonargparse are joined to one line."""
    line = "; ".join(part.strip(" -") for part in message.splitlines() if part.strip())
    found = WRONG_LIST.search(line)
    if found:
        items = found["type"].removeprefix("typing.Literal[")
        return f"{found['key']} is '{short(found['value'])}' (from {origin}): it must be a list, '[a, b]', of {items}"
    found = WRONG_TYPE.search(line)
    if found:
        wanted = in_words(re.sub(r"<class '(\w+)'>", r"\1", found["type"]))
        return f"{found['key']} is '{short(found['value'].strip())}' (from {origin}): it must be {wanted}"
    found = WRONG.search(line)
    if found and found["value"] is not None and found["key"] in hints:
        wanted = in_words(hints[found["key"]])
        return f"{found['key']} is '{short(found['value'])}' (from {origin}): it must be {wanted}"
    return f"{found['key']} (from {origin}) cannot be read: {short(found['why'])}" if found else short(line)


def in_words(hint: object) -> str:
    """Describe the values of a type, given by its hint or its name, such as `a whole number`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(part) for part in get_args(hint) if part is not type(None))
    name = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)
    name = name.replace("typing.", "")
    choices = re.fullmatch(r"Literal\[(.*)\]", name)
    return f"one of {choices[1]}" if choices else IN_WORDS.get(name.partition("[")[0], f"a value of type {name}")


def short(text: str) -> str:
    """Return a text in one line. The middle of a long one is left out."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 4 :]} ({len(text):,} characters)"


def _check_aliases(word: str, origin: str) -> None:
    """Refuse a word whose YAML aliases would grow without end."""
    if "&" in word and "*" in word:
        with suppress(yaml.YAMLError):
            check_node(yaml.compose(word, Loader=yaml.SafeLoader), origin)


def _parts(value: Any) -> Iterator[Any]:
    """Yield the items of a list, the keys and items of a dict, or the value itself."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    yield from value if isinstance(value, list) else [value]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def add_options(parser: Parser, owner: type, group: str = "") -> None:
    """Add an option for each field of a config dataclass, and of those inside it. Their docstrings are the help."""
    summary, texts = field_help(owner)
    section = parser.add_argument_group(group or "run", summary if group else None)
    hints = get_type_hints(owner)
    for item in dataclasses.fields(owner):
        name, hint = f"{group}.{item.name}" if group else item.name, hints[item.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            add_options(parser, hint, name)
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        section.add_argument(f"--{name}", type=hint, default=default, help=texts[item.name])
        parser.hints[name] = hint


def field_help(owner: type) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a config dataclass's docstring, and what its Args section says of each field."""
    text = inspect.getdoc(owner) or ""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text.partition("Args:\n")[2], re.MULTILINE)
    return text.partition("\n")[0], {name: " ".join(words.split()).rstrip(".") for name, words in entries}
