"""Modes as rows of one table, the settings that choose a row, and the choice."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from rawloop.errors import UserError
from rawloop.precision.scaler import LossScaleConfig

ModeName = Literal["auto", "fp32", "bf16", "amp_fp16", "native_fp16"]


class Mode(NamedTuple):
    """One row: dtypes of trainable and frozen weights (None: as stored), of autocast (None: off), and the scaler."""

    trainable: torch.dtype
    frozen: torch.dtype | None
    autocast: torch.dtype | None
    scaler: Literal["torch", "own"] | None = None


MODES = {
    "fp32": Mode(trainable=torch.float32, frozen=torch.float32, autocast=None),
    "bf16": Mode(trainable=torch.float32, frozen=None, autocast=torch.bfloat16),
    "amp_fp16": Mode(trainable=torch.float32, frozen=None, autocast=torch.float16, scaler="torch"),
    # Trainables in float32 beside a frozen base (LoRA); where most weights train, FP16 with float32 masters.
    "native_fp16": Mode(trainable=torch.float32, frozen=torch.float16, autocast=None, scaler="own"),
}


@dataclass
class PrecisionConfig:
    """The dtype of weights and of computation.

    Args:
        mode: fp32: everything in float32, the reference. bf16: bfloat16 autocast over float32 trainables; frozen
            weights stay as stored (Ampere and later, Apple, CPU). amp_fp16: FP16 autocast over float32 trainables with
            torch's GradScaler (Volta, Turing). native_fp16: FP16 weights without autocast, with loss scaling of our
            own: a frozen base beside float32 adapters, or, in full fine-tuning, float32 masters (Turing, least memory).
            auto: on a GPU bf16 where the card computes it natively, else amp_fp16; elsewhere fp32.
        tf32: let float32 matrix products on NVIDIA GPUs round their inputs to TF32 (10 bits of mantissa). Off, so
            that fp32 means float32.
        max_skips: stop with an error after this many steps in a row whose gradients were not finite.
        loss_scale: of the FP16 modes.
    """

    mode: ModeName = "auto"
    tf32: bool = False
    max_skips: int = 25
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)

    def __post_init__(self) -> None:
        if self.max_skips < 1:
            raise UserError(f"precision.max_skips is {self.max_skips}: it must be 1 or more")
        scales = self.mode == "auto" or MODES[self.mode].scaler is not None
        if self.loss_scale != LossScaleConfig() and not scales:
            raise UserError(
                f"precision.loss_scale is set and precision.mode is '{self.mode}', which scales no loss: "
                "take it out, or choose amp_fp16 or native_fp16"
            )


def choose_mode(config: PrecisionConfig, device: torch.device) -> tuple[str, str]:
    """Return the mode for a device, and why.

    Raises:
        UserError: the device does not compute the wanted dtype natively; names the card and the modes that work.
    """
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.mode == "bf16" and not native:
        card = torch.cuda.get_device_name(device)
        raise UserError(
            f"precision.mode is 'bf16', which {card} does not compute natively: use amp_fp16, native_fp16 or fp32"
        )
    if config.mode != "auto":
        return config.mode, f"precision.mode is '{config.mode}'"
    if device.type != "cuda":
        return "fp32", f"no mode faster than fp32 is known to be safe on '{device.type}'"
    card = torch.cuda.get_device_name(device)
    if native:
        return "bf16", f"{card} computes bfloat16 natively"
    return "amp_fp16", f"{card} has no native bfloat16; FP16 autocast with a scaler trains everything"
