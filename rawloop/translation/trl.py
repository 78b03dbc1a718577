"""TRL: its SFTConfig, and the YAML of `trl sft --config` and of scripts like it (July 2026)."""

from typing import Any

from rawloop.translation.memory import NESTED, loading_rules, quant_type
from rawloop.translation.rules import (
    Found,
    Given,
    changed,
    many,
    missing,
    nothing,
    same,
    sets,
    table,
    with_defaults,
    without,
)
from rawloop.translation.trainer import TRAINER
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.values import IMPORT, attention, modules, refuse, revision

SHORTENED = "nothing is cut: a sample that is too long for the model is refused, or left out with 'data.on_bad_sample'"
TEMPLATE = "there is none; the chat template and special tokens are those of the checkpoint's tokenizer"


def assistant_only(value: Any, _: Given) -> Found:
    """TRL's assistant_only_loss."""
    if value:
        return sets("all assistant turns are trained", data__train_turns="all")
    return sets("user and system turns are trained there; here all assistant turns", data__train_turns="all")


SFT = table(
    "TRL's SFTTrainer",
    with_defaults(TRAINER, learning_rate=2e-5, logging_steps=10, gradient_checkpointing=True, bf16=None),
    without("there is none; a model is loaded in its stored dtype", model_init_kwargs=None),
    same("trust_remote_code", "model.trust_remote_code", False),
    without(
        "there is none; the loss is plain cross-entropy", router_aux_loss_coef=0.001, loss_type=None, dft_loss=None
    ),
    without(TEMPLATE, chat_template_path=None, eos_token=None, pad_token=None),
    without("there is none; docs/data.md has the forms of a record", dataset_text_field="text", dataset_kwargs=None),
    without("there is none; data are read once, and an index is kept", dataset_num_proc=None, dataset_batch_size=1000),
    without(SHORTENED, max_length=1024, max_seq_length=None, truncation_mode="keep_start"),
    without("there is none; 'data.shuffle' takes another order in each epoch", shuffle_dataset=False),
    same("packing", "data.packing", False),
    without(
        "there is none; samples are packed without attention between them", packing_strategy="bfd", padding_free=False
    ),
    without("there is none; 'data.packing' is for the evaluation, too", eval_packing=None),
    without("there is none; a batch is padded to its longest sample", pad_to_multiple_of=None, num_of_sequences=None),
    without("always so: a prompt is not trained", completion_only_loss=None),
    changed(
        "assistant_only_loss",
        "data.train_turns",
        assistant_only,
        "all assistant turns are trained, other turns never",
        False,
    ),
    without("there is none; 'model.activation_checkpointing' recomputes activations", activation_offloading=False),
    based_on=MORE_TRAINER,
)


PREFERENCES = "beta max_prompt_length num_generations reward_funcs reward_model_path"  # of other trainers of TRL


def use_peft(value: Any, _: Given) -> Found:
    """use_peft."""
    return sets(adapter__mode="lora") if value else sets("all weights are trained", adapter__mode="full")


def dataset(value: Any, _: Given) -> Found:
    """dataset_name."""
    if value and str(value).endswith((".json", ".jsonl")):
        return sets("if docs/data.md has the form of its records", data__train=value)
    return missing(IMPORT) if value else nothing()


TRL = table(
    "TRL's scripts",
    same("model_name_or_path", "model.path", kind="text"),
    changed("model_revision", "model.revision", revision, "main is not written", "main"),
    changed("attn_implementation", "model.attention", attention, "sdpa, eager or flash_attention_2", None, "text"),
    many("there is none; a model is loaded in its stored dtype", "dtype torch_dtype"),
    changed("use_peft", "adapter.mode", use_peft, "lora, or else full", False),
    same("lora_r", "adapter.rank", 16),
    same("lora_alpha", "adapter.alpha", 32),
    same("lora_dropout", "adapter.dropout", 0.05),
    changed("lora_target_modules", "adapter.target_modules", modules, "a list of names, or all-linear", None, "list"),
    same("lora_modules_to_save", "adapter.modules_to_save", kind="list"),
    same("use_rslora", "adapter.rslora", False),
    same("use_dora", "adapter.dora", False),
    without("PEFT writes it into the adapter itself", lora_task_type="CAUSAL_LM"),
    many("there is none; LoRA is for linear layers", "lora_target_parameters"),
    loading_rules(),
    changed("bnb_4bit_quant_type", "", quant_type, "nf4", "nf4"),
    many(NESTED, "use_bnb_nested_quant bnb_4bit_quant_storage"),
    changed("dataset_name", "data.train", dataset, "a local file is taken; others are imported first", None, "text"),
    many(
        IMPORT, "dataset_mixture dataset_mixer dataset_splits dataset_configs datasets dataset_config dataset_streaming"
    ),
    without(IMPORT, dataset_train_split="train", dataset_test_split="test", preprocessing_num_workers=None),
    many(TEMPLATE, "chat_template tokenizer_name_or_path"),
    [
        changed(name, "", refuse(name, ()), "only given answers are trained", None, "any")
        for name in PREFERENCES.split()
    ],
    based_on=SFT,
)
