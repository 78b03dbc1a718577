"""A model in one precision mode: cast, with masters and a loss scaler, and switching to the next mode."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from warnings import warn
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim import Optimizer

from rawloop.dist import World
from rawloop.errors import TrainingError, UserError
from rawloop.precision.adopting import adopt, replace_parameters
from rawloop.precision.advice import lost_updates
from rawloop.precision.casting import cast_frozen, check_model, check_world
from rawloop.precision.config import Name, PrecisionConfig
from rawloop.precision.gradients import Observer, Window, drop_scaler_marks, watch_steps
from rawloop.precision.masters import HALF, TrainedWeights, held_by
from rawloop.precision.modes import MODES, Autocast, Mode, ModeChain, describe, examine, other_mode
from rawloop.precision.scaler import GuardedGradScaler, LossScaler
from rawloop.rounding import StochasticRounding
from rawloop.sharding import BlockRuns

UNPREPARED = "the precision policy has no model yet: call policy.prepare(model) first"
DIFFERENT_BLOCKS = (
    "the ranks have run different blocks of the model, each of which gathers its weights from all ranks, so they have "
    "computed with wrong weights: nothing was applied; set parallel to ddp, or run every block in every pass"
)


class PreparedModel:
    """A model, its trained weights and its optimizers in one mode.

    `PrecisionPolicy` adds the methods that each step calls; see it for the arguments.
    """

    def __init__(
        self,
        config: PrecisionConfig | str,
        device: torch.device | str | None = None,
        *,
        world: World | None = None,
        grad_scaler: Any = None,
        resume: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = warn,
        seed: int = 0,
    ) -> None:
        self.config = PrecisionConfig(config) if isinstance(config, str) else config  # type: ignore[arg-type]
        self.world = check_world(world)
        self.device = self.world.device if device is None else torch.device(device)
        self.say = say
        self.seed = seed
        self.chain = ModeChain(self.config, describe(self.device), resume)
        self.model: nn.Module | None = None
        self.trained = TrainedWeights([], torch.float32, self.device)
        self.window = Window(self.trained)
        self.scaler: LossScaler | None = None
        self.skips_in_a_row = self.bad_losses_in_a_row = 0
        self.observer: Observer | None = None
        self.stepping = False  # while `step` calls the optimizers
        self._grad_scaler = grad_scaler
        self._adopted: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self.block_runs: BlockRuns | None = None  # if the weights are sharded
        self.fallbacks_off: list[Name] = []  # for that reason
        self._ddp: list[ref[Any]] | None = None  # the DDP modules over trained weights; None: not searched yet
        name = self.chain.name
        if grad_scaler is not None and "amp_fp16" not in (name, *self.chain.remaining):
            raise UserError(f"a GradScaler was passed and precision.mode is '{name}': it goes with amp_fp16")

    @property
    def name(self) -> str:
        """The name of the mode; `auto` until the model is prepared."""
        return self.chain.name

    @property
    def reason(self) -> str:
        """The reason for this mode."""
        return self.chain.reason

    @property
    def remedies(self) -> list[str]:
        """What the policy does by itself so that the mode trains, a sentence each; for a prepared model."""
        done = []
        if self.trained.masters:
            done.append(
                f"{len(self.trained.masters)} trained weights in {self.trained.dtype} have float32 masters in the "
                "optimizer, so that its eps and small updates act"
            )
        if self.trained.rounding:
            done.append(
                f"{len(self.trained.weights)} trained weights in {self.trained.dtype} are updated in float32 and "
                "rounded stochastically, so that small updates act in the mean"
            )
        if self.scaler:
            floor = self.scaler.config.floor
            done.append(
                f"the loss is multiplied by a scale, now {self.scaler.scale:g} and never below {floor:g}, because "
                "small gradients round to zero in FP16"
            )
        return done

    @property
    def mode(self) -> Mode:
        """The mode's row of the table.

        Raises:
            UserError: the mode is `auto`, and no model is prepared.
        """
        if self.name not in MODES:
            raise UserError(UNPREPARED)
        return MODES[self.name]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for every forward pass: training, evaluation and generation. It may be kept and reused.

        Raises:
            UserError: the mode is `auto`, and no model is prepared.
        """
        assert self.mode
        return Autocast(lambda: self.mode, self.device.type)

    def prepare(self, model: nn.Module, block_runs: BlockRuns | None = None) -> nn.Module:
        """Cast the model's weights for the mode, in place. Call it before DDP and the optimizer exist.

        Args:
            model: the model.
            block_runs: the result of `shard`, if it has sharded the model. All ranks then call this together, and no
                fallback to another mode is left afterwards.

        Raises:
            UserError: no weight is trainable, a trainable weight has a dtype that no mode trains, the mode cannot train
                these weights, or the model is wrapped already.
        """
        if self.model is not None:
            raise UserError("prepare was called twice: put several models into one torch.nn.ModuleList")
        check_model(model)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.config.tf32
            torch.backends.cudnn.allow_tf32 = self.config.tf32
        self.chain.resolve_auto(examine(model))
        self.model = model
        for step in self.chain.history:  # frozen weights that a mode has rounded stay rounded, also after a resume
            if step["entered"]:
                cast_frozen(model, step["from"], self.config)
        self._enter()
        watch_steps(self)
        self.block_runs = block_runs
        if block_runs is not None:
            self.fallbacks_off, self.chain.remaining, self._ddp = self.chain.remaining, [], []
            return model  # its parts are on the device
        return model.to(self.device)

    def _enter(self) -> None:
        """Cast the model for the current mode, and build the scaler."""
        assert self.model is not None
        while True:
            try:
                dtype = cast_frozen(self.model, self.chain.name, self.config, is_last=not self.chain.remaining)
                break
            except UserError as error:  # raised before any weight is changed
                if not self.chain.advance(str(error)):
                    raise
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        masters, rounding = self.config.masters == "fp32", None
        if self.config.masters == "stochastic" and dtype == torch.bfloat16:
            rounding = StochasticRounding(self.device, self.seed)
            if self.device.type != "cpu":
                rounding.check()
        self.trained = TrainedWeights(named, dtype, self.device, masters, rounding)
        kind = MODES[self.chain.name].scaler
        if kind == "torch":
            self.scaler = GuardedGradScaler(self.config.loss_scale, self.device, self._grad_scaler)
        else:
            self.scaler = LossScaler(self.config.loss_scale) if kind == "own" else None
        self.window, self._ddp = Window(self.trained), None

    def check_block_runs(self) -> None:
        """Raise a TrainingError on all ranks if the passes of a sharded model ran different blocks on them."""
        if self.block_runs is None:
            return
        own = float(self.block_runs.digest)
        total, squares = self.world.sum([own, own * own])
        if squares * self.world.size != total * total:
            raise self.world.raised_on_all(TrainingError(DIFFERENT_BLOCKS))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the optimizer must hold after `prepare`.

        They are the trained weights, their masters, or stand-ins that have numbers only during an update.
        """
        return self.trained.named_parameters()

    def adopt(self, *optimizers: Optimizer) -> None:
        """Replace the model's weights in optimizers by their masters.

        `step` does this for you. Call it yourself before you load an optimizer's state: torch casts the state to the
        dtype of the weights, and in 16 bits most of it becomes zero.

        Raises:
            UserError: an optimizer holds weights that the model does not train, a weight was cast after `prepare`, or
                optimizer state was loaded in 16 bits.
        """
        if self.model is None:
            raise UserError(UNPREPARED)
        self.trained.follow_weights()
        for optimizer in optimizers:
            adopt(optimizer, self.trained, self.model.parameters())
            self._adopted[optimizer] = len(held_by([optimizer]))
            if self.trained.dtype in HALF and not self.trained.masters and not self.trained.rounding:
                self.say(lost_updates(self.trained, optimizer))

    def advance(self, reason: str) -> bool:
        """Switch to the next mode. Return False, and change nothing, if none is left.

        Weights, masters and the scaler become those of the new mode. Optimizers that the policy knows get the new
        parameters and keep their state. Wrap the model in DDP again afterwards.
        """
        before = dict(self.named_parameters())
        if not self.chain.advance(reason, entered=True):
            return False
        self.trained.clear_gradients()
        self.trained.restore_float32()
        self.skips_in_a_row = self.bad_losses_in_a_row = 0
        self._enter()
        after = dict(self.named_parameters())
        for optimizer in self._adopted:
            replace_parameters(optimizer, {id(held): after[name] for name, held in before.items()})
            drop_scaler_marks([optimizer])
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the mode, its reason, the counts of skips, the scaler, and the masters or the count of updates."""
        return {
            "mode": self.chain.name,
            "reason": self.chain.reason,
            "history": list(self.chain.history),
            "skips_in_a_row": self.skips_in_a_row,
            "bad_losses_in_a_row": self.bad_losses_in_a_row,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "masters": self.trained.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. Load the model's weights first.

        Raises:
            UserError: the state belongs to another mode.
            CheckpointError: its masters belong to other weights, or its updates were rounded in another way.
        """
        if state["mode"] != self.chain.name:
            raise other_mode(state["mode"], self.chain.name)
        self.chain.history = list(state["history"])
        self.skips_in_a_row, self.bad_losses_in_a_row = state["skips_in_a_row"], state["bad_losses_in_a_row"]
        self.trained.load_state_dict(state["masters"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
