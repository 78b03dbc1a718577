"""`RunConfig` is composed of the parts' config dataclasses. `parse` reads it from YAML files and the command line.

Each key has one default, in the dataclass of its part. An unknown key is refused with the nearest name. The resolved
config is written into the run folder.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

import yaml

from rawloop.adapters.config import AdapterConfig
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.errors import UserError, nearest
from rawloop.families.config import ModelConfig
from rawloop.listen.config import ListenConfig
from rawloop.parser import Parser, add_options, flattened, read_yaml
from rawloop.precision.config import PrecisionConfig
from rawloop.settings import (
    OLDER_RECORDS,
    DDPConfig,
    EvaluationConfig,
    OptimConfig,
    RecordsConfig,
    TrainConfig,
    read_older_records,
)
from rawloop.trainer_names import HF_NAMES, NO_COUNTERPART
from rawloop.watch.config import WatchConfig

RUN_MARKS = ("metrics.jsonl", "checkpoints")  # a run folder has one of them beside its config
ALIASES = {"--disable_eval": "--evaluation.enabled=false", "--disable_evaluation": "--evaluation.enabled=false"}

# Keys in the config.yaml of older runs -> the value that is ignored, and what to do with another value.
GONE: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {"resume_force": ([], "start another run from the checkpoint's weights with --init_from CHECKPOINT")}
)

PATHS = "Paths are relative to the folder that the command is started in."


@dataclass
class RunConfig:
    """A whole run. Paths are relative to the folder that the command is started in.

    Args:
        output: folder of the run: config, metrics, events, checkpoints, best.
        resume: `latest` continues the run in `output`; `auto` continues it if it has a checkpoint and else starts it,
            which is right for a job that is requeued; a path continues from that checkpoint.
        init_from: start a new run from the weights of this checkpoint, and from nothing else in it: RUN/best,
            RUN/latest, a checkpoint's folder, or an adapter/ or model/ folder. A run that has checkpoints resumes.
        seed: seed of weights, data order and dropout.
        device: auto, cuda, mps or cpu.
        model: the model.
        adapter: which of its weights train.
        data: the data.
        train: length, batch size, accumulation.
        optim: the optimizer.
        precision: dtypes.
        checks: checks before step 0.
        ddp: several processes.
        evaluation: evaluation during training.
        checkpoint: saving.
        records: where metrics go.
        watch: looking for numbers that go wrong.
        listen: hearing the model while it trains.
    """

    output: str = "runs/run"
    resume: str | None = None
    init_from: str | None = None
    seed: int = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    ddp: DDPConfig = field(default_factory=DDPConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    records: RecordsConfig = field(default_factory=RecordsConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)

    def __post_init__(self) -> None:
        if self.init_from == "":
            raise UserError("init_from is empty: name a checkpoint, such as RUN/best, or leave it out")
        if not self.output:
            raise UserError("output is empty: name the folder of the run")
        if self.resume == "":
            raise UserError("resume is empty: say 'latest' or 'auto', or name a checkpoint's folder")


def known_keys() -> set[str]:
    """Return every key of a run's config, dotted: `optim.lr`."""
    return {key for key, _ in flattened(dataclasses.asdict(RunConfig()))}


def parse(
    argv: list[str], prog: str, extra: Mapping[str, str] | None = None, about: str = ""
) -> tuple[RunConfig, dict[str, Any]]:
    """Read a run's config from `--config FILE` and options such as `--optim.lr 1e-5`.

    A later file overrides an earlier one, and options override all files. `extra` are the command's other string
    options, name -> help; their values are returned beside the config, None if not given.
    """
    head = f"{about[:1].upper()}{about[1:]}. {PATHS}" if about else PATHS
    parser = Parser(prog=prog, usage=f"{prog} [--config FILE] [--KEY VALUE ...]", description=head)
    other = {"config": "YAML file with the keys below; options override it", **(extra or {})}
    for name, text in other.items():
        parser.add_argument_group(f"--{name} {name.upper()}", text)  # only for the help: the name may be a group's
    add_options(parser, RunConfig)
    rest = [ALIASES.get(argument, argument) for argument in argv]
    options = {name: next(reversed(_pop_option(rest, name)), None) for name in extra or {}}
    files = _pop_option(rest, "config")
    known = known_keys()
    origins: dict[str, str] = {}
    values = None
    for file in files:  # one by one, so that an error names the right file
        parser.origin = file
        settings = _file_settings(Path(file), known)
        origins |= dict.fromkeys(settings, file)
        values = parser.read_settings(settings, values)
    parser.origin = Parser.origin
    origins |= dict.fromkeys(_option_keys(rest, known | other.keys(), prog), parser.origin)
    values = parser.read_options(rest, values).as_dict()
    try:
        return _build(RunConfig, values), options
    except UserError as error:
        named = [f"{k} from {origins[k]}" for k in origins if re.search(rf"(?<![\w.]){re.escape(k)}\b", str(error))]
        raise UserError(f"{error} ({', '.join(named)})" if named else str(error)) from error


