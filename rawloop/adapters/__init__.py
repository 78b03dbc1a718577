"""LoRA adapters, full fine-tuning, and the model's files in a checkpoint. Only this package imports PEFT."""

from typing import TYPE_CHECKING

from rawloop.lazy import importer

if TYPE_CHECKING:
    from rawloop.adapters.files import ModelFiles, copied, unwrapped, write_model
    from rawloop.adapters.fingerprint import BaseFingerprint, stored_fingerprint
    from rawloop.adapters.lora import AdapterConfig, add_adapter, count_parameters
    from rawloop.adapters.merge import base_of, load_base, merge_adapter
else:
    __getattr__ = importer(
        __name__,
        {
            "AdapterConfig": "rawloop.adapters.lora",
            "BaseFingerprint": "rawloop.adapters.fingerprint",
            "ModelFiles": "rawloop.adapters.files",
            "add_adapter": "rawloop.adapters.lora",
            "base_of": "rawloop.adapters.merge",
            "copied": "rawloop.adapters.files",
            "count_parameters": "rawloop.adapters.lora",
            "load_base": "rawloop.adapters.merge",
            "merge_adapter": "rawloop.adapters.merge",
            "stored_fingerprint": "rawloop.adapters.fingerprint",
            "unwrapped": "rawloop.adapters.files",
            "write_model": "rawloop.adapters.files",
        },
    )

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
