"""The settings of an import, which are the options of `rawloop import`."""

from dataclasses import dataclass
from typing import Literal

from rawloop.errors import UserError


@dataclass(frozen=True)
class ImportConfig:
    """What is imported, and how.

    Args:
        source: a folder or file; its layout is told by its content (docs/data.md).
        output: folder for train.jsonl, eval.jsonl and import.json.
        eval: share of the samples for the evaluation; 0 for none.
        split: evaluate on whole speakers, if there are several (speaker), or on single samples (sample).
        seed: another seed chooses other samples for the evaluation.
        root: where relative paths of clips start, and the folder that they must not leave. Default: that of the source.
        copy: copy the clips into the output.
        force: replace the files of an earlier import.
    """

    source: str
    output: str
    eval: float = 0.05
    split: Literal["speaker", "sample"] = "speaker"
    seed: int = 0
    root: str | None = None
    copy: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.eval < 1:
            raise UserError(f"--eval is {self.eval:g}: it is a share of the samples, from 0 (none) to below 1")
