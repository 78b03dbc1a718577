"""axolotl's YAML, by its schema of July 2026."""

from collections.abc import Iterator
from typing import Any

from rawloop.translation.memory import LOADED, ONLY, OTHER, loading_rules, optimizer_rule
from rawloop.translation.rules import (
    Convert,
    Found,
    Given,
    changed,
    many,
    missing,
    nothing,
    same,
    sets,
    shared,
    switch,
    table,
)
from rawloop.translation.trainer import COMPILE, DDP, TRAINER, UPLOAD, WORKERS, WRITTEN
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.trl import SHORTENED, TEMPLATE
from rawloop.translation.values import (
    EPOCH,
    SHARE,
    as_eval,
    attention,
    datasets,
    held_out,
    modules,
    refuse,
    save_strategy,
    save_total_limit,
    schedule,
    sinks,
)

ALL_LINEAR = "all linear layers but the output layer"
KERNELS = "there is none; the model runs with the kernels of transformers"
LOSS = "there is none; the loss is plain cross-entropy"
LOGGED = "there is none; 'records.report_to' and 'records.project' are the settings of the sinks"
READ = "there is none; data are read as they are (docs/data.md), and an index is kept"
ONE_LR = "there is none; AdamW has one learning rate for all weights"
LORA_KINDS = "there is none; 'adapter.dora' and 'adapter.rslora' are the kinds of LoRA that there are"
USED = ("tensorboard", "wandb", "mlflow", "trackio", "comet")
FLAGS = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
IN_STEPS = {
    "warmup_steps": "optim.warmup_steps",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.save_every",
    "logging_steps": "train.log_every",
}
IN_EPOCHS = {"evals_per_epoch": "evaluation.every", "saves_per_epoch": "checkpoint.save_every"}
TAKEN = (  # as HF Trainer has them
    "learning_rate gradient_accumulation_steps lr_scheduler_kwargs adam_beta1 adam_beta2 adam_epsilon weight_decay "
    "max_grad_norm seed metric_for_best_model greater_is_better ddp_find_unused_parameters ddp_broadcast_buffers "
    "ddp_timeout ddp_bucket_cap_mb resume_from_checkpoint load_best_model_at_end save_only_model optim_args "
    "optim_target_modules neftune_noise_alpha torch_empty_cache_steps remove_unused_columns dataloader_num_workers "
    "dataloader_drop_last gradient_checkpointing_kwargs auto_find_batch_size local_rank deepspeed fsdp fsdp_config "
    "accelerator_config"
)

# Why there is no counterpart -> the settings, whose default is none or false.
WITHOUT = {
    LOGGED: ("wandb_name wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode"),
    SHORTENED: "sequence_len excess_length_strategy eval_sequence_len min_sample_len max_prompt_len",
    TEMPLATE: (
        "special_tokens tokens added_tokens_overrides chat_template chat_template_jinja chat_template_kwargs "
        "eot_tokens default_system_message tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy "
        "tokenizer_use_mistral_common processor_type resize_token_embeddings_to_32x fix_untrained_tokens"
    ),
    READ: (
        "dataset_prepared_path dataset_processes dataset_num_proc push_dataset_to_hub skip_prepare_dataset "
        "streaming dataset_exact_deduplication dataset_keep_in_memory shuffle_before_merging_datasets "
        "pretraining_dataset"
    ),
    "there is none; 'data.packing' packs without attention between samples": "eval_sample_packing batch_flattening",
    "there is none; a batch is padded to its longest sample": "pad_to_sequence_len pad_to_multiple_of",
    "there is none; 'train.max_frames' batches samples of similar length": "group_by_length",
    "there is none; 'train.batch_size' and 'train.accumulation' give it": "batch_size",
    "there is none; only the answers are trained": "train_on_inputs",
    "there is none; its family is told by config.json": "model_type type_of_model base_model_config model_config",
    "there is none; 'adapter.freeze' has patterns of names that are not trained": (
        "unfrozen_parameters freeze_mm_modules"
    ),
    "there is none; 'init_from' starts from the weights of an adapter": "lora_model_dir merge_lora",
    ONLY: (
        "gptq gptq_groupsize gptq_model_v1 bnb_config_kwargs loftq_config peft qat "
        "quantization quantize_moe_experts model_quantization_config model_quantization_config_kwargs fp8"
    ),
    LORA_KINDS: (
        "lora_fan_in_fan_out lora_target_parameters lora_rank_pattern lora_alpha_pattern relora lisa_n_layers "
        "peft_layers_to_transform peft_layers_pattern peft_init_lora_weights lora_on_cpu"
    ),
    KERNELS: (
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel use_kernels flash_optimum plugins "
        "flash_attn_cross_entropy flash_attn_fuse_mlp xformers_attention flex_attention sage_attention tiled_mlp "
        "experts_implementation cut_cross_entropy chunked_cross_entropy activation_offloading layer_offloading"
    ),
    ONE_LR: "loraplus_lr_ratio loraplus_lr_embedding embedding_lr embedding_lr_scale lr_groups",
    "there is none; a schedule has no further settings": (
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup"
    ),
    LOSS: "use_eaft eaft_alpha eaft_k label_smoothing_factor",
    COMPILE: "torch_compile torch_compile_backend torch_compile_mode torch_compile_options",
    DDP: (
        "fsdp_version ddp device_map world_size tensor_parallel_size context_parallel_size "
        "sequence_parallel_degree dp_shard_size dp_replicate_size expert_parallel_size use_ray max_memory "
        "gpu_memory_limit low_cpu_mem_usage"
    ),
    "'device' is auto, cuda, mps or cpu; auto chooses": "device",
    UPLOAD: "hub_model_id hub_strategy hub_revision hf_use_auth_token",
    WORKERS: "dataloader_pin_memory dataloader_prefetch_factor",
    WRITTEN: (
        "include_tokens_per_second include_tkps profiler_steps profiler_steps_start gc_steps save_first_step debug"
    ),
    "always so: weights are safetensors files": "save_safetensors",
    "there is none; a watch looks for jumps of the loss": "loss_watchdog_threshold loss_watchdog_patience",
    "always so: unknown keys are refused": "strict",
}


