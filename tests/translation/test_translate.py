"""What a set of settings becomes: values that mean something else here, contradictions, and a line for each of them."""

from typing import Any

import pytest

from rawloop.errors import UserError
from rawloop.translation.axolotl import AXOLOTL
from rawloop.translation.higgs import HIGGS
from rawloop.translation.llama_factory import LLAMA_FACTORY
from rawloop.translation.lora import LORA
from rawloop.translation.rules import Table
from rawloop.translation.swift import SWIFT
from rawloop.translation.telling import our_defaults, told
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.translate import Translation, translate
from rawloop.translation.trl import SFT, TRL

OURS = our_defaults()


def of(table: Table, **given: Any) -> Translation:
    return translate(table, given, OURS)


def made(table: Table, **given: Any) -> dict[str, Any]:
    """The settings that are made of what is given, without those of defaults."""
    done = of(table, **given)
    return {key: value for line in done.of("taken", "changed") for key, value in line.settings.items()}


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"learning_rate": "2e-4"}, {"optim.lr": 2e-4}),  # YAML reads it as text
        ({"num_train_epochs": 2}, {"train.epochs": 2.0}),
        ({"per_device_train_batch_size": 4.0}, {"train.batch_size": 4}),
        ({"max_steps": 100}, {"train.max_steps": 100}),
        ({"max_steps": -1}, {}),
        ({"fp16": True}, {"precision.mode": "amp_fp16"}),
        ({"bf16": "true", "fp16": False}, {"precision.mode": "bf16"}),
        ({"lr_scheduler_type": "SchedulerType.COSINE"}, {"optim.schedule": "cosine"}),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 7},
         {"optim.schedule": "constant", "optim.warmup_steps": 7}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 7}, {"optim.schedule": "constant"}),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, {"optim.schedule": "constant"}),
        ({"lr_scheduler_type": "cosine_with_restarts"}, {"optim.schedule": "cosine"}),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}, {}),
        ({"lr_scheduler_type": "polynomial"}, {"optim.schedule": "linear"}),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}}, {}),
        ({"lr_scheduler_type": "inverse_sqrt"}, {}),
        ({"warmup_steps": 0.05}, {"optim.warmup_ratio": 0.05}),
        ({"warmup_ratio": 0.05}, {"optim.warmup_ratio": 0.05}),
        ({"warmup_ratio": 0.05, "warmup_steps": 9}, {"optim.warmup_steps": 9}),
        ({"warmup_ratio": 0.05, "warmup_steps": 0}, {"optim.warmup_ratio": 0.05}),
        ({"save_total_limit": 2}, {"checkpoint.keep_last": 2}),
        ({"save_total_limit": None}, {"checkpoint.keep_last": 0}),
        ({"save_strategy": "no"}, {"checkpoint.save_every": 0}),
        ({"save_strategy": "best", "save_steps": 7}, {"checkpoint.save_every": 0}),
        ({"save_strategy": "epoch", "save_steps": 7}, {}),
        ({"save_steps": 0.1}, {}),
        ({"eval_strategy": "steps", "eval_steps": 9}, {"evaluation.enabled": True, "evaluation.every": 9}),
        ({"evaluation_strategy": "IntervalStrategy.STEPS", "logging_steps": 9},
         {"evaluation.enabled": True, "train.log_every": 9}),
        ({"eval_strategy": "epoch", "eval_steps": 9}, {"evaluation.enabled": True}),
        ({"eval_strategy": "no", "eval_steps": 9}, {"evaluation.enabled": False}),
        ({"report_to": ["tensorboard", "comet_ml"]}, {"records.report_to": ["tensorboard"]}),
        ({"report_to": "trackio", "project": "p"}, {"records.report_to": ["trackio"], "records.project": "p"}),
        ({"report_to": "wandb", "project": "p"}, {"records.report_to": ["wandb"]}),
        ({"report_to": "none"}, {}),
        ({"report_to": "all"}, {}),
        ({"metric_for_best_model": "loss"}, {"evaluation.best_metric": "eval_loss"}),
        ({"metric_for_best_model": "accuracy", "greater_is_better": True}, {}),
        ({"greater_is_better": False}, {}),  # min is our default
        ({"optim": "adamw_torch"}, {}),
        ({"optim": "OptimizerNames.ADAFACTOR"}, {"optim.name": "adafactor"}),
        ({"optim": "adamw_bnb_8bit"}, {"optim.name": "adamw_8bit"}),
        ({"optim": "lion_8bit"}, {"optim.name": "lion"}),
        ({"optim": "paged_adamw_32bit"}, {}),
        ({"optim": "galore_adamw"}, {}),
        ({"adafactor": True}, {"optim.name": "adafactor"}),
        ({"disable_tqdm": True}, {"records.progress": False}),
        ({"use_cpu": True}, {"device": "cpu"}),
        ({"resume_from_checkpoint": True}, {"resume": "auto"}),
        ({"resume_from_checkpoint": "out/checkpoint-500"}, {}),
        ({"gradient_checkpointing": True}, {"model.activation_checkpointing": True}),
        ({"tf32": True}, {"precision.tf32": True}),
        ({"train_sampling_strategy": "sequential"}, {"data.shuffle": False}),
    ],
)  # fmt: skip
def test_values_of_hf_trainer(given: dict[str, Any], settings: dict[str, Any]) -> None:
    assert made(MORE_TRAINER, **given) == settings


