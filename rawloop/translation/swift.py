"""ms-swift's args.json (its arguments of August 2026), which has all settings of HF Trainer too."""

from collections.abc import Iterator
from typing import Any

from rawloop.translation.llama_factory import GENERATED, LOSS, PARTS, READ, finetuning
from rawloop.translation.memory import ONLY, bits
from rawloop.translation.rules import Found, Given, changed, many, nothing, same, sets, table, with_defaults, without
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.trl import SHORTENED, TEMPLATE
from rawloop.translation.values import as_eval, attention, datasets, held_out, modules, refuse

STORED = "there is none; a model is loaded in its stored dtype, and 'precision.mode' decides"


def share(value: Any, values: Given) -> Found:
    """split_dataset_ratio, which is not used beside val_dataset."""
    return nothing("val_dataset is given") if value and values["val_dataset"] else held_out(value, values)


def implied(values: Given) -> Iterator[Found]:
    """Yield what ms-swift does without a setting of its own."""
    yield sets("all assistant turns are trained, as there", data__train_turns="all")
    if not (values["split_dataset_ratio"] or values["val_dataset"]):
        yield sets("neither split_dataset_ratio nor val_dataset", evaluation__enabled=False)


SWIFT = table(
    "ms-swift",
    with_defaults(MORE_TRAINER, learning_rate=1e-4, lr_scheduler_type="cosine", gradient_checkpointing=True),
    same("model", "model.path", kind="text"),
    same("model_revision", "model.revision", kind="text"),
    changed("rlhf_type", "", refuse("rlhf_type", ()), "only given answers are trained", None, "text"),
    changed("task_type", "", refuse("task_type", ("causal_lm",)), "causal_lm; others are refused", "causal_lm"),
    changed("tuner_type", "adapter.mode", finetuning, "lora or full", "lora"),
    changed("train_type", "adapter.mode", finetuning, "lora or full", None, "text"),
    same("lora_rank", "adapter.rank", 8),
    same("lora_alpha", "adapter.alpha", 32),
    same("lora_dropout", "adapter.dropout", 0.05),
    changed("target_modules", "adapter.target_modules", modules, "a list of names, or all-linear", ["all-linear"]),
    same("modules_to_save", "adapter.modules_to_save", kind="list"),
    same("use_rslora", "adapter.rslora", False),
    same("use_dora", "adapter.dora", False),
    changed("dataset", "data.train", datasets, "one local file is taken; others are imported first", None, "list"),
    changed(
        "val_dataset",
        "data.eval",
        as_eval(datasets),
        "one local file is taken; others are imported first",
        None,
        "list",
    ),
    changed("split_dataset_ratio", "data.eval_share data.eval_by", share, "a share of single samples", 0.0),
    same("packing", "data.packing", False),
    same("dataset_shuffle", "data.shuffle", True),
    changed("attn_impl", "model.attention", attention, "sdpa, eager or flash_attention_2", None, "text"),
    without(STORED, torch_dtype=None),
    many(SHORTENED, "max_length truncation_strategy max_model_len packing_length"),
    many(TEMPLATE, "template system agent_template use_chat_template response_prefix new_special_tokens norm_bbox"),
    without(TEMPLATE, template_backend="swift", padding_side="right", add_non_thinking_prefix=True),
    many(
        READ,
        "cached_dataset cached_val_dataset streaming load_from_cache_file columns custom_dataset_info lazy_tokenize",
    ),
    without(
        READ, dataset_num_proc=1, packing_num_proc=1, shuffle_buffer_size=1000, val_dataset_shuffle=False, strict=False
    ),
    without(LOSS, loss_scale="default"),
    changed("quant_bits", "model.quantization", bits("quant_method"), "4 is nf4, 8 is int8", None, "number"),
    many(ONLY, "quant_method"),
    many(PARTS, "freeze_llm freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters"),
    without(PARTS, freeze_vit=True, freeze_aligner=True),
    without(GENERATED, max_new_tokens=64, temperature=0.0),
    many("there is none; 'init_from' starts from the weights of an adapter", "adapters"),
    based_on=MORE_TRAINER,
    implied=implied,
)
