"""The flags of another program's command line, as its argument parser would read them."""

from collections.abc import Collection
from typing import Any

from rawloop.errors import UserError, nearest
from rawloop.translation.rules import Rule, Table
from rawloop.translation.translate import TRUTH


def read_flags(
    argv: list[str], source: Table, keys: Collection[str]
) -> tuple[dict[str, Any], list[list[str]], list[str]]:
    """Read a command line of another program, between whose flags options of rawloop may stand.

    A flag is `--name value`, `--name=value`, or, if it is true or false, `--name` and `--no_name` alone; a dash in a
    name is an underscore. Of a flag that is given twice the last counts.

    Args:
        argv: the arguments.
        source: the table of the flags; its names have precedence over keys.
        keys: the options of rawloop, without dashes.

    Returns:
        The values by name; the options of rawloop, each with its words; and the names that were given twice.

    Raises:
        UserError: unknown flags, all of them with the nearest names; or a flag without its value.
    """
    given: dict[str, Any] = {}
    options: list[list[str]] = []
    unknown: list[str] = []
    twice: list[str] = []
    for word, values in _words(argv, keys, unknown):
        name, joined, text = word.removeprefix("--").partition("=")
        if name.removesuffix("+") in keys and source.rule(name.replace("-", "_")) is None:
            options.append([word, *values])
            continue
        rule, is_on = _rule(name.replace("-", "_"), source)
        if rule is None:
            ends = [key for key in keys if key.rpartition(".")[2] == name]
            hint = f" (did you mean '{min(ends)}'?)" if ends else nearest(name, [*source.rules, *keys])
            unknown.append(word.partition("=")[0] + hint)
            continue
        if rule.name in given:
            twice.append(rule.name)
        given[rule.name] = _value(rule, [text, *values] if joined else values, is_on, unknown)
    if unknown:
        raise UserError(f"unknown on the command line: {', '.join(unknown)}; `--help` lists the flags")
    return given, options, twice


def _words(argv: list[str], keys: Collection[str], unknown: list[str]) -> list[tuple[str, list[str]]]:
    """Return each flag with the words after it. Words before the first flag belong to none."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            unknown.append(f"'{word}'")
    return found


def _rule(name: str, source: Table) -> tuple[Rule | None, bool]:
    """Return the rule of a flag, and false for `--no_name`."""
    rule = source.rule(name)
    if rule is None and name.startswith("no_"):
        rule = source.rule(name.removeprefix("no_"))
        return (rule if rule is not None and rule.kind == "flag" else None), False
    return rule, True


def _value(rule: Rule, words: list[str], is_on: bool, unknown: list[str]) -> Any:
    """Return the value of a flag from the words after it. Words that are too many are unknown."""
    if rule.kind == "list" and words:
        return words if len(words) > 1 else words[0]
    most = 0 if not is_on else 1
    unknown += [f"'{word}' after --{rule.name}" for word in words[most:]]
    if rule.kind == "flag" or (rule.kind == "any" and not words):
        text = words[0] if words and is_on else "true"
        if text.lower() not in TRUTH:
            raise UserError(f"--{rule.name} is '{text}': it must be true or false, or stand alone for true")
        return TRUTH[text.lower()] is is_on
    if not words:
        raise UserError(f"--{rule.name} needs a value after it")
    return words[0]
