"""The files that settings of other programs stand in: which program it is, and what was given. Nothing is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rawloop.errors import UserError, first_few
from rawloop.translation.axolotl import AXOLOTL
from rawloop.translation.llama_factory import LLAMA_FACTORY
from rawloop.translation.lora import LORA
from rawloop.translation.rules import Table
from rawloop.translation.swift import SWIFT
from rawloop.translation.syntax import Source, read_calls
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.trl import SFT, TRL
from rawloop.yaml_file import read_yaml

LARGEST = 1_000_000  # bytes
FORMS = (
    "it must be a .json file that HF Trainer, PEFT, ms-swift or LLaMA-Factory wrote, a .py file with a call of "
    "TrainingArguments, or a .yaml file of axolotl or LLaMA-Factory"
)
# Settings by which a program is told from those below it.
MARKS: tuple[tuple[Table, tuple[str, ...]], ...] = (
    (LORA, ("peft_type",)),
    (SWIFT, ("tuner_type", "train_type", "tuner_backend")),
    (LLAMA_FACTORY, ("finetuning_type", "stage", "lora_target", "cutoff_len")),
    (AXOLOTL, ("base_model",)),
    (TRL, ("model_name_or_path",)),
    (SFT, ("dataset_text_field", "completion_only_loss")),
    (MORE_TRAINER, ("output_dir", "learning_rate")),
)
KNOWN = 2 / 3  # of the settings in a file, or it is another program's
JSON_OF_PICKLE = (
    'where you trust it: python -c "import sys, torch; '
    'print(torch.load(sys.argv[1], weights_only=False).to_json_string())" {} > training_args.json'
)


def read_sources(path: Path) -> list[Source]:
    """Return the settings in a file. Raises UserError if it is of no known form."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    if content.startswith((b"PK\x03\x04", b"\x80")):
        command = JSON_OF_PICKLE.format(path.name)
        raise UserError(
            f"{path} is a pickle, which is not read, as that runs the code in it: write it as JSON {command}"
        )
    if len(content) > LARGEST:
        raise UserError(f"{path} is larger than {LARGEST:,} bytes: {FORMS}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): {FORMS}") from error
    if path.suffix == ".py":
        return read_calls(path, text)
    if path.suffix in (".yaml", ".yml"):
        return [recognised(path, regrouped(read_yaml(path)))]
    if path.suffix == ".json":
        return [recognised(path, read_object(path, text))]
    raise UserError(f"{path} ends with '{path.suffix}': {FORMS}")


def read_object(path: Path, text: str) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: {FORMS}")
    return content


def regrouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with dotted keys as nested again, since a setting of other programs may be a mapping."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if rest and isinstance(tree.setdefault(name, {}), dict):
            tree[name][rest] = value
        else:
            tree[name] = value
    return tree


def recognised(path: Path, given: Mapping[str, Any]) -> Source:
    """Return settings with the table of their program. Raises UserError if no program has them."""
    table = next((table for table, marks in MARKS if any(mark in given for mark in marks)), None)
    if table is None:
        raise UserError(f"{path} has no setting by which its program is told: {FORMS}")
    foreign = [name for name in given if table.rule(name) is None]
    if len(given) - len(foreign) < KNOWN * len(given):
        raise UserError(
            f"{path} looks like {table.title}, which does not have {len(foreign)} of its {len(given)} settings, such "
            f"as {first_few(foreign)}: {FORMS}"
        )
    return Source(f"{path} ({table.title})", table, given)
