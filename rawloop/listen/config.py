"""The settings of listening while a model trains."""

import math
from dataclasses import dataclass, field

from rawloop.errors import UserError
from rawloop.settings import SamplingConfig


@dataclass
class ListenConfig:
    """Clips that the model generates at evaluations, as files and as metrics. Off unless there are prompts.

    Args:
        samples: prompts from the first so many samples of data.eval, each without its last trained turn.
        prompts: more prompts from a file: a text on each line, or a .jsonl or .json file with records as in data.train.
        every: listen at every n-th evaluation, and at the last.
        longest: stop a clip at so many times the length of the sample's own clip.
        max_seconds: stop any clip there, in seconds.
        max_tokens: stop any text there, in tokens.
        seed: seed of the sampling, the same at every evaluation.
        transcriber: measures the share of wrong characters: a folder or hub id of a speech recognition model of
            transformers; or package.module:function, called with a waveform (samples,) and its rate in Hz, which
            returns text.
        similarity: package.module:function, called with a generated waveform, a clip of the speaker and their rate in
            Hz, which returns a number; its mean is a metric.
        sampling: how tokens are drawn.
    """

    samples: int = 0
    prompts: str | None = None
    every: int = 1
    longest: float = 2.0
    max_seconds: float = 20.0
    max_tokens: int = 128
    seed: int = 0
    transcriber: str | None = None
    similarity: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for name in ("every", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"listen.{name} is {getattr(self, name)}: it must be 1 or more")
        if self.samples < 0:
            raise UserError(f"listen.samples is {self.samples}: it must be 0 (none) or more")
        if not 1 <= self.longest < math.inf or not 0 < self.max_seconds < math.inf:
            raise UserError(
                f"listen.longest is {self.longest} and listen.max_seconds is {self.max_seconds}: they must be at least "
                "1 and above 0"
            )
        if self.similarity and ":" not in self.similarity:
            raise UserError(f"listen.similarity is '{self.similarity[:100]}': name a function, package.module:function")

    @property
    def enabled(self) -> bool:
        """Whether there are prompts."""
        return bool(self.samples or self.prompts)
