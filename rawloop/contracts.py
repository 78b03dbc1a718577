"""The types that parts hand to each other, so that parts need not import each other.

data -> `Sample` -> family -> `Example` -> family -> `Batch` -> family -> `StreamLoss` -> loop and evaluator.
The checkpoint manager knows only `Stateful` and `FolderState`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rawloop.errors import UserError

IGNORE = -100  # torch's ignore_index: this position is no target


@dataclass(frozen=True)
class Text:
    """A piece of text inside a turn."""

    text: str


@dataclass(frozen=True)
class Audio:
    """A clip inside a turn, by its resolved path. The path of a segment includes its times (`rawloop.audio`)."""

    path: Path


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    `role` is system, scene, user, assistant or tool; or text, for plain text without a speaker, alone in its sample.
    Only `trained` turns have targets; others are context. `fields` are further keys for the template (`tool_calls`).
    """

    role: str
    parts: tuple[Text | Audio, ...]
    trained: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The texts of the turn, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def clips(self) -> list[Audio]:
        """The clips of the turn, in order."""
        return [part for part in self.parts if isinstance(part, Audio)]


@dataclass(frozen=True)
class Sample:
    """One conversation of a data set, independent of its file format and of the model.

    `source` is its place in the data file (`metadata.json samples[3]`), for messages. `extra` holds the keys of the
    record that rawloop does not read. `tools` are the functions that the chat template lists for the model.
    """

    id: str
    turns: tuple[Turn, ...]
    task: str | None = None
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()

    @property
    def is_text(self) -> bool:
        """Whether it is plain text. Any other sample is a conversation."""
        return [turn.role for turn in self.turns] == ["text"]

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Prefix the message of a UserError with the id and source of this sample."""
        try:
            yield
        except UserError as error:
            error.args = (f"sample '{self.id}' ({self.source}): {error}",)
            raise

    def audio_paths(self) -> list[Path]:
        """All clips of the conversation, references included, in order of appearance."""
        return [clip.path for turn in self.turns for clip in turn.clips]


class Labels(NamedTuple):
    """The targets of one stream in a batch.

    `positions` (targets,) int64 are the positions that predict, already shifted, as indices into the hidden states
    flattened to (batch * sequence, hidden). `targets` is (targets,) or (targets, codebooks) int64, with -100 where a
    codebook has no target.
    """

    positions: Tensor
    targets: Tensor

    @classmethod
    def shifted(cls, labels: Tensor) -> "Labels":
        """Return the targets of (batch, sequence) labels that are not shifted. Position 0 of a row must be -100."""
        flat = labels.flatten()
        positions = torch.nonzero(torch.ne(flat, IGNORE)).squeeze(1)
        return cls(positions - 1, flat[positions])


@dataclass
class Batch:
    """One micro-batch: the inputs of the model, the targets, and the ids of the samples.

    `inputs` are keyword arguments of the model's forward. `targets` counts the targets of each stream as Python ints;
    the collator counts them on the CPU, so that no step waits for the device to count. `work` counts, for the speed,
    `positions`, `tokens` (those that are not padding) and `audio` (seconds, or frames of codes); it may be empty.
    """

    inputs: dict[str, Tensor]
    labels: dict[str, Labels]
    targets: dict[str, int]
    ids: list[str]
    work: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`. Copies from pinned memory are asynchronous."""
        # An asynchronous copy from pageable memory could read it after it is reused.
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory. torch's DataLoader calls this with `pin_memory=True`."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        labels = {stream: Labels(*map(change, pair)) for stream, pair in self.labels.items()}
        return replace(self, inputs=inputs, labels=labels)


class StreamLoss(NamedTuple):
    """Loss of one stream in one micro-batch: a sum in nats over `targets` targets.

    `total` is a differentiable float32 scalar. `parts` (parts,) float32 splits the sum (per codebook), detached, with
    `part_targets` targets each; None for a stream without parts.
    """

    total: Tensor
    targets: int
    parts: Tensor | None = None
    part_targets: tuple[int, ...] = ()

    @classmethod
    def of_mean(cls, mean: Tensor, targets: int) -> "StreamLoss":
        """The loss of a model or criterion that returns the mean over its targets."""
        return cls(mean * targets, targets)