def test_eval_steps_that_are_not_set_are_logging_steps() -> None:
    assert of(MORE_TRAINER, eval_strategy="steps", logging_steps=9).settings["evaluation.every"] == 9


@pytest.mark.parametrize(
    ("table", "given", "settings"),
    [
        (LORA, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, {"adapter.target_modules": ["all-linear"]}),
        (LORA, {"target_modules": {"v_proj", "q_proj"}}, {"adapter.target_modules": ["q_proj", "v_proj"]}),
        (LORA, {"target_modules": r".*\.(q|v)_proj"}, {}),
        (SFT, {"assistant_only_loss": True, "packing": True}, {"data.train_turns": "all", "data.packing": True}),
        (TRL, {"use_peft": True, "lora_r": 4}, {"adapter.mode": "lora", "adapter.rank": 4}),
        (TRL, {"use_peft": False, "model_name_or_path": "x"}, {"adapter.mode": "full", "model.path": "x"}),
        (AXOLOTL, {"bf16": "auto"}, {}),
        (AXOLOTL, {"bf16": "auto", "fp16": True}, {"precision.mode": "amp_fp16"}),
        (AXOLOTL, {"bf16": True, "fp16": True}, {"precision.mode": "bf16"}),
        (AXOLOTL, {"bf16": "full"}, {"precision.mode": "bf16", "precision.trainable_dtype": "bf16"}),
        (AXOLOTL, {"val_set_size": 0.1}, {"data.eval_share": 0.1, "data.eval_by": "sample"}),
        (AXOLOTL, {"val_set_size": 200}, {}),
        (AXOLOTL, {"evals_per_epoch": 4, "saves_per_epoch": 1, "save_steps": 0.5}, {}),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "lora_r": 8},
         {"adapter.mode": "lora", "adapter.rank": 8, "model.quantization": "nf4"}),
        (AXOLOTL, {"load_in_8bit": True, "optimizer": "muon"}, {"model.quantization": "int8", "optim.name": "muon"}),
        (AXOLOTL, {"optimizer": "schedule_free_adamw", "lr_scheduler": "cosine"},
         {"optim.name": "schedule_free", "optim.schedule": "constant"}),
        (TRL, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"model.quantization": "nf4"}),
        (LLAMA_FACTORY, {"quantization_bit": 4, "use_muon": True},
         {"model.quantization": "nf4", "optim.name": "muon"}),
        (LLAMA_FACTORY, {"quantization_bit": 8, "quantization_method": "hqq"}, {}),
        (SWIFT, {"quant_bits": "8", "quant_method": "bnb"}, {"model.quantization": "int8"}),
        (AXOLOTL, {"lora_target_linear": True}, {"adapter.target_modules": ["all-linear"]}),
        (AXOLOTL, {"lora_target_linear": True, "lora_target_modules": ["a"]}, {"adapter.target_modules": ["a"]}),
        (AXOLOTL, {"datasets": [{"path": "a.jsonl", "type": "chat_template"}]}, {"data.train": "a.jsonl"}),
        (AXOLOTL, {"datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}, {}),
        (AXOLOTL, {"test_datasets": [{"path": "a.jsonl"}]}, {"data.eval": "a.jsonl"}),
        (AXOLOTL, {"flash_attention": True}, {"model.attention": "flash_attention_2"}),
        (AXOLOTL, {"use_mlflow": True, "use_wandb": True}, {"records.report_to": ["wandb", "mlflow"]}),
        (AXOLOTL, {"use_comet": True}, {}),
        (AXOLOTL, {"liger_rope": True, "wandb_project": "p"}, {"records.report_to": ["wandb"], "records.project": "p"}),
        (LLAMA_FACTORY, {"lora_rank": 16}, {"adapter.rank": 16}),
        (LLAMA_FACTORY, {"lora_target": "q_proj,v_proj"}, {"adapter.target_modules": ["q_proj", "v_proj"]}),
        (LLAMA_FACTORY, {"finetuning_type": "full", "pure_bf16": True, "dataset": "identity"},
         {"adapter.mode": "full", "precision.mode": "bf16", "precision.trainable_dtype": "bf16"}),
        (LLAMA_FACTORY, {"disable_gradient_checkpointing": True, "mask_history": True, "flash_attn": "fa2"},
         {"model.activation_checkpointing": False, "data.train_turns": "last", "model.attention": "flash_attention_2"}),
        (SWIFT, {"tuner_type": "full", "model": "m"}, {"adapter.mode": "full", "model.path": "m"}),
        (SWIFT, {"train_type": "lora", "dataset": ["a.jsonl"], "val_dataset": ["b.jsonl"], "split_dataset_ratio": 0.1},
         {"data.train": "a.jsonl", "data.eval": "b.jsonl"}),
    ],
)  # fmt: skip
def test_values_of_other_programs(table: Table, given: dict[str, Any], settings: dict[str, Any]) -> None:
    ours = made(table, **given)
    assert settings.items() <= ours.items()
    assert ours.keys() - settings.keys() <= {"adapter.rank", "adapter.alpha", "adapter.mode"} & ours.keys()


