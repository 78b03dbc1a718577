"""The first half of the faults: origin of what is not finite, weights and optimizer, gradients and scale."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rawloop.watch.findings import Finding
from tests.faults.form import Fault, within
from tests.faults.loops import CHARACTERS, CharGpt, Codec, Ddp, Denoiser, Gpt, Mlp
from tests.faults.scripts import Images, Lora


# ------------------------------------------------------------------------------------------------------------- origin
class LogOfSilence(Denoiser):
    """Clip 17 is digital silence, and the loss takes the log of its power as it is."""

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = super().batch(step)
        if step == 4:
            batch["power"][1] = 0.0
        return batch

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        target = torch.log(batch["power"])
        error = (self.model(batch["noisy"]) - target).square().mean(-1)
        loss: Tensor = (error * batch["mask"]).sum() / batch["mask"].sum().clamp_min(1)
        return loss


class LoudMlp(Mlp):
    """Works with hidden values as large as 16-bit samples of sound."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(1.5e4 * F.gelu(self.fc(x)))
        return x


class HalfOverflow(CharGpt):
    """The sums of one layer of one block are too large for float16, which ends at 65504. In float32 they are not."""

    def make_model(self) -> nn.Module:
        model = Gpt()
        loud = LoudMlp(32)
        nn.init.normal_(loud.proj.weight)
        model.blocks[1].mlp = loud
        return model

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.float16)


class RootOfNothing(Denoiser):
    """The loss is each clip's root mean square error; nothing of clip 21 is left by its mask."""

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = super().batch(step)
        if step == 5:
            batch["mask"][1] = 0.0
        return batch

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        error = (self.model(batch["noisy"]) - torch.log(batch["power"])) * batch["mask"].unsqueeze(-1)
        return torch.sqrt(error.square().mean((1, 2))).mean()


class NanInClip(Denoiser):
    """A frame of clip 27 is NaN, as a normalisation of an empty file makes them."""

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = super().batch(step)
        if step == 6:
            batch["noisy"][3, 2] = torch.nan
        return batch


# ------------------------------------------------------------------------------------------------------------ weights
class NanInCheckpoint(CharGpt):
    """The checkpoint that is loaded has NaN in one tensor."""

    def make_model(self) -> nn.Module:
        model = Gpt()
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        saved["blocks.0.attn.qkv.weight"][3, 5] = torch.nan
        model.load_state_dict(saved)
        return model


class FrozenChanged(Lora):
    """After step 6 the script rescales a weight that is frozen."""

    steps = 16

    def on_step_end(self, step: int) -> None:
        if step == 6:
            with torch.no_grad():
                weight = self.model.get_parameter("base_model.model.model.layers.1.self_attn.v_proj.base_layer.weight")
                weight.div_(torch.linalg.matrix_norm(weight, 2))


class RanksDiffer(Ddp):
    """Only rank 0 loads the head from a checkpoint, after DDP has made all ranks equal."""

    def after_wrapping(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        if self.rank == 0:
            with torch.no_grad():
                self.bare.get_parameter("outward.weight").mul_(1.5)


class LostUpdates(CharGpt):
    """All of the model in bfloat16, with a learning rate that bfloat16 cannot add to most weights."""

    lr = 1e-5

    def make_model(self) -> nn.Module:
        return Gpt().bfloat16()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).float().view(-1, CHARACTERS), y.reshape(-1))


class EpsInHalf(CharGpt):
    """All of the model in float16, with AdamW's eps of 1e-8, which is zero in float16."""

    lr = 1e-3

    def make_model(self) -> nn.Module:
        return Gpt().half()

    def make_optimizer(self) -> Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, eps=1e-8)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).float().view(-1, CHARACTERS), y.reshape(-1))


# ---------------------------------------------------------------------------------------------------------- gradients
class NoLossScale(CharGpt):
    """Float16 without a loss scale, and a small weight on the loss: gradients of activations become zero."""

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.float16)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return 1e-4 * super().loss(x, y)


class ScaleCollapses(Images):
    """The loss is a sum with a large weight: the scaler halves its scale at every step, down to far below 1."""

    steps = 30

    def criterion(self, logits: Tensor, classes: Tensor) -> Tensor:
        return 1e7 * F.cross_entropy(logits, classes, reduction="sum")


