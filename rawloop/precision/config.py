"""The settings of precision: the mode, its fallbacks, and the loss scale."""

from dataclasses import dataclass, field
from typing import Literal

from rawloop.errors import UserError

Name = Literal["fp32", "bf16", "amp_fp16", "native_fp16"]

# The dtypes that trained weights may have in each mode, the default first.
TRAINABLE: dict[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "bf16": ("fp32", "bf16"),
    "amp_fp16": ("fp32",),
    "native_fp16": ("fp32", "fp16"),
}
SCALED = ("amp_fp16", "native_fp16")  # modes with a loss scaler
WHY_NOT = {
    ("amp_fp16", "fp16"): ": GradScaler refuses them (`Attempting to unscale FP16 gradients.`); mode native_fp16 "
    "trains FP16 weights, with masters",
    ("fp32", "fp16"): "; mode native_fp16 trains FP16 weights",
    ("fp32", "bf16"): "; mode bf16 can train bfloat16 weights",
}


@dataclass
class LossScaleConfig:
    """Dynamic loss scaling, for FP16 modes only.

    Args:
        init: the first scale. An FP16 loss can be multiplied by 2^15 at most.
        floor: the smallest scale; a step that is not finite at the floor is counted and skipped.
        ceiling: the largest scale.
        growth_interval: double the scale after this many good steps in a row.
        hysteresis: halve the scale at the n-th step in a row that is not finite.
    """

    init: float = 2.0**15
    floor: float = 1.0
    ceiling: float = 2.0**24
    growth_interval: int = 2000
    hysteresis: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.init <= self.ceiling:
            raise UserError(
                f"precision.loss_scale needs 0 < floor <= init <= ceiling: they are {self.floor:g}, {self.init:g} and "
                f"{self.ceiling:g}"
            )
        if self.growth_interval < 1 or self.hysteresis < 1:
            raise UserError(
                f"precision.loss_scale.growth_interval ({self.growth_interval}) and hysteresis ({self.hysteresis}) "
                "must be 1 or more"
            )


@dataclass
class PrecisionConfig:
    """The dtype of weights and of computation.

    Args:
        mode: dtype of computation and weights. auto: chosen by device, stored dtype and number of trained weights.
            fp32: everything in float32, the reference. bf16: bfloat16 autocast with float32 trainables (Ampere and
            later, Apple, CPU). amp_fp16: FP16 autocast with float32 trainables and torch's GradScaler (Volta, Turing).
            native_fp16: FP16 weights without autocast, with rawloop's loss scaler: a frozen base beside float32
            adapters, or, in full fine-tuning, float32 masters (Turing, least memory).
        fallback: modes to switch to, in this order, if the mode does not work; all ranks switch together. Empty: stop
            with an error. Not set: empty for a named mode; for auto bf16 -> fp32, amp_fp16 -> bf16 -> fp32,
            native_fp16 -> amp_fp16 -> fp32.
        trainable_dtype: dtype of trained weights. auto: fp32, or fp16 in native_fp16 if most weights are trained. bf16
            needs mode bf16, fp16 needs mode native_fp16. It applies to `mode`, not to `fallback`.
        masters: fp32: keep a float32 master of each 16-bit trainable, so that rounding loses no update (16 bytes per
            weight with AdamW). stochastic: keep no masters; each update is computed in float32 and rounded
            stochastically, so that none is lost in the mean (12 bytes). none: keep no masters and round to nearest,
            which loses most small updates, with a warning. The last two are for bf16 trainables only.
        tf32: let float32 matrix products on NVIDIA GPUs round their inputs to TF32 (10 bits of mantissa).
        max_skips: leave the mode after this many steps in a row with a loss or gradients that are not finite.
        max_nonfinite_losses: leave the mode for a fallback after this many steps in a row with a loss that is not
            finite: no loss scale helps.
        loss_scale: loss scaling in the FP16 modes.
    """

    mode: Literal["auto", "fp32", "bf16", "amp_fp16", "native_fp16"] = "auto"
    fallback: list[Name] | None = None
    trainable_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    masters: Literal["fp32", "stochastic", "none"] = "fp32"
    tf32: bool = False
    max_skips: int = 25
    max_nonfinite_losses: int = 5
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)

    def __post_init__(self) -> None:
        if self.mode not in ("auto", *TRAINABLE):
            raise UserError(f"precision.mode is '{self.mode}': it must be auto, {', '.join(TRAINABLE)}")
        for name in ("max_skips", "max_nonfinite_losses"):
            if getattr(self, name) < 1:
                raise UserError(f"precision.{name} is {getattr(self, name)}: it must be 1 or more")
        self._check_fallback()
        self._check_trainables()
        scales = self.mode == "auto" or any(mode in SCALED for mode in (self.mode, *(self.fallback or [])))
        if self.loss_scale != LossScaleConfig() and not scales:
            raise UserError(
                f"precision.loss_scale is set and precision.mode is '{self.mode}', which scales no loss: "
                "remove it, or choose amp_fp16 or native_fp16"
            )

    def _check_fallback(self) -> None:
        chain = [self.mode, *(self.fallback or [])]
        wrong = [mode for mode in chain[1:] if mode not in TRAINABLE]
        if wrong:
            raise UserError(f"precision.fallback has '{wrong[0]}': it must be one of {', '.join(TRAINABLE)}")
        if len(set(chain)) < len(chain):
            raise UserError(f"precision.fallback repeats a mode ({' -> '.join(chain)}): no mode is tried twice")
        if "fp32" in chain[:-1]:
            raise UserError(f"precision.fallback continues after fp32 ({' -> '.join(chain)}): fp32 must be last")

    def _check_trainables(self) -> None:
        wanted = self.trainable_dtype
        if wanted != "auto" and self.mode == "auto":
            raise UserError(f"precision.trainable_dtype is '{wanted}' and precision.mode is 'auto': name the mode")
        if wanted != "auto" and wanted not in TRAINABLE[self.mode]:
            allowed = " or ".join(TRAINABLE[self.mode])
            raise UserError(
                f"precision.trainable_dtype is '{wanted}' and precision.mode is '{self.mode}', which trains {allowed}"
                f"{WHY_NOT.get((self.mode, wanted), '')}"
            )
        if self.masters not in ("fp32", "stochastic", "none"):
            raise UserError(
                f"precision.masters is '{self.masters}': it must be fp32, stochastic or none; where it was residual "
                "(14 bytes per weight with AdamW), use fp32 (16 bytes)"
            )
        if self.masters == "stochastic" and wanted != "bf16":
            raise UserError(
                f"precision.masters is 'stochastic' and precision.trainable_dtype is '{wanted}': only updates of bf16 "
                "trainables are rounded stochastically; set precision.mode and precision.trainable_dtype to bf16, or "
                "leave masters out"
            )
        if self.masters == "none" and wanted != "bf16":
            raise UserError(
                "precision.masters is 'none': FP16 weights without masters lose most of their updates; "
                "only bf16 trainables go without (precision.mode bf16, precision.trainable_dtype bf16)"
            )
        if self.masters != "fp32" and "native_fp16" in (self.fallback or []):
            raise UserError(
                f"precision.masters is '{self.masters}' and precision.fallback has native_fp16, whose FP16 weights "
                "lose most of their updates without masters: remove one of them"
            )
