"""Settings in a Python file, from its syntax tree: the file is never run, so a value must stand in it."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rawloop.errors import UserError, first_few
from rawloop.translation.lora import LORA
from rawloop.translation.rules import Found, Table, sets
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.trl import SFT

CALLS: Mapping[str, Table] = {
    "TrainingArguments": MORE_TRAINER,
    "Seq2SeqTrainingArguments": MORE_TRAINER,
    "SFTConfig": SFT,
    "LoraConfig": LORA,
}
OTHERS = ("DPOConfig", "GRPOConfig", "KTOConfig", "ORPOConfig", "CPOConfig", "PPOConfig", "RLOOConfig", "RewardConfig")
FIRST = {
    "TrainingArguments": "output_dir",
    "Seq2SeqTrainingArguments": "output_dir",
}  # the first argument without a name
UNKNOWN = object()


@dataclass(frozen=True)
class Source:
    """Settings that stand together.

    Attributes:
        place: where they stand, for people.
        table: of their program.
        given: name -> value.
        unread: name -> the place and the expression whose value only running it would give.
        implied: what else follows from the file.
    """

    place: str
    table: Table
    given: Mapping[str, Any]
    unread: Mapping[str, str] = field(default_factory=dict)
    implied: tuple[Found, ...] = ()


def read_calls(path: Path, text: str) -> list[Source]:
    """Return the settings of the calls of TrainingArguments and LoraConfig in a Python file.

    Raises:
        UserError: the file is no Python, has no such call, or several of one kind.
    """
    try:
        tree = ast.parse(text, str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path}{line} is not valid Python: {getattr(error, 'msg', error)}") from error
    calls = [(name, node) for node in ast.walk(tree) if isinstance(node, ast.Call) and (name := called(node)) in CALLS]
    training = [(name, node) for name, node in calls if CALLS[name] is not LORA]
    lora = [(name, node) for name, node in calls if CALLS[name] is LORA]
    if not calls:
        raise UserError(f"{path} has no call of {', '.join(CALLS)}{_instead(tree)}")
    for group in (training, lora):
        if len(group) > 1:
            places = first_few(f"{name} in line {node.lineno}" for name, node in group)
            raise UserError(f"{path} has {places}: copy the one that is meant into a file of its own")
    constants = dict(constants_of(tree))
    sources = [_source(path, name, node, tree, constants) for name, node in [*training, *lora]]
    if training and not lora and not _uses_peft(tree):
        full = sets("the file has no call of LoraConfig: all weights are trained", adapter__mode="full")
        sources[0] = Source(sources[0].place, sources[0].table, sources[0].given, sources[0].unread, (full,))
    return sources


def _uses_peft(tree: ast.AST) -> bool:
    """Return whether a file makes an adapter, if by another way than a call of LoraConfig."""
    names = {getattr(node, "id", "") or getattr(node, "attr", "") for node in ast.walk(tree)}
    return "get_peft_model" in names or any(
        isinstance(node, ast.keyword) and node.arg == "peft_config" for node in ast.walk(tree)
    )


def called(node: ast.Call) -> str:
    """Return the last name of what is called: `LoraConfig` for `peft.LoraConfig(...)`."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _instead(tree: ast.AST) -> str:
    """Return a clause about a file without such a call."""
    other = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and called(node) in OTHERS]
    if other:
        return (
            f", but {called(other[0])} in line {other[0].lineno}: rawloop trains on given answers, without preferences "
            "or rewards"
        )
    parses = any(isinstance(node, ast.Name) and node.id == "HfArgumentParser" for node in ast.walk(tree))
    how = "its values come from a command line; " if parses else ""
    return f": {how}save them with `training_args.to_json_string()`, and give that JSON file"


def constants_of(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the names that are assigned once in the whole file, at its top level, and a literal."""
    stores = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    changed = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign):
            name = targets[0].id
            value = literal(node.value, {}) if node.value is not None else UNKNOWN
            if value is not UNKNOWN and stores.count(name) == 1 and name not in changed:
                yield name, value


def literal(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    """Return the value of an expression that has one without running it, or UNKNOWN."""
    if isinstance(node, ast.Name):
        return constants.get(node.id, UNKNOWN)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return UNKNOWN


def _source(path: Path, name: str, node: ast.Call, tree: ast.Module, constants: Mapping[str, Any]) -> Source:
    """Return the settings of one call, and those that are set on its result."""
    given: dict[str, Any] = {}
    unread: dict[str, str] = {}

    def note(setting: str, value: ast.expr) -> None:
        found = literal(value, constants)
        if found is UNKNOWN:
            unread[setting] = f"{ast.unparse(value)} (line {value.lineno})"
        else:
            given[setting] = found

    for number, value in enumerate(node.args):
        note(FIRST[name] if number == 0 and name in FIRST else f"argument {number + 1}", value)
    for keyword in node.keywords:
        several = literal(keyword.value, constants) if keyword.arg is None else None
        if keyword.arg is not None:
            note(keyword.arg, keyword.value)
        elif isinstance(several, dict):
            given.update({str(key): value for key, value in several.items()})
        else:
            note("**", keyword.value)
    for setting, line in later(tree, node):
        given.pop(setting, None)
        unread[setting] = f"it is set again in line {line}"
    return Source(f"{path} line {node.lineno} ({name})", CALLS[name], given, unread)


def later(tree: ast.Module, call: ast.Call) -> Iterator[tuple[str, int]]:
    """Yield (setting, line) of the settings that are assigned to the result of a call: `args.seed = 1`."""
    holders = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and node.value is call
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    stores = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    for node in stores:
        if isinstance(node.value, ast.Name) and node.value.id in holders:
            yield node.attr, node.lineno