def test_defaults_that_depend_on_other_settings() -> None:
    assert of(LLAMA_FACTORY, lora_rank=4).settings["adapter.alpha"] == 8.0
    assert of(AXOLOTL, micro_batch_size=2).settings["evaluation.batch_size"] == 2
    assert of(AXOLOTL).settings["optim.warmup_ratio"] == 0.03
    assert "optim.warmup_ratio" not in of(AXOLOTL, warmup_steps=5).settings
    assert "evaluation.enabled" not in of(AXOLOTL, val_set_size=0.1).settings


def test_what_is_given_has_precedence_over_defaults_of_other_settings() -> None:
    done = of(LLAMA_FACTORY, eval_strategy="steps")  # and no data to evaluate on, which alone would switch it off
    assert done.settings["evaluation.enabled"] is True
    assert [line.name for line in of(LLAMA_FACTORY).lines if "evaluation.enabled" in line.settings] == ["eval_strategy"]


@pytest.mark.parametrize(
    ("table", "name", "value"), [(AXOLOTL, "rl", "dpo"), (LLAMA_FACTORY, "stage", "ppo"), (TRL, "beta", 0.1)]
)
def test_preferences_are_refused(table: Table, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} is '{value}': rawloop trains on given answers"):
        of(table, **{name: value})
    assert not of(table, **{name: table.rules[name].default}).of("changed", "without")


def test_each_setting_has_one_line() -> None:
    given = {
        "learning_rate": 1e-5,
        "fp16": True,
        "optim": "adamw_torch",
        "deepspeed": "z3.json",
        "weight_decay": 0.0,
        "x": 1,
    }
    done = translate(
        MORE_TRAINER, given, OURS, {"seed": "args.seed (line 3)", "hub_model_id": "f() (line 4)", "y": "g() (line 5)"}
    )
    lines = {line.name: line.status for line in done.lines if line.status != "assumed"}
    assert lines == {
        "learning_rate": "taken", "fp16": "changed", "optim": "idle", "deepspeed": "without", "weight_decay": "default",
        "x": "unknown", "seed": "unread", "hub_model_id": "without", "y": "unread",
    }  # fmt: skip
    assert "seed" not in done.settings  # no default stands for what cannot be read
    assert done.settings["train.batch_size"] == 8
    text = "\n".join(told(done, "taken", "changed", "idle", "without", "unread", "unknown", "assumed", "default"))
    for line in (
        "learning_rate 1e-05 -> optim.lr: 1e-05",
        "fp16 true -> precision.mode: amp_fp16 (amp_fp16: FP16 autocast",
        "optim adamw_torch: AdamW, as here",
        "deepspeed z3.json: several processes train by DDP",
        "seed args.seed (line 3) -> seed",
        "y g() (line 5)",
        "train.epochs: 3.0 (num_train_epochs)",
    ):
        assert f"\n  {line}" in text, text
    assert text.endswith("\n  weight_decay")


def test_a_strategy_that_cannot_be_read_does_not_switch_its_steps_off() -> None:
    done = translate(MORE_TRAINER, {"eval_steps": 9}, OURS, {"eval_strategy": "'steps' if x else 'no' (line 1)"})
    assert done.settings["evaluation.every"] == 9
    assert "evaluation.enabled" not in done.settings


@pytest.mark.parametrize(
    ("table", "given", "words"),
    [
        (MORE_TRAINER, {"fp16": True, "bf16": True}, "fp16 is True and bf16 is True, and both decide 'precision.mode'"),
        (HIGGS, {"train_data_dir": "a", "train_data_file": "b"}, "--train_data_dir is 'a' and --train_data_file"),
        (MORE_TRAINER, {"learning_rate": "fast"}, "learning_rate is 'fast': it must be a number"),
        (HIGGS, {"bf16": "maybe"}, "--bf16 is 'maybe': it must be true or false"),
        (HIGGS, {"resume_from_checkpoint": "out/checkpoint-5"}, "HF Trainer's cannot be continued"),
    ],
)  # fmt: skip
def test_contradictions_and_wrong_values_are_refused(table: Table, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        of(table, **given)
    assert words in str(caught.value)
