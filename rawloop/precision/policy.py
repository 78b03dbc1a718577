"""The precision policy: which dtype weights have, what runs under autocast, and when an update is applied.

Modes are rows of a table, so the loop, the evaluator and a foreign loop call the same verbs whatever the mode is:
`prepare`, `autocast`, `backward`, `step`. `prepare` runs before DDP and the optimizer exist.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.errors import TrainingError, UserError
from rawloop.precision.masters import Masters
from rawloop.precision.modes import MODES, PrecisionConfig, choose_mode
from rawloop.precision.scaler import GuardedGradScaler, LossScaler

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


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
        grad_scaler: your own torch GradScaler, for amp_fp16.
    """

    def __init__(
        self,
        config: PrecisionConfig,
        device: torch.device,
        agree: Callable[[bool], bool] = bool,
        grad_scaler: Any = None,
    ) -> None:
        self.config, self.device, self.agree = config, device, agree
        self.name, self.reason = choose_mode(config, device)
        self.mode = MODES[self.name]
        self.skips_in_a_row = 0
        self.masters = Masters([])
        self.own_scaler = LossScaler(config.loss_scale) if self.mode.scaler == "own" else None
        self.grad_scaler: GuardedGradScaler | None = None
        if self.mode.scaler == "torch":
            self.grad_scaler = GuardedGradScaler(config.loss_scale, device, grad_scaler)
        elif grad_scaler is not None:
            raise UserError(f"a GradScaler was handed in and precision.mode is '{self.name}': it goes with amp_fp16")

    @property
    def scaler(self) -> LossScaler | GuardedGradScaler | None:
        """The loss scaler of the mode, if it has one."""
        return self.own_scaler or self.grad_scaler

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cast the model's weights as the mode asks, in place, before DDP and the optimizer exist.

        Raises:
            UserError: nothing is trainable, a trainable weight is of a dtype that is never right, or the mode cannot
                train these weights.
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
        self._cast(model, trainable)
        model = model.to(self.device)
        self.masters = Masters((name, p) for name, p in model.named_parameters() if p.requires_grad)
        return model

    def _cast(self, model: nn.Module, trainable: list[tuple[str, nn.Parameter]]) -> None:
        stream = _stream_weights(model)
        mixed = [name for name, parameter in trainable if id(parameter) in stream]
        wanted_trainable = self.mode.trainable
        if self.name == "native_fp16" and _mostly_trained(model):
            wanted_trainable = torch.float16
        elif self.name == "native_fp16" and mixed:
            raise UserError(
                f"precision.mode is 'native_fp16' and {mixed[0]} is trained beside a frozen FP16 base: in float32 it "
                "would not fit the base's hidden states; use amp_fp16, or leave it frozen"
            )
        for parameter in model.parameters():
            wanted = wanted_trainable if parameter.requires_grad else self.mode.frozen
            if mixed and id(parameter) in stream:
                wanted = wanted_trainable
            if wanted is not None and parameter.dtype in FLOATS:
                parameter.data = parameter.data.to(wanted)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer must hold after `prepare`: the trainable weights, or their float32 masters, by name."""
        return self.masters.named_parameters()

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for every forward pass: training, evaluation and generation alike."""
        if self.mode.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.mode.autocast)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, on the scaled loss where the mode scales.

        Raises:
            TrainingError: the loss hangs on no trainable weight, so nothing would be learnt from it.
        """
        if loss.grad_fn is None:
            raise TrainingError(
                "the loss is not connected to any trainable weight (it has no grad_fn): "
                "it was detached, made anew, or all weights that it depends on are frozen"
            )
        torch.autograd.backward(self.scaler.apply(loss) if self.scaler else loss.float())

    def step(self, optimizer: Optimizer | Sequence[Optimizer], max_norm: float | None = None) -> StepResult:
        """Unscale, clip, test and apply the gradients of one accumulation window, then clear them.

        Args:
            optimizer: whose parameters' gradients are applied; several are applied together or not at all.
            max_norm: clip the global L2 norm of the gradients to this; None or 0 clips nothing.

        Returns:
            whether the update was applied. Gradients that are not finite on any rank are applied on none.

        Raises:
            TrainingError: no weight has a gradient, or `max_skips` steps in a row were skipped.
        """
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        held = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        gradients = [gradient for p in held if (gradient := self.masters.gradient(p)) is not None]
        if not gradients:
            raise TrainingError(
                "no weight of the optimizer got a gradient: was it built before the model was prepared?"
            )
        scale = self.own_scaler.scale if self.own_scaler else 1.0
        if self.grad_scaler:
            for each in optimizers:
                self.grad_scaler.grad_scaler.unscale_(each)
        norm = global_norm(gradients).item() / scale  # the one host sync of a step: what is applied must be known
        applied = not self.agree(not math.isfinite(norm))
        if applied:
            # Clipping and unscaling are one factor, multiplied in float32: in FP16 it would flush gradients to zero.
            clip = max_norm / norm if max_norm and norm > max_norm else 1.0
            self.masters.hand_over(held, clip / scale)
            for each in optimizers:
                self.grad_scaler.grad_scaler.step(each) if self.grad_scaler else each.step()
            self.masters.write_weights()
        if self.scaler:
            self.scaler.update(applied)
        self._clear(optimizers)
        if not applied:
            self._count_skip(norm)
            return StepResult(False, norm, f"the gradients' norm is {norm}")
        self.skips_in_a_row = 0
        return StepResult(True, norm)

    def _clear(self, optimizers: list[Optimizer]) -> None:
        self.masters.clear_gradients()
        for each in optimizers:
            each.zero_grad(set_to_none=True)

    def _count_skip(self, norm: float) -> None:
        self.skips_in_a_row += 1
        if self.skips_in_a_row >= self.config.max_skips:
            raise TrainingError(
                f"{self.skips_in_a_row} steps in a row had gradients that are not finite (norm {norm}): training "
                "cannot go on; resume from the last checkpoint with a lower learning rate or other precision.mode"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the mode and its reason, the count of skips, the scaler and the float32 masters."""
        return {
            "mode": self.name,
            "reason": self.reason,
            "skips_in_a_row": self.skips_in_a_row,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "masters": self.masters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UserError: the state is of another mode; its optimizer state would not fit.
        """
        if state["mode"] != self.name:
            raise UserError(
                f"the checkpoint was trained with precision.mode '{state['mode']}', this run has '{self.name}': "
                f"resume with --precision.mode {state['mode']}"
            )
        self.skips_in_a_row = state["skips_in_a_row"]
        self.masters.load_state_dict(state["masters"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])


def _mostly_trained(model: nn.Module) -> bool:
    """Whether more weights are trained than frozen: full fine-tuning, where float32 trainables save nothing."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 2 * trained > sum(parameter.numel() for parameter in model.parameters())


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
