"""The precision modes as rows of one table, the choice of a mode, and its fallbacks."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from rawloop.errors import UserError
from rawloop.precision.config import TRAINABLE, Name, PrecisionConfig


class Mode(NamedTuple):
    """One row: dtypes of trained weights (the default first), of frozen weights, of autocast, and the scaler.

    `frozen` is None if weights stay as stored, `autocast` is None if it is off.
    """

    trainable: tuple[str, ...]
    frozen: torch.dtype | None
    autocast: torch.dtype | None
    scaler: Literal["torch", "own"] | None = None


MODES = {
    "fp32": Mode(trainable=TRAINABLE["fp32"], frozen=torch.float32, autocast=None),
    "bf16": Mode(trainable=TRAINABLE["bf16"], frozen=None, autocast=torch.bfloat16),
    "amp_fp16": Mode(trainable=TRAINABLE["amp_fp16"], frozen=None, autocast=torch.float16, scaler="torch"),
    # LoRA trains float32 weights beside the FP16 base; if most weights train, they are FP16 with float32 masters.
    "native_fp16": Mode(trainable=TRAINABLE["native_fp16"], frozen=torch.float16, autocast=None, scaler="own"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO_FALLBACK: dict[str, list[Name]] = {
    "amp_fp16": ["bf16", "fp32"],
    "native_fp16": ["amp_fp16", "fp32"],
    "bf16": ["fp32"],
    "fp32": [],
}


class Autocast(AbstractContextManager[None]):
    """Autocast to the dtype of the mode that is in use when it is entered.

    A loop may keep it in a variable and enter it for every pass; torch's own would stay in the old mode after a
    fallback, without a word.
    """

    def __init__(self, mode: Callable[[], Mode], device_type: str) -> None:
        self.mode, self.device_type = mode, device_type
        self._entered: list[torch.autocast | None] = []

    def __enter__(self) -> None:
        dtype = self.mode().autocast
        context = None if dtype is None else torch.autocast(self.device_type, dtype=dtype)
        if context is not None:
            context.__enter__()  # type: ignore[no-untyped-call]
        self._entered.append(context)

    def __exit__(self, *error: Any) -> None:
        context = self._entered.pop()
        if context is not None:
            context.__exit__(*error)


class Hardware(NamedTuple):
    """A device: its type (`cuda`, `mps`, `cpu`), its name, and whether it computes bfloat16 natively."""

    kind: str
    name: str
    bf16: bool


def describe(device: torch.device) -> Hardware:
    """Return the hardware of a device."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", torch.cuda.get_device_name(device), bf16)
    if device.type == "mps":
        return Hardware("mps", "this Apple GPU", torch.backends.mps.is_macos_or_newer(14, 0))
    return Hardware(device.type, f"the {device.type}", True)


class Weights(NamedTuple):
    """A model's weights: the dtypes of frozen ones, whether most are trained, and the first trained stream weight."""

    frozen: set[torch.dtype]
    mostly_trained: bool
    trained_stream: str | None


def examine(model: nn.Module) -> Weights:
    """Return the properties of a model's weights that the mode depends on. Call it before weights are cast."""
    named = list(model.named_parameters())
    stream = stream_weights(model)
    trained = sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
    return Weights(
        frozen={p.dtype for _, p in named if not p.requires_grad and p.dtype.is_floating_point},
        mostly_trained=2 * trained > sum(parameter.numel() for _, parameter in named),
        trained_stream=next((name for name, p in named if p.requires_grad and id(p) in stream), None),
    )


