"""The training scripts for Higgs Audio v2 that are built on HF Trainer: train-higgs-audio and those made from it.

Defaults are those of its script for several GPUs, trainer_ddp.py. HF Trainer's other settings keep its defaults.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rawloop.errors import UserError
from rawloop.translation.rules import (
    Convert,
    Found,
    Given,
    changed,
    nothing,
    same,
    sets,
    switch,
    table,
    with_defaults,
    without,
)
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.values import held_out, names, resume, strategy_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TASK = "single_speaker_smart_voice"
# The text half of a layer, which the authors' code freezes with freeze_llm; the audio half and the heads are trained.
TEXT_HALF = (
    "model.layers.*.self_attn.*",
    "model.layers.*.mlp.*",
    "model.layers.*.input_layernorm.*",
    "model.layers.*.post_attention_layernorm.*",
    "model.norm.*",
    "model.embed_tokens.*",
)
FROZEN = {
    "freeze_llm": TEXT_HALF,
    "freeze_embed": ("model.embed_tokens.*",),
    "freeze_text_head": ("text_lm_head.*",),
}
NO_TOWER = "there is none; the model of transformers has no audio tower: reference clips enter as codes"
WATCHED = "there is none; each run is watched (docs/debugging.md), and `rawloop inspect` shows a batch"
LORA_OFF = "without --use_lora all weights are trained"


def given_path(key: str) -> Convert:
    """Return the convert of a path, which may be empty for none."""
    return lambda value, _: Found({key: value}) if value else nothing()


def eval_path(value: Any, values: Given) -> Found:
    """eval_data_dir and eval_data_file."""
    if value and values["validation_split"]:
        return nothing("validation_split is above 0, and then the scripts do not read it; it is not read here")
    return sets(data__eval=value) if value else nothing()


def task(value: Any, values: Given) -> Found:
    """task_type: the scripts that read a folder have a default, those that read a file of chats have no tasks."""
    if "task_type" not in values.named and values["train_data_file"]:
        return nothing()
    return sets("for all samples, as in the scripts; null lets the keys of each sample decide", data__task=value)


def adapter(value: Any, _: Given) -> Found:
    """use_lora."""
    return (
        sets("LoRA beside frozen weights", adapter__mode="lora")
        if value
        else sets("all weights are trained", adapter__mode="full")
    )


def of_lora(key: str) -> Convert:
    """Return the convert of a setting of LoRA, which has no effect without it."""

    def convert(value: Any, values: Given) -> Found:
        if value is None:
            return nothing()
        return Found({key: value}) if values["use_lora"] else nothing(LORA_OFF)

    return convert


def targets(value: Any, values: Given) -> Found:
    """lora_target_modules, and lora_target."""
    if value is None:
        return nothing()
    return sets(adapter__target_modules=names(value, values)) if values["use_lora"] else nothing(LORA_OFF)


def freeze(value: Any, values: Given) -> Found:
    """The flags that freeze parts of the language model."""
    if not value:
        return nothing()
    if values["use_lora"]:
        return nothing("LoRA trains beside frozen weights anyway")
    patterns = [pattern for name, parts in FROZEN.items() if values[name] for pattern in parts]
    return sets("the same weights by their names here", adapter__freeze=list(dict.fromkeys(patterns)))


def continued(value: Any, values: Given) -> Found:
    """resume_from_checkpoint. To start anew in place of continuing would be another training."""
    found = resume(value, values)
    if found.missing:
        raise UserError(
            f"--resume_from_checkpoint is '{value}', which is no checkpoint of rawloop, and HF Trainer's cannot be "
            "continued: leave it out, or start from the weights of its adapter with --init_from FOLDER"
        )
    return found


def seconds(value: Any, _: Given) -> Found:
    """max_audio_length."""
    return sets("longer clips are refused, never cut", data__max_seconds=value) if value else nothing()


def implied(values: Given) -> Iterator[Found]:
    """Yield what follows from several flags."""
    sources = [values["eval_data_dir"], values["eval_data_file"], values["validation_split"]]
    if not any(sources) and strategy_of(values, "eval_strategy", "evaluation_strategy") != "no":
        words = "no --eval_data_dir, --eval_data_file or --validation_split: the scripts do not evaluate then"
        yield sets(words, evaluation__enabled=False)


HIGGS = table(
    "the scripts of train-higgs-audio",
    with_defaults(
        MORE_TRAINER,
        output_dir="./output",
        num_train_epochs=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=1,
        warmup_steps=100,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=500,
        save_total_limit=3,
        report_to="tensorboard",
    ),
    replace(MORE_TRAINER.rules["resume_from_checkpoint"], convert=continued, kind="any"),
    same("model_path", "model.path", kind="text"),
    same("audio_tokenizer_path", "model.codec", kind="text"),
    without("there is none; the tokenizer is that of the checkpoint", tokenizer_path=None),
    changed(
        "train_data_dir", "data.train", given_path("data.train"), "a folder with metadata.json, or a file", None, "text"
    ),
    changed("train_data_file", "data.train", given_path("data.train"), "a file of chats, or a folder", None, "text"),
    changed("eval_data_dir", "data.eval", eval_path, "not read beside validation_split, as there", None, "text"),
    changed("eval_data_file", "data.eval", eval_path, "not read beside validation_split, as there", None, "text"),
    changed(
        "validation_split",
        "data.eval_share data.eval_by",
        held_out,
        "a share of single samples; 'data.eval_by' speaker holds out whole speakers",
        0.0,
    ),
    changed("task_type", "data.task", task, "for all samples of a folder", TASK),
    same("ref_audio_in_system_message", "data.refs_in_scene", False),
    changed("use_lora", "adapter.mode", adapter, "lora, or else full: all weights are trained", False),
    changed("lora_rank", "adapter.rank", of_lora("adapter.rank"), "with use_lora", 16),
    changed("lora_r", "adapter.rank", of_lora("adapter.rank"), "with use_lora", None, "number"),
    changed("lora_alpha", "adapter.alpha", of_lora("adapter.alpha"), "with use_lora", 32),
    changed("lora_dropout", "adapter.dropout", of_lora("adapter.dropout"), "with use_lora", 0.1),
    changed(
        "lora_target_modules",
        "adapter.target_modules",
        targets,
        "with use_lora; some of the scripts take gate_proj, up_proj and down_proj too",
        TARGETS,
        "list",
    ),
    changed("disable_eval", "evaluation.enabled", switch(evaluation__enabled=False), "false", False),
    changed("disable_evaluation", "evaluation.enabled", switch(evaluation__enabled=False), "false", False),
    same("wandb_project", "records.project", kind="text"),
    changed("freeze_llm", "adapter.freeze", freeze, "without use_lora: attention, text half, norms, embeddings", False),
    changed("freeze_embed", "adapter.freeze", freeze, "without use_lora: the text embeddings", False),
    changed("freeze_text_head", "adapter.freeze", freeze, "without use_lora: the text head", False),
    without(NO_TOWER, freeze_audio_tower=False, freeze_audio_encoder_proj=False),
    changed(
        "max_audio_length", "data.max_seconds", seconds, "seconds; longer clips are refused, never cut", None, "number"
    ),
    without("there is none; a text that is too long for the model is refused", max_text_length=None),
    without(WATCHED, enable_strategic_logging=False, strategic_logging_steps=100),
    based_on=MORE_TRAINER,
    label="--{}",
    implied=implied,
)
