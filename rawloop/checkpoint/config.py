"""When checkpoints are written, and how many are kept."""

from dataclasses import dataclass

from rawloop.errors import UserError


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept.

    Args:
        save_every: optimizer steps between two checkpoints; 0 saves at the end only.
        keep_last: how many of the newest checkpoints to keep; 0 keeps all. The best one and those of `keep_every` are
            never deleted and not counted.
        keep_every: never delete a checkpoint whose step is a multiple of this; 0 has no multiples.
        save_at_end: save after the last step, whatever `save_every` says.
        asynchronous: copy the state to host memory, and train while it is written. Off: training waits until the
            checkpoint is on the disk, which needs no memory for a copy.
        max_failures: end the run when this many saves in a row have failed. The last save of a run must succeed.
    """

    save_every: int = 500
    keep_last: int = 3
    keep_every: int = 0
    save_at_end: bool = True
    asynchronous: bool = True
    max_failures: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("save_every", "keep_last", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.max_failures < 1:
            raise UserError(f"checkpoint.max_failures is {self.max_failures}: it must be 1 or more")
