"""The few types that parts hand to each other, so that parts need not import each other.

data -> `Sample` -> family -> `Example` -> family -> `Batch` -> family -> `StreamLoss` -> loop and evaluator.
`Stateful` and `FolderState` are all that the checkpoint manager knows of anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """A clip inside a turn, by its resolved path, with times if it is a segment of its file (`rawloop.segments`).

    Its codes come from the cache that `rawloop prepare` wrote.
    """

    path: Path


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    `role` is system, scene, user, assistant or tool, or text: plain text without a speaker, alone in its sample. Only a
    turn with `trained` set has targets: reference turns and prompts are context. `fields` are further keys of the
    message that a chat template may read, such as `tool_calls` and `reasoning_content`.
    """

    role: str
    parts: tuple[Text | Audio, ...]
    trained: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The texts of the turn as one."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Sample:
    """One conversation of a data set, independent of the file format it came from and of any model.

    `source` says where it stands (`metadata.json samples[3]`), for messages. `extra` holds every key of the record
    that rawloop does not read itself. `tools` are the functions that a chat template tells the model of.
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
        """Let a refusal begin with the sample that it is about."""
        try:
            yield
        except UserError as error:
            error.args = (f"sample '{self.id}' ({self.source}): {error}",)
            raise

    def audio_paths(self) -> list[Path]:
        """All clips of the conversation, in order of appearance, references included."""
        return [part.path for turn in self.turns for part in turn.parts if isinstance(part, Audio)]


class Labels(NamedTuple):
    """The targets of one stream in a batch.

    `positions` (targets,) int64 indexes the hidden states flattened to (batch * sequence, hidden): the positions
    whose *prediction* is scored, already shifted. `targets` is (targets,) or (targets, codebooks) int64, with -100
    where a codebook has no target.
    """

    positions: Tensor
    targets: Tensor

    @classmethod
    def shifted(cls, labels: Tensor) -> "Labels":
        """Return the targets of (batch, sequence) labels that stand at their own tokens: each is predicted one before.

        Position 0 of a row is predicted by nothing and must be -100.
        """
        flat = labels.flatten()
        positions = torch.nonzero(torch.ne(flat, IGNORE)).squeeze(1)
        return cls(positions - 1, flat[positions])


@dataclass
class Batch:
    """One micro-batch: what the model takes, what it must predict, and whose samples these are.

    `inputs` are keyword arguments of the model's forward, by explicit name. `targets` counts targets per stream as
    Python ints (counted by the collator, on the CPU), so that no step needs a device sync to count.
    """

    inputs: dict[str, Tensor]
    labels: dict[str, Labels]
    targets: dict[str, int]
    ids: list[str]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with every tensor on `device`; copies from pinned memory do not block the host."""
        return self._map(lambda tensor: _copied(tensor, device))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by torch's DataLoader when pinning is on)."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        labels = {stream: Labels(*map(change, pair)) for stream, pair in self.labels.items()}
        return Batch(inputs, labels, self.targets, self.ids)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy from pageable memory that does not block may read the memory after it has been given to another tensor.
    return tensor.to(device, non_blocking=tensor.is_pinned())


class StreamLoss(NamedTuple):
    """Loss of one stream in one micro-batch: a sum in nats and the number of targets it runs over.

    `total` is a differentiable float32 scalar. `parts` (parts,) float32 is the same sum split up (per codebook),
    detached, with `part_targets` targets each; None where a stream has no parts.
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

    In a stream with codebooks `id` is looked for in each of them. `roles` are those of the pieces that end with it, if
    only some samples do (`text` and not `assistant`): it is missed where a sample has such a piece, and each must have
    it. Without any, some sample must have it.
    """

    stream: str
    name: str
    id: int
    required: bool
    roles: tuple[str, ...] = ()


class Piece(NamedTuple):
    """A run of positions of an example, for people: who says it, what it is, and how much of it is learnt.

    `role` is the turn's, `text` is as the tokenizer decodes it (or says how many frames a clip has), `positions` counts
    the positions of the model's sequence that it takes, `targets` the targets of `stream` that stand on them.
    """

    role: str
    stream: str
    text: str
    positions: int
    targets: int


class Context(NamedTuple):
    """A batch in which what stands before some predictions is another, and their own inputs are as they were.

    `later` has, per stream, a bool of (targets,): true for those predictions. They notice only what reaches them from
    other positions.
    """

    batch: Batch
    later: dict[str, Tensor]


class Perturbed(NamedTuple):
    """A batch whose inputs are other ones from some position of each row on, and others changed before it instead.

    `earlier` has, per stream, a bool of (targets,): true where a target's prediction may see only what stayed the same,
    which is where its own token stands no later than the first changed one. Find that token among the inputs by what it
    is, not by `Labels.positions`: only then do labels show that were not shifted.

    `contexts` says by name what is changed before predictions that must notice it, such as tokens, or clips.
    """

    batch: Batch
    earlier: dict[str, Tensor]
    contexts: Mapping[str, Context]


