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
from rawloop.watch.marks import Line


@dataclass
class Subject:
    """The objects under watch."""

    model: nn.Module  # the bare model, outside DDP and torch.compile
    optimizers: Sequence[Optimizer]  # may be empty
    scaler: Any  # torch's GradScaler, rawloop's, or anything with `get_scale()`; None without one
    named: Callable[[], Iterable[tuple[str, nn.Parameter]]]  # those that the optimizers hold: may be masters, stand-ins
    world: World = field(default_factory=World.current)
    config: WatchConfig = field(default_factory=WatchConfig)
    compiled: bool = False  # torch.compile has compiled a part of the model, and would do so again for each hook on it
    guard: Guard = field(default_factory=Guard)  # shields the user's calls from errors of hooks in them
    writes: dict[int, int] = field(default_factory=dict)  # of the weights when they were last updated, by id

    def note_writes(self) -> None:
        """Note how often torch has written each weight that an optimizer holds."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.writes = {id(weight): weight._version for group in groups for weight in group["params"]}

    def written_outside(self, weight: Tensor) -> bool:
        """Whether torch has written a weight since the last update. It does not count writes through `.data`."""
        return self.writes.get(id(weight), weight._version) != weight._version

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
    """What the hooks in a foreign loop have seen since the last update. Lines are those of the user's code."""

    calls: int = 0  # of the model, with gradients
    evaluating: int = 0  # of these, with the model in evaluation mode
    backwards: int = 0  # backward passes
    scaled: int = 0  # of these, with a loss that the scaler had multiplied
    unscaled: bool = False  # scaler.unscale_ was called
    optimizer: str = ""  # whose update this is, as `AdamW` or `AdamW (2)`
    stepped: set[int] = field(default_factory=set)  # the ids of the optimizers that were stepped
    step_line: Line | None = None  # asked for the update
    through_scaler: bool = False  # the update is made by scaler.step
    inside_backward: bool = False  # it is made by hooks while the backward pass runs
    idle: bool = False  # the optimizer was stepped without a backward pass since its last step
    left_over: bool = False  # it applies gradients that hold those of its update before
    written: Line | None = None  # wrote to gradients while they were scaled; an empty line if it was not seen
    zeroed: Line | None = None  # zero_grad after the last backward pass
    scale_moved: Line | None = None  # scaler.update after a backward pass, and before an attempt to step

    @property
    def is_scaled(self) -> bool:
        """Whether the gradients are multiplied by the loss scale."""
        return self.scaled > 0 and not self.unscaled


@dataclass
class StepRecord:
    """One step, as far as it has come. A number that is not measured is None."""

    step: int  # counted from 0: the update that this step makes. A skipped step keeps its number
    batch: Any = None  # what the user named as the batch; a nest of tensors
    ids: tuple[str, ...] = ()  # the names of its samples, one for each row; empty if unknown
    passes: list[Pass] = field(default_factory=list)  # since the last update
    loss: float | None = None  # the sum of the losses of its backward passes, unscaled
    grad_norm: float | None = None  # the L2 norm of all gradients, unscaled
    scale: float = 1.0  # by which the gradients are multiplied
    scales: dict[int, float] = field(default_factory=dict)  # that of an optimizer, by its id, where it differs
    applied: bool | None = None  # whether the optimizer has applied an update; None before it is known
    seconds: float | None = None  # the duration of the step
    data_seconds: float | None = None  # the wait for data before it
    why_no_passes: str = ""  # why some of its backward passes cannot run again; empty if all can
    facts: Facts = field(default_factory=Facts)  # empty inside rawloop's own run
    probing: bool = False  # it takes the costly looks: when `WatchConfig.is_due`, and after a skip


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
        """Look at the gradients of the window, before its update; they are multiplied by `record.scale`."""
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
