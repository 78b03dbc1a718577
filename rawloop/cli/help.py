"""What `rawloop COMMAND --help` prints: the options and the keys that most people set; `--help all` prints all keys."""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from shutil import get_terminal_size
from textwrap import TextWrapper
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rawloop.cli.table import TABLE, Row
from rawloop.config import CONFIG
from rawloop.keys import REQUIRED, Key, field_help
from rawloop.parser import is_flag, takes_several

COLUMN, WIDEST = 28, 110  # where the texts begin, and where they end at the latest
FILES = "Options override files, a later file an earlier one. Paths start in the current folder."
KINDS = {int: "NUMBER", float: "NUMBER", str: "TEXT", bool: "true|false", list: "'[A, B]'", dict: "'{A: 1, B: 2}'"}


def help_of(name: str, about: str, actions: Iterable[str], is_all: bool) -> str:
    """Return the help of a command, such as `train` or `precision probe`; with all its keys in full if `is_all`.

    `actions` are the words of which one must follow `name`.
    """
    width, about = min(get_terminal_size().columns, WIDEST), f"{about[:1].upper()}{about[1:]}."
    if actions:
        usage = [f"rawloop {name} {action} [FILE.yaml ...] [--KEY VALUE ...]" for action in actions]
        return "\n".join(["usage: " + "\n       ".join(usage), "", _filled(about, width)])
    row = TABLE[name]
    own, keys = row.own(), row.read_keys()
    head = f"{about} {FILES}" if row.reads else about
    lines = [f"usage: rawloop {name} {_usage(row, own)}", "", _filled(head, width), ""]
    lines += [_entry(key, row, width, is_full=True) for key in (*own, *([CONFIG] if row.reads else []))]
    if is_all:
        lines += _groups(keys, row, width)
    elif keys:
        lines += ["", "keys that most people set, with their defaults:"]
        lines += [_entry(key, row, width, is_full=False) for usual in row.usual for key in keys if key.name == usual]
        lines += ["", f"`rawloop {name} --help all` explains all {len(keys)} keys, with their types."]
    return "\n".join(lines)


def _usage(row: Row, own: Iterable[Key]) -> str:
    required, optional = list[str](), list[str]()
    for key in own:
        several = " ..." if takes_several(key) else ""
        words = key.name.upper() + several if key.name == row.alone else f"--{key.name} {_kind(key.hint)}"
        if key.default is REQUIRED:
            required.append(words)
        elif key.name == row.alone:
            optional.append(f"[{words}]")
    optional += ["[FILE.yaml ...]", "[--KEY VALUE ...]"] if row.reads else ["[--OPTION VALUE ...]"]
    return " ".join([*required, *optional])


def _groups(keys: Iterable[Key], row: Row, width: int) -> Iterator[str]:
    for group, members in groupby(keys, lambda key: key.name.rpartition(".")[0]):
        listed = [*members]
        yield ""
        yield _filled(f"{group}: {field_help(listed[0].owner)[0]}", width) if group else "the run:"
        yield from (_entry(key, row, width, is_full=True) for key in listed)


def _entry(key: Key, row: Row, width: int, is_full: bool) -> str:
    """Return an option and its text; without the type and all but the first clause of the text if not `is_full`."""
    kind = "" if is_flag(key) or not is_full else _kind(key.hint, key.own)
    name = key.name.upper() if key.name == row.alone else f"--{key.name} {kind}".rstrip()
    text = key.text if is_full else _gist(key)
    if key.default not in (None, "", REQUIRED) and not is_flag(key) and key.default not in ([], {}):
        text += f" (default: {_shown(key.default)})" if is_full else f" [{_shown(key.default)}]"
    label, indent = f"  {name}", " " * COLUMN
    if len(label) > COLUMN - 2:
        return f"{label}\n{_filled(text, width, indent, indent)}"
    return _filled(text, width, label.ljust(COLUMN), indent)


def _filled(text: str, width: int, first: str = "", indent: str = "") -> str:
    """Return a text in lines; `first` and `indent` begin the first line and the others."""
    wrapper = TextWrapper(
        width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.wrap(text))


def _gist(key: Key) -> str:
    """Return the first clause of a text, and the values to choose from if it does not name them."""
    clause = re.split(r"[;:.] | such as ", key.text)[0]
    choices = get_args(key.hint) if get_origin(key.hint) is Literal else ()
    return clause if all(choice in clause for choice in choices) else f"{clause}: {', '.join(choices)}"


def _kind(hint: Any, own: bool = False) -> str:
    """Return what an option's value looks like."""
    if get_origin(hint) in (Union, UnionType):
        return "|".join(_kind(part) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    return "A B ..." if own and get_origin(hint) is list else KINDS[get_origin(hint) or hint]


def _shown(value: Any) -> str:
    """Return a default as it is written on the command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
