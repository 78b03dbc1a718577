"""The precision policy: which dtype weights have, what runs under autocast, and when an update is applied.

Modes are rows of a table, so the loop, the evaluator and a foreign loop call the same verbs whatever the mode is:
`prepare`, `autocast`, `backward`, `step`. `prepare` runs before DDP and the optimizer exist.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import TrainingError, UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Mode(NamedTuple):
    """One row: the dtype of trainable weights, of frozen weights (None: as stored), and of autocast (None: off)."""

    trainable: torch.dtype
    frozen: torch.dtype | None
    autocast: torch.dtype | None


MODES = {
    "fp32": Mode(trainable=torch.float32, frozen=torch.float32, autocast=None),
    "bf16": Mode(trainable=torch.float32, frozen=None, autocast=torch.bfloat16),
}


@dataclass
class PrecisionConfig:
    """The dtype of weights and of computation.

    Args:
        mode: fp32: everything in float32, the reference. bf16: bfloat16 autocast over float32 trainables; frozen
            weights stay as stored (Ampere and later, Apple, CPU). auto: bf16 on a GPU that has it, else fp32.
        tf32: let float32 matrix products on NVIDIA GPUs round their inputs to TF32 (10 bits of mantissa). Off, so
            that fp32 means float32.
        max_skips: stop with an error after this many steps in a row whose gradients were not finite.
    """

    mode: Literal["auto", "fp32", "bf16"] = "auto"
    tf32: bool = False
    max_skips: int = 25


class StepResult(NamedTuple):
    """What one optimizer step did. `grad_norm` is the global L2 norm before clipping."""

    applied: bool
    grad_norm: float
    skipped_because: str | None = None


class PrecisionPolicy:
    """Applies one row of `MODES` to a model, in rawloop's loop or in your own.

    Args:
        config: the wanted mode.
        device: where the model runs.
        agree: tells whether something is true on any rank; the default is right for a single process. All ranks must
            take the same decision at each step.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device, agree: Callable[[bool], bool] = bool) -> None:
        self.config, self.device, self.agree = config, device, agree
        self.name, self.reason = self._choose()
        self.mode = MODES[self.name]
        self.skips_in_a_row = 0

    def _choose(self) -> tuple[str, str]:
        """Return the mode and why it was chosen."""
        if self.config.mode != "auto":
            if self.config.mode == "bf16" and not _has_bf16(self.device):
                card = torch.cuda.get_device_name(self.device)
                raise UserError(f"precision.mode is 'bf16', which {card} does not compute natively: use 'fp32'")
            return self.config.mode, f"precision.mode is '{self.config.mode}'"
        if self.device.type == "cuda" and _has_bf16(self.device):
            return "bf16", f"{torch.cuda.get_device_name(self.device)} computes bfloat16 natively"
        return "fp32", f"no mode faster than fp32 is known to be safe on '{self.device.type}'"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cast the model's weights as the mode asks, in place, before DDP and the optimizer exist.

        Raises:
            UserError: nothing is trainable, or a trainable weight is of a dtype that is never right.
        """
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.config.tf32
            torch.backends.cudnn.allow_tf32 = self.config.tf32
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trainable:
            raise UserError("no weight of the model is trainable: check adapter.mode and adapter.freeze")
        for name, parameter in trainable:
            if parameter.dtype not in FLOATS:
                raise UserError(
                    f"trainable weight {name} is {parameter.dtype}: only 16- and 32-bit floats can be trained"
                )
        stream = _stream_weights(model)
        mixed = any(parameter.requires_grad for parameter in stream.values())
        for parameter in model.parameters():
            wanted = self.mode.trainable if parameter.requires_grad else self.mode.frozen
            if mixed and id(parameter) in stream:
                wanted = self.mode.trainable
            if wanted is not None and parameter.dtype in FLOATS:
                parameter.data = parameter.data.to(wanted)
        return model.to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for every forward pass: training, evaluation and generation alike."""
        if self.mode.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.mode.autocast)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass.

        Raises:
            TrainingError: the loss hangs on no trainable weight, so nothing would be learnt from it.
        """
        if loss.grad_fn is None:
            raise TrainingError(
                "the loss is not connected to any trainable weight (it has no grad_fn): "
                "it was detached, made anew, or all weights that it depends on are frozen"
            )
        torch.autograd.backward(loss.float())

    def step(self, optimizer: Optimizer, max_norm: float | None = None) -> StepResult:
        """Clip, test and apply the gradients of one accumulation window, then clear them.

        Args:
            optimizer: whose parameters' gradients are applied.
            max_norm: clip the global L2 norm of the gradients to this; None or 0 clips nothing.

        Returns:
            whether the update was applied. Gradients that are not finite on any rank are applied on none.

        Raises:
            TrainingError: no weight has a gradient, or `max_skips` steps in a row were skipped.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise TrainingError(
                "no weight of the optimizer got a gradient: was it built before the model was prepared?"
            )
        value = global_norm(gradients).item()  # the one host sync of a step: what is applied must be known
        if self.agree(not math.isfinite(value)):
            optimizer.zero_grad(set_to_none=True)
            self._count_skip(value)
            return StepResult(False, value, f"the gradients' norm is {value}")
        if max_norm and value > max_norm:
            torch._foreach_mul_(gradients, max_norm / value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.skips_in_a_row = 0
        return StepResult(True, value)

    def _count_skip(self, norm: float) -> None:
        self.skips_in_a_row += 1
        if self.skips_in_a_row >= self.config.max_skips:
            raise TrainingError(
                f"{self.skips_in_a_row} steps in a row had gradients that are not finite (norm {norm}): training "
                "cannot go on; resume from the last checkpoint with a lower learning rate or other precision.mode"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the mode, its reason and the count of skips."""
        return {"mode": self.name, "reason": self.reason, "skips_in_a_row": self.skips_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the count of skips.

        Raises:
            UserError: the state is of another mode; its optimizer state would not fit.
        """
        if state["mode"] != self.name:
            raise UserError(
                f"the checkpoint was trained with precision.mode '{state['mode']}', this run has '{self.name}': "
                f"resume with --precision.mode {state['mode']}"
            )
        self.skips_in_a_row = state["skips_in_a_row"]


def _stream_weights(model: nn.Module) -> dict[int, nn.Parameter]:
    """Weights that decide the dtype of the hidden states: embeddings, and vectors such as norms, by identity.

    Models write parts of the hidden states into each other in place, so these must be of one dtype: where one of them
    is trained in float32, all of them are held in float32.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    chosen = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    chosen += [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return {id(parameter): parameter for parameter in chosen}


def global_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm over all gradients together, a float32 scalar on their device: in 16 bits it would overflow."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _has_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
