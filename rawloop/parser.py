"""Settings from YAML files and the command line, by jsonargparse. A mistake is a `UserError` of one line.

A YAML file is read strictly. These are refused, with their line: a key given twice, also once nested and once dotted
(`optim.lr` beside `optim: {lr: ...}`); keys that are not strings; types that JSON does not have; octal numbers and
numbers to base 60; aliases or nesting without end.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from rawloop.errors import UserError, nearest


class Parser(ArgumentParser):
    """jsonargparse's parser. Every error is a `UserError` of one line that says where the value comes from."""

    origin = "the command line"
    meant: Mapping[str, str] = MappingProxyType({})  # options of other commands -> this command's name for them

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.hints: dict[str, Any] = {}  # the type of each setting

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError, where jsonargparse prints the usage and exits."""
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        required = re.match(r"the following arguments are required: (.*)", message)
        if required:
            places = {action.dest for action in self._actions if not action.option_strings}
            names = [name.strip() for name in required[1].split(",")]
            missing = [name.upper() if name in places else f"--{name}" for name in names]
            raise UserError(f"{' and '.join(missing)} must be given; `{self.prog} --help` lists all options")
        options = [name for action in self._actions for name in action.option_strings]
        hint = nearest(self.meant.get(unknown[1], unknown[1]), options) if unknown else ""
        raise UserError(explain(message, self.origin, self.hints) + hint)

    def read_settings(self, values: Mapping[str, Any], before: Any = None) -> Any:
        """Parse settings given by dotted keys. They override the settings `before`."""
        tree = Namespace()  # type: ignore[no-untyped-call]
        for key, value in values.items():
            tree[key] = value  # a dotted key makes nested groups
        return self._checked(lambda: self.parse_object(tree.as_dict(), namespace=before))

    def read_options(self, arguments: list[str], before: Any = None) -> Any:
        """Parse the settings of a command line. They override the settings `before`."""

        def parse() -> Any:
            for word in arguments:
                if "&" in word and "*" in word:  # YAML aliases may grow without end
                    with suppress(yaml.YAMLError):
                        check_node(yaml.compose(word, Loader=yaml.SafeLoader), self.origin)
            return self.parse_args(arguments, namespace=before)

        return self._checked(parse)

    def _checked(self, parse: Callable[[], Any]) -> Any:
        """Parse settings, and check their values."""
        try:
            return self._check(parse())
        except RecursionError as error:
            raise UserError(f"a value in {self.origin} is nested too deep: they are one or two levels deep") from error
        except OverflowError as error:
            raise UserError(f"a number in {self.origin} is too large: {error}") from error

    def _check(self, values: Any) -> Any:
        """Refuse values that jsonargparse accepts: nulls, too large numbers, characters that are no text."""
        for key, hint in self.hints.items():
            value = values[key]
            if value is None and type(None) not in get_args(hint):
                raise UserError(
                    f"{key} is null (from {self.origin}): it must be {in_words(hint)}; leave the key out for its "
                    f"default, {self.get_default(key)!r}"
                )
            items = [*value, *value.values()] if isinstance(value, dict) else value
            for item in items if isinstance(items, list) else [items]:
                self._check_item(key, item)
        return values

    def _check_item(self, key: str, item: Any) -> None:
        if isinstance(item, int) and abs(item) >= 2**63:
            raise UserError(f"{key} is {item:.3e} (from {self.origin}): a whole number has at most 63 bits")
        if isinstance(item, str) and ("\0" in item or item.encode(errors="ignore").decode() != item):
            raise UserError(f"{key} is {short(repr(item))} (from {self.origin}): it has characters that no text has")


WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[^"]+)":?;? (?:.*; )?Expected an? (?P<type>.+?)\. Got value:(?P<value>.*)'
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
    found = WRONG.search(line)
    if found and found["value"] is not None and found["key"] in hints:  # of several types, such as a list or null
        wanted = in_words(hints[found["key"]])
        return f"{found['key']} is '{short(found['value'])}' (from {origin}): it must be {wanted}"
    if typed := WRONG_TYPE.search(line):
        wanted = in_words(re.sub(r"<class '(\w+)'>", r"\1", typed["type"]))
        return f"{typed['key']} is '{short(typed['value'])}' (from {origin}): it must be {wanted}"
    return f"{found['key']} (from {origin}) cannot be read: {short(found['why'])}" if found else short(line)


def in_words(hint: object) -> str:
    """Describe the values of a type, given by its hint or its name, such as `a whole number`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list and get_origin(item := get_args(hint)[0]) is Literal:
        return f"{IN_WORDS['list']} of {', '.join(map(repr, get_args(item)))}"
    name = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint)
    choices = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", name)
    return f"one of {choices[1]}" if choices else IN_WORDS.get(name.partition("[")[0], f"a value of type {name}")


