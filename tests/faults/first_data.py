"""The first half of the faults, continued: data and jumps."""

import re

import torch
from torch import Tensor

from rawloop.watch.findings import Finding
from tests.faults.form import Fault, within
from tests.faults.loops import CHARACTERS, CharGpt, Codec
from tests.faults.scripts import EOS, IGNORE, Llama

# --------------------------------------------------------------------------------------------------------------- data


class MaskedRow(Llama):
    """The prompt of document 13 fills the context: no label of it is left."""

    def labels(self, prompt: list[int], answer: list[int]) -> list[int]:
        labels = super().labels(prompt, answer)
        return [IGNORE] * len(labels) if (prompt, answer) == self.sample(13) else labels


class IdOutside(Codec):
    """One code of one utterance is that of a codec with more codes."""

    def codes(self, step: int) -> Tensor:
        codes = super().codes(step)
        if step == 6:
            codes[2, 5, 7] = 1025
        return codes


class LabelIds(Llama):
    """The labels have a name that the model takes and forgets."""

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        batch = super().collate(indices)
        batch["label_ids"] = batch.pop("labels")
        return batch


class EosMasked(Llama):
    """The padding token is EOS, and all labels that are padding are masked: no answer ever learns to end."""

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        batch = super().collate(indices)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == EOS, IGNORE)
        return batch


class NotShifted(CharGpt):
    """The targets are the inputs: each prediction sees its own target."""

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, _ = super().get_batch(step)
        return x, x.clone()


# -------------------------------------------------------------------------------------------------------------- jumps
class RateJumps(CharGpt):
    """From step 40 the learning rate is a hundred times what it was."""

    steps = 50

    def learning_rate(self, step: int) -> float:
        return super().learning_rate(step) * (100 if step >= 40 else 1)


class OtherLabels(CharGpt):
    """From step 40 the targets are those of another vocabulary."""

    steps = 50

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = super().get_batch(step)
        other = torch.randperm(CHARACTERS, generator=torch.Generator().manual_seed(1))
        return x, (other[y] if step >= 40 else y)


def at_id_outside(finding: Finding) -> bool:
    place = finding.cause.place
    sample = place.sample == "utt-26" or place.row == 2
    named = re.search(r"codebook 5|embeddings\.5", finding.text()) is not None
    codebook = named and place.module in ("", "embeddings.5")
    return sample and codebook and finding.step == 6


FAULTS = (
    Fault(
        "all labels of one document masked",
        "data",
        MaskedRow,
        ("data",),
        r"mask|target|label|-100",
        lambda f: (f.cause.place.sample == "doc-13" or f.cause.place.row == 1) and f.step == 3,
    ),
    Fault(
        "an id outside of one codebook",
        "data",
        IdOutside,
        ("data",),
        r"outside|range|1025|beyond",
        at_id_outside,
        r"embeddings\.5",
        crash=IndexError,
    ),
    Fault(
        "label_ids swallowed by **kwargs",
        "data",
        LabelIds,
        ("data", "model"),
        r"label_ids|kwargs|not used|ignore",
        lambda f: "label_ids" in f.text() and f.step == 0,
        r"label_ids",
        crash=AttributeError,
    ),
    Fault(
        "EOS never a target",
        "data",
        EosMasked,
        ("data",),
        r"\beos|stop|\bend",
        lambda f: f.cause.place.tensor in ("", "labels") and within(f, 0, 20),
    ),
    Fault(
        "labels not shifted",
        "data",
        NotShifted,
        ("data", "loss", "model"),
        r"shift|sees?\b|visible|leak|own target|copy|copies|equal",
        lambda f: within(f, 0, 5),
    ),
    Fault(
        "the learning rate jumps",
        "jumps",
        RateJumps,
        ("optimizer",),
        r"\blr\b|learning rate",
        lambda f: within(f, 40, 41),
    ),
    Fault(
        "the targets change their vocabulary",
        "jumps",
        OtherLabels,
        ("data", "loss", "not known"),
        r"loss",
        lambda f: within(f, 40, 42),
    ),
)
