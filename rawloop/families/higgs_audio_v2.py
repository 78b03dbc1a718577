"""Higgs Audio v2: inputs and labels from cached codes, losses of both streams, the codec.

The model's own processor encodes audio on every call, cannot take codes, masks the stop token out of the labels and
trains reference audio and prompts. So inputs are built here, equal to the processor's token for token, and labels are
built right: per codebook `[-100 (BOS) | codes | EOS]` under the delay pattern, one EOS target per codebook, reference
turns and prompts masked.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from rawloop.contracts import IGNORE, Audio, Batch, CodecInfo, Labels, Sample, StreamLoss, Text, Turn
from rawloop.errors import UserError
from rawloop.families import ModelConfig
from rawloop.families.higgs_codec import codec_hash, load_codec
from rawloop.families.inputs import check_inputs

SYSTEM = "Generate audio following instruction."
# The wording the model was trained with for dialogues without reference voices.
SYSTEM_DIALOGUE = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following "
    "text, using the specified voice.\nIf no speaker tag is present, select a suitable voice on your own."
)
STREAMS = ("audio", "text")


@dataclass(frozen=True)
class Example:
    """One encoded sample.

    `input_ids` and `labels` are (sequence,) int64, `audio_input_ids` and `audio_labels` (frames, codebooks) int64 with
    the delay pattern applied. Labels stand at the position of their own token, as transformers has them: position t is
    predicted from t - 1.
    """

    id: str
    input_ids: Tensor
    audio_input_ids: Tensor
    labels: Tensor
    audio_labels: Tensor


class HiggsAudioV2:
    """The family of `HiggsAudioV2ForConditionalGeneration`: two streams, `audio` (per codebook) and `text`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        unknown = set(config.stream_weights) - set(STREAMS)
        if unknown:
            raise UserError(
                f"model.stream_weights has {sorted(unknown)}: Higgs Audio v2 has the streams audio and text"
            )
        weights = {stream: float(config.stream_weights.get(stream, 1.0)) for stream in STREAMS}
        self.stream_weights: Mapping[str, float] = {
            stream: weight for stream, weight in weights.items() if weight != 0.0
        }
        self.streams: Sequence[str] = tuple(self.stream_weights)
        if "audio" not in self.streams:
            raise UserError("model.stream_weights sets audio to 0: nothing would be learnt of speech; give it a weight")
        self.settings: Any = AutoConfig.from_pretrained(config.path, revision=config.revision)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(config.path, revision=config.revision)
        self._check_settings()
        self.end_of_turn: int = self.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        self._structural = self._structural_tokens()
        self._checked: set[tuple[str, ...]] = set()

    def _check_settings(self) -> None:
        if self.settings.audio_stream_eos_id >= self.settings.codebook_size:
            raise UserError(
                f"{self.config.path}/config.json has codebook_size {self.settings.codebook_size}, which leaves no room "
                f"for the stream's stop token {self.settings.audio_stream_eos_id}: real checkpoints have 1026 "
                "(1024 codes + BOS + EOS); set codebook_size to that"
            )
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.config.path} has no chat_template.jinja: prompts cannot be built as in generation")

    def _structural_tokens(self) -> re.Pattern[str]:
        """Tokens that give a conversation its shape; inside a transcript they would forge turns or audio."""
        ids = (self.settings.audio_token_id, self.settings.audio_delay_token_id, self.settings.audio_bos_token_id)
        names = {self.tokenizer.convert_ids_to_tokens(i) for i in ids}
        names |= {self.tokenizer.eos_token, self.tokenizer.bos_token, "<|eot_id|>", "<|audio_eos|>"}
        names |= {"<|start_header_id|>", "<|end_header_id|>"}
        return re.compile("|".join(re.escape(name) for name in sorted(names) if name))

    # -- model ---------------------------------------------------------------------------------------------------

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model in its stored dtype, with the text head when the text stream has a weight.

        Args:
            path: another folder than the configured one, for the weights of a checkpoint.

        Raises:
            UserError: the checkpoint cannot be read, or lacks weights that would be trained from random numbers.
        """
        source = path or self.config.path
        try:
            model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
                source,
                revision=None if path else self.config.revision,
                use_text_head="text" in self.streams,
                dtype="auto",
                attn_implementation=self.config.attention,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"model.path is '{source}', which cannot be loaded: {_line(error)}") from error
        missing = sorted(info["missing_keys"])
        if missing == ["text_lm_head.weight"]:
            raise UserError(
                f"{source} has no text head (text_lm_head.weight): set model.stream_weights to "
                "{text: 0} to train on audio alone"
            )
        if missing:
            raise UserError(f"{source} lacks {len(missing)} weights, first {missing[0]}: fetch it again")
        if self.config.activation_checkpointing:
            enable_activation_checkpointing(model)
        return cast(nn.Module, model)

    def load_codec(self, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
        """Load the codec for `rawloop prepare`; see `rawloop.families.higgs_codec.load_codec`."""
        return load_codec(self.config, device)

    def codec_hash(self) -> str:
        """Content hash of the codec that the checkpoint goes with."""
        return codec_hash(self.config)

    # -- examples ------------------------------------------------------------------------------------------------

    def conversation(self, sample: Sample) -> list[dict[str, Any]]:
        """Return the sample as messages for a chat template, with the system message that the task wants.

        Raises:
            UserError: an assistant turn is not exactly one clip, audio stands in a turn that the template drops it
                from, or a text contains a token that would forge the conversation's shape.
        """
        turns = list(sample.turns)
        if not turns or turns[0].role != "system":
            system = SYSTEM_DIALOGUE if sample.task == "multi_speaker_smart_voice" else SYSTEM
            turns.insert(0, Turn("system", (Text(system),)))
        for turn in turns:
            self._check_turn(turn, sample)
        return [{"role": turn.role, "content": [_content(part) for part in _joined(turn)]} for turn in turns]

    def _check_turn(self, turn: Turn, sample: Sample) -> None:
        clips = sum(isinstance(part, Audio) for part in turn.parts)
        where = f"sample '{sample.id}' ({sample.source})"
        if turn.role == "assistant" and (clips != 1 or len(turn.parts) != 1):
            raise UserError(
                f"{where}: an assistant turn must be exactly one clip; this one has {len(turn.parts)} parts, "
                f"{clips} of them audio"
            )
        if clips and turn.role not in ("assistant", "scene"):
            raise UserError(
                f"{where}: audio in a {turn.role} turn, where Higgs Audio v2's chat template drops it: "
                "put a reference clip into an assistant turn after its transcript, or into the scene"
            )
        for part in turn.parts:
            forged = self._structural.search(part.text) if isinstance(part, Text) else None
            if forged:
                raise UserError(f"{where}: its text contains the control token {forged.group()}: take it out")

    def example(self, sample: Sample, codes: Callable[[Path], Tensor]) -> Example:
        """Encode one sample from cached codes.

        Args:
            sample: the conversation; exactly its `trained` turns get targets.
            codes: gives a clip's (frames, codebooks) int64 codes.

        Raises:
            UserError: no turn is trained, a clip's codes do not fit the model, or the sample is too long for it.
        """
        text = self.tokenizer.apply_chat_template(self.conversation(sample), tokenize=False)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        clips = [codes(path) for path in sample.audio_paths()]
        trained = [turn.trained for turn in sample.turns for part in turn.parts if isinstance(part, Audio)]
        self._check_clips(sample, clips, trained, ids)
        blocks = [self.delayed(clip, learn) for clip, learn in zip(clips, trained, strict=True)]
        pieces, labels = self._expand(ids, [len(inputs) for inputs, _ in blocks], trained)
        limit = self.settings.max_position_embeddings
        if len(pieces) > limit:
            raise UserError(
                f"sample '{sample.id}' ({sample.source}) takes {len(pieces)} positions, the model has {limit}: "
                "shorten the clip or its references, or leave the sample out"
            )
        inputs, audio_labels = (torch.cat(rows) for rows in zip(*blocks, strict=True))
        return Example(sample.id, torch.tensor(pieces), inputs, torch.tensor(labels), audio_labels)

    def _expand(self, ids: list[int], lengths: list[int], trained: list[bool]) -> tuple[list[int], list[int]]:
        """Give each audio placeholder as many positions as its clip has frames, and label the text to be learnt.

        What follows a trained clip (end of audio, end of turn) is the model's to say; then its turn is over.
        """
        ramp = self.settings.num_codebooks - 1
        pieces: list[int] = []
        labels: list[int] = []
        clip, learn = 0, False
        for token in ids:
            if token == self.settings.audio_token_id:
                pieces += [token] * (lengths[clip] - ramp) + [self.settings.audio_delay_token_id] * ramp
                labels += [IGNORE] * lengths[clip]
                learn = trained[clip]
                clip += 1
            else:
                pieces.append(token)
                labels.append(token if learn else IGNORE)
                learn = learn and token != self.end_of_turn
        return pieces, labels

    def _check_clips(self, sample: Sample, clips: list[Tensor], trained: list[bool], ids: list[int]) -> None:
        where = f"sample '{sample.id}' ({sample.source})"
        if not any(trained):
            raise UserError(f"{where} has no clip to learn: no assistant turn with audio is trained")
        places = ids.count(self.settings.audio_token_id)
        if places != len(clips):
            raise UserError(f"{where}: the chat template has {places} places for its {len(clips)} clips")
        for path, clip in zip(sample.audio_paths(), clips, strict=True):
            if clip.shape[1] != self.settings.num_codebooks or int(clip.max()) >= self.settings.audio_stream_bos_id:
                raise UserError(
                    f"the codes of {path} are {tuple(clip.shape)} with a largest value of {int(clip.max())}: the model "
                    f"takes {self.settings.num_codebooks} codebooks of {self.settings.audio_stream_bos_id} codes; "
                    "prepare the data with this model's codec"
                )

    def delayed(self, codes: Tensor, trained: bool) -> tuple[Tensor, Tensor]:
        """Apply the delay pattern: codebook k runs k frames late.

        Args:
            codes: (frames, codebooks) int64.
            trained: whether the clip has targets.

        Returns:
            inputs and labels, both (frames + 2 + codebooks - 1, codebooks): BOS before and EOS after each codebook's
            stream; as labels the codes and one EOS per codebook, -100 elsewhere.
        """
        frames, codebooks = codes.shape
        length = frames + 2 + codebooks - 1
        inputs = codes.new_full((length, codebooks), self.settings.audio_stream_eos_id)
        labels = codes.new_full((length, codebooks), IGNORE)
        for k in range(codebooks):
            inputs[: k + 1, k] = self.settings.audio_stream_bos_id
            inputs[k + 1 : k + 1 + frames, k] = codes[:, k]
            if trained:
                labels[k + 1 : k + 2 + frames, k] = inputs[k + 1 : k + 2 + frames, k]
        return inputs, labels

    # -- batches -------------------------------------------------------------------------------------------------

    def pad(self, examples: list[Example], side: str = "right") -> dict[str, Tensor]:
        """Pad examples into the tensors that the processor returns: text on `side`, audio always on the right.

        Returns:
            `input_ids`, `attention_mask`, `labels` (batch, sequence); `audio_input_ids`, `audio_labels` (batch,
            frames, codebooks); `audio_input_ids_mask` (batch, frames) bool.
        """

        def text(rows: list[Tensor], value: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        def audio(rows: list[Tensor], value: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value)

        ones = [torch.ones(len(e.input_ids), dtype=torch.int64) for e in examples]
        frames = [torch.ones(len(e.audio_input_ids), dtype=torch.bool) for e in examples]
        return {
            "input_ids": text([e.input_ids for e in examples], self.tokenizer.pad_token_id),
            "attention_mask": text(ones, 0),
            "labels": text([e.labels for e in examples], IGNORE),
            "audio_input_ids": audio([e.audio_input_ids for e in examples], self.settings.audio_stream_eos_id),
            "audio_input_ids_mask": audio(frames, 0),
            "audio_labels": audio([e.audio_labels for e in examples], IGNORE),
        }

    def collate(self, examples: list[Example]) -> Batch:
        """Make a micro-batch, padded on the right.

        Under a causal mask nothing looks to its right, so right padding needs no attention mask: padding changes no
        result, and attention keeps its fast causal path without a device sync to look at the mask.
        """
        padded = self.pad(examples)
        labels = {"audio": self._audio_labels(padded), "text": _shifted(padded["labels"])}
        labels = {stream: labels[stream] for stream in self.streams}
        names = ("input_ids", "audio_input_ids", "audio_input_ids_mask")
        targets = {stream: int((pair.targets != IGNORE).sum()) for stream, pair in labels.items()}
        return Batch({name: padded[name] for name in names}, labels, targets, [e.id for e in examples])

    def _audio_labels(self, padded: dict[str, Tensor]) -> Labels:
        ids = padded["input_ids"]
        places = (ids == self.settings.audio_token_id) | (ids == self.settings.audio_delay_token_id)
        positions = places.flatten().nonzero().squeeze(1)  # row by row, the order in which the model fills them
        targets = padded["audio_labels"][padded["audio_input_ids_mask"]]
        scored = (targets != IGNORE).any(1)
        return Labels(positions[scored] - 1, targets[scored])

    # -- losses --------------------------------------------------------------------------------------------------

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once and return the logits of every target, float32 (float64 of a float64 model).

        Logits are computed only where there are targets: a vocabulary of 128,256 over every position would take more
        memory than the rest of the head's work.

        Returns:
            `audio`: (targets, codebooks, codebook_size); `text`: (targets, vocabulary).
        """
        unwrap: Any = getattr(model, "get_base_model", None)  # a PEFT wrapper has it; adapters stay in the layers
        base: Any = unwrap() if unwrap else model
        if tuple(batch.inputs) not in self._checked:
            check_inputs(base.model.forward, batch.inputs, type(base.model).__name__)
            self._checked.add(tuple(batch.inputs))
        hidden = base.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        heads = {"audio": base.audio_lm_head, "text": base.text_lm_head}
        rows = {s: _exact(heads[s](hidden.index_select(0, batch.labels[s].positions))) for s in self.streams}
        rows["audio"] = rows["audio"].unflatten(-1, (self.settings.num_codebooks, -1))
        return rows

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Score each stream's targets, in nats; audio also per codebook."""
        logits = self.logits(model, batch)
        codebooks, count = self.settings.num_codebooks, batch.targets["audio"]
        wanted = batch.labels["audio"].targets.flatten()
        nats = F.cross_entropy(logits["audio"].flatten(0, 1), wanted, ignore_index=IGNORE, reduction="none")
        parts = nats.view(-1, codebooks).sum(0)
        # Every trained clip has frames + 1 targets in each codebook, so the count splits evenly.
        result = {"audio": StreamLoss(parts.sum(), count, parts.detach(), (count // codebooks,) * codebooks)}
        if "text" in self.streams:
            total = F.cross_entropy(logits["text"], batch.labels["text"].targets, reduction="sum")
            result["text"] = StreamLoss(total, batch.targets["text"])
        return result

    def probe(self) -> Batch:
        """A fixed little batch with random codes, for comparing two versions of a model by their logits."""
        turns = (Turn("user", (Text("One two three."),)), Turn("assistant", (Audio(Path("probe")),), trained=True))
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(self.settings.audio_stream_bos_id, (25, self.settings.num_codebooks), generator=generator)
        return self.collate([self.example(Sample("probe", turns), lambda _: codes)])


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, non-reentrant (reentrant breaks under DDP with unused parameters)."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _exact(logits: Tensor) -> Tensor:
    """In float32 at least: 16 bits are too few for a log-softmax over a vocabulary. Float64 stays, for proofs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _shifted(labels: Tensor) -> Labels:
    """Text targets with the positions that predict them: one to the left, in the flattened batch."""
    flat = labels.flatten()
    positions = torch.nonzero(torch.ne(flat, IGNORE)).squeeze(1)
    return Labels(positions - 1, flat[positions])


def _joined(turn: Turn) -> Sequence[Text | Audio]:
    """A system turn's texts as one: chat templates read the first item only and would drop the rest."""
    if turn.role != "system":
        return turn.parts
    return (Text("".join(part.text for part in turn.parts if isinstance(part, Text))),)


def _content(part: Text | Audio) -> dict[str, str]:
    return {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "audio", "path": str(part.path)}


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
