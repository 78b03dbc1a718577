"""The second half of the faults: mistakes of practice in foreign loops, in the origin, the weights and the gradients.

The answers were written before any finding of these loops was seen, and without sight of what looks for them.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawloop.watch.findings import Finding
from tests.faults import second_controls, second_data, second_runs
from tests.faults.form import Fault, within
from tests.faults.loops import CODEBOOKS, CONTEXT, CharGpt, Codec, Ddp, Denoiser, Nobody
from tests.faults.scripts import Images, Llama
from tests.faults.second_loops import Ctc, Pairs, Table

NOT_FINITE = r"finite|\bnan\b|\binf"
NO_GRADIENT = (
    r"no grad|zero grad|grad\w* (of|is|are|was|were|has|have|stays?|exactly)? ?(exactly )?(zero|none|0\b)|exactly zero"
    r"|never (get|receiv|train|updat|learn)|not (reach|receive|train|updat|learn)|without (a )?grad|detach|cut off"
)


# ----------------------------------------------------------------------------------------------------------- origin
class WhereTrap(Denoiser):
    """`where` leaves out log(0) of the frames after a clip's end, but its derivative is still 0 / 0."""

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = super().batch(step)
        batch["mask"] = torch.ones_like(batch["mask"])
        if step >= 6:
            batch["mask"][1, 12:] = 0
        return batch

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        power = F.softplus(self.model(batch["noisy"])) * batch["mask"].unsqueeze(-1)
        logs = torch.where(power > 0, torch.log(power), batch["power"].log())
        return F.mse_loss(logs, batch["power"].log())


class CoolingSoftmax(Pairs):
    """A softmax written by hand, without its maximum, whose temperature is halved in each step."""

    def temperature(self, step: int) -> float:
        return float(0.5**step)

    def loss(self, cosines: Tensor, temperature: float) -> Tensor:
        weights = torch.exp(cosines / temperature)
        return -(weights.diagonal() / weights.sum(1)).log().mean()


class PaddedOnTheLeft(CharGpt):
    """Causal and padding masks are added; rows of padding on the left may then look at nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = torch.ones(self.batch_size, CONTEXT, dtype=torch.bool)

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.keep = torch.ones(self.batch_size, CONTEXT, dtype=torch.bool)
        if step >= 6:
            self.keep[2, :5] = False
        return super().get_batch(step)

    def extras(self) -> dict[str, Tensor]:
        return {"keep": self.keep}

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        causal = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
        padding = torch.zeros(self.keep.shape).masked_fill(~self.keep, float("-inf"))
        logits = self.model(x, causal + padding[:, None, None])
        return F.cross_entropy(logits[self.keep], y[self.keep])


class TooFewFrames(Ctc):
    """One utterance has fewer frames than letters: CTC has no path, and its loss is infinite."""

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = super().batch(step)
        if step == 8:
            batch["frames"][1] = 4
        return batch


# ---------------------------------------------------------------------------------------------------------- weights
class HeadReplaced(Llama):
    """The head is replaced after the optimizer was made, which still holds the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.model.lm_head = nn.Linear(32, 48, bias=False)


class StateCast(CharGpt):
    """Resumes in bfloat16: load_state_dict casts the float32 moments to the dtype of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 3
        self.train(Nobody())
        self.steps = 20
        state = self.optimizer.state_dict()
        self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, betas=(0.9, 0.999))
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["betas"] = (0.9, 0.999)


class AverageLeftIn(CharGpt):
    """The weights' moving average is put into the model for an evaluation, and stays there."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.model.state_dict())

    def on_step_end(self, step: int) -> None:
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 0.01)
        if step == 11:
            self.model.load_state_dict(self.average)


class AroundDdp(Ddp):
    """The loss calls the bare module instead of the wrapper: gradients are not averaged over the ranks."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        target = torch.log(batch["power"])
        error = (self.bare(batch["noisy"]) - target).square().mean(-1)
        loss: Tensor = (error * batch["mask"]).sum() / batch["mask"].sum()
        return loss


# -------------------------------------------------------------------------------------------------------- gradients
class DeadRelu(Images):
    """A bias of -50 before a ReLU: nothing passes, forward or backward."""

    def make_model(self) -> nn.Module:
        model = super().make_model()
        with torch.no_grad():
            model.get_parameter("body.1.bias").fill_(-50.0)
        return model


class LastCodebookForgotten(Codec):
    """The loss is a sum over the first seven codebooks."""

    def losses(self, logits: list[Tensor], targets: Tensor) -> list[Tensor]:
        return [F.cross_entropy(logits[k].flatten(0, 1), targets[:, k].flatten()) for k in range(CODEBOOKS - 1)]


class LossMadeAgain(Table):
    """The loss is put into a tensor of its own, to silence an error of backward: it hangs on no weight."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = super().loss(batch)
        return torch.tensor(loss.item(), requires_grad=True)


