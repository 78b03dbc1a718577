"""HF Trainer: every field of TrainingArguments (transformers 5.24)."""

from typing import Any

from rawloop.translation.memory import OTHER, optimizer_rule, word
from rawloop.translation.rules import Found, Given, changed, missing, nothing, same, sets, switch, table, without
from rawloop.translation.values import (
    best_metric,
    best_mode,
    data_seed,
    eval_steps,
    eval_strategy,
    logging_steps,
    logging_strategy,
    project,
    report_to,
    resume,
    save_steps,
    save_strategy,
    save_total_limit,
    schedule,
    warmup_steps,
)

DDP = "there is none; several processes train by DDP, or by FSDP if 'parallel' is fsdp; torchrun starts them"
ALL_RANKS = "always so: the loss of each stream is divided by its targets over all ranks and micro-batches"
NO_LOGITS = "there is none; the evaluation sums losses and keeps no logits"
SAME_DTYPE = "there is none; the evaluation computes in the dtype of the training"
UPLOAD = "there is none; `rawloop export --push` uploads a trained model"
WORKERS = "there is none; 'data.num_workers' is the only setting of the workers"
COMPILE = "there is none; 'model.compile' is torch.compile of the blocks, in its usual mode"
WRITTEN = "there is none; rank 0 writes metrics.jsonl and events.jsonl into 'output'"
OLD = "there is none; transformers has no such setting any more"
SPECULATION = "there is none; losses are measured, and 'listen.samples' generates"


def off(value: Any, _: Given) -> Found:
    """disable_tqdm."""
    return nothing() if value is None else sets(records__progress=not value)


def max_steps(value: Any, _: Given) -> Found:
    """max_steps: -1 stands for no limit."""
    return sets(train__max_steps=max(0, int(value or 0)))


def sampling(value: Any, _: Given) -> Found:
    """train_sampling_strategy."""
    if word(value) == "sequential":
        return sets(data__shuffle=False)
    return nothing() if word(value) == "random" else missing("'train.max_frames' batches samples of similar length")


def by_strategy(value: Any, values: Given) -> Found:
    """do_eval."""
    return nothing("eval_strategy decides there, and it decides here")


def unnamed(value: Any, _: Given) -> Found:
    """run_name."""
    return nothing("a run is named by its folder, 'output'")


