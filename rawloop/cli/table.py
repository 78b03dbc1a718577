"""What each command reads: its options, the keys of a run's config, and those of them that most people set."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NamedTuple

from rawloop.cli import model_options, options
from rawloop.config import NoOptions, RunConfig, known_keys
from rawloop.data.foreign.config import ImportConfig
from rawloop.keys import Key, keys_of, options_of
from rawloop.parser import NOTHING


class Row(NamedTuple):
    """One command.

    Args:
        options: the dataclass of its options.
        alone: the option whose value stands without a name.
        meant: options of other commands -> the option of this one.
        reads: patterns of the keys of a run's config that it reads, without those after a `!`. Empty: no config.
        usual: keys that most people set: `--help` lists them alone.
    """

    options: type = NoOptions
    alone: str = ""
    meant: Mapping[str, str] = NOTHING
    reads: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()

    def own(self) -> list[Key]:
        """Return the options that are no keys of a config."""
        return [key for key in options_of(self.options).values() if key.own and not key.hidden]

    def read_keys(self) -> list[Key]:
        """Return the keys that it reads, of a run's config or of the config dataclasses among its options."""
        keys, unread = keys_of(RunConfig) if self.reads else options_of(self.options), self.unread()
        return [key for key in keys.values() if not key.own and not (self.reads and key.name in unread)]

    def unread(self) -> frozenset[str]:
        """Return the keys of a run's config that the command does not read."""
        read = {key for key in known_keys() if any(fnmatchcase(key, pattern) for pattern in self.reads)}
        left = {key for key in read if any(fnmatchcase(key, p[1:]) for p in self.reads if p[0] == "!")}
        return frozenset(known_keys() - read | left)


EXAMPLES = ("model.*", "data.*")  # all of them say what is in an index of samples, and whether it can be used again
BATCH = ("train.batch_size", "train.max_frames")
MODEL = (*EXAMPLES, "adapter.*", "precision.*", "seed", "device", "ddp.timeout")
MICRO_BATCH = (*MODEL, "!data.eval", "!data.num_workers", "init_from", *BATCH, "train.accumulation")
DATA = ("model.path", "data.train", "data.eval")
TRAINED = ("optim.lr", "adapter.mode", "adapter.rank", "precision.mode")
STEP = (  # of what a step takes
    *("checkpoint.asynchronous", "ddp.gradient_as_bucket_view", "parallel", "optim.*"),
    *("!optim.schedule", "!optim.warmup_steps", "!optim.warmup_ratio"),
)

TABLE: Mapping[str, Row] = MappingProxyType(
    {
        "demo": Row(options.DemoOptions),
        "import": Row(ImportConfig, "source"),
        "prepare": Row(
            options.PrepareOptions,
            reads=(*EXAMPLES, "!data.num_workers", "!data.shuffle", "device", "ddp.timeout"),
            usual=(*DATA, "data.codes", "data.on_bad_sample", "data.max_seconds", "model.codec", "device"),
        ),
        "inspect": Row(
            options.InspectOptions,
            reads=(*EXAMPLES, "!data.num_workers", "seed", *BATCH, "evaluation.batch_size"),
            usual=(*DATA, "data.codes", *BATCH, "seed"),
        ),
        "plan": Row(
            options.PlanOptions,
            reads=(*MODEL, "!data.eval", "!data.num_workers", "!ddp.timeout", *BATCH, "train.accumulation", *STEP),
            usual=("model.path", "data.train", *BATCH, "train.accumulation", *TRAINED),
        ),
        "train": Row(
            reads=("*",),
            usual=(
                *DATA,
                *("output", "resume", "init_from", "device"),
                *BATCH,
                *("train.accumulation", "train.epochs", "train.max_steps"),
                *TRAINED,
                *("optim.warmup_steps", "evaluation.every", "checkpoint.save_every"),
            ),
        ),
        "from-trainer": Row(options.FromTrainerOptions, "file"),
        "evaluate": Row(
            options.EvaluateOptions,
            reads=(*MODEL, "!data.shuffle", "output", "train.max_frames", "evaluation.batch_size", "records.progress"),
            usual=(*DATA, "output", "device", "evaluation.batch_size", "train.max_frames", "precision.mode"),
        ),
        "generate": Row(
            model_options.GenerateOptions,
            "run",
            {"prompt": "text", "ref_audio": "reference", "base": "model.path"},
            usual=("model.path", "sampling.temperature"),
        ),
        "export": Row(
            model_options.ExportOptions,
            "run",
            {"base": "model.path", "hub": "push"},
            usual=("model.path", "model.revision"),
        ),
        "merge": Row(
            model_options.MergeOptions,
            meant={
                **dict.fromkeys(("checkpoint", "config"), "adapter"),
                **dict.fromkeys(("base", "base_model", "model"), "model.path"),
            },
            usual=("model.path", "model.revision"),
        ),
        "report": Row(options.ReportOptions, "run"),
        "verify": Row(options.VerifyOptions, "run"),
        "replay": Row(options.ReplayOptions, "capsule"),
        "precision probe": Row(
            options.ProbeOptions,
            reads=(*MICRO_BATCH, "optim.lr"),
            usual=("model.path", "data.train", "init_from", "device", *BATCH, *TRAINED),
        ),
        "precision compare": Row(
            options.CompareOptions,
            reads=(*MICRO_BATCH, "!adapter.dropout", "optim.*"),
            usual=("model.path", "data.train", "init_from", "device", *BATCH, *TRAINED),
        ),
        "launch-check": Row(
            options.LaunchCheckOptions,
            reads=("*",),  # so that it is started like train
            usual=(*DATA, "data.codes", "output", "device"),
        ),
        "doctor": Row(
            options.DoctorOptions,
            reads=(
                *("*", "!adapter.dropout", "!train.*", "!resume", "!evaluation.every", "!evaluation.patience"),
                *("!checkpoint.save_every", "!checkpoint.keep_last", "!records.*"),
            ),
            usual=(*DATA, "device", *TRAINED),
        ),
    }
)
