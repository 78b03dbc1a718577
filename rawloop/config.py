"""`RunConfig`: the parts' own config dataclasses put together, and how it is read from YAML and the command line.

Each key has one home and one default, beside the component that it configures. Unknown keys fail with the nearest
name; the resolved config is written into the run folder.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from rawloop.adapters import AdapterConfig
from rawloop.checkpoint import CheckpointConfig
from rawloop.checkpoint.slots import CHECKPOINTS
from rawloop.data import DataConfig
from rawloop.diagnose import ChecksConfig
from rawloop.dist import DDPConfig
from rawloop.errors import UserError, nearest
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.foreign_names import NOT_AS_HF_TRAINER, OF_HF_TRAINER
from rawloop.loop import TrainConfig
from rawloop.optim import OptimConfig
from rawloop.precision import PrecisionConfig
from rawloop.records import METRICS, RecordsConfig

RUN_MARKS = (METRICS, CHECKPOINTS)  # one of them stands beside the config that a run has written into its folder
ALIASES = {"--disable_eval": "--evaluation.enabled=false", "--disable_evaluation": "--evaluation.enabled=false"}

PATHS = "Paths are relative to the folder that the command is started in."


@dataclass
class RunConfig:
    """A whole run. Paths are relative to the folder that the command is started in.

    Args:
        output: folder of the run: config, metrics, events, checkpoints, best.
        resume: `latest` continues the run in `output`; `auto` does if it has a checkpoint, and starts it from the
            beginning if not, which is what a job that is requeued should say; a path continues from that checkpoint.
        resume_force: keys whose change a resume refuses and that are to change all the same, such as '[seed]'
            (docs/checkpoints.md).
        seed: seed of weights, data order and dropout.
        device: auto, cuda, mps or cpu.
        model: the model.
        adapter: what is trained of it.
        data: the data.
        train: how long, and on how much at a time.
        optim: the optimizer.
        precision: dtypes.
        checks: checks before step 0.
        ddp: several processes.
        evaluation: evaluation during training.
        checkpoint: saving.
        records: where metrics go.
    """

    output: str = "runs/run"
    resume: str | None = None
    resume_force: list[str] = field(default_factory=list)
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

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("output is empty: name the folder of the run")
        if self.resume == "":
            raise UserError("resume is empty: say 'latest' or 'auto', or name a checkpoint's folder")
        if self.resume_force and self.resume is None:
            raise UserError(f"resume_force is {self.resume_force}, and nothing is resumed: add --resume latest")


class Parser(ArgumentParser):
    """jsonargparse's parser, with every complaint turned into one `UserError` line that says where a value stands."""

    origin = "the command line"
    meant: Mapping[str, str] = MappingProxyType({})  # options of other commands -> the one of this command

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        names = [name for action in self._actions for name in action.option_strings]
        hint = nearest(self.meant.get(unknown[1], unknown[1]), names) if unknown else ""
        raise UserError(explain(message, self.origin) + hint)


WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[^"]+)":?;? (?:.*; )?Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)'
)
WRONG_LIST = re.compile(
    r'Parser key "(?P<key>[^"]+)":; Does not .*?list\[(?P<type>.*?)\]+, .*; Given value: (?P<value>.*)'
)
IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string: put it in quotes",
    "list": "a list such as '[a, b]'",
}


def explain(message: str, origin: str) -> str:
    """Put jsonargparse's words about a wrong type into one line of ours; other messages are only joined to a line."""
    line = "; ".join(part.strip(" -") for part in message.splitlines() if part.strip())
    found = WRONG_LIST.search(line)
    if found:
        items = found["type"].removeprefix("typing.Literal[")
        return f"{found['key']} is '{found['value']}' (from {origin}): it must be a list, '[a, b]', of {items}"
    found = WRONG_TYPE.search(line)
    if not found:
        return line
    wanted = re.sub(r"<class '(\w+)'>", r"\1", found["type"]).replace("typing.", "")
    choices = re.fullmatch(r"Literal\[(.*)\]", wanted)
    wanted = f"one of {choices[1]}" if choices else IN_WORDS.get(wanted, f"a value of type {wanted}")
    return f"{found['key']} is '{found['value']}' (from {origin}): it must be {wanted}"


