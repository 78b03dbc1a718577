"""PEFT: every field of LoraConfig (0.21)."""

from typing import Any

from rawloop.translation.rules import Found, Given, changed, missing, nothing, same, table, without
from rawloop.translation.values import modules

PATTERNS = "there is none; all layers of 'adapter.target_modules' have one rank and one alpha"
START = "there is none; A starts as PEFT's default, B at zero"
KINDS = "there is none; 'adapter.dora' and 'adapter.rslora' are the kinds of LoRA that there are"
NAMED = "there is none; a name in 'adapter.target_modules' may be a longer path, such as layers.3.self_attn.q_proj"
ITSELF = "PEFT writes it into the adapter itself"


def start(value: Any, _: Given) -> Found:
    """init_lora_weights."""
    return nothing() if value is True else missing(START)


def bias(value: Any, _: Given) -> Found:
    """Bias."""
    return nothing() if value == "none" else missing("there is none; biases are not trained beside LoRA")


LORA = table(
    "PEFT's LoraConfig",
    same("r", "adapter.rank", 8),
    same("lora_alpha", "adapter.alpha", 8),
    same("lora_dropout", "adapter.dropout", 0.0),
    changed(
        "target_modules",
        "adapter.target_modules",
        modules,
        "a list of names, or all-linear; no regular expression",
        None,
        "list",
    ),
    same("modules_to_save", "adapter.modules_to_save", kind="list"),
    same("use_dora", "adapter.dora", False),
    same("use_rslora", "adapter.rslora", False),
    same("base_model_name_or_path", "model.path", kind="text"),
    same("revision", "model.revision", kind="text"),
    changed("init_lora_weights", "", start, "A starts as PEFT's default, B at zero", True, "any"),
    changed("bias", "", bias, "biases are not trained beside LoRA", "none"),
    without(ITSELF, task_type=None, peft_type=None, auto_mapping=None, peft_version=None, inference_mode=False),
    without("there is none; it is read from the layers", fan_in_fan_out=False),
    without(NAMED, exclude_modules=None, layers_to_transform=None, layers_pattern=None),
    without(PATTERNS, rank_pattern={}, alpha_pattern={}),
    without("there is none; each process has the whole model", megatron_config=None, megatron_core="megatron.core"),
    without(
        "there is none; 'adapter.modules_to_save' trains whole modules",
        trainable_token_indices=None,
        ensure_weight_tying=False,
    ),
    without("there is none; LoRA is for linear layers", target_parameters=None, layer_replication=None),
    without(
        "there is none; 'model.quantization' rounds the base as it is",
        loftq_config={},
        use_qalora=False,
        qalora_group_size=16,
    ),
    without(START, eva_config=None, corda_config=None, lora_ga_config=None, kasa_config=None),
    without(KINDS, velora_config=None, monteclora_config=None, use_bdlora=None, arrow_config=None),
    without(KINDS, alora_invocation_tokens=None, lora_bias=False, runtime_config={"ephemeral_gpu_offload": False}),
)
