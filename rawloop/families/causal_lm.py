"""The family of plain causal language models, as transformers' AutoModelForCausalLM builds them.

In plain text every token after the first is learnt, and the end of text. In a chat, the trained assistant turns and the
token that ends each of them are learnt.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rawloop.contracts import IGNORE, Batch, Piece, Sample, Special
from rawloop.errors import UserError
from rawloop.families import ModelConfig, packing, shared
from rawloop.families.chat_template import ChatTemplate, Messages, control_tokens
from rawloop.families.generating import generate_text
from rawloop.families.loading import load_weights
from rawloop.families.packing import check_causality, check_packing, packed
from rawloop.families.sample_checks import Letters, check_control, check_conversation, control_pattern
from rawloop.families.shared import TextFamily, check_length, labels_of, load_parts, padded, text_batch
from rawloop.family_protocols import Generated
from rawloop.settings import SamplingConfig

ROLES = ("system", "user", "assistant", "tool")
EXTRA = 8  # more special tokens than any tokenizer adds to a text
PROBES = ("One two three four five six.", "Seven eight nine ten eleven twelve.")


@dataclass(frozen=True)
class Example(shared.Example):
    """One encoded sample. `runs` splits it for display: the role of each run, and the position after its last token."""

    runs: tuple[tuple[str, int], ...]


class TextEncoder:
    """Turns samples into examples.

    Args:
        settings: config of the text model.
        tokenizer: of the checkpoint.
        path: of the checkpoint, for messages.
    """

    def __init__(self, settings: Any, tokenizer: Any, path: str) -> None:
        self.tokenizer, self.path = tokenizer, path
        self.vocabulary: int = settings.vocab_size
        self.kind: str = settings.model_type
        self.limit: int | None = getattr(settings, "max_position_embeddings", None)
        self.template = ChatTemplate(tokenizer, path)
        self.letters = Letters(tokenizer, path)
        self.control = control_pattern(control_tokens(tokenizer).values())
        self.kinds: set[str] = set()  # of the samples: text, chat
        # Whether every token of the tokenizer can be learnt.
        self._any_token = tokenizer.unk_token_id is None and len(tokenizer) <= self.vocabulary

    def check(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> None:
        """Refuse a sample that cannot be trained: its turns, letters, chat template or length."""
        text = sample.is_text
        if not text and self.tokenizer.chat_template is not None:
            _ = self.template.end_of_turn  # refuses a template that can split no chat, without naming a sample
        with sample.named_in_errors():
            check_conversation(sample, ("text",) if text else ROLES, deaf=self.kind)
            for turn in sample.turns:
                check_control(turn, self.control, *map(_as_text, (*turn.fields.values(), sample.tools)))
                self.letters.check(turn.words)
            if text:
                self._check_text(sample.turns[0].words)
            else:
                self._check_chat(sample)
        self.kinds.add("text" if text else "chat")

    def _check_text(self, text: str) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"it is plain text, and the tokenizer of {self.path} has no eos_token to end it: set one")
        # A token has at least one byte, so a short text that can have no bad tokens need not be tokenized.
        if self._any_token and self.limit is not None and len(text.encode()) + EXTRA <= self.limit:
            return
        ids = self._text_ids(text)
        self.letters.check_tokens(ids, text)
        self._check_ids(ids)

    def _check_chat(self, sample: Sample) -> None:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"it is a chat, and {self.path} has no chat template: add the chat_template.jinja that the model was "
                "trained with, or give plain 'text'"
            )
        messages, text, trained = self._chat(sample)
        self.template.check_tools(text, messages, sample.tools)
        self.template.check_words(text, messages, trained)
        self.letters.check(text)  # including tools and the template's own text
        ids = self.template.ids(text)
        self.letters.check_tokens(ids, text)
        for index in trained:
            self.template.check_span(messages, index, ids, sample.tools)
        self._check_ids(ids)

    def _check_ids(self, ids: list[int]) -> None:
        check_length(len(ids), self.limit)
        if max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"its token {token} has the id {max(ids)}, and the vocabulary of {self.path} ends at "
                f"{self.vocabulary}: use the tokenizer that belongs to the model"
            )

    def example(self, sample: Sample, codes: Callable[[Path], Tensor] | None = None) -> Example:
        """Encode one sample that `check` has passed."""
        self.kinds.add("text" if sample.is_text else "chat")
        if sample.is_text:
            ids = self._text_ids(sample.turns[0].words)
            spans = [(0, len(ids))]
        else:
            messages, text, trained = self._chat(sample)
            ids = self.template.ids(text)
            spans = [self.template.span(messages, index, ids, sample.tools) for index in trained]
        inputs = torch.tensor(ids)
        return Example(sample.id, inputs, labels_of(inputs, spans), _runs(sample, spans, len(ids)))

    def prompt(self, sample: Sample) -> list[int]:
        """Return the tokens before the last trained answer, as `example` has them; a plain text is all prompt."""
        if sample.is_text:
            ids = self._text_ids(sample.turns[0].words)
            return ids[:-1]
        messages, text, trained = self._chat(sample)
        ids = self.template.ids(text)
        return ids[: self.template.span(messages, trained[-1], ids, sample.tools)[0]]

    def stops(self, samples: Sequence[Sample]) -> list[int]:
        """Return the tokens that end a text, and a turn if a sample is a chat."""
        ends = {self.tokenizer.eos_token_id} - {None}
        chat = not all(sample.is_text for sample in samples)
        return sorted(ends | ({self.template.end_of_turn} if chat else set()))

    def length(self, sample: Sample, frames: Callable[[Path], int] | None = None) -> int:
        """Return the number of tokens of a sample."""
        if sample.is_text:
            return len(self._text_ids(sample.turns[0].words))
        return len(self.template.ids(self._chat(sample)[1]))

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]  # some tokenizers add it

    def _chat(self, sample: Sample) -> tuple[Messages, str, list[int]]:
        """Return the messages up to the last trained one, their text, and the indices of the trained ones."""
        trained = [index for index, turn in enumerate(sample.turns) if turn.trained]
        turns = sample.turns[: trained[-1] + 1]
        messages = [{"role": turn.role, "content": turn.words, **turn.fields} for turn in turns]
        return *self.template.taken(messages, sample.tools), trained


def _as_text(value: Any) -> str:
    """Return a value of a message, or tools, as a template may write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _runs(sample: Sample, spans: Sequence[tuple[int, int]], length: int) -> tuple[tuple[str, int], ...]:
    """Split a sequence into answers and the text between them, named by the turns before each answer."""
    runs: list[tuple[str, int]] = []
    turns = iter(sample.turns)
    for start, end in spans:
        before = list(dict.fromkeys(turn.role for turn in takewhile(lambda turn: not turn.trained, turns)))
        role = sample.turns[0].role if len(sample.turns) == 1 else "assistant"
        runs += [("+".join(before), start)] * bool(start) + [(role, end)]
    return (*runs, *([("template", length)] if runs[-1][1] < length else []))


