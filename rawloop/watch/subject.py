"""What a watch looks at: the objects of a loop, one step of it, and its passes, which can be run again."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.dist import World
from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.guard import Guard


@dataclass
class Subject:
    """The objects under watch.

    Args:
        model: the bare model, outside DDP and torch.compile.
        optimizers: may be empty.
        scaler: torch's GradScaler, rawloop's, or anything with `get_scale()`; None without one.
        named: returns the parameters that the optimizers hold, by name. With float32 masters these are not the model's.
        world: the ranks.
        config: the settings.
        compiled: torch.compile has compiled the model or a part of it. Hooks on its modules would compile it again.
        guard: shields the user's calls from errors of a detector's hooks in them.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    scaler: Any
    named: Callable[[], Iterable[tuple[str, nn.Parameter]]]
    world: World = field(default_factory=World.current)
    config: WatchConfig = field(default_factory=WatchConfig)
    compiled: bool = False
    guard: Guard = field(default_factory=Guard)

    @property
    def is_scaled(self) -> bool:
        """Whether there is a scaler, and it is enabled."""
        return self.scaler is not None and bool(getattr(self.scaler, "is_enabled", lambda: True)())

    def loss_scale(self) -> float:
        """Return the scaler's scale, 1.0 without one. With torch's GradScaler this waits for the device."""
        if self.scaler is None:
            return 1.0
        return float(self.scaler.get_scale() if hasattr(self.scaler, "get_scale") else self.scaler.scale)


class Pass(NamedTuple):
    """One forward and backward pass, which can be run again.

    Args:
        inputs: a nest of tensors (dicts, lists, tuples, dataclasses): the batch, and other tensors that do not come
            from the model. `rawloop.watch.nest` maps over it.
        forward: called with `inputs`, or with a nest of the same structure and shapes, returns the tensor from which
            backward starts, multiplied by the loss scale, as it was in training (autocast and all). It draws from the
            global random streams and changes nothing but `.grad` (through backward) and moving buffers.
        rng: `seed.capture_rng()` before the pass; empty if unknown.
        ids: the names of the samples, one for each row; empty if unknown.
        scale: the loss scale.
    """

    inputs: Any
    forward: Callable[[Any], Tensor]
    rng: dict[str, Any]
    ids: tuple[str, ...] = ()
    scale: float = 1.0


@dataclass
class Facts:
    """What the hooks in a foreign loop have seen since the last update. Lines are those of the user's code.

    Args:
        calls: calls of the model with gradients.
        evaluating: calls of them that found the model in evaluation mode.
        backwards: backward passes.
        scaled: backward passes whose loss the scaler had multiplied.
        optimizer: the optimizer whose update this is, as `AdamW` or `AdamW (2)`.
        step_line: the line that asked for the update.
        through_scaler: it is made by `scaler.step`.
        unscaled: `scaler.unscale_` was called for its gradients.
        written: what wrote to gradients while they were scaled: a line, or "code that is not seen".
        left_over: it applies gradients that hold those of the optimizer's update before.
        zeroed: the line of a `zero_grad` after the last backward pass.
        scale_moved: the line of a `scaler.update` after a backward pass and before an attempt to step.
        idle: the optimizer was stepped without a backward pass since its last step.
        stepped: the ids of the optimizers that were stepped.
        inside_backward: the optimizer was stepped by hooks while the backward pass ran.
        lr_moved: the learning rate has changed since an update that the scaler skipped.
    """

    calls: int = 0
    evaluating: int = 0
    backwards: int = 0
    scaled: int = 0
    optimizer: str = ""
    step_line: str = ""
    through_scaler: bool = False
    unscaled: bool = False
    written: str = ""
    left_over: bool = False
    zeroed: str = ""
    scale_moved: str = ""
    idle: bool = False
    stepped: set[int] = field(default_factory=set)
    inside_backward: bool = False
    lr_moved: bool = False


@dataclass
class StepRecord:
    """One step, as far as it has come. A number that is not measured is None.

    Args:
        step: counted from 0: the update that this step makes. A skipped step keeps its number.
        batch: what the user named as the batch; a nest of tensors.
        ids: the names of its samples, one for each row; empty if unknown.
        passes: the forward and backward passes so far, since the last update.
        loss: the sum of the losses of its backward passes, unscaled.
        grad_norm: the L2 norm of all gradients, unscaled.
        scale: the loss scale of its gradients.
        scales: the scale of the gradients of an optimizer, by its id, where it differs: the scaler has not come to it.
        applied: whether the optimizer has applied an update; None before it is known.
        seconds: the duration of the step.
        data_seconds: the wait for data before it.
        why_no_passes: why some of its backward passes cannot be run again; empty if all can.
        facts: what the hooks have seen; empty inside rawloop's own run.
        probing: whether this step takes the costly looks (each `WatchConfig.every` steps, and after a skip).
    """

    step: int
    batch: Any = None
    ids: tuple[str, ...] = ()
    passes: list[Pass] = field(default_factory=list)
    loss: float | None = None
    grad_norm: float | None = None
    scale: float = 1.0
    scales: dict[int, float] = field(default_factory=dict)
    applied: bool | None = None
    seconds: float | None = None
    data_seconds: float | None = None
    why_no_passes: str = ""
    facts: Facts = field(default_factory=Facts)
    probing: bool = False


class Detector:
    """Looks at a subject and yields findings. A method that a detector does not define yields none.

    Every method may read from the device only if `record.probing`, or from numbers that the record has.
    """

    def start(self, subject: Subject) -> Iterable[Finding]:
        """Look before the first step."""
        return ()

    def batch(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at a batch, before its forward pass."""
        return ()

    def gradients(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look at the gradients of the window, before its update. They are multiplied by `record.scale`, or by 1 if
        `unscale_` was called (`record.scale` is then 1).
        """
        return ()

    def end(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Look after the update, or after a step without one."""
        return ()

    def failed(self, subject: Subject, record: StepRecord) -> Iterable[Finding]:
        """Explain an exception that has left the step."""
        return ()

    def finish(self, subject: Subject) -> Iterable[Finding]:
        """Look at the end of the watch."""
        return ()
