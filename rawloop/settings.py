"""The config dataclasses of the parts that are one file. Those of a package are in its config.py. None needs torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from rawloop.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "lion", "muon", "schedule_free"]


@dataclass
class DDPConfig:
    """DistributedDataParallel, with every switch explicit.

    Args:
        find_unused_parameters: true: search each step's graph for parameters without a gradient, which is needed if a
            batch may leave a trained parameter unused on some rank; costs 5 to 10% of a step. false: do not search;
            if a batch leaves a parameter unused, the run ends and names it. auto: true if the first batch leaves a
            parameter unused, else false.
        broadcast_buffers: copy rank 0's buffers to all ranks at every forward pass.
        gradient_as_bucket_view: keep gradients inside the all-reduce buckets (saves one copy of the gradients).
        static_graph: promise that the graph never changes. Not together with gradient accumulation.
        timeout: seconds that ranks wait for a rank that neither comes nor works; then the run ends and names it.
    """

    find_unused_parameters: bool | Literal["auto"] = "auto"
    broadcast_buffers: bool = False
    gradient_as_bucket_view: bool = True
    static_graph: bool = False
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout < 1e6:
            raise UserError(f"ddp.timeout is {self.timeout}: it must be above 0 and below 1,000,000 seconds")


@dataclass
class RecordsConfig:
    """Sinks of the metrics besides `metrics.jsonl`, which is always written.

    Args:
        report_to: send copies of the metrics to tensorboard (files in the run folder), wandb, mlflow, trackio; each
            needs the package of its name.
        project: the project of wandb and trackio, and the experiment of mlflow.
        progress: show a progress bar on rank 0; if stderr is no terminal, a line per log step and per evaluation.
    """

    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=list)
    project: str = "rawloop"
    progress: bool = True

    def __post_init__(self) -> None:
        twice = [name for name in self.report_to if self.report_to.count(name) > 1]
        if twice:
            raise UserError(f"records.report_to names {twice[0]} {len(twice)} times: name it once")
        if not self.project:
            raise UserError("records.project is empty: name a project")


OLDER_RECORDS: Mapping[str, str] = MappingProxyType(
    {
        "records.tensorboard": "records.report_to",
        "records.wandb": "records.report_to",
        "records.wandb_project": "records.project",
    }
)


def read_older_records(settings: dict[str, Any], source: str) -> None:
    """Replace `OLDER_RECORDS`, which configs of older runs have, in settings by dotted keys.

    Raises:
        UserError: they stand beside the keys that replaced them.
    """
    values = {key: settings.pop(key) for key in OLDER_RECORDS if key in settings}
    for key in values:
        if OLDER_RECORDS[key] in settings:
            raise UserError(f"{source} has '{key}' beside '{OLDER_RECORDS[key]}', which replaced it: take '{key}' out")
        if not isinstance(values[key], str if key.endswith("project") else bool):
            raise UserError(f"'{key}' in {source} is {values[key]!r}; it is '{OLDER_RECORDS[key]}' now: take it out")
    if "records.wandb_project" in values:
        settings["records.project"] = values.pop("records.wandb_project")
    if values:
        settings["records.report_to"] = [key.rpartition(".")[2] for key, value in values.items() if value is True]


@dataclass
class EvaluationConfig:
    """Evaluation during training, independent of saving.

    Args:
        enabled: whether to evaluate at all. Without evaluation there is no best model; nothing else changes.
        every: evaluate after this many steps, besides at step 0 and at the end.
        batch_size: samples per batch and process, where train.max_frames is 0. The result does not depend on it beyond
            rounding.
        best_metric: the metric that decides which model is the best, such as eval_loss/audio.
        best_mode: whether the best value is the smallest (min) or the largest (max).
        patience: stop after this many evaluations in a row that were not the best; 0 never stops early.
    """

    enabled: bool = True
    every: int = 500
    batch_size: int = 4
    best_metric: str = "eval_loss"
    best_mode: Literal["min", "max"] = "min"
    patience: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.batch_size < 1:
            raise UserError(
                f"evaluation.every ({self.every}) and evaluation.batch_size ({self.batch_size}) must be 1 or more"
            )
        if self.patience < 0:
            raise UserError(f"evaluation.patience is {self.patience}: it must be 0 (never stop early) or more")
        if self.best_mode not in ("min", "max"):
            raise UserError(f"evaluation.best_mode is '{self.best_mode}': it must be min or max")


@dataclass
class SamplingConfig:
    """How tokens are drawn when a model generates. What is left out is the model's own setting.

    The model's own is that of its generation_config.json, else what its authors generate with.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: draw from the k most likely tokens only; 0 does not limit them.
        top_p: draw from the most likely tokens that have this probability together; 1 does not limit them.
        ras_window: Higgs Audio v2 draws a code again if it was already drawn often in so many frames before
            (repetition-aware sampling); 0 never does.
        ras_repeats: how often is often.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    ras_window: int | None = None
    ras_repeats: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "ras_window"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"sampling.{name} is {value}: it must be a number, and not below 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.ras_repeats is not None and self.ras_repeats < 1:
            raise UserError(f"sampling.ras_repeats is {self.ras_repeats}: it must be 1 or more")


