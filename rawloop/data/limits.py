"""What a batch may hold, looked at on the CPU, where a wrong number still has a name.

A token or target beyond the model's tables is an IndexError without a sample on the CPU, and on a GPU it kills the
whole process with a device-side assert. A NaN among features is a skipped step, for ever. Both are found here, where
the batch is made, at the cost of one pass over its numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rawloop.contracts import IGNORE, Batch

TOKENIZER = "use the tokenizer and codec that belong to the model"


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    `embeddings` is the number of ids that `input_ids` may hold (None: not known), `classes` that of each stream's
    targets.
    """

    embeddings: int | None
    classes: Mapping[str, int]

    def fault(self, batch: Batch) -> str | None:
        """Say what is wrong with a batch that is on the CPU, or None."""
        faults = [self._fault_of_input(name, values) for name, values in batch.inputs.items()]
        faults += [self._fault_of_stream(stream, batch) for stream in self.classes]
        return next((fault for fault in faults if fault is not None), None)

    def _fault_of_input(self, name: str, values: Tensor) -> str | None:
        if not values.numel():
            return None
        if values.is_floating_point():
            if bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):  # a NaN is both the least and the most
                return None
            return f"its '{name}' has numbers that are not finite: mend what they are made of, or leave the sample out"
        if name != "input_ids" or self.embeddings is None:
            return None
        least, most = (int(value) for value in torch.aminmax(values))
        if least >= 0 and most < self.embeddings:
            return None
        return (
            f"its 'input_ids' has the token {least if least < 0 else most}, and the model's embedding knows 0 to "
            f"{self.embeddings - 1}: {TOKENIZER}"
        )

    def _fault_of_stream(self, stream: str, batch: Batch) -> str | None:
        labels = batch.labels.get(stream)
        if labels is None or stream not in batch.targets:
            return f"it has no labels or no count of targets for the stream '{stream}': collate must give both"
        targets = labels.targets[labels.targets != IGNORE]
        if len(targets) != batch.targets[stream]:
            return (
                f"it counts {batch.targets[stream]} targets of the stream '{stream}', and {len(targets)} of its labels "
                f"are not {IGNORE}: collate must count what is scored"
            )
        if not len(targets):
            return None
        least, most = (int(value) for value in torch.aminmax(targets))
        if least < 0 or most >= self.classes[stream]:
            return (
                f"a target of the stream '{stream}' is {least if least < 0 else most}, and the model can say 0 to "
                f"{self.classes[stream] - 1}: {TOKENIZER}; what is no target is {IGNORE}"
            )
        if int(labels.positions.min()) < 0:
            return f"a target of the stream '{stream}' is the first of all: nothing stands before it to predict it from"
        return None


def no_fault(batch: Batch) -> str | None:
    """What is said where no limits are known."""
    return None
