"""Values that mean the same in several programs, such as HF Trainer's schedules, and what they are here."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rawloop.checkpoint.config import CheckpointConfig
from rawloop.errors import UserError
from rawloop.settings import RecordsConfig
from rawloop.translation.memory import is_schedule_free, word
from rawloop.translation.rules import EMPTY, Convert, Found, Given, missing, nothing, sets

SCHEDULES = ("constant", "linear", "cosine")
ATTENTION = {"flash_attention_2": "flash_attention_2", "fa2": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}
SINKS = get_args(get_args(get_type_hints(RecordsConfig)["report_to"])[0])
IMPORT = "`rawloop import FILE --output data` makes data of ShareGPT, Alpaca and others; then set 'data.train'"
EPOCH = "it counts epochs: set '{}' to the steps of an epoch, which `rawloop train` prints when it starts"
SHARE = "it is a share of all steps: set '{}' to a number of steps; `rawloop train` prints how many there are"


def schedule(value: Any, values: Given) -> Found:
    """HF Trainer's lr_scheduler_type."""
    name, extra = word(value), values.get("lr_scheduler_kwargs") or {}
    if is_schedule_free(values):
        return sets("schedule_free averages weights in place of a decay", optim__schedule="constant")
    if name in SCHEDULES:
        return sets(optim__schedule=name)
    if name == "constant_with_warmup":
        return sets("constant after its warm-up", optim__schedule="constant")
    if name == "cosine_with_restarts" and extra.get("num_cycles", 1) == 1:
        return sets("with one cycle, its default, it is cosine", optim__schedule="cosine")
    if name == "polynomial" and extra.get("power", 1.0) == 1.0:
        return sets("with power 1, its default, it is linear to 1e-7; here to 0", optim__schedule="linear")
    return missing(f"'optim.schedule' is {', '.join(SCHEDULES)}")


def warmup_steps(value: Any, values: Given) -> Found:
    """HF Trainer's warmup_steps, which is a share of all steps if it is below 1."""
    if not value:
        return nothing()
    if word(values.get("lr_scheduler_type")) == "constant":
        return nothing("the schedule constant has no warm-up there, and gets none here")
    if "warmup_steps" not in values.named and values.get("warmup_ratio"):
        return nothing()
    return sets(optim__warmup_steps=int(value)) if value >= 1 else sets(optim__warmup_ratio=value)


def warmup_ratio(value: Any, values: Given) -> Found:
    """HF Trainer's warmup_ratio, which warmup_steps overrides."""
    if not value:
        return nothing()
    if word(values.get("lr_scheduler_type")) == "constant":
        return nothing("the schedule constant has no warm-up there, and gets none here")
    if "warmup_steps" in values.named and values["warmup_steps"]:
        return nothing("warmup_steps overrides it there, and here")
    return sets(optim__warmup_ratio=value)


def strategy_of(values: Given, *names: str) -> str:
    """Return the strategy of one of these names, or else the default: no, steps, epoch, best. Not read: steps."""
    if values.unread & {*names}:
        return "steps"
    chosen = [name for name in names if name in values.named] or [name for name in names if values.get(name)]
    value = values[chosen[0]] if chosen else "no"
    return {"true": "steps", "false": "no"}.get(word(value), word(value))


def _every(key: str, value: Any) -> Found:
    """A cadence in steps."""
    if isinstance(value, float) and 0 < value < 1:
        return missing(SHARE.format(key))
    return Found({key: int(value)}) if isinstance(value, int | float) else missing(f"'{key}' is a number of steps")


def eval_strategy(value: Any, values: Given) -> Found:
    """HF Trainer's eval_strategy, by both of its names."""
    if value is None:
        return nothing()
    name = strategy_of(values, "eval_strategy", "evaluation_strategy")
    if name in ("no", "none"):
        return sets(evaluation__enabled=False)
    words = EPOCH.format("evaluation.every") if name == "epoch" else "each 'evaluation.every' steps"
    return sets(words, evaluation__enabled=True)


