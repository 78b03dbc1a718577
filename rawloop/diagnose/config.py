"""The settings of the checks before step 0."""

from dataclasses import dataclass, field
from typing import Literal

from rawloop.errors import UserError

Finding = Literal["leak", "dead", "blind", "mismatch"]


@dataclass
class ChecksConfig:
    """Checks of labels, first loss and causality before step 0 of a new run.

    Args:
        enabled: run the checks. A resumed run is not checked again.
        batches: micro-batches of training data that each process checks.
        expect_chance: do not warn if the first loss is that of guessing, as with random weights.
        allow_missing_targets: train even if a stop token is never a target, so generation does not learn to stop.
        allow: findings that do not stop the run: leak, dead, blind, and mismatch (losses that are not the cross-entropy
            of the logits, such as weighted losses, or losses with a further term).
    """

    enabled: bool = True
    batches: int = 4
    expect_chance: bool = False
    allow_missing_targets: bool = False
    allow: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise UserError(
                f"checks.batches is {self.batches}: it must be 1 or more; set checks.enabled to false for no checks"
            )
