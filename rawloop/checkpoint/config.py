"""When checkpoints are written, and how many are kept."""

from dataclasses import dataclass

from rawloop.errors import UserError


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept.

    Args:
        save_every: optimizer steps between two checkpoints; 0 writes none but the one at the end.
        keep_last: newest checkpoints to keep; 0 keeps all. The best one and those of `keep_every` are never deleted and
            not counted.
        keep_every: never delete the checkpoint of a step that is a multiple of this; 0 spares none.
        save_at_end: write a checkpoint after the last step, whatever `save_every` says.
        asynchronous: copy the state in host memory and let training go on while it is written. Off: train on when it
            is on the disk, which saves the memory of the copy.
        max_failures: end the run when this many saves in a row could not be written. The last one of a run must be.
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
