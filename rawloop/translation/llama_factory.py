"""LLaMA-Factory's YAML, or JSON (its arguments of August 2026). It has all settings of HF Trainer too."""

from collections.abc import Iterator
from typing import Any

from rawloop.translation.memory import NAMES, NESTED, ONLY, OTHER, bits, quant_type
from rawloop.translation.rules import (
    Found,
    Given,
    changed,
    many,
    missing,
    nothing,
    same,
    sets,
    switch,
    table,
    without,
)
from rawloop.translation.trainer import UPLOAD, WRITTEN
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.trl import SHORTENED, TEMPLATE
from rawloop.translation.values import as_eval, attention, datasets, held_out, names, refuse, revision

KERNELS = "there is none; the model runs with the kernels of transformers"
LOSS = "there is none; the loss is plain cross-entropy"
READ = "there is none; data are read as they are (docs/data.md), and an index is kept"
GENERATED = "there is none; `rawloop generate` and 'listen.samples' generate"
LORA_START = "there is none; A starts as PEFT's default, B at zero"
PARTS = "there is none; 'adapter.freeze' has patterns of names that are not trained"


def finetuning(value: Any, _: Given) -> Found:
    """finetuning_type."""
    if value in ("lora", "full"):
        return sets(adapter__mode=value)
    return missing("'adapter.mode' is lora or full; 'adapter.freeze' has patterns of names that are not trained")


def alpha(value: Any, values: Given) -> Found:
    """lora_alpha: twice the rank, if it is not given."""
    return sets("" if value else "twice the rank", adapter__alpha=value or 2 * values["lora_rank"])


def target(value: Any, values: Given) -> Found:
    """lora_target: names with commas, or all."""
    if value in ("all", ["all"]):
        return sets("all linear layers but the output layer", adapter__target_modules=["all-linear"])
    return sets(adapter__target_modules=names(value, values)) if value else nothing()


def saved(value: Any, values: Given) -> Found:
    """additional_target."""
    return sets(adapter__modules_to_save=names(value, values)) if value else nothing()


def data_names(value: Any, values: Given) -> Found:
    """dataset: names in dataset_info.json, which a file here does not have."""
    found = datasets(names(value, values), values)
    if found.settings or not value:
        return found
    return missing(f"its names stand in dataset_info.json: name their files; {found.words}")


def history(value: Any, _: Given) -> Found:
    """mask_history."""
    return sets("" if value else "all assistant turns are trained", data__train_turns="last" if value else "all")


def off(value: Any, _: Given) -> Found:
    """disable_gradient_checkpointing."""
    return sets("on by default there", model__activation_checkpointing=not value)


def decided(value: Any, _: Given) -> Found:
    """gradient_checkpointing."""
    return nothing("disable_gradient_checkpointing decides there")


def implied(values: Given) -> Iterator[Found]:
    """Yield what LLaMA-Factory does without a setting of its own."""
    if not (values["val_size"] or values["eval_dataset"]):
        yield sets("neither val_size nor eval_dataset", evaluation__enabled=False)


