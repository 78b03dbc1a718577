"""Modes as rows of one table, the settings that choose a row, and the choice."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn

from rawloop.errors import UserError
from rawloop.precision.scaler import LossScaleConfig

Name = Literal["fp32", "bf16", "amp_fp16", "native_fp16"]


class Mode(NamedTuple):
    """One row: dtypes of trained and frozen weights (None: as stored), of autocast (None: off), and the scaler.

    `trainable` are the dtypes that trained weights may have, the default first.
    """

    trainable: tuple[str, ...]
    frozen: torch.dtype | None
    autocast: torch.dtype | None
    scaler: Literal["torch", "own"] | None = None


MODES = {
    "fp32": Mode(trainable=("fp32",), frozen=torch.float32, autocast=None),
    "bf16": Mode(trainable=("fp32", "bf16"), frozen=None, autocast=torch.bfloat16),
    "amp_fp16": Mode(trainable=("fp32",), frozen=None, autocast=torch.float16, scaler="torch"),
    # Trainables in float32 beside a frozen base (LoRA); where most weights train, FP16 with float32 masters.
    "native_fp16": Mode(trainable=("fp32", "fp16"), frozen=torch.float16, autocast=None, scaler="own"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO_FALLBACK: dict[str, list[Name]] = {
    "amp_fp16": ["bf16", "fp32"],
    "native_fp16": ["amp_fp16", "fp32"],
    "bf16": ["fp32"],
    "fp32": [],
}
WHY_NOT = {
    ("amp_fp16", "fp16"): ": GradScaler refuses them (`Attempting to unscale FP16 gradients.`); mode native_fp16 "
    "trains FP16 weights, with masters",
    ("fp32", "fp16"): "; mode native_fp16 trains FP16 weights",
    ("fp32", "bf16"): "; mode bf16 can train bfloat16 weights",
}


@dataclass
class PrecisionConfig:
    """The dtype of weights and of computation.

    Args:
        mode: fp32: everything in float32, the reference. bf16: bfloat16 autocast over float32 trainables; frozen
            weights stay as stored (Ampere and later, Apple, CPU). amp_fp16: FP16 autocast over float32 trainables with
            torch's GradScaler (Volta, Turing). native_fp16: FP16 weights without autocast, with loss scaling of our
            own: a frozen base beside float32 adapters, or, in full fine-tuning, float32 masters (Turing, least memory).
            auto: by what the device computes natively, what the weights are stored in, and how many are trained.
        fallback: modes to go on in, in this order, where the mode turns out not to work; all ranks change together.
            Empty: stop with an error instead. Not set: empty for a named mode; for auto bf16 -> fp32,
            amp_fp16 -> bf16 -> fp32, native_fp16 -> amp_fp16 -> fp32.
        trainable_dtype: of trained weights. auto: fp32, but in native_fp16 fp16 where most weights are trained. bf16
            goes with mode bf16, fp16 with mode native_fp16. It holds for `mode`, not for the modes of `fallback`.
        masters: what keeps the updates that 16-bit trainables would lose. fp32: float32 masters (16 bytes per weight
            with AdamW). residual: a 16-bit residual (14 bytes). none: nothing; only with bf16 trainables, and warned
            of.
        tf32: let float32 matrix products on NVIDIA GPUs round their inputs to TF32 (10 bits of mantissa). Off, so
            that fp32 means float32.
        max_skips: give the mode up after this many steps in a row whose loss or gradients were not finite.
        max_nonfinite_losses: give it up, where another is left, after this many steps in a row whose loss itself was
            not finite: no loss scale mends that.
        loss_scale: of the FP16 modes.
    """

    mode: Literal["auto", "fp32", "bf16", "amp_fp16", "native_fp16"] = "auto"
    fallback: list[Name] | None = None
    trainable_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    masters: Literal["fp32", "residual", "none"] = "fp32"
    tf32: bool = False
    max_skips: int = 25
    max_nonfinite_losses: int = 5
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)

    def __post_init__(self) -> None:
        if self.mode not in ("auto", *MODES):
            raise UserError(f"precision.mode is '{self.mode}': it must be auto, {', '.join(MODES)}")
        for name in ("max_skips", "max_nonfinite_losses"):
            if getattr(self, name) < 1:
                raise UserError(f"precision.{name} is {getattr(self, name)}: it must be 1 or more")
        self._check_fallback()
        self._check_trainables()
        scales = self.mode == "auto" or any(MODES[mode].scaler for mode in (self.mode, *(self.fallback or [])))
        if self.loss_scale != LossScaleConfig() and not scales:
            raise UserError(
                f"precision.loss_scale is set and precision.mode is '{self.mode}', which scales no loss: "
                "take it out, or choose amp_fp16 or native_fp16"
            )

    def _check_fallback(self) -> None:
        chain = [self.mode, *(self.fallback or [])]
        wrong = [mode for mode in chain[1:] if mode not in MODES]
        if wrong:
            raise UserError(f"precision.fallback has '{wrong[0]}': it must be of {', '.join(MODES)}")
        if len(set(chain)) < len(chain):
            raise UserError(f"precision.fallback comes back to a mode ({' -> '.join(chain)}): nothing is tried twice")
        if "fp32" in chain[:-1]:
            raise UserError(f"precision.fallback goes on after fp32 ({' -> '.join(chain)}): it is the last resort")

    def _check_trainables(self) -> None:
        wanted = self.trainable_dtype
        if wanted != "auto" and self.mode == "auto":
            raise UserError(f"precision.trainable_dtype is '{wanted}' and precision.mode is 'auto': name the mode")
        if wanted != "auto" and wanted not in MODES[self.mode].trainable:
            allowed = " or ".join(MODES[self.mode].trainable)
            raise UserError(
                f"precision.trainable_dtype is '{wanted}' and precision.mode is '{self.mode}', which trains {allowed}"
                f"{WHY_NOT.get((self.mode, wanted), '')}"
            )
        if self.masters == "none" and wanted != "bf16":
            raise UserError(
                "precision.masters is 'none': FP16 weights without masters or residual lose most of their updates; "
                "only bf16 trainables go without (precision.mode bf16, precision.trainable_dtype bf16)"
            )
        if self.masters == "none" and "native_fp16" in (self.fallback or []):
            raise UserError(
                "precision.masters is 'none' and precision.fallback has native_fp16, whose FP16 weights lose most "
                "of their updates without masters: take one of them out"
            )
        if self.masters == "residual" and not self._may_train_16_bits():
            raise UserError(
                f"precision.masters is 'residual' and precision.mode is '{self.mode}' with float32 trainables, which "
                "need none: take it out, or choose native_fp16, or trainable_dtype bf16"
            )

    def _may_train_16_bits(self) -> bool:
        return self.trainable_dtype in ("bf16", "fp16") or "native_fp16" in (self.mode, *(self.fallback or []))


class Hardware(NamedTuple):
    """What a choice depends on: the kind of device (`cuda`, `mps`, `cpu`), its name, and bfloat16 done natively."""

    kind: str
    name: str
    bf16: bool


def describe(device: torch.device) -> Hardware:
    """Ask a device what it is."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", torch.cuda.get_device_name(device), bf16)
    if device.type == "mps":
        return Hardware("mps", "this Apple GPU", _multiplies_bf16(device))
    return Hardware(device.type, f"the {device.type}", True)