def eval_steps(value: Any, values: Given) -> Found:
    """HF Trainer's eval_steps: logging_steps, if it is not set."""
    if strategy_of(values, "eval_strategy", "evaluation_strategy") != "steps":
        return nothing("it has no effect there with this eval_strategy")
    if not value:
        return _every("evaluation.every", values.get("logging_steps", 500))
    return _every("evaluation.every", value)


def save_strategy(value: Any, values: Given) -> Found:
    """HF Trainer's save_strategy."""
    name = word(value)
    if name == "epoch":
        return missing(EPOCH.format("checkpoint.save_every"))
    if name == "best":
        return sets("saves when an evaluation is the best, which always happens here", checkpoint__save_every=0)
    return sets("saved at the end only", checkpoint__save_every=0) if name in ("no", "false") else nothing()


def save_steps(value: Any, values: Given) -> Found:
    """HF Trainer's save_steps."""
    if values.get("save_strategy") is not None and word(values["save_strategy"]) != "steps":
        return nothing("it has no effect there with this save_strategy")
    return _every("checkpoint.save_every", value) if value else nothing()


def save_total_limit(value: Any, _: Given) -> Found:
    """HF Trainer's save_total_limit: without it all checkpoints are kept."""
    keep = int(value) if value and value > 0 else 0
    words = "all checkpoints are kept" if not keep else "the best one is kept beside them, and not counted"
    return sets(words if keep != CheckpointConfig.keep_last else "", checkpoint__keep_last=keep)


def logging_steps(value: Any, values: Given) -> Found:
    """HF Trainer's logging_steps."""
    if word(values.get("logging_strategy", "steps")) in ("steps", "none"):
        return _every("train.log_every", value) if value else nothing()
    return nothing("it has no effect there with this logging_strategy")


def logging_strategy(value: Any, _: Given) -> Found:
    """HF Trainer's logging_strategy."""
    if word(value) == "epoch":
        return missing(EPOCH.format("train.log_every"))
    return (
        nothing()
        if word(value) == "steps"
        else missing("metrics.jsonl is always written, each 'train.log_every' steps")
    )


def sinks(asked: Iterable[str]) -> Found:
    """Return the setting for the sinks of metrics that are asked for, by their names there."""
    wanted = list(dict.fromkeys(name for name in asked if name not in ("", "none")))
    ours = [name for name in wanted if name in SINKS]
    others = [name for name in wanted if name not in SINKS]
    words = f"not to {', '.join(others)}: 'records.report_to' has {', '.join(SINKS)}" if others else ""
    return Found({"records.report_to": ours} if ours else {}, words, missing=bool(others and not ours))


def report_to(value: Any, values: Given) -> Found:
    """HF Trainer's report_to: one name, several, or none."""
    return sinks(name.lower() for name in names(value, values))


def project(value: Any, values: Given) -> Found:
    """HF Trainer's project, which is that of trackio alone."""
    if "trackio" in names(values.get("report_to"), values):
        return sets(records__project=value)
    return nothing("only trackio has it there")


def best_metric(value: Any, _: Given) -> Found:
    """HF Trainer's metric_for_best_model."""
    if value in EMPTY:
        return nothing()
    if str(value).removeprefix("eval_") == "loss":
        return sets(evaluation__best_metric="eval_loss")
    return missing("'evaluation.best_metric' is eval_loss, the loss of a stream, or what is heard (docs/listening.md)")


def best_mode(value: Any, values: Given) -> Found:
    """HF Trainer's greater_is_better, which belongs to metric_for_best_model."""
    if value is None:
        return nothing()
    if value and str(values.get("metric_for_best_model") or "loss").removeprefix("eval_") == "loss":
        return missing("the best loss is the smallest; another metric needs 'evaluation.best_mode' max")
    if value:
        return missing("it belongs to metric_for_best_model, which has no counterpart; 'evaluation.best_mode' is that")
    return sets(evaluation__best_mode="min")