LLAMA_FACTORY = table(
    "LLaMA-Factory",
    same("model_name_or_path", "model.path", kind="text"),
    changed("model_revision", "model.revision", revision, "main is not written", "main"),
    same("trust_remote_code", "model.trust_remote_code", False),
    changed("stage", "", refuse("stage", ("sft", "pt")), "sft or pt; other stages are refused", "sft"),
    changed("finetuning_type", "adapter.mode", finetuning, "lora or full", "lora"),
    same("lora_rank", "adapter.rank", 8),
    changed("lora_alpha", "adapter.alpha", alpha, "twice the rank if it is not given", None, "number"),
    same("lora_dropout", "adapter.dropout", 0.0),
    changed("lora_target", "adapter.target_modules", target, "a list; all is all-linear", "all", "list"),
    changed("additional_target", "adapter.modules_to_save", saved, "a list", None, "list"),
    same("use_rslora", "adapter.rslora", False),
    same("use_dora", "adapter.dora", False),
    changed("dataset", "data.train", data_names, "one local file is taken; others are imported first", None, "list"),
    changed(
        "eval_dataset",
        "data.eval",
        as_eval(data_names),
        "one local file is taken; others are imported first",
        None,
        "list",
    ),
    changed("val_size", "data.eval_share data.eval_by", held_out, "a share of single samples, no number of them", 0.0),
    changed("mask_history", "data.train_turns", history, "last, or else all", False),
    same("packing", "data.packing", kind="flag"),
    changed("neat_packing", "data.packing", switch(data__packing=True), "true", False),
    changed("disable_shuffling", "data.shuffle", switch(data__shuffle=False), "false", False),
    changed("flash_attn", "model.attention", attention, "sdpa, eager or flash_attention_2; auto is sdpa", "auto"),
    changed(
        "disable_gradient_checkpointing", "model.activation_checkpointing", off, "true, if it is not disabled", False
    ),
    changed("gradient_checkpointing", "", decided, "disable_gradient_checkpointing decides", None, "flag"),
    changed(
        "pure_bf16",
        "precision.mode precision.trainable_dtype",
        switch("bfloat16 weights, with masters in FP32", precision__mode="bf16", precision__trainable_dtype="bf16"),
        "bfloat16 weights with masters",
        False,
    ),
    changed(
        "early_stopping_steps",
        "evaluation.patience",
        lambda v, _: Found({"evaluation.patience": int(v)} if v else {}),
        "evaluations without a better loss",
        None,
        "number",
    ),
    without(SHORTENED, cutoff_len=2048),
    many(
        TEMPLATE,
        "template tool_format default_system add_tokens add_special_tokens new_special_tokens_config resize_vocab",
    ),
    without(
        TEMPLATE, enable_thinking=True, preserve_thinking=False, use_fast_tokenizer=True, split_special_tokens=False
    ),
    without(TEMPLATE, init_special_tokens="noise_init"),
    without(READ, dataset_dir="data", mix_strategy="concat", buffer_size=16384, preprocessing_batch_size=1000),
    many(READ, "media_dir streaming interleave_probs overwrite_cache preprocessing_num_workers tokenized_path"),
    many(READ, "data_shared_file_system cache_dir eval_on_each_dataset"),
    many("there is none; cut the data file to the samples that are wanted", "max_samples"),
    many("there is none; only the answers are trained", "train_on_prompt"),
    without("always so: padding is no target", ignore_pad_token_for_loss=True),
    many(
        "there is none; 'init_from' starts from the weights of an adapter",
        "adapter_name_or_path adapter_folder create_new_adapter",
    ),
    changed(
        "quantization_bit", "model.quantization", bits("quantization_method"), "4 is nf4, 8 is int8", None, "number"
    ),
    without(ONLY, quantization_method="bnb", quantization_device_map=None),
    changed("quantization_type", "", quant_type, "nf4", "nf4"),
    without(NESTED, double_quantization=True),
    many(
        KERNELS,
        "enable_liger_kernel use_unsloth use_unsloth_gc shift_attn mixture_of_depths use_v1_kernels upcast_layernorm",
    ),
    many(KERNELS, "upcast_lmhead_output rope_scaling use_kt fp8 fp8_enable_fsdp_float8_all_gather"),
    without(KERNELS, use_reentrant_gc=True, fp8_backend="auto", low_cpu_mem_usage=True, use_kv_cache=True),
    many(LOSS, "moe_aux_loss_coef use_dft_loss use_asft_loss use_eaft_loss"),
    changed("use_muon", "optim.name", switch(NAMES["muon"][1], optim__name="muon"), "muon", False),
    many(OTHER, "use_galore use_apollo use_badam use_adam_mini loraplus_lr_ratio"),
    without(OTHER, loraplus_lr_embedding=1e-6),
    many(LORA_START, "pissa_init pissa_convert train_from_scratch"),
    without(LORA_START, pissa_iter=16),
    many(PARTS, "freeze_extra_modules freeze_language_model use_llama_pro"),
    without(PARTS, freeze_trainable_layers=2, freeze_trainable_modules="all", freeze_vision_tower=True),
    without(PARTS, freeze_multi_modal_projector=True),
    many(UPLOAD, "hf_hub_token ms_hub_token om_hub_token export_dir"),
    many("there is none; `rawloop report` draws the curves", "plot_loss compute_accuracy"),
    many(WRITTEN, "include_effective_tokens_per_second print_param_status enable_torch_profiler profile_modules"),
    without(GENERATED, do_sample=True, temperature=0.95, top_p=0.7, top_k=50, num_beams=1, max_length=1024),
    without(GENERATED, max_new_tokens=1024, repetition_penalty=1.0, length_penalty=1.0, infer_backend="hf"),
    many(
        "there is none; torchrun starts the processes",
        "use_ray ray_num_workers ray_init_kwargs master_addr master_port",
    ),
    based_on=MORE_TRAINER,
    prefixes={
        **dict.fromkeys(("pref_", "kto_", "ppo_", "dpo_", "ref_model", "reward_model", "simpo_"), LOSS),
        **dict.fromkeys(("galore_", "apollo_", "badam_"), OTHER),
        **dict.fromkeys(("image_", "video_"), "there is none; no family reads pictures"),
        **dict.fromkeys(("vllm_", "sglang_"), GENERATED),
        "swanlab_": "there is none; 'records.report_to' has no swanlab",
        "profiler_": WRITTEN,
    },
    implied=implied,
)
