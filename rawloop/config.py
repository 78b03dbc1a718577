"""`RunConfig` is composed of the parts' config dataclasses. `parse` reads it from YAML files and the command line.

Each key has one default, in the dataclass of its part. An unknown key is refused with the nearest name. The resolved
config is written into the run folder.
"""

import dataclasses
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import exists, expanduser, isdir
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import yaml

from rawloop.adapters.config import AdapterConfig
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.errors import UserError
from rawloop.families.config import ModelConfig
from rawloop.keys import Key, keys_of, options_of
from rawloop.listen.config import ListenConfig
from rawloop.parser import COMMAND_LINE, Reader, split
from rawloop.precision.config import PrecisionConfig
from rawloop.settings import (
    DDPConfig,
    EvaluationConfig,
    OptimConfig,
    RecordsConfig,
    TrainConfig,
    read_older_records,
)
from rawloop.values import shown
from rawloop.watch.config import WatchConfig
from rawloop.yaml_file import read_yaml

RUN_MARKS = ("metrics.jsonl", "checkpoints")  # a run folder has one of them beside its config
ALIASES = {"--disable_eval": "--evaluation.enabled=false", "--disable_evaluation": "--evaluation.enabled=false"}

# Keys in the config.yaml of older runs -> the value that is ignored, and what to do with another value.
GONE: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {"resume_force": ([], "start another run from the checkpoint's weights with --init_from CHECKPOINT")}
)

CONFIG = Key("config", str, None, "the same as FILE.yaml alone", object, own=True)


@dataclass
class RunConfig:
    """A whole run. Paths are relative to the folder that the command is started in.

    Args:
        output: folder of the run: config, metrics, events, checkpoints, best.
        resume: `latest` continues the run in `output`, `auto` continues or starts it; a path continues from that
            checkpoint. `auto` is right for a job that is requeued.
        init_from: start a new run from the weights of a checkpoint: RUN/best, RUN/latest, a checkpoint's folder, or an
            adapter/ or model/ folder. Nothing else in it is taken. A run that has checkpoints resumes.
        seed: seed of weights, data order and dropout.
        device: auto, cuda, mps or cpu.
        parallel: how several processes share the work. ddp: each has the whole model, and gradients are averaged.
            fsdp: weights, gradients and optimizer state are sharded over the processes (docs/sharding.md).
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
    parallel: Literal["ddp", "fsdp"] = "ddp"
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
        if self.model.quantization and self.adapter.mode == "full":
            raise UserError(
                f"model.quantization is '{self.model.quantization}' and adapter.mode is 'full': quantised weights "
                "cannot be trained; set adapter.mode to lora, or leave model.quantization out"
            )
        if self.parallel == "fsdp":
            self._check_fsdp()

    def _check_fsdp(self) -> None:
        """Refuse what sharded weights cannot do, each with the nearest that works."""
        name, quantization = self.optim.name, self.model.quantization
        switch = "it is a switch of DDP: set it to false"
        for wrong, what, way_on in (
            (name.startswith("paged"), f"optim.name '{name}'", "paged state is not sharded: take adamw_8bit"),
            (quantization, f"model.quantization '{quantization}'", "quantised weights are not sharded: leave it out"),
            (self.ddp.broadcast_buffers, "ddp.broadcast_buffers true", switch),
            (self.ddp.static_graph, "ddp.static_graph true", switch),
        ):
            if wrong:
                raise UserError(f"parallel is 'fsdp', with {what}: {way_on}, or set parallel to ddp")


def known_keys() -> set[str]:
    """Return every key of a run's config, dotted: `optim.lr`."""
    return set(keys_of(RunConfig))


@dataclass
class NoOptions:
    """A command has no options besides the keys of a config."""


class Parsed(NamedTuple):
    """A run's config, the command's other options, and where the keys come from that are set: a file's name, or not."""

    config: RunConfig
    options: Any
    origins: Mapping[str, str]


def config_keys(options: type = NoOptions) -> Mapping[str, Key]:
    """Return all options of a command that reads a run's config: its own, `config`, and the keys."""
    return {**options_of(options), "config": CONFIG, **keys_of(RunConfig)}


def parse(argv: Sequence[str], prog: str, options: type = NoOptions, unread: Collection[str] = ()) -> Parsed:
    """Read a run's config from YAML files, named alone or by `--config FILE`, and options such as `--optim.lr 1e-5`.

    A later file overrides an earlier one, and options override all files. `options` is the dataclass of the command's
    other options. The command line may not have the keys that are `unread`.

    Raises:
        UserError: the mistakes in all files and on the command line.
    """
    keys = config_keys(options)
    reader = Reader(prog, keys, unread, aliases=[name.removeprefix("--") for name in ALIASES])
    for name in [word.partition("=")[0] for word in argv if word not in ALIASES]:
        if name in ALIASES:
            reader.fail(f"{name} takes no value: write it alone, or write {ALIASES[name]}")
    given = split([ALIASES.get(word.partition("=")[0], word) for word in argv], keys)
    for option in given:
        if option.values and (option.name == "config" or (not option.name and _is_file(reader, option.values[0]))):
            _take_file(reader, option.values[0])
    reader.take_options(option for option in given if option.name and (option.name != "config" or not option.values))
    config, own = reader.build(RunConfig), reader.build(options)
    reader.check()
    return Parsed(config, own, reader.origins)


def _take_file(reader: Reader, file: str) -> None:
    """Take the settings of a file, or note why it cannot be read."""
    settings: dict[str, Any] = {}
    try:
        settings = read_yaml(Path(file))
        read_older_records(settings, file)
    except UserError as error:
        reader.fail(str(error))
    for key in [key for key in settings if key in GONE]:
        unused, way_on = GONE[key]
        if settings.pop(key) != unused:
            reader.fail(f"'{key}' in {file} is no key any more: take it out, and {way_on}")
    reader.take_settings(settings, file)


def _is_file(reader: Reader, word: str) -> bool:
    """Return whether a word that stands alone is meant as a YAML file. If not, note what to write instead."""
    path, is_folder = Path(word), isdir(word)  # pathlib raises if a word is too long for a path
    name, _, value = word.lstrip("-").partition("=")
    if path.suffix in (".yaml", ".yml") or (exists(word) and not is_folder):
        return True
    if is_folder and any((path / mark).exists() for mark in RUN_MARKS):
        resume = "" if "resume" in reader.unread else " --resume latest"
        more = " --checkpoint best" if "checkpoint" in reader.keys else resume
        command = f"{reader.prog} {path / 'config.yaml'}{more}"
        reader.fail(f"'{word}' is the folder of a run, and no YAML file: write `{command}`")
    elif name in reader.keys:
        reader.fail(f"{shown(word)} is no YAML file: write --{name} {shlex.quote(value) if value else 'VALUE'}")
    else:
        what = "a folder, and no YAML file" if is_folder else "no YAML file"
        reader.fail(f"{shown(word)} is {what}: name one, such as run.yaml, or give values as --KEY VALUE")
    return False


def moved_run(parsed: Parsed) -> str | None:
    """Return a notice if `output` comes from a run's own config, and that run was copied or moved to another folder."""
    file = parsed.origins.get("output", COMMAND_LINE)
    folder = Path(file).parent
    if file == COMMAND_LINE or not any((folder / mark).exists() for mark in RUN_MARKS):
        return None
    output = parsed.config.output
    if folder.resolve() == Path(expanduser(output)).resolve():
        return None
    return f"the config is a run's own, in {folder}, and its output is {output}: pass --output {folder} to work there"


def to_yaml(config: RunConfig) -> str:
    """Return the config as YAML, which `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
