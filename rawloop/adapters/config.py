"""The settings of the adapter."""

import math
from dataclasses import dataclass, field
from typing import Literal

from rawloop.errors import UserError

ALL_LINEAR = "all-linear"


@dataclass
class AdapterConfig:
    """What is trained: a LoRA adapter beside frozen weights, or the weights themselves.

    Args:
        mode: lora or full.
        rank: rank of the LoRA matrices.
        alpha: LoRA scale; updates are multiplied by alpha / rank (alpha / sqrt(rank) with rslora).
        dropout: dropout on the input of the LoRA branch.
        target_modules: names of the linear layers that get LoRA. A name matches every layer whose path ends with it,
            so `mlp.up_proj` is narrower than `up_proj`. Or the single entry all-linear.
        modules_to_save: modules trained in full beside LoRA and stored with the adapter, such as audio_lm_head.
        dora: weight-decomposed LoRA (DoRA).
        rslora: rank-stabilised scale, alpha / sqrt(rank).
        freeze: patterns (`*` matches anything) of parameter names that are not trained, such as model.embed_tokens.*
        unfreeze: patterns of parameter names that mode full trains although the model comes with them frozen, as parts
            of some models do.
    """

    mode: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    modules_to_save: list[str] = field(default_factory=list)
    dora: bool = False
    rslora: bool = False
    freeze: list[str] = field(default_factory=list)
    unfreeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("lora", "full"):
            raise UserError(f"adapter.mode is '{self.mode}': it must be lora or full")
        if self.mode == "lora" and not self.target_modules:
            raise UserError(
                "adapter.target_modules is empty: name the layers that get LoRA, or set adapter.mode to full"
            )
        if self.mode == "lora" and self.unfreeze:
            raise UserError(
                f"adapter.unfreeze is {self.unfreeze} and adapter.mode is lora, which trains LoRA and modules_to_save "
                "alone: name their modules in adapter.modules_to_save, or set adapter.mode to full"
            )
        if ALL_LINEAR in self.target_modules[1:] or self.target_modules[:-1].count(ALL_LINEAR):
            raise UserError(f"adapter.target_modules has '{ALL_LINEAR}' beside others: it must stand alone")
        if self.rank < 1:
            raise UserError(f"adapter.rank is {self.rank}: it must be 1 or more")
        if not 0.0 < self.alpha < math.inf:
            raise UserError(f"adapter.alpha is {self.alpha}: it must be above 0, or LoRA changes nothing")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"adapter.dropout is {self.dropout}: it must be at least 0 and below 1")