def _multiplies_bf16(device: torch.device) -> bool:
    """Apple GPUs learnt bfloat16 with macOS 14; before that torch raises a TypeError."""
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return bool((ones @ ones == 2).all())
    except (TypeError, RuntimeError):
        return False


class Weights(NamedTuple):
    """What a choice depends on: the model's frozen dtypes, whether most of its weights are trained, and a trained name
    that decides the dtype of the hidden states, if there is one.
    """

    frozen: set[torch.dtype]
    mostly_trained: bool
    trained_stream: str | None


def examine(model: nn.Module) -> Weights:
    """Look at a model's weights before anything is cast."""
    named = list(model.named_parameters())
    stream = stream_weights(model)
    trained = sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
    return Weights(
        frozen={p.dtype for _, p in named if not p.requires_grad and p.dtype.is_floating_point},
        mostly_trained=2 * trained > sum(parameter.numel() for _, parameter in named),
        trained_stream=next((name for name, p in named if p.requires_grad and id(p) in stream), None),
    )


def stream_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """Weights that decide the dtype of the hidden states: embeddings, and vectors such as norms, by identity.

    Models write parts of the hidden states into each other in place, so these must be of one dtype: where one of them
    is trained in float32, all of them are held in float32.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    chosen = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    chosen += [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return {id(parameter): parameter for parameter in chosen}


def choose_auto(hardware: Hardware, weights: Weights) -> tuple[Name, str]:
    """Return the mode for a device and a model, and why."""
    if hardware.kind not in ("cuda", "mps"):
        return "fp32", f"on {hardware.name} no mode is faster than fp32 everywhere"
    if hardware.bf16:
        return "bf16", f"{hardware.name} computes bfloat16 natively"
    without = f"{hardware.name} has no native bfloat16"
    if weights.mostly_trained:
        return "amp_fp16", f"{without}; most weights are trained, in float32 under FP16 autocast"
    if weights.frozen == {torch.float16} and weights.trained_stream is None:
        return "native_fp16", f"{without}; the frozen weights are stored in FP16 and the trained ones fit beside them"
    if weights.trained_stream is not None:
        return "amp_fp16", f"{without}; {weights.trained_stream} is trained, whose float32 output needs autocast"
    stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in weights.frozen))
    return "amp_fp16", f"{without}; the frozen weights are stored in {stored}, whose range FP16 may not hold"