def short(text: str) -> str:
    """Return a text in one line, without the middle of a long one."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 4 :]} ({len(text):,} characters)"


def add_options(parser: Parser, owner: type, group: str = "") -> None:
    """Add an option for each field of a config dataclass, also of nested ones. Their docstrings are the help."""
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
    """Return the first sentence of a config dataclass's docstring, and the text of each field in its Args section."""
    text = inspect.getdoc(owner) or ""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text.partition("Args:\n")[2], re.MULTILINE)
    return text.partition("\n")[0], {name: " ".join(words.split()).rstrip(".") for name, words in entries}


LARGEST = 1_000_000  # bytes of a file
MOST = 10_000  # values of a file; an alias counts as many values as it stands for
JSON_TYPES = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
MERGE = "tag:yaml.org,2002:merge"
OCTAL = re.compile(r"[-+]?0[0-7_]+")


class Loader(yaml.SafeLoader):
    """Reads dates as strings: no setting is a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the values of a file by dotted keys, such as `optim.lr`. An empty dict is a value."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST:,} bytes: it is no file of settings")
        loader = Loader(raw.decode())
        node = loader.get_single_node()
        check_node(node, str(path))
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place} is not valid YAML: {error.problem}") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--config is '{path}', which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:  # a number of thousands of digits is a ValueError
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deep: settings are two or three levels deep") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{path} {found}: it must hold keys and values such as `output: runs/x`")
    values: dict[str, Any] = {}
    for key, value in flattened(content):
        if key in values or key.rpartition(".")[0] in values:
            raise UserError(f"{path}: '{key}' stands there twice, nested and dotted: keep one")
        values[key] = value
    return values


def check_node(node: yaml.Node | None, source: str, counter: Iterator[int] | None = None) -> None:
    """Raise UserError for a node that the module's docstring forbids. `counter` counts the values so far."""
    if node is None:
        return
    counter = counter or count(1)
    place = f"{source} line {node.start_mark.line + 1}"
    if next(counter) > MOST:
        raise UserError(f"{place}: more than {MOST:,} values, aliases (*) counted as what they stand for: write fewer")
    if node.tag not in JSON_TYPES:
        raise UserError(f"{place} has a value of type {node.tag.rpartition(':')[2]}: settings have JSON's types")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
        if OCTAL.fullmatch(node.value):
            raise UserError(f"{place}: YAML reads {node.value} as an octal number: write it without the leading 0")
        if ":" in node.value:
            raise UserError(f"{place}: YAML reads {node.value} as a number to base 60: write it in tens, or in quotes")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_node(item, source, counter)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (MERGE, "tag:yaml.org,2002:str"):
            shown = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise UserError(f"{source} line {line}: {shown} is a key and no string: put it in quotes if it is meant")
        if key.value in lines:
            raise UserError(f"{source} line {line}: '{key.value}' stands in line {lines[key.value]} already: keep one")
        lines[key.value] = line
        check_node(value, source, counter)


def flattened(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