def stream_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """Return the weights that set the dtype of the hidden states, by id: embeddings, and vectors such as norms.

    Models write parts of the hidden states into each other in place, so these weights must share one dtype: if one is
    trained in float32, all are kept in float32.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    chosen = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    chosen += [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return {id(parameter): parameter for parameter in chosen}


def choose_auto(hardware: Hardware, weights: Weights) -> tuple[Name, str]:
    """Return the mode for a device and a model, and the reason."""
    if hardware.kind not in ("cuda", "mps"):
        return "fp32", f"on {hardware.name} no mode is faster than fp32 everywhere"
    if hardware.bf16:
        return "bf16", f"{hardware.name} computes bfloat16 natively"
    without = f"{hardware.name} has no native bfloat16"
    if weights.mostly_trained:
        return "amp_fp16", f"{without}; most weights are trained, in float32 under FP16 autocast"
    if weights.trained_stream is not None:
        return "amp_fp16", f"{without}; {weights.trained_stream} is trained, whose float32 output needs autocast"
    if weights.frozen == {torch.float16}:
        return "native_fp16", f"{without}; the frozen weights are stored in FP16 and the trained ones fit beside them"
    stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in weights.frozen))
    return "amp_fp16", f"{without}; the frozen weights are stored in {stored}, whose range FP16 may not hold"


class OtherMode(UserError):
    """A checkpoint was trained in another mode than that of the run."""


def other_mode(then: str, now: str) -> OtherMode:
    """Return the error for a checkpoint of the mode `then` in a run of the mode `now`."""
    return OtherMode(
        f"the checkpoint was trained with precision.mode '{then}', this run has '{now}': resume with --precision.mode "
        f"{then}, or start another run from these weights with --init_from CHECKPOINT --output NEW"
    )


class ModeChain:
    """The current mode (`name`) and its `reason`, the fallbacks that `remaining` lists, and the `history` of changes.

    Args:
        config: the requested mode and its fallbacks.
        hardware: the device.
        resume: the policy's state in the checkpoint to resume from; the run continues in the mode of that state.

    Raises:
        UserError: the hardware computes neither the mode nor a fallback natively.
        OtherMode: `resume` was trained in neither the mode nor a fallback.
    """

    def __init__(self, config: PrecisionConfig, hardware: Hardware, resume: Mapping[str, Any] | None = None) -> None:
        self.config, self.hardware = config, hardware
        self.name: str = config.mode
        self.reason = f"precision.mode is '{config.mode}'"
        self.remaining: list[Name] = list(config.fallback or [])
        self.history: list[dict[str, Any]] = []
        why = f"{hardware.name} does not compute {self.name} natively"
        if not self._is_native(self.name) and not self.advance(why):
            raise UserError(
                f"precision.mode is '{config.mode}', which {hardware.name} does not compute natively: "
                f"use one of {self.modes_that_work()}, or name them in precision.fallback"
            )
        if resume is None or resume["mode"] not in MODES:  # an unknown mode is damage: loading the state reports it
            return
        if resume["history"]:
            self._resume(resume)
        # `auto` is resolved later, and a fallback may follow: loading the state compares again.
        if self.name != "auto" and resume["mode"] not in (self.name, *self.remaining):
            raise other_mode(resume["mode"], self.name)

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Continue in the mode that a run fell back to, if the config names that mode or the run's first mode."""
        mode, first = state["mode"], state["history"][0]["from"]
        if self.name not in ("auto", mode, first):
            return
        if not self._is_native(mode):
            raise UserError(
                f"the checkpoint was trained in {mode}, which {self.hardware.name} does not compute natively: resume "
                f"it on the hardware that trained it, or start a run in one of {self.modes_that_work()}"
            )
        self.history = list(state["history"])
        if self.name == mode:
            return
        if self.name == "auto" and self.config.fallback is None:
            self.remaining = AUTO_FALLBACK[first]
        self.remaining = self._after(mode) if mode in self.remaining else []
        self.name, self.reason = mode, state["reason"]

    def _is_native(self, mode: str) -> bool:
        return mode != "bf16" or self.hardware.bf16

    def _after(self, mode: str) -> list[Name]:
        """Return the remaining modes after one of them: no mode is tried twice."""
        names: list[str] = list(self.remaining)
        return self.remaining[names.index(mode) + 1 :]

    def modes_that_work(self) -> str:
        """Return the names of the other modes that the hardware computes natively, for messages."""
        return ", ".join(name for name in MODES if self._is_native(name) and name != self.name)

    def resolve_auto(self, weights: Weights) -> None:
        """Replace `auto` by the mode for this hardware and these weights."""
        if self.name != "auto":
            return
        self.name, why = choose_auto(self.hardware, weights)
        self.reason = f"precision.mode is 'auto': {why}"
        if self.config.fallback is None:
            self.remaining = list(AUTO_FALLBACK[self.name])
        elif self.name in self.remaining:
            self.remaining = self._after(self.name)
        elif self.name == "fp32":  # the last resort
            self.remaining = []

    def advance(self, why: str, entered: bool = False) -> bool:
        """Switch to the next mode that the hardware computes natively. Return False if none is left.

        Args:
            why: the reason, for the user.
            entered: whether the old mode has cast the model: a resumed run must round its weights in the same way.
        """
        name = next((mode for mode in self.remaining if self._is_native(mode)), None)
        if name is None:
            return False
        self.history.append({"from": self.name, "to": name, "reason": why, "entered": entered})
        self.remaining = self._after(name)
        self.name, self.reason = name, f"fell back from {self.name}: {why}"
        return True

    def trail(self) -> str:
        """Return all modes so far: `amp_fp16 -> bf16`."""
        return " -> ".join([*(step["from"] for step in self.history), self.name])
