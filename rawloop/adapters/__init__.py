"""What of a model is trained (LoRA, or all of it), and its files. The only room that knows PEFT."""

from rawloop.adapters.files import ModelFiles, copied, unwrapped, write_model
from rawloop.adapters.fingerprint import BaseFingerprint, stored_fingerprint
from rawloop.adapters.lora import AdapterConfig, add_adapter, count_parameters
from rawloop.adapters.merge import base_of, load_base, merge_adapter

__all__ = [
    "AdapterConfig",
    "BaseFingerprint",
    "ModelFiles",
    "add_adapter",
    "base_of",
    "copied",
    "count_parameters",
    "load_base",
    "merge_adapter",
    "stored_fingerprint",
    "unwrapped",
    "write_model",
]
