"""Modes as rows of one table, the settings that choose a row, and the choice."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from rawloop.errors import UserError
from rawloop.precision.config import TRAINABLE, Name, PrecisionConfig


class Mode(NamedTuple):
    """One row: dtypes of trained and frozen weights (None: as stored), of autocast (None: off), and the scaler.

    `trainable` are the dtypes that trained weights may have, the default first.
    """

    trainable: tuple[str, ...]
    frozen: torch.dtype | None
    autocast: torch.dtype | None
    scaler: Literal["torch", "own"] | None = None


MODES = {
    "fp32": Mode(trainable=TRAINABLE["fp32"], frozen=torch.float32, autocast=None),
    "bf16": Mode(trainable=TRAINABLE["bf16"], frozen=None, autocast=torch.bfloat16),
    "amp_fp16": Mode(trainable=TRAINABLE["amp_fp16"], frozen=None, autocast=torch.float16, scaler="torch"),
    # Trainables in float32 beside a frozen base (LoRA); where most weights train, FP16 with float32 masters.
    "native_fp16": Mode(trainable=TRAINABLE["native_fp16"], frozen=torch.float16, autocast=None, scaler="own"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO_FALLBACK: dict[str, list[Name]] = {
    "amp_fp16": ["bf16", "fp32"],
    "native_fp16": ["amp_fp16", "fp32"],
    "bf16": ["fp32"],
    "fp32": [],
}


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


def refusal(then: str, now: str) -> str:
    """The message about a checkpoint of the mode `then` in a run of the mode `now`."""
    return (
        f"the checkpoint was trained with precision.mode '{then}', this run has '{now}': resume with --precision.mode "
        f"{then}, or start another run from these weights with --init_from CHECKPOINT --output NEW"
    )


class ModeChain:
    """The mode `name`, the `reason` for it, the modes `remaining` to fall back to, and the `history` of fallbacks.

    Args:
        config: the wanted mode and its fallbacks.
        hardware: what the device computes natively.
        resume: the policy's state in the checkpoint to resume from; the run continues in the mode of that state.

    Raises:
        UserError: the hardware computes neither the mode nor any of its fallbacks natively, or `resume` is of a mode
            that is none of them.
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
        if resume is not None and resume["history"]:
            self._resume(resume)
        # `auto` is resolved later, and so is a fallback for the model's sake: loading the state compares once more.
        if resume is not None and self.name != "auto":
            other = resume["mode"] not in (self.name, *self.remaining)
            if other and resume["mode"] in MODES:  # a word that is none of them is damage, which loading finds
                raise UserError(refusal(resume["mode"], self.name))

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Continue in the mode that a run fell back to, if the config names it or the run's first mode."""
        mode, trail = state["mode"], [step["from"] for step in state["history"]]
        if self.name not in ("auto", mode, trail[0]) or mode not in MODES:
            return  # another mode was asked for: loading the state will refuse it
        if not self._is_native(mode):
            raise UserError(
                f"the checkpoint was trained in {mode}, which {self.hardware.name} does not compute natively: resume "
                f"it where it is, or start a run in one of {self.modes_that_work()}"
            )
        self.history = list(state["history"])
        if self.name == mode:
            return
        chain = self.remaining
        if self.name == "auto" and self.config.fallback is None:
            chain = AUTO_FALLBACK[trail[0]]
        self.remaining = chain[chain.index(mode) + 1 :] if mode in chain else []
        self.name, self.reason = mode, state["reason"]

    def _is_native(self, mode: str) -> bool:
        return mode != "bf16" or self.hardware.bf16

    def modes_that_work(self) -> str:
        """The names of the other modes that the hardware computes natively, for messages."""
        return ", ".join(name for name in MODES if self._is_native(name) and name != self.name)

    def resolve_auto(self, weights: Weights) -> None:
        """Replace `auto` by the mode for this hardware and these weights."""
        if self.name != "auto":
            return
        self.name, why = choose_auto(self.hardware, weights)
        self.reason = f"precision.mode is 'auto': {why}"
        if self.config.fallback is None:
            self.remaining = list(AUTO_FALLBACK[self.name])
        elif self.name in self.remaining:  # nothing is tried twice
            self.remaining = self.remaining[self.remaining.index(self.name) + 1 :]
        elif self.name == "fp32":  # the last resort
            self.remaining = []

    def advance(self, why: str, entered: bool = False) -> bool:
        """Move to the next mode that the hardware computes natively. Return False if there is none.

        Args:
            why: the reason, for the user.
            entered: whether the old mode has cast the model: a resumed run must round its weights in the same way.
        """
        name = next((mode for mode in self.remaining if self._is_native(mode)), None)
        if name is None:
            return False
        self.history.append({"from": self.name, "to": name, "reason": why, "entered": entered})
        self.reason = f"fell back from {self.name}: {why}"
        self.remaining = self.remaining[self.remaining.index(name) + 1 :]
        self.name = name
        return True

    def trail(self) -> str:
        """All modes so far: `amp_fp16 -> bf16`."""
        return " -> ".join([*(step["from"] for step in self.history), self.name])
