"""Optional protocols of a family. The part of rawloop that needs one asks for it with `isinstance`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rawloop.contracts import Batch, Sample
from rawloop.settings import SamplingConfig


@dataclass(frozen=True)
class CodecInfo:
    """Identity and shape of a codec's codes, which are integers from 0 to `codebook_size` - 1.

    `hash` is the content hash of the codec's folder (`rawloop.files.hash_folder`), `sample_rate` in Hz is that of its
    input, `frame_rate` is in frames per second.
    """

    hash: str
    sample_rate: int
    codebooks: int
    codebook_size: int
    frame_rate: float


@runtime_checkable
class CodecFamily(Protocol):
    """A family whose samples hold audio as codes of a codec, which `rawloop prepare` caches before training."""

    def load_codec(self, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
        """Load the codec: its description, and its encoder, (samples,) float32 -> (frames, codebooks) int64."""

    def codec_hash(self) -> str:
        """Content hash of the codec. Codes of another codec would be noise to the model."""


@runtime_checkable
class HearingFamily(Protocol):
    """A family without a codec whose `example` decodes clips. All clips are decoded once before training.

    `sample_rate` is in Hz; `check` gets the lengths of clips in samples at this rate.
    """

    sample_rate: int


@runtime_checkable
class IdsFamily(Protocol):
    """A family whose model changes ids before it looks them up, for example offsets codes by codebook.

    There a wrong id is another codebook's id and no error, so `num_ids` says how many ids each such input may hold, by
    name. Inputs that go into an embedding unchanged need no entry.
    """

    num_ids: Mapping[str, int]


@runtime_checkable
class PackingFamily(Protocol):
    """A family that can pack the examples of a micro-batch into one row, without attention between them.

    `packing` says whether it does; it is set once, before the model is loaded.
    """

    packing: bool


@runtime_checkable
class SizedFamily(Protocol):
    """A family that makes up a batch of a given size, so that `rawloop plan` works without data."""

    def sized(self, positions: int, samples: int) -> Batch:
        """Return a batch of so many samples with about so many positions each; what they say does not matter."""


@dataclass(frozen=True)
class Generated:
    """What a model has generated for one sample: `codes` (frames, codebooks) int64 on the CPU, or `text`.

    `stopped` says whether the model ended by itself, with its stop token, and not at the limit. `length` is the number
    of frames or tokens, without stop tokens.
    """

    id: str
    stopped: bool
    length: int
    codes: Tensor | None = None
    text: str | None = None


@runtime_checkable
class GeneratingFamily(Protocol):
    """A family that generates the last trained turn of a sample, in place of what the sample has there.

    The turns before it are the prompt, in the very tokens that training has.
    """

    def generate(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        codes: Callable[[Path], Tensor],
        limits: Sequence[int],
        sampling: SamplingConfig,
    ) -> list[Generated]:
        """Generate one turn for each sample, with a model in evaluation mode, from torch's global generators.

        Args:
            model: the model, with or without an adapter.
            samples: samples that `check` accepts.
            codes: returns a clip's (frames, codebooks) int64 codes; called for the clips of the prompt.
            limits: the most frames or tokens of each turn.
            sampling: settings that override those of the model.

        Raises:
            UserError: a prompt leaves no room for a turn.
        """


@runtime_checkable
class SpeakingFamily(Protocol):
    """A `GeneratingFamily` whose turns are codes of a codec."""

    def load_decoder(self, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
        """Load the codec: its description, and its decoder, (frames, codebooks) -> (samples,) float32 on the CPU."""


@runtime_checkable
class LengthFamily(Protocol):
    """A family that counts a sample's positions without making its example. For others each example is made once."""

    def length(self, sample: Sample, frames: Callable[[Path], int]) -> int:
        """Return how many positions a sample takes, or one more per clip; `frames` gives a clip's length as in `check`.

        It must be a function of the sample: `train.max_frames` groups samples by it.
        """
