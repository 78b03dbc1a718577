"""A family of text models in which whatever comes of the sample `bad` is wrong, each class in another way.

Named in a config (`model.family: spoilt_family:Detached`) by tests that run real commands: the folder of this file is
on the path of the processes that they start.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rawloop.contracts import IGNORE, Batch, StreamLoss
from rawloop.families.causal_lm import CausalLM

BEYOND = 9999  # no token of any model here


class Spoilt(CausalLM):
    """Right for all samples but one."""

    def example(self, sample: Any, codes: Any = None) -> Any:
        made = super().example(sample, codes)
        return self.spoil_example(made) if sample.id == "bad" else made

    def collate(self, examples: list[Any]) -> Batch:
        batch = super().collate(examples)
        return self.spoil_batch(batch) if "bad" in batch.ids else batch

    def losses(self, model: nn.Module, batch: Batch) -> Any:
        losses = super().losses(model, batch)
        return self.spoil_losses(losses, model) if "bad" in batch.ids else losses

    def spoil_example(self, example: Any) -> Any:
        return example

    def spoil_batch(self, batch: Batch) -> Batch:
        return batch

    def spoil_losses(self, losses: dict[str, StreamLoss], model: nn.Module) -> Any:
        return losses


class Masked(Spoilt):
    """A sample without targets."""

    def spoil_example(self, example: Any) -> Any:
        return replace(example, labels=torch.full_like(example.labels, IGNORE))


class Target(Spoilt):
    """A target that is no class of the model."""

    def spoil_example(self, example: Any) -> Any:
        labels = example.labels.clone()
        labels[-1] = BEYOND
        return replace(example, labels=labels)


class Token(Spoilt):
    """An input that has no row in the embedding."""

    def spoil_example(self, example: Any) -> Any:
        ids = example.input_ids.clone()
        ids[-1] = BEYOND
        return replace(example, input_ids=ids)


class Features(Spoilt):
    """Features with a NaN among them."""

    def spoil_batch(self, batch: Batch) -> Batch:
        features = torch.zeros(batch.inputs["input_ids"].shape)
        features[0, 0] = torch.nan
        return replace(batch, inputs={**batch.inputs, "attention_mask": features})


class Key(Spoilt):
    """A key that the model lacks."""

    def spoil_batch(self, batch: Batch) -> Batch:
        return replace(batch, inputs={**batch.inputs, "label_ids": batch.inputs["input_ids"]})


class Crash(Spoilt):
    """A bug in the forward pass."""

    def spoil_losses(self, losses: dict[str, StreamLoss], model: nn.Module) -> Any:
        return [losses][model.training]


class CrashInData(Spoilt):
    """A bug while a sample is made into an example."""

    def spoil_example(self, example: Any) -> Any:
        return [example][1]


class NoLoss(Spoilt):
    """A model that returns no loss."""

    def spoil_losses(self, losses: dict[str, StreamLoss], model: nn.Module) -> Any:
        return {name: loss._replace(total=None) for name, loss in losses.items()}  # type: ignore[arg-type]


class NoStream(Spoilt):
    """A model that forgets a stream."""

    def spoil_losses(self, losses: dict[str, StreamLoss], model: nn.Module) -> Any:
        return {}


class Detached(Spoilt):
    """A loss that hangs on no weight."""

    def spoil_losses(self, losses: dict[str, StreamLoss], model: nn.Module) -> Any:
        return {name: loss._replace(total=loss.total.detach()) for name, loss in losses.items()}


class NotFinite(Spoilt):
    """A loss that is not finite."""

    def spoil_losses(self, losses: dict[str, StreamLoss], model: nn.Module) -> Any:
        return {name: loss._replace(total=loss.total * torch.nan) for name, loss in losses.items()}


class AllMasked(Spoilt):
    """Labels of which nothing is left."""

    def example(self, sample: Any, codes: Any = None) -> Any:
        made = super().example(sample, codes)
        return replace(made, labels=torch.full_like(made.labels, IGNORE)) if self.masks(sample.id) else made

    def masks(self, name: str) -> bool:
        return True


class WindowMasked(AllMasked):
    """A window of two samples without targets."""

    def masks(self, name: str) -> bool:
        return name in ("train-6", "bad")


class EvaluationMasked(AllMasked):
    """An evaluation set without targets."""

    def masks(self, name: str) -> bool:
        return name.startswith("eval")
