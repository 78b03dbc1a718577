"""The keys of config dataclasses: their types, defaults and texts, and what somebody meant who wrote another one."""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from rawloop.settings import OLDER_RECORDS
from rawloop.trainer_names import HF_NAMES, NO_COUNTERPART, SCRIPT_NAMES

REQUIRED = dataclasses.MISSING  # the default of a key that must be given


class Key(NamedTuple):
    """A field of a config dataclass, or an option of a command."""

    name: str  # dotted, such as optim.lr
    hint: Any
    default: Any
    text: str
    owner: type
    hidden: bool = False  # in no help, for rawloop's own processes
    own: bool = False  # an option of a command and no key of a config: true or false is a flag, a list several words


@cache
def keys_of(owner: type, group: str = "") -> Mapping[str, Key]:
    """Return the keys of a config dataclass by dotted name, also those of nested ones."""
    texts, hints = field_help(owner)[1], get_type_hints(owner)
    found: dict[str, Key] = {}
    for item in dataclasses.fields(owner):
        name, hint = f"{group}.{item.name}" if group else item.name, hints[item.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= keys_of(hint, name)
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        found[name] = Key(name, hint, default, texts[item.name], owner, bool(item.metadata.get("hidden")))
    return found


def options_of(owner: type) -> Mapping[str, Key]:
    """Return a command's options, given by their dataclass, and the keys of the config dataclasses among them."""
    return {name: key._replace(own="." not in name) for name, key in keys_of(owner).items()}


@cache
def field_help(owner: type) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a config dataclass's docstring, and the text of each field in its Args section."""
    text = inspect.getdoc(owner) or ""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text.partition("Args:\n")[2], re.MULTILINE)
    return text.partition("\n")[0], {name: " ".join(words.split()).rstrip(".") for name, words in entries}


def suggest(key: str, known: Iterable[str], form: str = "") -> str:
    """Return a clause with what somebody may have meant by an unknown key, or an empty string.

    That is our key for a name of HF Trainer, of PEFT or of the scripts for Higgs Audio, or keys of that name in other
    groups, or a key that is misspelt. `form` is what stands before a key, such as `--`.
    """
    for name in reversed(key.split(".")):
        if name in HF_NAMES:
            whose = "PEFT" if name.startswith("lora_") else "HF Trainer"
            return f" (what {whose} calls {name} is '{HF_NAMES[name]}' here)"
        if name in NO_COUNTERPART:
            return f" (HF Trainer's {name}: {NO_COUNTERPART[name]})"
    if key in OLDER_RECORDS:
        return f" (it is '{OLDER_RECORDS[key]}' now)"
    names = [*known]
    last = key.rpartition(".")[2]
    ends = sorted(name for name in names if name.rpartition(".")[2] == last) or _misspelt(key, names)
    if not ends and key in SCRIPT_NAMES:
        return f" ({key} of the scripts for Higgs Audio is '{SCRIPT_NAMES[key]}' here; `rawloop train-higgs` takes it)"
    return " (did you mean " + " or ".join(f"'{form}{name}'" for name in ends) + "?)" if ends else ""


def _misspelt(key: str, names: list[str]) -> list[str]:
    """Return the names that a key misspells, as a whole or, without its group, after theirs."""
    whole = _nearest(key, names)
    if "." in key or whole:
        return whole
    near = _nearest(key, sorted({name.rpartition(".")[2] for name in names}))
    return sorted(name for name in names if name.rpartition(".")[2] in near)


def _nearest(word: str, names: list[str]) -> list[str]:
    """Return the name with the fewest wrong letters: at most 2, or 1 after the first in a short one, such as `dora`."""
    most = 1 if len(word) < 8 else 2
    able = [name for name in names if len(word) >= 8 or (len(name) > 3 and name[0] == word[:1])]
    wrong, name = min(((_wrong_letters(word, name, most), name) for name in able), default=(most + 1, ""))
    return [name] if wrong <= most else []


def _wrong_letters(word: str, name: str, most: int) -> int:
    """Return how many letters must be added, left out, exchanged or swapped with the next one; or more than `most`."""
    if abs(len(word) - len(name)) > most:
        return most + 1
    before, row = [0], list(range(len(name) + 1))
    for i, letter in enumerate(word, start=1):
        before, last, row = row, before, [i]
        for j, other in enumerate(name, start=1):
            swapped = j > 1 and i > 1 and letter == name[j - 2] and other == word[i - 2]
            least = min(row[-1] + 1, before[j] + 1, before[j - 1] + (letter != other))
            row.append(min(least, last[j - 2] + 1) if swapped else least)
    return row[-1]