def data_seed(value: Any, values: Given) -> Found:
    """HF Trainer's data_seed."""
    return nothing() if value in (None, values.get("seed")) else missing("'seed' is that of the data order, too")


def resume(value: Any, _: Given) -> Found:
    """HF Trainer's resume_from_checkpoint: a path, or whether to continue from the newest checkpoint."""
    if value in (None, False) or word(value) in ("false", "none", ""):
        return nothing()
    if value is True or word(value) == "true":
        return sets("continues the run in 'output', if it has a checkpoint", resume="auto")
    if Path(str(value), "MANIFEST.json").is_file():
        return sets(resume=str(value))
    return missing("a checkpoint of HF Trainer cannot be continued; 'init_from' starts from the weights of an adapter")


def modules(value: Any, _: Given) -> Found:
    """PEFT's target_modules."""
    if value in EMPTY:
        return missing("PEFT has a default for each model; 'adapter.target_modules' is a list")
    if isinstance(value, str) and value != "all-linear" and not re.fullmatch(r"[\w.]+", value):
        return missing("it is a regular expression; 'adapter.target_modules' is a list of names")
    return sets(adapter__target_modules=[value] if isinstance(value, str) else sorted_if_set(value))


def sorted_if_set(value: Iterable[Any]) -> list[Any]:
    """Return a list; a set has no order of its own."""
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def names(value: Any, _: Given) -> list[str]:
    """Return names that are given as a list, or as one text with commas or blanks."""
    return (
        [name for name in re.split(r"[\s,]+", value) if name] if isinstance(value, str) else sorted_if_set(value or [])
    )


def attention(value: Any, _: Given) -> Found:
    """The name of an attention implementation."""
    if not value or value == "auto":
        return nothing()
    if value in ATTENTION:
        return sets(model__attention=ATTENTION[value])
    return missing("'model.attention' is sdpa, eager or flash_attention_2")


def datasets(value: Any, _: Given) -> Found:
    """Data sets of text: one local file is taken, since it may have a form that is read here."""
    listed = value if isinstance(value, list) else [value] if value else []
    paths = [str(item.get("path", "")) if isinstance(item, dict) else str(item) for item in listed]
    if len(paths) == 1 and paths[0].endswith((".json", ".jsonl")):
        return sets("if docs/data.md has the form of its records; else `rawloop import` it first", data__train=paths[0])
    return missing(IMPORT) if listed else nothing()


def as_eval(convert: Convert) -> Convert:
    """Return the convert that does for the evaluation what `convert` does for the training data."""

    def converted(value: Any, values: Given) -> Found:
        found = convert(value, values)
        return Found({"data.eval": found.settings["data.train"]}, found.words) if found.settings else found

    return converted


def held_out(value: Any, _: Given) -> Found:
    """The share, or the number, of the training samples that are evaluated and not trained."""
    if not value:
        return nothing()
    if value >= 1:
        return missing("it is a number of samples; 'data.eval_share' is a share, such as 0.05")
    words = "single samples, as there, though not the same ones; 'data.eval_by' speaker holds out whole speakers"
    return sets(words, data__eval_share=value, data__eval_by="sample")


def revision(value: Any, _: Given) -> Found:
    """model_revision: main is what the hub gives anyway."""
    return nothing() if value in (None, "main") else sets(model__revision=value)


def refuse(what: str, allowed: Iterable[str]) -> Convert:
    """Return the convert of a setting that names the method: another method than these has no counterpart at all."""
    kept = set(allowed)

    def convert(value: Any, _: Given) -> Found:
        if value not in EMPTY and value not in kept:
            raise UserError(
                f"{what} is '{value}': rawloop trains on given answers, by cross-entropy, and on nothing else"
            )
        return nothing()

    return convert
