"""A foreign training loop on a real tiny model, for tests of what the policy does in it."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any
from warnings import warn

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.dist import World
from rawloop.optim_state import NamedOptimizerState
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.gradients import StepResult
from rawloop.precision.policy import PrecisionPolicy

Agreement = Callable[[Sequence[bool]], Sequence[bool]]


class Amplify(torch.autograd.Function):
    """The loss as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None


class Training:
    """A model, an optimizer with a schedule, and the policy's verbs, as somebody else's loop calls them.

    `step(factor)` multiplies the loss; an infinite factor multiplies only its gradient, and leaves the loss finite.
    """

    def __init__(
        self,
        mode: Any,
        fallback: Any = None,
        *,
        lr: float = 3e-3,
        divisor: float = 1.0,
        model: nn.Module | None = None,
        resume: Any = None,
        scaler: Any = None,
        say: Any = warn,
        **settings: Any,
    ) -> None:
        config = PrecisionConfig(mode=mode, fallback=fallback, **settings)
        self.policy = PrecisionPolicy(config, torch.device("cpu"), resume=resume, grad_scaler=scaler, say=say)
        self.model = self.policy.prepare(model or self.tiny_llama())
        held = [p for _, p in self.policy.named_parameters()]
        self.optimizer = AdamW(held, lr=lr, eps=1e-12, fused=True)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0 / (1 + step / 100))
        self.divisor = divisor

    @staticmethod
    def tiny_llama() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model

    @staticmethod
    def loss_of(model: nn.Module) -> Tensor:
        ids = (torch.arange(32).view(2, 16) * 7) % 32
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    def backward(self, factor: float = 1.0) -> None:
        with self.policy.autocast():
            loss = self.loss_of(self.model) / self.divisor
        self.policy.backward(Amplify.apply(loss, factor) if math.isinf(factor) else loss * factor)  # type: ignore[no-untyped-call]

    def step(self, factor: float = 1.0) -> StepResult:
        self.backward(factor)
        result = self.policy.step(self.optimizer, 1.0)
        if result.applied:
            self.schedule.step()
        return result

    def loss(self) -> float:
        with torch.no_grad(), self.policy.autocast():
            return self.loss_of(self.model).item()

    def values(self) -> dict[str, Tensor]:
        """Every trained weight with all that is kept of it, in float32."""
        return {name: self.policy.trained.value(name).clone() for name in self.policy.trained.weights}

    def moments(self) -> dict[str, Any]:
        """The optimizer's state by name."""
        return copy.deepcopy(NamedOptimizerState(self.optimizer, self.policy.named_parameters).state_dict())

    def save(self) -> tuple[Any, ...]:
        """A checkpoint of everything."""
        parts = (self.model, self.policy, self.schedule)
        return copy.deepcopy((self.moments(), *(part.state_dict() for part in parts)))

    def load(self, saved: tuple[Any, ...]) -> None:
        """Restore what `save` returned."""
        moments, model, policy, schedule = saved
        self.model.load_state_dict(model)
        NamedOptimizerState(self.optimizer, self.policy.named_parameters).load_state_dict(moments)
        self.policy.load_state_dict(policy)
        self.schedule.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate


@pytest.fixture(scope="session")
def world_where() -> Callable[[Agreement], World]:
    """Makes a world whose ranks agree on flags as a function says."""

    def make(agreement: Agreement) -> World:
        class OtherRanks(World):
            def any(self, flags: Sequence[bool]) -> Sequence[bool]:
                return agreement(flags)

        return OtherRanks()

    return make


@pytest.fixture(scope="session")
def training() -> type[Training]:
    """The class `Training`."""
    return Training
