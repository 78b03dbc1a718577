"""The family of plain causal language models, as transformers' AutoModelForCausalLM builds them."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rawloop.contracts import IGNORE, Batch, Perturbed, Piece, Sample, Special
from rawloop.errors import UserError
from rawloop.families import ModelConfig
from rawloop.families.causal_lm.examples import Example, TextEncoder
from rawloop.families.shared import TextFamily, load_parts, load_weights, padded, perturbed, rows_of, text_batch

PACKED_ATTENTION = ("sdpa", "eager")
PROBES = ("One two three four five six.", "Seven eight nine ten eleven twelve.")


class CausalLM(TextFamily):
    """The family of causal language models: one stream, `text`.

    With `packing` set, the examples of a micro-batch stand one behind the other in one row instead of being padded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.packing = False
        settings, self.tokenizer = load_parts(config, AutoTokenizer, "tokenizer.json or tokenizer_config.json")
        self.decoder = getattr(settings, "is_decoder", None) is not False  # BERT and its like can be either
        self.encoder = TextEncoder(settings.get_text_config(), self.tokenizer, config.path)
        self.vocabulary = self.encoder.vocabulary
        self._kinds: set[str] = set()

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model, and refuse it if it sees more than its past, where that is not sure; see `load_weights`."""
        model: nn.Module = load_weights(AutoModelForCausalLM, self.config, path)
        if self.packing:
            self._check_packing(model)
        if self.packing or (not self.decoder and self.config.attention in PACKED_ATTENTION):
            self._check_past(model)
        return model

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained, and note its kind; see `TextEncoder.check`."""
        self.encoder.check(sample)  # one that is left out is of no kind
        self._kinds.add("text" if sample.is_text else "chat")

    def example(self, sample: Sample, codes: Callable[[Path], Tensor] | None = None) -> Example:
        """Encode one sample, which has no audio; see `TextEncoder.example`."""
        self._kinds.add("text" if sample.is_text else "chat")
        return self.encoder.example(sample)

    def collate(self, examples: list[Example]) -> Batch:
        """Make a micro-batch: a row per example, padded on the right, or all of them in one row.

        Packed, positions start again at 0 with every example. transformers makes each layer's mask (full, sliding
        window) from them, which keeps the examples apart. A mask given to it would be the same for all layers.
        """
        if self.packing:
            inputs = {
                "input_ids": torch.cat([e.input_ids for e in examples])[None],
                "position_ids": torch.cat([torch.arange(len(e.input_ids)) for e in examples])[None],
            }
            return text_batch(inputs, torch.cat([e.labels for e in examples]), examples)
        padding = self.tokenizer.pad_token_id or 0  # any id will do: nothing sees it
        inputs = {"input_ids": padded([e.input_ids for e in examples], padding)}
        return text_batch(inputs, padded([e.labels for e in examples], IGNORE), examples)

    def probe(self) -> Batch:
        """A fixed little batch of two documents, for comparing two versions of a model by their logits."""
        examples = []
        for index, text in enumerate(PROBES):
            inputs = torch.tensor(self.tokenizer(text)["input_ids"])
            labels = inputs.clone()
            labels[0] = IGNORE
            examples.append(Example(f"probe {index}", inputs, labels, (("text", len(inputs)),)))
        return self.collate(examples)

    def special_targets(self) -> Sequence[Special]:
        """End of text and end of turn, each required once `check` or `example` has seen a sample that ends with it."""
        ends: dict[int, list[str]] = {}
        if self.tokenizer.eos_token_id is not None:
            ends[self.tokenizer.eos_token_id] = ["text"] if "text" in self._kinds else []
        if "chat" in self._kinds:
            ends.setdefault(self.encoder.template.end_of_turn, []).append("assistant")
        name = self.tokenizer.convert_ids_to_tokens
        return [Special("text", name(i), i, bool(roles), tuple(roles)) for i, roles in ends.items()]

    def pieces(self, example: Example) -> Sequence[Piece]:
        """Return an example in pieces for people: prompts and answers."""
        found, start = [], 0
        for role, end in example.runs:
            text = self.tokenizer.decode(example.input_ids[start:end], clean_up_tokenization_spaces=False)
            targets = int((example.labels[start:end] != IGNORE).sum())
            found.append(Piece(role, "text", text, end - start, targets))
            start = end
        return found

    def perturb(self, batch: Batch) -> Perturbed:
        """Change every document's tokens from its middle target on, or before it; see `shared.perturbed`."""
        ids = batch.inputs["input_ids"]
        other = (ids + 1) % self.vocabulary

        def change(where: Tensor) -> dict[str, Tensor]:
            return {"input_ids": torch.where(where.view_as(ids), other, ids)}

        return perturbed(batch, {"text": ids.flatten()}, documents(batch), "tokens", change)

    def _check_packing(self, model: Any) -> None:
        if self.config.attention not in PACKED_ATTENTION:
            raise UserError(
                f"data.packing is true and model.attention is '{self.config.attention}': packing is proven for "
                f"{' and '.join(PACKED_ATTENTION)} only; set one of them back"
            )
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise UserError(
                f"data.packing is true, and {type(model).__name__} takes no position_ids: set data.packing to false"
            )

    def _check_past(self, model: nn.Module) -> None:
        """Refuse a model whose predictions see later words, or, packed, other documents, as recurrent layers let them.

        Layers mask in many ways, so this is tried on the model itself.
        """
        batch = self.probe()
        changed = self.perturb(batch)
        with torch.no_grad():
            moved = (self.logits(model, changed.batch)["text"] - self.logits(model, batch)["text"]).abs()
        earlier = changed.earlier["text"]
        leak = float(moved[earlier].max())
        # A mask lets nothing through; experts, who take the words of all documents at once, may round otherwise.
        bound = 0.05 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-4
        if leak > bound * float(moved[~earlier].max()):
            fix = (
                "set data.packing to false" if self.packing else "it is no causal model (is_decoder in its config.json)"
            )
            raise UserError(
                f"{self.config.path}: predictions of {type(model).__name__} see later words"
                f"{' or other documents of their row' if self.packing else ''}, which move logits by {leak:.2g}: {fix}"
            )


def documents(batch: Batch) -> Tensor:
    """Number the documents of a batch from 0, for each position of the flattened (batch, sequence)."""
    if "position_ids" in batch.inputs:
        return (batch.inputs["position_ids"].flatten() == 0).cumsum(0) - 1
    return rows_of(batch.inputs["input_ids"])