@dataclass(frozen=True)
class CodecInfo:
    """What identifies the codec that a family's `encode` runs, and what its codes look like.

    `hash` is the content hash of the codec's folder (`rawloop.hashing.hash_folder`), `sample_rate` in Hz of the
    waveforms it takes, `frame_rate` in frames per second. Codes are integers from 0 to `codebook_size` - 1.
    """

    hash: str
    sample_rate: int
    codebooks: int
    codebook_size: int
    frame_rate: float


Losses = Callable[[nn.Module, Batch], dict[str, StreamLoss]]


class Family(Protocol):
    """All that rawloop knows of one kind of model. `families/<name>/` implements it.

    The methods from `logits` on are optional. Without them something is not checked before step 0, not compared by
    `rawloop merge` or not shown by `rawloop inspect`, which each say so; see `has`.
    """

    streams: Sequence[str]
    stream_weights: Mapping[str, float]

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model from its configured place, or from `path`, in the dtype it is stored in, on the CPU."""
        ...

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained, before anything is; `frames(path)` gives a prepared clip's length.

        Raises:
            BadSample: it is too long, or a clip of it is no good: it may be left out.
            UserError: anything else that is wrong with it.
        """
        ...

    def example(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Any:
        """Encode one sample; `codes(path)` gives a clip's (frames, codebooks) int64 codes.

        It may draw at random, from the global streams of torch (CPU), python and numpy: they are seeded per sample.
        """
        ...

    def collate(self, examples: list[Any]) -> Batch:
        """Pad examples to one micro-batch and count its targets."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Run the model and return the loss sum and target count of every stream, of every one in every batch."""
        ...

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model and return the float32 logits of every target, by stream."""
        ...

    def probe(self) -> Batch:
        """A fixed little batch, for comparing two versions of a model by their logits."""
        ...

    def special_targets(self) -> Sequence[Special]:
        """The special tokens of every stream: those that must be learnt, and those that should show in a census."""
        ...

    def pieces(self, example: Any) -> Sequence[Piece]:
        """An example as people read it, in order; its targets add up to those that collating it counts."""
        ...

    def chance(self) -> Mapping[str, float]:
        """Loss of uniform guesses, nats per target, by stream."""
        ...

    def perturb(self, batch: Batch) -> Perturbed:
        """Change all inputs from the middle of each row's targets on, or before it.

        No earlier prediction may notice the one, and later ones must notice the other.

        Where streams have their targets at different places, rows take turns among them: the first row is cut in the
        middle of the first stream's targets, the second in the middle of the second's.
        """
        ...


def has(family: Family, *methods: str) -> bool:
    """Whether a family has these methods, which are optional."""
    found = (getattr(type(family), name, None) for name in methods)
    return all(callable(method) and method is not vars(Family).get(name) for name, method in zip(methods, found))


@runtime_checkable
class CodecFamily(Protocol):
    """A family whose samples hold audio as codes of a codec, which `rawloop prepare` caches before training."""

    def load_codec(self, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
        """Load the audio codec: what it is, and its encoder, (samples,) float32 -> (frames, codebooks) int64."""
        ...

    def codec_hash(self) -> str:
        """Content hash of the codec: codes of another one would be noise to the model."""
        ...


@runtime_checkable
class HearingFamily(Protocol):
    """A family without a codec, whose `example` decodes clips: they are all decoded once before training begins.

    `sample_rate` is in Hz; `check` is given the lengths of clips in samples at this rate.
    """

    sample_rate: int


@runtime_checkable
class IdsFamily(Protocol):
    """A family whose model works on ids before it looks them up, such as codes that it counts on from codebook to
    codebook: there a wrong id is another codebook's, and no error.

    `num_ids` is how many ids each such input may hold, by name. Inputs that go into an embedding as they are need none.
    """

    num_ids: Mapping[str, int]


@runtime_checkable
class PackingFamily(Protocol):
    """A family that can put the examples of a micro-batch into one row, where none of them sees another.

    `packing` says whether it does; it is set once, before the model is loaded.
    """

    packing: bool


@runtime_checkable
class Stateful(Protocol):
    """Something whose state goes into `state/` of a checkpoint: nested dicts and lists of tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, or raise: what cannot be restored is an error."""
        ...


@runtime_checkable
class FolderState(Protocol):
    """Something that writes files of its own into a folder of the checkpoint (a PEFT adapter, a whole model)."""

    folder: str

    def snapshot(self, copy: bool) -> Callable[[Path], None]:
        """Take what is to be saved, as it is now; what is returned writes it into a folder that exists and is empty.

        With `copy` it is written later, in another thread, while training goes on: all that training changes must be
        copied into host memory now.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore from the files in `folder`, or raise."""
        ...
