"""HF Trainer beside TrainingArguments: sequence-to-sequence, names of older versions, arguments of callbacks."""

from rawloop.translation.memory import NAMES
from rawloop.translation.rules import changed, same, switch, table, without
from rawloop.translation.trainer import COMPILE, DDP, NO_LOGITS, SPECULATION, TRAINER, UPLOAD, WRITTEN
from rawloop.translation.values import eval_strategy, warmup_ratio

# Seq2SeqTrainingArguments, names that older versions of transformers had, and arguments of its callbacks.
MORE_TRAINER = table(
    "HF Trainer",
    without(
        SPECULATION,
        predict_with_generate=False,
        generation_max_length=None,
        generation_num_beams=None,
        generation_config=None,
    ),
    without("there is none; 'train.max_frames' batches samples of similar length", sortish_sampler=False),
    changed(
        "evaluation_strategy",
        "evaluation.enabled",
        eval_strategy,
        "'evaluation.every' is a number of steps; for no, 'evaluation.enabled' is false",
        None,
        "text",
    ),
    changed("warmup_ratio", "optim.warmup_ratio", warmup_ratio, "warmup_steps overrides it", None, "number"),
    same("early_stopping_patience", "evaluation.patience", kind="number"),
    without("there is none; every improvement counts", early_stopping_threshold=0.0),
    same("per_gpu_train_batch_size", "train.batch_size", kind="number"),
    same("per_gpu_eval_batch_size", "evaluation.batch_size", kind="number"),
    without("there is none; 'train.max_frames' batches samples of similar length", group_by_length=False),
    changed("no_cuda", "device", switch(device="cpu"), "'device' set to cpu", False),
    without("there is none; 'device' is auto, which takes an Apple GPU if there is one", use_mps_device=False),
    without(
        "there is none; continue the run in a folder with --resume auto, or delete the folder",
        overwrite_output_dir=False,
    ),
    without("there is none; TensorBoard's files lie in tensorboard/ of the run's folder, 'output'", logging_dir=None),
    without("always so: weights are safetensors files", save_safetensors=True),
    without("there is none; GradScaler and autocast are PyTorch's", half_precision_backend="auto", fp16_backend="auto"),
    without("there is none; 'precision.mode' is amp_fp16 or native_fp16", fp16_opt_level="O1"),
    changed("adafactor", "optim.name", switch(NAMES["adafactor"][1], optim__name="adafactor"), "adafactor", False),
    without(COMPILE, torchdynamo=None, jit_mode_eval=False, use_ipex=False),
    without(DDP, sharded_ddp="", fsdp_min_num_params=0, fsdp_transformer_layer_cls_to_wrap=None, mp_parameters=""),
    without(DDP, tpu_num_cores=None, tpu_metrics_debug=False, xpu_backend=None, ray_scope="last"),
    without(DDP, dispatch_batches=None, split_batches=None, distributed_state=None, deepspeed_plugin=None),
    without(UPLOAD, push_to_hub_token=None, push_to_hub_model_id=None, push_to_hub_organization=None),
    without(NO_LOGITS, include_inputs_for_metrics=False, past_index=-1),
    without(WRITTEN, include_tokens_per_second=False),
    based_on=TRAINER,
)