TRAINER = table(
    "HF Trainer",
    same("output_dir", "output", kind="text"),
    same("per_device_train_batch_size", "train.batch_size", 8),
    same("num_train_epochs", "train.epochs", 3.0),
    changed("max_steps", "train.max_steps", max_steps, "no limit is 0, not -1", -1),
    same("learning_rate", "optim.lr", 5e-5),
    changed(
        "lr_scheduler_type",
        "optim.schedule",
        schedule,
        "constant, linear and cosine; constant_with_warmup is constant, cosine_with_restarts of one cycle is cosine, "
        "polynomial of power 1 is linear",
        "linear",
    ),
    without("there is none; a schedule has no further settings", lr_scheduler_kwargs=None),
    changed(
        "warmup_steps",
        "optim.warmup_steps optim.warmup_ratio",
        warmup_steps,
        "below 1 it is a share of all steps, 'optim.warmup_ratio'",
        0,
    ),
    optimizer_rule("optim"),
    without(
        "there is none; 'optim.beta1', 'optim.beta2' and 'optim.eps' are AdamW's settings, and 'precision.masters' "
        "stochastic is bf16_stochastic_round, with 'precision.mode' and 'precision.trainable_dtype' bf16",
        optim_args=None,
    ),
    without(OTHER, optim_target_modules=None),
    same("weight_decay", "optim.weight_decay", 0.0),
    same("adam_beta1", "optim.beta1", 0.9),
    same("adam_beta2", "optim.beta2", 0.999),
    same("adam_epsilon", "optim.eps", 1e-8),
    same("gradient_accumulation_steps", "train.accumulation", 1),
    without(ALL_RANKS, average_tokens_across_devices=True),
    same("max_grad_norm", "optim.max_norm", 1.0),
    without("there is none; the loss is plain cross-entropy", label_smoothing_factor=0.0),
    changed(
        "bf16",
        "precision.mode",
        switch(precision__mode="bf16"),
        "bf16: bfloat16 autocast, trained weights in FP32; without bf16 and fp16 auto chooses by the device",
        False,
    ),
    changed(
        "fp16",
        "precision.mode",
        switch(precision__mode="amp_fp16"),
        "amp_fp16: FP16 autocast with GradScaler, trained weights in FP32",
        False,
    ),
    without(SAME_DTYPE, bf16_full_eval=False, fp16_full_eval=False),
    same("tf32", "precision.tf32", kind="flag"),
    same("activation_checkpointing", "model.activation_checkpointing", kind="flag"),
    same("gradient_checkpointing", "model.activation_checkpointing", kind="flag"),
    without(
        "there is none; activations are always recomputed without re-entrance",
        activation_checkpointing_kwargs=None,
        gradient_checkpointing_kwargs=None,
    ),
    same("torch_compile", "model.compile", False),
    same("torch_compile_backend", "model.compile_backend", kind="text"),
    without(COMPILE, torch_compile_mode=None),
    without(
        "there is none; the model runs with the kernels of transformers",
        use_liger_kernel=False,
        liger_kernel_config=None,
    ),
    without("there is none; a cache is of use only in generation", use_cache=False),
    without("there is none; embeddings get no noise", neftune_noise_alpha=None),
    without("there is none; PyTorch keeps its memory", torch_empty_cache_steps=None),
    without("there is none; 'train.rehearse' runs the costliest micro-batch before step 0", auto_find_batch_size=False),
    changed("logging_strategy", "train.log_every", logging_strategy, "'train.log_every' is a number of steps", "steps"),
    changed("logging_steps", "train.log_every", logging_steps, "a number of steps, never a share of them", 500),
    without("there is none; the first line is that of step 'train.log_every'", logging_first_step=False),
    without(WRITTEN, log_on_each_node=True, log_level="passive", log_level_replica="warning"),
    without(
        "there is none; a loss that is not finite is shown as it is, and its update is skipped",
        logging_nan_inf_filter=True,
    ),
    without("there is none; metrics.jsonl counts samples", include_num_input_tokens_seen="no"),
    changed("disable_tqdm", "records.progress", off, "'records.progress' set to false is that", None, "flag"),
    changed("report_to", "records.report_to", report_to, "tensorboard, wandb, mlflow and trackio", "none", "list"),
    changed("run_name", "output", unnamed, "a run is named by its folder, 'output'", None, "text"),
    changed("project", "records.project", project, "of trackio, as there", "huggingface"),
    without(
        "there is none; 'records.report_to' and 'records.project' are the settings of trackio",
        trackio_space_id=None,
        trackio_bucket_id=None,
        trackio_static_space_id=None,
    ),
    changed(
        "eval_strategy",
        "evaluation.enabled",
        eval_strategy,
        "'evaluation.every' is a number of steps; for no, 'evaluation.enabled' is false",
        "no",
    ),
    changed(
        "eval_steps",
        "evaluation.every",
        eval_steps,
        "a number of steps; logging_steps if it is not set",
        None,
        "number",
    ),
    without("there is none; the first evaluation is at step 0", eval_delay=0, eval_on_start=False),
    same("per_device_eval_batch_size", "evaluation.batch_size", 8),
    without(
        NO_LOGITS,
        prediction_loss_only=False,
        eval_do_concat_batches=True,
        eval_use_gather_object=False,
        eval_accumulation_steps=None,
        include_for_metrics=[],
        batch_eval_metrics=False,
    ),
    without("there is none; adapter/ or model/ of a checkpoint is the model alone", save_only_model=False),
    changed(
        "save_strategy",
        "checkpoint.save_every",
        save_strategy,
        "'checkpoint.save_every' is a number of steps; for no it is 0, and the end is saved",
        "steps",
    ),
    changed("save_steps", "checkpoint.save_every", save_steps, "a number of steps, never a share of them", 500),
    without("there is none; the folder of a run is shared, or each machine has a copy of it", save_on_each_node=False),
    changed(
        "save_total_limit",
        "checkpoint.keep_last",
        save_total_limit,
        "without it all are kept, which is 0 here; the best one is never counted",
        None,
        "number",
    ),
    without("always so: SIGTERM saves, and the run ends with exit code 75", enable_jit_checkpoint=False),
    without(
        UPLOAD,
        push_to_hub=False,
        hub_token=None,
        hub_private_repo=None,
        hub_model_id=None,
        hub_strategy="every_save",
        hub_always_push=False,
        hub_revision=None,
    ),
    without("there is none; the best model is always kept, in best/ of the run's folder", load_best_model_at_end=False),
    changed(
        "metric_for_best_model",
        "evaluation.best_metric",
        best_metric,
        "the loss is always called eval_loss",
        None,
        "text",
    ),
    changed("greater_is_better", "evaluation.best_mode", best_mode, "min or max", None, "flag"),
    without(
        "there is none; a resumed run goes on with the samples that were next, and skips none", ignore_data_skip=False
    ),
    without("there is none; a run has no callbacks", restore_callback_states_from_checkpoint=False),
    without("there is none; on a CPU a run repeats bit for bit", full_determinism=False),
    same("seed", "seed", 42),
    changed("data_seed", "seed", data_seed, "'seed' is that of the data order, too", None, "number"),
    changed("use_cpu", "device", switch(device="cpu"), "'device' set to cpu", False),
    without(DDP, accelerator_config=None, parallelism_config=None),
    without("there is none; no sample is dropped", dataloader_drop_last=False),
    same("dataloader_num_workers", "data.num_workers", 0),
    without(
        WORKERS,
        dataloader_pin_memory=True,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        dataloader_multiprocessing_context=None,
        dataloader_in_order=True,
    ),
    without(
        "there is none; keys of a record that nothing reads are counted, or refused with 'data.strict'",
        remove_unused_columns=True,
    ),
    without("there is none; what is learnt follows from the data (docs/data.md)", label_names=None),
    changed(
        "train_sampling_strategy",
        "data.shuffle",
        sampling,
        "sequential: 'data.shuffle' is false; group_by_length: 'train.max_frames' batches similar lengths",
        "random",
    ),
    without("there is none; lengths are measured", length_column_name="length"),
    same("ddp_find_unused_parameters", "ddp.find_unused_parameters", kind="flag"),
    without("there is none; DDP's own size is used", ddp_bucket_cap_mb=None),
    same("ddp_broadcast_buffers", "ddp.broadcast_buffers", kind="flag"),
    same("ddp_static_graph", "ddp.static_graph", kind="flag"),
    without("there is none; it is nccl on GPUs and gloo on CPUs", ddp_backend=None),
    without("there is none; 'ddp.timeout' is the time for a rank that neither comes nor works", ddp_timeout=1800),
    without(DDP, fsdp=None, fsdp_config=None, deepspeed=None),
    without(
        "there is none; a watch looks for numbers that go wrong (docs/debugging.md)", debug="", skip_memory_metrics=True
    ),
    without("there is none; `rawloop train` trains, `rawloop evaluate` evaluates", do_train=False, do_predict=False),
    changed("do_eval", "evaluation.enabled", by_strategy, "eval_strategy decides", False),
    changed(
        "resume_from_checkpoint",
        "resume",
        resume,
        "true is auto; a checkpoint of HF Trainer cannot be continued",
        None,
        "text",
    ),
    without("there is none; torchrun sets it", local_rank=-1),
)