class CausalLM(TextFamily):
    """The family of causal language models: one stream, `text`.

    With `packing`, the examples of a micro-batch are concatenated into one row instead of padded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.packing = False
        settings, self.tokenizer = load_parts(config, AutoTokenizer, "tokenizer.json or tokenizer_config.json")
        self.decoder = getattr(settings, "is_decoder", None) is not False  # BERT and similar models can be either
        self.encoder = TextEncoder(settings.get_text_config(), self.tokenizer, config.path)
        self.vocabulary = self.encoder.vocabulary

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model; see `load_weights`. Test its causality where that is uncertain."""
        model = load_weights(AutoModelForCausalLM, self.config, path)
        if self.packing:
            check_packing(self, model, self.probe, self.config)
        elif not self.decoder and self.config.attention in packing.ATTENTION:
            check_causality(self, model, self.probe, "it is no causal model (is_decoder in its config.json)")
        return model

    def collate(self, examples: list[Example]) -> Batch:
        """Make a micro-batch: a row per example, padded on the right, or one row of all examples."""
        rows, labels = [e.input_ids for e in examples], [e.labels for e in examples]
        if self.packing:
            return text_batch(packed(rows), torch.cat(labels)[None], examples)
        padding = self.tokenizer.pad_token_id or 0  # any id: no token attends to it
        return text_batch({"input_ids": padded(rows, padding)}, padded(labels, IGNORE), examples)

    def probe(self) -> Batch:
        """Return a fixed small batch of two documents, to compare two versions of a model by their logits."""
        examples = []
        for index, text in enumerate(PROBES):
            ids = torch.tensor(self.tokenizer(text)["input_ids"])
            labels = labels_of(ids, [(0, len(ids))])
            examples.append(Example(f"probe {index}", ids, labels, (("text", len(ids)),)))
        return self.collate(examples)

    def sized(self, positions: int, samples: int) -> Batch:
        """Return a batch of so many texts of so many tokens; see `SizedFamily`."""
        ids = torch.zeros(positions, dtype=torch.int64)
        labels = labels_of(ids, [(0, positions)])
        return self.collate([Example("probe", ids, labels, (("text", positions),))] * samples)

    def generate(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        codes: Callable[[Path], Tensor],
        limits: Sequence[int],
        sampling: SamplingConfig,
    ) -> list[Generated]:
        """Generate the last trained answer of each sample; see `GeneratingFamily.generate`. `codes` is not used."""
        encoder = self.encoder
        return generate_text(
            model,
            samples,
            lambda sample: {"input_ids": torch.tensor([encoder.prompt(sample)])},
            self.tokenizer,
            encoder.stops(samples),
            encoder.limit,
            limits,
            sampling,
        )

    def special_targets(self) -> Sequence[Special]:
        """End of text and end of turn. Each is required if the encoder has seen a sample that ends with it."""
        kinds = self.encoder.kinds
        ends: dict[int, list[str]] = {}
        if self.tokenizer.eos_token_id is not None:
            ends[self.tokenizer.eos_token_id] = ["text"] if "text" in kinds else []
        if "chat" in kinds:
            ends.setdefault(self.encoder.template.end_of_turn, []).append("assistant")
        name = self.tokenizer.convert_ids_to_tokens
        return [Special("text", name(i), i, bool(roles), tuple(roles)) for i, roles in ends.items()]

    def pieces(self, example: Example) -> Sequence[Piece]:
        """Split an example into prompts and answers."""
        found, start = [], 0
        for role, end in example.runs:
            text = self.tokenizer.decode(example.input_ids[start:end], clean_up_tokenization_spaces=False)
            targets = int((example.labels[start:end] != IGNORE).sum())
            found.append(Piece(role, "text", text, end - start, targets))
            start = end
        return found
