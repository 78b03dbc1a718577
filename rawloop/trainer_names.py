"""What HF Trainer and PEFT call a setting, and which key it is here: for people who come from them. Needs no torch."""

from types import MappingProxyType

# Names of HF Trainer and PEFT -> the key here.
HF_NAMES = MappingProxyType(
    {
        "bf16": "precision.mode",
        "data_seed": "seed",
        "do_eval": "evaluation.enabled",
        "early_stopping_patience": "evaluation.patience",
        "eval_steps": "evaluation.every",
        "fp16": "precision.mode",
        "gradient_accumulation_steps": "train.accumulation",
        "gradient_checkpointing": "model.activation_checkpointing",
        "group_by_length": "train.max_frames",
        "greater_is_better": "evaluation.best_mode",
        "learning_rate": "optim.lr",
        "logging_steps": "train.log_every",
        "lora_alpha": "adapter.alpha",
        "lora_dropout": "adapter.dropout",
        "lora_r": "adapter.rank",
        "lr_scheduler_type": "optim.schedule",
        "max_grad_norm": "optim.max_norm",
        "metric_for_best_model": "evaluation.best_metric",
        "num_train_epochs": "train.epochs",
        "output_dir": "output",
        "per_device_eval_batch_size": "evaluation.batch_size",
        "per_device_train_batch_size": "train.batch_size",
        "resume_from_checkpoint": "resume",
        "run_name": "output",
        "save_steps": "checkpoint.save_every",
        "save_total_limit": "checkpoint.keep_last",
    }
)
# Names of HF Trainer -> why there is no such key here.
NO_COUNTERPART = MappingProxyType(
    {
        "deepspeed": "there is none; several processes train by DDP, which torchrun starts",
        "disable_tqdm": "'records.progress' set to false is that",
        "eval_strategy": "'evaluation.every' is a number of steps",
        "evaluation_strategy": "'evaluation.every' is a number of steps",
        "fsdp": "there is none; several processes train by DDP, which torchrun starts",
        "ignore_data_skip": "there is none; a resumed run goes on with the samples that were next, and skips none",
        "load_best_model_at_end": "there is none; the best model is always kept, in best/ of the run's folder",
        "logging_dir": "there is none; TensorBoard's files lie in tensorboard/ of the run's folder, 'output'",
        "logging_strategy": "'train.log_every' is a number of steps",
        "overwrite_output_dir": "there is none; continue the run in a folder with --resume auto, or delete the folder",
        "save_only_model": "there is none; adapter/ or model/ of a checkpoint is the model alone",
        "save_strategy": "'checkpoint.save_every' is a number of steps",
    }
)