class Special(NamedTuple):
    """A special token of a stream, such as its stop token. A `required` one must occur among the targets.

    In a stream with codebooks, every codebook must have `id` as a target. With `roles`, each piece of these roles must
    end with the token; without them, some sample must have it.
    """

    stream: str
    name: str
    id: int
    required: bool
    roles: tuple[str, ...] = ()


class Piece(NamedTuple):
    """A run of positions of an example, for display.

    `role` is that of the turn, `text` decoded text or a clip's number of frames. `positions` counts positions of the
    model's sequence, `targets` the targets of `stream` among them.
    """

    role: str
    stream: str
    text: str
    positions: int
    targets: int


class Context(NamedTuple):
    """A batch in which the inputs before some predictions are changed, but not those at their own positions.

    `later` marks these predictions: a bool (targets,) per stream.
    """

    batch: Batch
    later: dict[str, Tensor]


class Perturbed(NamedTuple):
    """A batch with changed inputs, for the causality probe.

    `batch` is changed from some position of each row on. `earlier` marks the predictions that must stay the same: a
    bool (targets,) per stream, true if the target's token is at the first changed position or before it. Locate that
    token by its value: by `Labels.positions`, unshifted labels go unnoticed. `contexts` are batches with changes that
    must change later predictions. Their names say what is changed, such as tokens or clips.
    """

    batch: Batch
    earlier: dict[str, Tensor]
    contexts: Mapping[str, Context]


Losses = Callable[[nn.Module, Batch], dict[str, StreamLoss]]


class Family(Protocol):
    """Everything that rawloop knows of one kind of model. `families/<name>/` implements it.

    The methods from `logits` on are optional; see `has`. Checks that need a missing method are left out with a notice.
    """

    streams: Sequence[str]
    stream_weights: Mapping[str, float]

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model from its configured place, or from `path`, in its stored dtype, on the CPU."""

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained, before training; `frames(path)` is the length of a prepared clip.

        Raises:
            BadSample: the sample is too long or has a bad clip. `data.on_bad_sample` may leave it out.
            UserError: any other mistake.
        """

    def example(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Any:
        """Encode one sample; `codes(path)` returns a clip's (frames, codebooks) int64 codes.

        It may draw from the global generators of torch (CPU), Python and numpy, which are seeded per sample.
        """

    def collate(self, examples: list[Any]) -> Batch:
        """Pad examples to one micro-batch and count its targets."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Run the model and return the loss sum and target count of every stream, also of a stream without targets."""

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model and return the float32 logits of every target, by stream."""

    def probe(self) -> Batch:
        """Return a fixed small batch, to compare two versions of a model by their logits."""

    def special_targets(self) -> Sequence[Special]:
        """Return the special tokens that must be learnt, and others that the census should show."""

    def pieces(self, example: Any) -> Sequence[Piece]:
        """Split an example into pieces, in order. Their targets add up to those that `collate` counts."""

    def chance(self) -> Mapping[str, float]:
        """Return the loss of uniform guesses, nats per target, by stream."""

    def perturb(self, batch: Batch) -> Perturbed:
        """Change all inputs from the middle of each row's targets on; and, in another batch, all inputs before it.

        Where streams have targets at different places, the rows take turns: one is split in the middle of each stream.
        """


def has(family: Family, *methods: str) -> bool:
    """Whether a family implements these optional methods."""
    found = (getattr(type(family), name, None) for name in methods)
    return all(callable(method) and method is not vars(Family).get(name) for name, method in zip(methods, found))


@runtime_checkable
class Stateful(Protocol):
    """An object with a state for `state/` of a checkpoint: nested dicts and lists of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, or raise if any of it cannot be restored."""


@runtime_checkable
class FolderState(Protocol):
    """An object that writes its own files into a folder of the checkpoint (a PEFT adapter, a whole model)."""

    folder: str

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        """Capture the current state; return a function that writes it into an existing empty folder.

        With `copy`, another thread calls that function while training goes on, so everything that training changes
        must be copied before `snapshot` returns. Rank 0 calls it; all ranks if an attribute `is_sharded` is true.
        """

    def load(self, folder: Path) -> None:
        """Restore from the files in `folder`, or raise."""