def add_options(parser: Parser, owner: type, group: str = "") -> None:
    """Add an option for each field of a config dataclass, and of those inside it, helped by its docstring."""
    summary, texts = field_help(owner)
    section = parser.add_argument_group(group or "run", summary if group else None)
    hints = get_type_hints(owner)
    for item in dataclasses.fields(owner):
        name, hint = f"{group}.{item.name}" if group else item.name, hints[item.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            add_options(parser, hint, name)
            continue
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        section.add_argument(f"--{name}", type=hint, default=default, help=texts[item.name])


def field_help(owner: type) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a config dataclass's docstring, and what its Args section says of each field."""
    text = inspect.getdoc(owner) or ""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text.partition("Args:\n")[2], re.MULTILINE)
    return text.partition("\n")[0], {name: " ".join(words.split()).rstrip(".") for name, words in entries}


def known_keys() -> set[str]:
    """Every key of a run's config, dotted: `optim.lr`."""
    return set(_flatten(dataclasses.asdict(RunConfig())))


def parse(
    argv: list[str], prog: str, extra: Mapping[str, str] | None = None, about: str = ""
) -> tuple[RunConfig, dict[str, Any]]:
    """Read a run's config from `--config FILE` and overrides such as `--optim.lr 1e-5`.

    Args:
        argv: the command's arguments. A later file overrides an earlier one, and an option overrides all files.
        prog: name of the command, for its help.
        extra: further string options of the command, name -> help.
        about: what the command does, for its help.

    Returns:
        the config, and the values of the further options (None where not given).

    Raises:
        UserError: an unknown key, a wrong type, a file that is not there or not YAML.
    """
    head = f"{about[:1].upper()}{about[1:]}. {PATHS}" if about else PATHS
    parser = Parser(prog=prog, usage=f"{prog} [--config FILE] [--KEY VALUE ...]", description=head)
    parser.add_argument("--config", action="config", help="YAML file with the keys below; options override it")
    for name, text in (extra or {}).items():
        parser.add_argument_group(f"--{name} {name.upper()}", text)  # taken out by hand: it may be called like a group
    add_options(parser, RunConfig)
    rest = [ALIASES.get(argument, argument) for argument in argv]
    options = {name: next(reversed(_take(rest, name)), None) for name in extra or {}}
    files = _take(rest, "config")
    known = known_keys()
    origins: dict[str, str] = {}
    for file in files:  # each on its own first, so that a wrong value is laid at the right door
        origins |= dict.fromkeys(_file_keys(Path(file), known), file)
        parser.origin = file
        parser.parse_args(["--config", file])
    parser.origin = Parser.origin
    origins |= dict.fromkeys(_option_keys(rest, known, prog), parser.origin)
    values = parser.parse_args([word for file in files for word in ("--config", file)] + rest).as_dict()
    try:
        return _built(RunConfig, values), options
    except UserError as error:
        raise UserError(f"{error}{_where(str(error), origins)}") from error


def moved_run(argv: list[str], config: RunConfig) -> str | None:
    """A sentence about a run's own config whose `output` is another folder than its own: it was copied or moved.

    None where `--output` is given, and of all other configs.
    """
    rest = list(argv)
    files = [Path(file) for file in _take(rest, "config")]
    if any(argument.partition("=")[0] == "--output" for argument in rest):
        return None
    named = [file for file in files if "output" in _file_keys(file, known_keys())]
    folder = named[-1].parent if named else None
    if folder is None or not any((folder / mark).exists() for mark in RUN_MARKS):
        return None
    if folder.resolve() == Path(config.output).expanduser().resolve():
        return None
    return (
        f"--config is a run's own, in {folder}, and its output is {config.output}: pass --output {folder} to work there"
    )