class ClippedBeforeUnscale(Images):
    """The gradients are clipped while they are multiplied by the loss scale."""

    first_scale = 2.0**12
    steps = 30

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class DetachedHead(Codec):
    """The loss of one codebook is taken on detached logits: its head never gets a gradient."""

    def losses(self, logits: list[Tensor], targets: Tensor) -> list[Tensor]:
        return super().losses([part.detach() if k == 3 else part for k, part in enumerate(logits)], targets)


def at_log_of_silence(finding: Finding) -> bool:
    place = finding.cause.place
    return "torch.log(" in place.expression and (place.sample == "clip-17" or place.row == 1) and finding.step == 4


def at_clip_27(finding: Finding) -> bool:
    place = finding.cause.place
    return place.sample == "clip-27" and place.tensor in ("", "noisy") and finding.step == 6


def at_frozen_weight(finding: Finding) -> bool:
    name = "base_model.model.model.layers.1.self_attn.v_proj.base_layer.weight"
    return finding.cause.place.parameter in (name, name.removeprefix("base_model.model.")) and within(finding, 5, 10)


FAULTS = (
    Fault(
        "log of a silent clip in the loss",
        "origin",
        LogOfSilence,
        ("loss", "data"),
        r"finite|inf|nan|\blog\b",
        at_log_of_silence,
        r"torch\.log",
    ),
    Fault(
        "float16 overflow in one layer",
        "origin",
        HalfOverflow,
        ("precision", "model"),
        r"overflow|float16|65504|finite",
        lambda f: f.cause.place.module == "blocks.1.mlp.proj" and f.step == 0,
        r"blocks\.1\.mlp\.proj|self\.proj\(",
    ),
    Fault(
        "backward of sqrt at zero, one clip masked",
        "origin",
        RootOfNothing,
        ("loss", "data"),
        r"finite|nan|inf|sqrt|zero",
        lambda f: "torch.sqrt(" in f.cause.place.expression and f.step == 5,
        r"torch\.sqrt",
    ),
    Fault(
        "NaN in the features of one clip",
        "origin",
        NanInClip,
        ("data",),
        r"finite|nan",
        at_clip_27,
        r"clip-27",
    ),
    Fault(
        "NaN in a loaded weight",
        "weights",
        NanInCheckpoint,
        ("model", "hardware", "not known"),
        r"finite|nan",
        lambda f: f.cause.place.parameter == "blocks.0.attn.qkv.weight" and f.step == 0,
        r"blocks\.0\.attn\.qkv|self\.qkv\(",
    ),
    Fault(
        "a frozen weight is changed after step 6",
        "weights",
        FrozenChanged,
        ("model", "optimizer", "hardware", "not known"),
        r"chang|written|differ",
        at_frozen_weight,
    ),
    Fault(
        "one rank loads after DDP",
        "weights",
        RanksDiffer,
        ("distributed",),
        r"differ|equal|same",
        lambda f: f.cause.place.parameter.endswith("outward.weight") and within(f, 0, 1),
    ),
    Fault(
        "bfloat16 weights with lr 1e-5",
        "weights",
        LostUpdates,
        ("precision", "optimizer"),
        r"lost|round|updates?\b",
        lambda f: bool(f.cause.place.parameter or f.cause.place.optimizer) and within(f, 0, 10),
    ),
    Fault(
        "AdamW's eps in float16",
        "weights",
        EpsInHalf,
        ("precision", "optimizer"),
        r"\beps\b|epsilon|second moment",
        lambda f: bool(f.cause.place.optimizer or f.cause.place.parameter) and within(f, 0, 2),
    ),
    Fault(
        "float16 without a loss scale",
        "gradients",
        NoLossScale,
        ("precision", "loss"),
        r"flush|underflow|zero|subnormal|loss scal",
        lambda f: within(f, 0, 5),
    ),
    Fault(
        "the scale collapses",
        "gradients",
        ScaleCollapses,
        ("precision", "loss"),
        r"\bscale\b|skip",
        lambda f: within(f, 0, 16),
    ),
    Fault(
        "clipped before unscale_",
        "gradients",
        ClippedBeforeUnscale,
        ("optimizer", "precision", "loss"),
        r"clip|unscale",
        lambda f: within(f, 0, 10),
    ),
    Fault(
        "a head on detached logits",
        "gradients",
        DetachedHead,
        ("model", "loss"),
        r"gradient",
        lambda f: "heads.3" in f.cause.place.module + f.cause.place.parameter and within(f, 0, 5),
    ),
)
