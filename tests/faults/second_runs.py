"""The second half of the faults: mistakes in runs of rawloop."""

from typing import Any

from torch import Tensor, nn

from rawloop.errors import TrainingError
from rawloop.run import Run
from tests.faults.form import Fault, within
from tests.faults.runs import FULL, LORA, InRun, model_of


class NormalizedGradient(InRun):
    """A user's hook divides each adapter's gradient by its norm: that of every `lora_A` is zero at first."""

    settings = LORA | {"precision": {"mode": "fp32"}}

    def spoil(self, run: Run) -> None:
        for name, parameter in model_of(run).named_parameters():
            if "lora_A" in name:
                parameter.register_hook(lambda gradient: gradient / gradient.norm())  # type: ignore[no-untyped-call]


class StateLost(InRun):
    """A callback empties the optimizer's state before step 8, as a resume without it does."""

    settings = FULL | {"precision": {"mode": "fp32"}, "optim": {"lr": 1e-3}}

    def spoil(self, run: Run) -> None:
        before = run.lr

        def rate(step: int) -> float:
            if step == 8:
                run.optimizer.state.clear()
            return before(step)

        run.lr = rate


class CutTrunk(InRun):
    """A user's hook detaches the output of the first layer: its adapter gets no gradient."""

    settings = LORA | {"precision": {"mode": "fp32"}}

    def spoil(self, run: Run) -> None:
        def cut(module: nn.Module, inputs: Any, output: Any) -> Any:
            return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])

        model_of(run).get_submodule("base_model.model.model.layers.0").register_forward_hook(cut)


class WarmsUpTooFar(InRun):
    """Warm-up to a rate 100 times too large: the loss falls, then jumps in step 23 on one CPU, 35 on another."""

    settings = FULL | {"precision": {"mode": "fp32"}, "optim": {"lr": 0.3, "warmup_steps": 40, "schedule": "constant"}}
    steps = 40


FAULTS = (
    Fault(
        "run: gradients are divided by a norm of zero",
        "origin",
        NormalizedGradient,
        ("model", "optimizer", "not known"),
        r"finite|\bnan\b|\binf",
        lambda f: "lora_A" in f.cause.place.parameter and f.step == 0,
        crash=TrainingError,
    ),
    Fault(
        "run: Adam's state is lost before step 8",
        "weights",
        StateLost,
        ("optimizer", "not known"),
        r"state|moment|exp_avg|step count|reset|\blost\b|empt|restart|fresh",
        lambda f: within(f, 5, 10),
    ),
    Fault(
        "run: the first layer's output is detached",
        "gradients",
        CutTrunk,
        ("model", "loss"),
        r"no grad|zero|none\b|never|not reach|detach|cut off|without (a )?grad",
        lambda f: "layers.0." in f"{f.cause.place.parameter} {f.cause.place.module}." and within(f, 0, 5),
    ),
    Fault(
        "run: warm-up to a rate that diverges",
        "jumps",
        WarmsUpTooFar,
        ("optimizer",),
        r"loss|norm|\blr\b|learning rate|diverg|rate",
        lambda f: within(f, 13, 40),  # the rest of the warm-up
    ),
)
