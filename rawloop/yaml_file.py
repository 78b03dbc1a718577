"""Reads YAML files of settings, strictly.

These are refused, with their line: a key given twice, also once nested and once dotted (`optim.lr` beside
`optim: {lr: ...}`); keys that are not strings; types that JSON does not have; octal numbers and numbers to base 60;
aliases or nesting without end.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from rawloop.errors import UserError

LARGEST = 1_000_000  # bytes of a file
MOST = 10_000  # values of a file; an alias counts as many values as it stands for
JSON_TYPES = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
MERGE = "tag:yaml.org,2002:merge"
OCTAL = re.compile(r"[-+]?0[0-7_]+")


class Loader(yaml.SafeLoader):
    """Reads dates as strings: no setting is a date. `on`, `off`, `yes` and `no` are strings too, as in YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":bool"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])


def load(text: str, source: str) -> Any:
    """Return the value of a YAML document; None if it is empty. `source` names it in messages.

    Raises:
        UserError: something that the module's docstring forbids.
        yaml.YAMLError: no YAML. ValueError: a number of thousands of digits. RecursionError: nested too deep.
    """
    loader = Loader(text)
    node = loader.get_single_node()
    check_node(node, source)
    return None if node is None else loader.construct_document(node)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the values of a file by dotted keys, such as `optim.lr`. An empty dict is a value."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST:,} bytes: it is no file of settings")
        content = load(raw.decode(), str(path))
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place} is not valid YAML: {error.problem}") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"the config '{path}' cannot be read: {error.strerror}") from error
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
