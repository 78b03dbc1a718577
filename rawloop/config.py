"""`RunConfig`: the parts' own config dataclasses put together, and how it is read from YAML and the command line.

Each key has one home and one default, beside the component that it configures. Unknown keys fail with the nearest
name; the resolved config is written into the run folder.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from rawloop.adapters import AdapterConfig
from rawloop.checkpoint import CheckpointConfig
from rawloop.data import DataConfig
from rawloop.dist import DDPConfig
from rawloop.errors import UserError, nearest
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.loop import TrainConfig
from rawloop.optim import OptimConfig
from rawloop.precision import PrecisionConfig
from rawloop.records import RecordsConfig

ALIASES = {"--disable_eval": "--evaluation.enabled=false", "--disable_evaluation": "--evaluation.enabled=false"}


@dataclass
class RunConfig:
    """A whole run. Paths are relative to the folder that the command is started in.

    Args:
        output: folder of the run: config, metrics, events, checkpoints, best.
        resume: `latest` continues the run in `output`; a path continues from that checkpoint.
        seed: seed of weights, data order and dropout.
        device: auto, cuda, mps or cpu.
        model: the model.
        adapter: what is trained of it.
        data: the data.
        train: how long, and on how much at a time.
        optim: the optimizer.
        precision: dtypes.
        ddp: several processes.
        evaluation: evaluation during training.
        checkpoint: saving.
        records: where metrics go.
    """

    output: str = "runs/run"
    resume: str | None = None
    seed: int = 0
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    ddp: DDPConfig = field(default_factory=DDPConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    records: RecordsConfig = field(default_factory=RecordsConfig)


class Parser(ArgumentParser):
    """jsonargparse's parser, with every complaint turned into one `UserError` line that says where a value stands."""

    origins: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UserError(explain(str(message), self.origins))


WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[^"]+)":?;? (?:.*; )?Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)'
)


def explain(message: str, origins: Mapping[str, str]) -> str:
    """Put jsonargparse's words about a wrong type into one line of ours; other messages are only joined to a line."""
    line = "; ".join(part.strip(" -") for part in message.splitlines() if part.strip())
    found = WRONG_TYPE.search(line)
    if not found:
        return line
    wanted = re.sub(r"<class '(\w+)'>", r"\1", found["type"]).replace("typing.", "")
    choices = re.fullmatch(r"Literal\[(.*)\]", wanted)
    wanted = f"one of {choices[1]}" if choices else f"a value of type {wanted}"
    where = f" (from {origins[found['key']]})" if found["key"] in origins else ""
    return f"{found['key']} is '{found['value']}'{where}: it must be {wanted}"


def known_keys() -> set[str]:
    """Every key of a run's config, dotted: `optim.lr`."""
    return set(_flatten(dataclasses.asdict(RunConfig())))


def parse(argv: list[str], prog: str, extra: dict[str, str] | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """Read a run's config from `--config FILE` and overrides such as `--optim.lr 1e-5`.

    Args:
        argv: the command's arguments.
        prog: name of the command, for its help.
        extra: further string options of the command, name -> help.

    Returns:
        the config, and the values of the further options (None where not given).

    Raises:
        UserError: an unknown key, a wrong type, a file that is not there or not YAML.
    """
    parser = Parser(prog=prog, description=RunConfig.__doc__.splitlines()[0] if RunConfig.__doc__ else None)
    parser.add_argument("--config", action="config", help="YAML file with the keys below; later options override it")
    for name, text in (extra or {}).items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    parser.add_class_arguments(RunConfig)
    arguments = _config_first([ALIASES.get(argument, argument) for argument in argv])
    parser.origins = _check_keys(arguments, known_keys() | set(extra or {}))
    values = parser.parse_args(arguments)
    values.pop("config", None)
    options = {name: values.pop(name) for name in (extra or {})}
    config: RunConfig = RunConfig(**parser.instantiate_classes(values).as_dict())
    return config, options


def _config_first(arguments: list[str]) -> list[str]:
    """Move `--config` to the front: what stands on the command line overrides the file wherever it stands."""
    front, rest = [], list(arguments)
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            front, rest = arguments[i : i + 2], arguments[:i] + arguments[i + 2 :]
        elif argument.startswith("--config="):
            front, rest = [argument], arguments[:i] + arguments[i + 1 :]
    return front + rest


def _check_keys(arguments: list[str], known: set[str]) -> dict[str, str]:
    """Refuse keys that no component has, naming the nearest, before types are looked at. Returns where each stands."""
    groups = {key.rpartition(".")[0] for key in known} - {""}
    origins: dict[str, str] = {}
    for i, argument in enumerate(arguments):
        if not argument.startswith("--") or argument in ("--help", "--print_config"):
            continue
        key, _, value = argument[2:].partition("=")
        if key == "config":
            path = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            origins |= dict.fromkeys(_file_keys(Path(path), known, groups), path)
        elif key.removesuffix("+") in known or key in groups or _below(key, known):
            origins[key.removesuffix("+")] = "the command line"
        else:
            raise UserError(f"unknown option --{key}{nearest(key, known)}: `rawloop train --help` lists them all")
    return origins


def _file_keys(path: Path, known: set[str], groups: set[str]) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config is '{path}', which cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold keys and values such as `output: runs/x`, not a {type(content).__name__}")
    keys = _flatten(content)
    for key in keys:
        if key in groups:
            raise UserError(f"{path}: '{key}' is a group of keys, such as {_members(key, known)}")
        if key not in known and not _below(key, known):
            raise UserError(f"{path}: unknown key '{key}'{nearest(key, known)}")
    return keys


def _members(group: str, known: set[str]) -> str:
    return ", ".join(sorted(key for key in known if key.startswith(group + "."))[:3])


def _below(key: str, known: set[str]) -> bool:
    """Whether the key is an entry of a dict-valued key, such as `model.stream_weights.text`."""
    parent = key.rpartition(".")[0]
    return parent in known and parent.endswith("stream_weights")


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        keys += _flatten(value, name + ".") if isinstance(value, dict) and value else [name]
    return keys


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, which `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
