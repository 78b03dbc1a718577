"""The values that a key may have, by its type: numbers, true and false, text, one of several words, lists, keys."""

import re
from collections.abc import Callable
from contextlib import suppress
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from rawloop.yaml_file import load

IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string: put it in quotes",
    "list": "a list such as '[a, b]'",
    "dict": "keys and values such as '{a: 1, b: 2}'",
}
SHOWN = 120  # characters of a value in a message
WHOLE = re.compile(r"\s*[-+]?[0-9]+(_[0-9]+)*\s*")
NUMBER = re.compile(r"\s*[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*|[-+]?\.(inf|nan)")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULL = ("null", "Null", "NULL", "~")


class WrongValue(ValueError):
    """A value that a key may not have. The message says why: it begins with `it`."""


def typed(value: Any, hint: Any) -> Any:
    """Return a value from YAML as the type that `hint` names, such as 1.0 for 1, and 1e-5 for '1e-5'.

    Raises:
        WrongValue: it is not of that type.
    """
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return _one_of_types(value, hint)
    if kind is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif kind is list and isinstance(value, list):
        return [_inside(item, arguments[0], f"{shown(item)} in it") for item in value]
    elif kind is dict and isinstance(value, dict):
        return {name: _inside(item, arguments[1], f"{shown(item)} of {name}") for name, item in value.items()}
    elif kind is None and (fits := CONVERTERS[hint](value)) is not None:
        return fits
    raise WrongValue(f"it must be {in_words(hint)}")


def of_text(text: str, hint: Any) -> Any:
    """Return the value that a word of the command line stands for. A list, or keys and values, are read as YAML.

    Raises:
        WrongValue: the text stands for no value of that type.
    """
    kinds = kinds_of(hint)
    if NoneType in kinds and text in NULL:
        return None
    if not {list, dict}.isdisjoint(kinds):
        try:
            read = load(text, "the command line")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise WrongValue(f"it must be {in_words(hint)}") from error
        return typed(text if read is None else read, hint)
    return typed(text, hint)


def kinds_of(hint: Any) -> set[Any]:
    """Return the types that a value may have: {list, NoneType} for `list[str] | None`."""
    return {get_origin(part) or part for part in (get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint])}


def items_of_text(text: str, hint: Any) -> list[Any]:
    """Return the items that `--KEY+ TEXT` adds to a list: those of a list, or the text itself."""
    with suppress(WrongValue):
        return list(of_text(text, hint) or ())
    return list(typed([text], hint))


def _one_of_types(value: Any, hint: Any) -> Any:
    parts = [part for part in get_args(hint) if part is not NoneType]
    if value is None and len(parts) < len(get_args(hint)):
        return None
    if len(parts) == 1:
        return typed(value, parts[0])
    for part in parts:
        with suppress(WrongValue):
            return typed(value, part)
    raise WrongValue(f"it must be {in_words(hint)}")


def _inside(value: Any, hint: Any, name: str) -> Any:
    try:
        return typed(value, hint)
    except WrongValue as error:
        raise WrongValue(str(error).replace("it", name, 1)) from error  # all begin with `it`


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and WHOLE.fullmatch(value) and len(value) < SHOWN:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if abs(value) >= 2**63:
        raise WrongValue("it must be a whole number of at most 63 bits")
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as error:
            raise WrongValue("it must be a number below 1e308") from error
    return value if isinstance(value, float) else None


def _truth(value: Any) -> bool | None:
    return TRUTH.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    if isinstance(value, str) and ("\0" in value or value.encode(errors="ignore").decode() != value):
        raise WrongValue("it has characters that no text has")
    return value if isinstance(value, str) else None


CONVERTERS: MappingProxyType[Any, Callable[[Any], Any]] = MappingProxyType(
    {int: _whole, float: _number, bool: _truth, str: _text}
)


def in_words(hint: object) -> str:
    """Describe the values of a type, such as `a whole number`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(part) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return f"{'one of ' if len(get_args(hint)) > 1 else ''}{', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is list and get_origin(item := get_args(hint)[0]) is Literal:
        return f"{IN_WORDS['list']} of {', '.join(map(repr, get_args(item)))}"
    return IN_WORDS[getattr(get_origin(hint) or hint, "__name__", "")]


def shown(value: object) -> str:
    """Return a value in quotes, as a message shows it."""
    return f"'{short(str(value))}'" if str(value).isprintable() else short(repr(value))


def short(text: str) -> str:
    """Return a text in one line, without the middle of a long one."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 4 :]} ({len(text):,} characters)"