class StepPastScaler(Images):
    """The loss is scaled, but the optimizer steps by itself: its gradients are 65536 times too large."""

    def update(self) -> None:
        self.optimizer.step()


def _place_names(finding: Finding) -> Iterator[str]:
    place = finding.cause.place
    yield from (place.module, place.parameter, place.expression)


def _at(*names: str) -> Any:
    """Whether the finding's module, parameter or expression holds one of these names."""
    return lambda f: any(name in part for part in _place_names(f) for name in names)


FAULTS = (
    Fault(
        "backward of a log that `where` leaves out",
        "origin",
        WhereTrap,
        ("loss", "model", "data"),
        NOT_FINITE,
        lambda f: "torch.log(power)" in f.cause.place.expression and f.step == 6,
        mentions=r"torch\.log\(power\)",
    ),
    Fault(
        "a softmax by hand overflows as its temperature falls",
        "origin",
        CoolingSoftmax,
        ("loss", "precision"),
        rf"{NOT_FINITE}|overflow",
        lambda f: "exp(" in f.cause.place.expression and f.step == 8,
        mentions=r"torch\.exp\(",
    ),
    Fault(
        "rows of padding on the left may attend to nothing",
        "origin",
        PaddedOnTheLeft,
        ("model", "data"),
        rf"{NOT_FINITE}|fully masked|masked (row|out)|attend",
        lambda f: f.step == 6 and ("blocks.0.attn" in f.cause.place.module or f.cause.place.sample == "text-50"),
        mentions=r"blocks\.0\.attn",
    ),
    Fault(
        "CTC with fewer frames than letters",
        "origin",
        TooFewFrames,
        ("data", "loss"),
        NOT_FINITE,
        lambda f: f.step == 8 and ("ctc_loss" in f.cause.place.expression or f.cause.place.sample == "utt-33"),
        mentions=r"ctc_loss|utt-33",
    ),
    Fault(
        "a head replaced after the optimizer was made",
        "weights",
        HeadReplaced,
        ("optimizer", "model"),
        r"optimizer|never (updat|train|chang|mov)|not (updat|train|chang|mov)|stale|unchanged",
        _at("lm_head"),
    ),
    Fault(
        "Adam's moments cast to bfloat16 at resume",
        "weights",
        StateCast,
        ("optimizer", "precision"),
        r"moment|\bstate|exp_avg",
        lambda f: bool(f.cause.place.optimizer or f.cause.place.parameter) and within(f, 0, 5),
    ),
    Fault(
        "the moving average is left in the model",
        "weights",
        AverageLeftIn,
        ("model", "optimizer", "hardware", "not known"),
        r"chang|written|wrote|overwr|differ|outside|without",
        lambda f: bool(f.cause.place.parameter or f.cause.place.module) and within(f, 10, 15),
    ),
    Fault(
        "the bare module is called instead of DDP",
        "weights",
        AroundDdp,
        ("distributed",),
        r"differ|diverg|sync|averag|reduc|not (the same|equal)|unequal|apart",
        lambda f: bool(f.cause.place.parameter or f.cause.place.module) and within(f, 0, 6),
    ),
    Fault(
        "a layer dead by the bias before its ReLU",
        "gradients",
        DeadRelu,
        ("model",),
        rf"{NO_GRADIENT}|dead|zero|relu",
        lambda f: f.cause.place.module.startswith(("body", "stem")) or _at("body.", "stem.")(f),
    ),
    Fault(
        "the last codebook is left out of the loss",
        "gradients",
        LastCodebookForgotten,
        ("loss", "model"),
        rf"{NO_GRADIENT}|hangs|zero|unused|left out",
        lambda f: _at("heads.7")(f) and within(f, 0, 5),
    ),
    Fault(
        "the loss is made again from its value",
        "gradients",
        LossMadeAgain,
        ("loss", "model"),
        rf"{NO_GRADIENT}|hangs|no (parameter|weight)|nothing|graph|depend",
        lambda f: within(f, 0, 5),
    ),
    Fault(
        "the optimizer steps past the scaler",
        "gradients",
        StepPastScaler,
        ("precision", "optimizer"),
        r"unscale|scaler|loss scale|still scaled|\bscale\b",
        lambda f: within(f, 0, 5),
    ),
    *second_data.FAULTS,
    *second_runs.FAULTS,
)
CONTROLS = second_controls.CONTROLS
