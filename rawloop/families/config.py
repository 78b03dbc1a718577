"""The settings of the model: which one is trained, and how it is loaded."""

import math
from dataclasses import dataclass, field
from datetime import datetime
from os.path import expanduser
from typing import Literal

from rawloop.errors import UserError


@dataclass
class ModelConfig:
    """The model to fine-tune.

    Args:
        path: folder written by `save_pretrained`, or a hub id such as bosonai/higgs-audio-v2-generation-3B-base. Your
            own family may read it differently.
        family: `auto` reads it from the checkpoint's config.json; or a name (higgs_audio_v2, causal_lm, audio_chat); or
            your own as `package.module:Class`.
        codec: folder or hub id of the audio codec. Default: the one that the checkpoint's processor names.
        revision: commit or tag of the hub repository; pin it, hub files change.
        stream_weights: weight of each stream's mean loss, such as {audio: 1.0, text: 1.0}; causal_lm has text alone. A
            weight of 0 leaves the stream out, head included.
        attention: attention implementation of transformers (sdpa, eager, flash_attention_2).
        compile: compile each of the model's repeated blocks by torch.compile. Training only.
        compile_backend: of torch.compile: inductor, or aot_eager, which generates no code.
        activation_checkpointing: recompute activations in the backward pass: less memory, a third more time; with LoRA
            half more.
        quantization: quantise the frozen linear layers beside which LoRA trains (QLoRA): nf4 takes 4.5 bits a weight
            and needs bitsandbytes, int8 takes 8. Heads and embeddings stay. null: as stored.
        trust_remote_code: for your own families: whether they may run the checkpoint's Python code. rawloop's families
            never run any. Only for checkpoints that you trust.
        template_date: date, or date and time, such as 2024-07-26, that chat templates get as the current time.
    """

    path: str = ""
    family: str = "auto"
    codec: str | None = None
    revision: str | None = None
    stream_weights: dict[str, float] = field(default_factory=dict)
    attention: str = "sdpa"
    compile: bool = False
    compile_backend: str = "inductor"
    activation_checkpointing: bool = False
    quantization: Literal["nf4", "int8"] | None = None
    trust_remote_code: bool = False
    template_date: str = "2024-07-26"

    def __post_init__(self) -> None:
        self.path = expanduser(self.path)  # transformers knows no ~
        self.codec = expanduser(self.codec) if self.codec else self.codec
        if self.quantization not in (None, "nf4", "int8"):
            raise UserError(f"model.quantization is '{self.quantization}': it must be nf4 or int8, or left out")
        try:
            datetime.fromisoformat(self.template_date)
        except (TypeError, ValueError):
            raise UserError(
                f"model.template_date is '{self.template_date}': it must be a date such as 2024-07-26, or one with a "
                "time, 2024-07-26T09:00:00"
            ) from None
        for stream, weight in self.stream_weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"model.stream_weights.{stream} is {weight}: it must be a number, and not below 0")