# The keys that optimizers other than those of Adam's kind read, of beta1, beta2 and eps.
READ_BY: Mapping[str, tuple[str, ...]] = MappingProxyType({"adafactor": (), "lion": ("beta1", "beta2")})


@dataclass
class OptimConfig:
    """The optimizer and its schedule.

    Args:
        name: adamw keeps 8 bytes of state for each trained weight. adamw_8bit keeps 2, paged_adamw_8bit moves them to
            the CPU's memory if the GPU's is full, lion keeps 4: they need bitsandbytes. adafactor keeps a row and a
            column of each matrix. muon updates the matrices of hidden layers by orthogonal steps (4 bytes), and
            embeddings, heads and vectors by AdamW. schedule_free averages the weights instead of decaying the learning
            rate (8 bytes); it needs schedulefree. docs/optimizers.md compares them.
        lr: peak learning rate; for adafactor it is relative to the size of each tensor's weights.
        weight_decay: decoupled weight decay of matrices; vectors (norms, biases) get none.
        beta1: decay of the gradient's running mean.
        beta2: decay of the squared gradient's running mean; in lion, of the mean that is kept.
        eps: added to the root of the running mean square.
        schedule: after warm-up: constant, linear to 0, or cosine to 0.
        warmup_steps: steps over which the learning rate rises linearly from 0 to lr.
        warmup_ratio: the same as a share of all steps, in place of warmup_steps.
        max_norm: clip the global gradient norm to this; 0 clips nothing.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must be a number above 0")
        for name in ("warmup_steps", "max_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must be a number, and not below 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(
                f"optim.warmup_ratio is {self.warmup_ratio}: it must lie between 0 and 1, a share of all steps"
            )
        if self.warmup_steps and self.warmup_ratio:
            raise UserError(
                f"optim.warmup_steps is {self.warmup_steps} and optim.warmup_ratio {self.warmup_ratio}: set one to 0"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        self._check_name()

    def _check_name(self) -> None:
        if self.name not in get_args(OptimizerName):
            raise UserError(f"optim.name is '{self.name}': it must be one of {', '.join(get_args(OptimizerName))}")
        defaults = {each.name: each.default for each in fields(self)}
        for key in {"beta1", "beta2", "eps"}.difference(READ_BY.get(self.name, ("beta1", "beta2", "eps"))):
            if getattr(self, key) != defaults[key]:
                raise UserError(
                    f"optim.{key} is {getattr(self, key)} and optim.name is '{self.name}', which does not read it: "
                    f"leave optim.{key} out, or take adamw"
                )
        if self.name == "schedule_free" and self.schedule != "constant":
            raise UserError(
                f"optim.name is 'schedule_free' and optim.schedule is '{self.schedule}': its averaging takes the place "
                "of a decay; set optim.schedule to constant (warm-up may stay)"
            )

    def warmup(self, total: int) -> int:
        """Return the steps of the warm-up in a run of `total` steps."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total)


@dataclass
class TrainConfig:
    """Length of the training, batch size and accumulation.

    Args:
        batch_size: samples per micro-batch and process, where max_frames is 0.
        accumulation: micro-batches per optimizer step and process.
        epochs: passes over the training set, if max_steps is 0.
        max_steps: number of optimizer steps; 0 trains for `epochs`.
        log_every: steps between lines in metrics.jsonl; only then losses are read from the device.
        max_frames: positions per micro-batch and process, padding included: samples of similar length are batched
            together, as many as fit. Also for the evaluation. 0: batch_size decides.
        rehearse: run the costliest micro-batch forward and backward before step 0, to see whether memory suffices.
    """

    batch_size: int = 1
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = 0
    log_every: int = 10
    max_frames: int = 0
    rehearse: bool = True

    def __post_init__(self) -> None:
        if self.max_frames < 0 or self.accumulation < 1:
            raise UserError(
                f"train.max_frames ({self.max_frames}) must not be below 0, and train.accumulation "
                f"({self.accumulation}) must be 1 or more"
            )
        endless = self.max_steps == 0 and not 0 < self.epochs < 1e9
        if self.max_steps < 0 or self.log_every < 1 or endless:
            raise UserError(
                f"train.max_steps ({self.max_steps}) must not be below 0, train.log_every ({self.log_every}) must be "
                f"1 or more, and train.epochs ({self.epochs}) above 0 and below 1e9 where max_steps is 0"
            )