def _built(owner: type, values: dict[str, Any]) -> Any:
    """Make a config dataclass of parsed values; its own checks may refuse them."""
    hints = get_type_hints(owner)
    given = {item.name: values[item.name] for item in dataclasses.fields(owner)}
    return owner(**{k: _built(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in given.items()})


def _where(message: str, origins: Mapping[str, str]) -> str:
    """A clause that says where the keys that a message names were set."""
    named = [f"{key} from {origins[key]}" for key in origins if re.search(rf"(?<![\w.]){re.escape(key)}\b", message)]
    return f" ({', '.join(named)})" if named else ""


def _take(arguments: list[str], name: str) -> list[str]:
    """Take `--name VALUE` and `--name=VALUE` out of the arguments, wherever they stand, and return the values."""
    values, left = [], iter(list(arguments))
    arguments.clear()
    for argument in left:
        if argument == f"--{name}":
            value = next(left, "")
            if not value or value.startswith("--"):
                raise UserError(f"--{name} needs a value after it")
            values.append(value)
        elif argument.startswith(f"--{name}="):
            values.append(argument.partition("=")[2])
        else:
            arguments.append(argument)
    return values


def _option_keys(arguments: list[str], known: set[str], prog: str) -> list[str]:
    """Refuse options that no component has, naming the nearest, before types are looked at."""
    keys = []
    for argument in arguments:
        key = argument[2:].partition("=")[0].removesuffix("+")
        if not argument.startswith("--") or key in ("help", "print_config"):
            continue
        if f"--{key}" in ALIASES:
            raise UserError(f"--{key} takes no value: write it alone, or write {ALIASES[f'--{key}']}")
        _check_key(key, known, "on the command line", f": `{prog} --help` lists them all")
        keys.append(key)
    return keys


def _file_keys(path: Path, known: set[str]) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        _check_repeats(yaml.compose(text, Loader=yaml.SafeLoader), path)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config is '{path}', which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8") from error
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place} is not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{path} {found}: it must hold keys and values such as `output: runs/x`")
    keys = _flatten(content)
    for key in keys:
        _check_key(key, known, f"in {path}")
    return keys


def _check_repeats(node: yaml.Node | None, path: Path) -> None:
    """Refuse a key that stands twice in a mapping: YAML would silently take the later one."""
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise UserError(f"{path} line {line}: '{key.value}' stands in line {lines[key.value]} already: keep one")
        lines[key.value] = line
        _check_repeats(value, path)


def _check_key(key: str, known: set[str], place: str, more: str = "") -> None:
    members = sorted(name for name in known if name.startswith(key + "."))
    if members:
        raise UserError(f"'{key}' {place} is a group: give values to its keys, such as {', '.join(members[:3])}")
    if key not in known and not _below(key, known):
        raise UserError(f"unknown key '{key}' {place}{near(key, known)}{more}")


def near(key: str, known: set[str]) -> str:
    """A clause: what HF Trainer calls so, or the keys of the same name in other groups, or the nearest one."""
    for name in reversed(key.split(".")):
        if name in OF_HF_TRAINER:
            whose = "PEFT" if name.startswith("lora_") else "HF Trainer"
            return f" (what {whose} calls {name} is '{OF_HF_TRAINER[name]}' here)"
        if name in NOT_AS_HF_TRAINER:
            return f" (HF Trainer's {name}: {NOT_AS_HF_TRAINER[name]})"
    ends = sorted(name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2])
    if ends:
        return " (did you mean '" + "' or '".join(ends) + "'?)"
    return nearest(key, {*known, *(alias.removeprefix("--") for alias in ALIASES)})


def _below(key: str, known: set[str]) -> bool:
    """Whether the key is an entry of a dict-valued key, such as `model.stream_weights.text`."""
    parent = key.rpartition(".")[0]
    return parent in known and parent.endswith("stream_weights")


def _flatten(tree: dict[Any, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        keys += _flatten(value, name + ".") if isinstance(value, dict) and value else [name]
    return keys


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, which `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