def moved_run(argv: list[str], config: RunConfig) -> str | None:
    """Return a notice if `--config` belongs to a run that was copied or moved, so that `output` is another folder."""
    rest = list(argv)
    files = [Path(file) for file in _pop_option(rest, "config") if Path(file).is_file()]  # a pipe is read only once
    if any(argument.partition("=")[0] == "--output" for argument in rest):
        return None
    named = [file for file in files if "output" in read_yaml(file)]
    folder = named[-1].parent if named else None
    if folder is None or not any((folder / mark).exists() for mark in RUN_MARKS):
        return None
    if folder.resolve() == Path(expanduser(config.output)).resolve():
        return None
    return (
        f"--config is a run's own, in {folder}, and its output is {config.output}: pass --output {folder} to work there"
    )


def _build(owner: type, values: dict[str, Any]) -> Any:
    """Build a config dataclass from parsed values. Its checks may refuse them."""
    hints = get_type_hints(owner)
    return owner(**{k: _build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


def _pop_option(arguments: list[str], name: str) -> list[str]:
    """Remove `--name VALUE` and `--name=VALUE` from the arguments, and return the values."""
    values, all_arguments = [], iter(list(arguments))
    arguments.clear()
    for argument in all_arguments:
        if argument == f"--{name}":
            value = next(all_arguments, "")
            if not value or value.startswith("--"):
                raise UserError(f"--{name} needs a value after it")
            values.append(value)
        elif argument.startswith(f"--{name}="):
            values.append(argument.partition("=")[2])
        else:
            arguments.append(argument)
    return values


def _option_keys(arguments: list[str], known: set[str], prog: str) -> list[str]:
    """Return the keys of the options. Refuse an unknown key, before any value is parsed."""
    keys = []
    for argument in arguments:
        key = argument[2:].partition("=")[0].removesuffix("+")
        if not argument.startswith("--") or key == "help":
            continue
        if f"--{key}" in ALIASES:
            raise UserError(f"--{key} takes no value: write it alone, or write {ALIASES[f'--{key}']}")
        _check_key(key, known, "on the command line", f": `{prog} --help` lists them all")
        keys.append(key)
    return keys


def _file_settings(path: Path, known: set[str]) -> dict[str, Any]:
    """Return the values in a file by dotted keys. Refuse an unknown key."""
    settings = read_yaml(path)
    read_older_records(settings, str(path))
    for key in [key for key in settings if key in GONE]:
        unused, way_on = GONE[key]
        if settings.pop(key) != unused:
            raise UserError(f"'{key}' in {path} is no key any more: take it out, and {way_on}")
    for key in settings:
        _check_key(key, known, f"in {path}")
    return settings


def _check_key(key: str, known: set[str], place: str, more: str = "") -> None:
    members = sorted(name for name in known if name.startswith(key + "."))
    if members:
        raise UserError(f"'{key}' {place} is a group: give values to its keys, such as {', '.join(members[:3])}")
    parent = key.rpartition(".")[0]
    is_entry = parent in known and parent.endswith("stream_weights")  # of a dict, such as model.stream_weights.text
    if key not in known and not is_entry:
        raise UserError(f"unknown key '{key}' {place}{_suggest(key, known)}{more}")


def _suggest(key: str, known: set[str]) -> str:
    """Return a clause: the key for a name of HF Trainer, or keys of this name in other groups, or the nearest key."""
    if key in OLDER_RECORDS:
        return f" (it is '{OLDER_RECORDS[key]}' now)"
    for name in reversed(key.split(".")):
        if name in HF_NAMES:
            whose = "PEFT" if name.startswith("lora_") else "HF Trainer"
            return f" (what {whose} calls {name} is '{HF_NAMES[name]}' here)"
        if name in NO_COUNTERPART:
            return f" (HF Trainer's {name}: {NO_COUNTERPART[name]})"
    ends = sorted(name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2])
    if ends:
        return " (did you mean '" + "' or '".join(ends) + "'?)"
    return nearest(key, {*known, *(alias.removeprefix("--") for alias in ALIASES)})


def to_yaml(config: RunConfig) -> str:
    """Return the config as YAML, which `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