def adapter(value: Any, _: Given) -> Found:
    """adapter: lora, qlora, or none."""
    if not value:
        return sets("without an adapter all weights are trained", adapter__mode="full")
    if value == "qlora":
        return sets(f"{LOADED} to nf4", adapter__mode="lora", model__quantization="nf4")
    return sets(adapter__mode="lora") if value == "lora" else missing("'adapter.mode' is lora or full")


def target_linear(value: Any, values: Given) -> Found:
    """lora_target_linear."""
    if value and values["lora_target_modules"]:
        return nothing("the names of lora_target_modules are taken")
    return sets(ALL_LINEAR, adapter__target_modules=["all-linear"]) if value else nothing()


def target_modules(value: Any, values: Given) -> Found:
    """lora_target_modules."""
    return modules(value, values) if value else nothing()


def bf16(value: Any, _: Given) -> Found:
    """bf16 and bfloat16: true, false, auto or full."""
    if value == "full":
        words = "bfloat16 weights, with masters in FP32"
        return sets(words, precision__mode="bf16", precision__trainable_dtype="bf16")
    if value == "auto":
        return nothing("'precision.mode' auto takes bfloat16 where the hardware has it")
    return sets(precision__mode="bf16") if value else nothing()


def fp16(value: Any, values: Given) -> Found:
    """fp16 and float16; bf16 overrides them."""
    return sets(precision__mode="amp_fp16") if value and values["bf16"] in (None, False, "auto") else nothing()


def cadence(key: str) -> Convert:
    """Return the convert of a number of steps, which may be a share of all."""

    def convert(value: Any, _: Given) -> Found:
        return missing(SHARE.format(key)) if value and value < 1 else Found({key: int(value)} if value else {})

    return convert


def per_epoch(key: str) -> Convert:
    """Return the convert of a cadence of so many times an epoch."""
    return lambda value, _: missing(EPOCH.format(key)) if value else nothing()


def strategy(value: Any, _: Given) -> Found:
    """eval_strategy."""
    if value == "no":
        return sets(evaluation__enabled=False)
    return missing(EPOCH.format("evaluation.every")) if value == "epoch" else nothing()


def sink(value: Any, values: Given) -> Found:
    """use_tensorboard and its like, and wandb_project, which switches wandb on."""
    asked = [name for name in USED if values[f"use_{name}"] or (name == "wandb" and values["wandb_project"])]
    return sinks(asked) if value else nothing()


def wandb(value: Any, values: Given) -> Found:
    """wandb_project."""
    return Found({**sink(value, values).settings, "records.project": value}) if value else nothing()


def implied(values: Given) -> Iterator[Found]:
    """Yield what axolotl does without a setting of its own."""
    yield sets("all assistant turns are trained, as there", data__train_turns="all")
    if not values["warmup_steps"] and values["warmup_ratio"] is None:
        yield sets("3% of the steps; there at most 100 steps", optim__warmup_ratio=0.03)
    if not (values["val_set_size"] or values["test_datasets"]):
        yield sets("neither val_set_size nor test_datasets", evaluation__enabled=False)
    if values["eval_batch_size"] is None:
        yield sets("as micro_batch_size", evaluation__batch_size=values["micro_batch_size"])


