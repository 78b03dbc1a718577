"""The optimizer, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Muon, Optimizer

from rawloop.errors import UserError
from rawloop.layers import is_embedding_or_head
from rawloop.settings import OptimConfig as OptimConfig
from rawloop.sharded_optim import Of8BitParts, OfParts, OfWholes
from rawloop.sharding import is_sharded

Groups = list[dict[str, Any]]
TRAINED = "trained"  # the weights that train, in the state of an optimizer whose average stands in the model


class Kind(NamedTuple):
    """One optimizer.

    Args:
        build: builds it over parameter groups.
        copies: its state, as a multiple of a weight's size.
        package: that it needs.
        devices: that it works on.
        nearest: the nearest that works where it does not.
    """

    build: Callable[[Groups, OptimConfig], Optimizer]
    copies: float
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")
    nearest: str = "adamw"


class MuonWithAdamW(Optimizer):
    """Muon and AdamW as one optimizer, which has the groups and the state of both.

    Raises:
        ValueError: a weight for Muon is no matrix.
    """

    def __init__(self, muon: Optimizer, adamw: Optimizer) -> None:
        self._parts = ((muon, True), (adamw, False))  # whose groups are `hidden`
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights. The closure, if any, is called once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, hidden in self._parts:  # `load_state_dict` makes other groups
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["hidden"] == hidden]
            optimizer.step()
        return loss


@runtime_checkable
class Averaging(Protocol):
    """An optimizer whose average of the weights is to be evaluated and saved, such as those of schedulefree."""

    param_groups: list[dict[str, Any]]
    state: Any

    def eval(self) -> None:
        """Put the average into the model."""

    def train(self) -> None:
        """Put the weights that train into the model."""


def _adamw(groups: Groups, config: OptimConfig) -> Optimizer:
    fused = all(p.device.type in ("cpu", "cuda", "mps") for group in groups for p in group["params"])
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


def _adafactor(groups: Groups, config: OptimConfig) -> Optimizer:
    return _for_shards(Adafactor(groups, lr=config.lr), OfWholes)


def _muon(groups: Groups, config: OptimConfig) -> Optimizer:
    hidden, others = ([group for group in groups if group["hidden"] == flag] for flag in (True, False))
    if not hidden:
        raise UserError("optim.name is 'muon', and no matrix of a hidden layer is trained: take adamw")
    read, default = (config.beta1, config.beta2, config.eps), OptimConfig()
    if not others and read != (default.beta1, default.beta2, default.eps):
        raise UserError(
            "optim.name is 'muon', all that is trained are matrices of hidden layers, and muon does not read "
            "optim.beta1, optim.beta2 and optim.eps: leave them out, or take adamw"
        )
    # With this factor an update is as large as one of AdamW, so both share a learning rate and weight decay.
    muon = _for_shards(Muon(hidden, lr=config.lr, adjust_lr_fn="match_rms_adamw"), OfWholes)
    return MuonWithAdamW(muon, _adamw(others, config)) if others else muon


def _for_shards(optimizer: Optimizer, kind: type[OfParts]) -> Optimizer:
    """Return an optimizer; if its weights are sharded, of a kind that updates them."""
    sharded = any(is_sharded(weight) for group in optimizer.param_groups for weight in group["params"])
    return kind(optimizer) if sharded else optimizer


def _library(module: str, name: str, shards: type[OfParts] | None = None) -> Callable[[Groups, OptimConfig], Optimizer]:
    """Return a function that builds an optimizer of a library, which it imports."""

    def build(groups: Groups, config: OptimConfig) -> Optimizer:
        options = {} if name == "Lion" else {"eps": config.eps}
        kind = getattr(import_module(module), name)
        optimizer: Optimizer = kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), **options)
        return _for_shards(optimizer, shards) if shards else optimizer

    return build


BITSANDBYTES = "bitsandbytes.optim"
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "adamw": Kind(_adamw, 2.0),
        "adamw_8bit": Kind(
            _library(BITSANDBYTES, "AdamW8bit", Of8BitParts), 0.51, "bitsandbytes", ("cpu", "cuda"), "adafactor"
        ),
        "paged_adamw_8bit": Kind(
            _library(BITSANDBYTES, "PagedAdamW8bit"), 0.0, "bitsandbytes", ("cuda",), "adamw_8bit"
        ),
        "adafactor": Kind(_adafactor, 0.005),
        "lion": Kind(_library(BITSANDBYTES, "Lion", OfParts), 1.0, "bitsandbytes", ("cpu", "cuda")),
        "muon": Kind(_muon, 1.0),
        "schedule_free": Kind(_library("schedulefree", "AdamWScheduleFree"), 2.0, "schedulefree"),
    }
)


def check_optimizer(config: OptimConfig, device: torch.device) -> None:
    """Build the optimizer for two small weights on a device, and make an update.

    Raises:
        UserError: a package is missing, or the optimizer does not work on the device.
    """
    kind, asked = KINDS[config.name], f"optim.name is '{config.name}'"
    if device.type not in kind.devices:
        where = " and ".join(kind.devices)
        raise UserError(
            f"{asked}, which works on {where}, and the device is {device.type}: take {kind.nearest}, or set device"
        )
    if kind.package and find_spec(kind.package) is None:
        free = kind.nearest if not KINDS[kind.nearest].package else "adamw"
        raise UserError(
            f"{asked}, which needs {kind.package}, and that is not installed: run `pip install "
            f"'rawloop[{kind.package}]'`, or take {free}, which needs nothing"
        )
    config = replace(config, lr=1e-3)  # the run's own may be too small for a weight of 1 to change
    weights = [nn.Parameter(torch.ones(64, 64, device=device)), nn.Parameter(torch.ones(64, device=device))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    try:
        optimizer = build_optimizer([("hidden.weight", weights[0]), ("hidden.bias", weights[1])], config)
        use_trained(optimizer)
        optimizer.step()
    except Exception as error:
        line = str(error).strip().splitlines()[:1]
        raise UserError(
            f"{asked}, and its update fails on this {device.type} ({type(error).__name__}: {''.join(line)}): "
            f"take adamw{f', or install another version of {kind.package}' if kind.package else ''}"
        ) from error
    if not all(bool((weight.isfinite() & (weight != 1)).all()) for weight in weights):
        raise UserError(f"{asked}, and its update changes no weight on this {device.type}: take adamw")


def is_hidden(name: str, weight: Tensor) -> bool:
    """Return whether a weight is a matrix of a hidden layer, by its name: not of an embedding or a head."""
    return weight.ndim == 2 and not is_embedding_or_head(name)


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> Optimizer:
    """Return the optimizer over trainable parameters. AdamW is the fused one.

    Args:
        named: `PrecisionPolicy.named_parameters()`, or a model's.
        config: name, learning rate, betas and weight decay. Only matrices decay.

    Raises:
        UserError: `muon` has no matrix of a hidden layer.
    """
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    is_muon, groups = config.name == "muon", []
    for hidden, matrix in ((True, True), (False, True), (False, False)):
        held = [p for n, p in trainable if (p.ndim >= 2, is_muon and is_hidden(n, p)) == (matrix, hidden)]
        if held:
            decay = config.weight_decay if matrix else 0.0
            groups.append({"params": held, "weight_decay": decay, **({"hidden": hidden} if is_muon else {})})
    return KINDS[config.name].build(groups, config)


def state_bytes(config: OptimConfig, name: str, weight: Tensor) -> int:
    """Return the bytes of device memory that the state of a weight takes, without what can be paged out."""
    kind = KINDS[config.name]
    copies = 2.0 if config.name == "muon" and not is_hidden(name, weight) else kind.copies
    size = 4 if kind.package == "bitsandbytes" else weight.itemsize  # its state has the same dtypes for all weights
    return int(copies * size * weight.numel())


@torch.no_grad()
def use_average(optimizer: Optimizer) -> None:
    """Put the average of an `Averaging` optimizer into the model, and keep the weights that train. Others do nothing.

    The weights are kept in the optimizer's state, and so in checkpoints: the library would compute them again from the
    average, with other roundings.
    """
    if isinstance(optimizer, Averaging):
        for weight, state in optimizer.state.items():
            if state and TRAINED not in state:
                state[TRAINED] = weight.detach().clone()
        optimizer.eval()


@torch.no_grad()
def use_trained(optimizer: Optimizer) -> None:
    """Put back the weights that `use_average` has kept, bit for bit. Other optimizers do nothing."""
    if isinstance(optimizer, Averaging):
        optimizer.train()
        for weight, state in optimizer.state.items():
            if TRAINED in state:
                weight.copy_(state.pop(TRAINED))


def lr_at(step: int, total: int, config: OptimConfig) -> float:
    """Return the learning rate of the update from `step` to `step + 1`, of `total` updates.

    Warm-up is linear, and its last step has the rate `lr`. The decay over the remaining steps would reach 0 one step
    after the last.
    """
    warmup = config.warmup(total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of the parameter group with the largest rate; other groups keep their ratio to it.

    The first rates of the groups are kept as `initial_lr`, as in torch's schedulers.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    largest = max(group["initial_lr"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = lr * (group["initial_lr"] / largest) if largest else lr
