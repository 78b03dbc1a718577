"""Writes the tables of docs/from-trainer.md from the code: `python -m tests.translation.page`. A test compares them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rawloop.translation.axolotl import AXOLOTL
from rawloop.translation.higgs import HIGGS
from rawloop.translation.llama_factory import LLAMA_FACTORY
from rawloop.translation.lora import LORA
from rawloop.translation.rules import Given, Rule, Table
from rawloop.translation.swift import SWIFT
from rawloop.translation.trainer import TRAINER
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.trl import SFT, TRL

PAGE = Path(__file__).parents[2] / "docs" / "from-trainer.md"
# Name of the block on the page -> the table, and the one whose rows it does not repeat.
BLOCKS: dict[str, tuple[Table, Table | None]] = {
    "train-higgs": (HIGGS, MORE_TRAINER),
    "TrainingArguments": (TRAINER, None),
    "more of HF Trainer": (MORE_TRAINER, TRAINER),
    "LoraConfig": (LORA, None),
    "SFTConfig": (SFT, MORE_TRAINER),
    "trl sft": (TRL, SFT),
    "axolotl": (AXOLOTL, None),
    "LLaMA-Factory": (LLAMA_FACTORY, MORE_TRAINER),
    "ms-swift": (SWIFT, MORE_TRAINER),
}
FENCE = re.compile(r"<!-- begin: ([\w -]+) -->\n.*?<!-- end -->", re.DOTALL)


def own_rules(name: str) -> list[Rule]:
    """The rules of a block."""
    table, base = BLOCKS[name]
    known = base.rules if base else {}
    return [rule for rule in table.rules.values() if known.get(rule.name) != rule]


def counts(name: str) -> tuple[int, int, int]:
    """How many settings of a block have only another name, are changed, have no counterpart."""
    rules = own_rules(name)
    renamed = sum(rule.renamed for rule in rules)
    absent = sum(map(is_without, rules))
    return renamed, len(rules) - renamed - absent, absent


def is_without(rule: Rule) -> bool:
    """Whether no value of a setting has a counterpart."""
    return not rule.keys and rule.convert(rule.default, Given()).missing


def cell(value: Any) -> str:
    """A value in a table."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if text else ""


def block(name: str) -> Iterator[str]:
    """The lines of a block."""
    table, base = BLOCKS[name]
    renamed, is_changed, absent = counts(name)
    beside = f", beside those of {base.title} that it does not change" if base else ""
    number, ways = len(own_rules(name)), f"{renamed} have another name here, {is_changed} are changed"
    yield f"{number} settings{beside}: {ways}, {absent} have no counterpart.\n"
    yield "| there | default there | key here | what is different |\n|---|---|---|---|"
    for rule in own_rules(name):
        if not is_without(rule):
            keys = ", ".join(f"`{key}`" for key in rule.keys)
            yield f"| `{rule.name}` | {cell(rule.default)} | {keys} | {plain(rule.words)} |"
    reasons: dict[str, list[str]] = {}
    for rule in own_rules(name):
        if is_without(rule):
            reasons.setdefault(rule.words, []).append(f"`{rule.name}`")
    for prefix, words in table.prefixes.items():
        reasons.setdefault(words, []).append(f"`{prefix}...`")
    yield "\n| without counterpart | why |\n|---|---|"
    for words, names in reasons.items():
        yield f"| {', '.join(names)} | {plain(words)} |"


def plain(words: str) -> str:
    """Words with their keys as code."""
    return re.sub(r"'([\w.]+)'", r"`\1`", words.removeprefix("there is none; "))


def rendered(text: str) -> str:
    """The page with its blocks as the code has them."""
    return FENCE.sub(lambda at: "\n".join([f"<!-- begin: {at[1]} -->", *block(at[1]), "<!-- end -->"]), text)


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