AXOLOTL = table(
    "axolotl",
    shared(TRAINER, TAKEN),
    same("base_model", "model.path", kind="text"),
    same("revision_of_model", "model.revision", kind="text"),
    same("trust_remote_code", "model.trust_remote_code", kind="flag"),
    same("output_dir", "output", "./model-out"),
    changed("adapter", "adapter.mode model.quantization", adapter, "lora, qlora; without one full", None, "text"),
    same("lora_r", "adapter.rank", kind="number"),
    same("lora_alpha", "adapter.alpha", kind="number"),
    same("lora_dropout", "adapter.dropout", 0.0),
    changed("lora_target_modules", "adapter.target_modules", target_modules, "a list of names", None, "list"),
    changed("lora_target_linear", "adapter.target_modules", target_linear, "all-linear", None, "flag"),
    same("lora_modules_to_save", "adapter.modules_to_save", kind="list"),
    same("peft_use_dora", "adapter.dora", kind="flag"),
    same("peft_use_rslora", "adapter.rslora", kind="flag"),
    same("micro_batch_size", "train.batch_size", 1),
    same("eval_batch_size", "evaluation.batch_size", kind="number"),
    same("num_epochs", "train.epochs", 1.0),
    same("max_steps", "train.max_steps", kind="number"),
    shared(MORE_TRAINER, "warmup_ratio"),
    changed("lr_scheduler", "optim.schedule", schedule, "constant, linear and cosine", "cosine"),
    optimizer_rule("optimizer"),
    loading_rules()[:2],
    changed(
        "bf16", "precision.mode precision.trainable_dtype", bf16, "full: bfloat16 weights with masters", "auto", "any"
    ),
    changed("bfloat16", "precision.mode", bf16, "bf16", None, "any"),
    changed("fp16", "precision.mode", fp16, "amp_fp16; bf16 overrides it", None, "any"),
    changed("float16", "precision.mode", fp16, "amp_fp16; bf16 overrides it", None, "any"),
    changed(
        "tf32",
        "precision.tf32",
        lambda v, _: Found({"precision.tf32": True} if v is True else {}),
        "true",
        "auto",
        "any",
    ),
    changed(
        "gradient_checkpointing",
        "model.activation_checkpointing",
        switch(model__activation_checkpointing=True),
        "activations are recomputed, never moved to the host",
        False,
        "any",
    ),
    changed("attn_implementation", "model.attention", attention, "sdpa, eager or flash_attention_2", None, "text"),
    [changed(name, "model.attention", switch(model__attention=kind), kind) for name, kind in FLAGS.items()],
    changed("datasets", "data.train", datasets, "one local file is taken; others are imported first", None, "list"),
    changed(
        "test_datasets",
        "data.eval",
        as_eval(datasets),
        "one local file is taken; others are imported first",
        None,
        "list",
    ),
    changed(
        "val_set_size", "data.eval_share data.eval_by", held_out, "a share of single samples, no number of them", 0.0
    ),
    same("sample_packing", "data.packing", kind="flag"),
    [changed(name, key, cadence(key), "a number of steps", None, "number") for name, key in IN_STEPS.items()],
    [changed(name, key, per_epoch(key), "a number of steps", None, "number") for name, key in IN_EPOCHS.items()],
    [
        changed(name, "evaluation.enabled", strategy, "'evaluation.every' is a number of steps", None, "text")
        for name in ("eval_strategy", "evaluation_strategy")
    ],
    changed("save_strategy", "checkpoint.save_every", save_strategy, "a number of steps", None, "text"),
    changed("save_total_limit", "checkpoint.keep_last", save_total_limit, "the best one is not counted", 4),
    same("early_stopping_patience", "evaluation.patience", kind="number"),
    changed("wandb_project", "records.report_to records.project", wandb, "also switches wandb on", None, "text"),
    [changed(f"use_{name}", "records.report_to", sink, name) for name in USED],
    changed(
        "shuffle_merged_datasets", "data.shuffle", lambda v, _: sets(data__shuffle=bool(v)), "of every epoch", True
    ),
    changed("rl", "", refuse("rl", ()), "rawloop trains on given answers", None, "text"),
    changed("auto_resume_from_checkpoints", "resume", switch(resume="auto"), "auto"),
    [rule for words, names in WITHOUT.items() for rule in many(words, names)],
    prefixes={
        "liger_": KERNELS,
        "qgalore_": OTHER,
        "dion_": OTHER,
        "jagged_restart_": "there is none; a schedule has no further settings",
        **dict.fromkeys(("mlflow_", "comet_", "trackio_", "swanlab_", "otel_"), LOGGED),
    },
    implied=implied,
)
