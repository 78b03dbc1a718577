"""The family of Higgs Audio v2: loading model and codec, batches, and the losses of both streams."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DacFeatureExtractor,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2TokenizerModel,
)

from rawloop.contracts import IGNORE, Batch, Labels, Perturbed, Piece, Sample, Special, StreamLoss
from rawloop.errors import UserError
from rawloop.families import ModelConfig, check_path, head, local_folder, read_json
from rawloop.families.higgs_audio_v2.examples import Example, HiggsEncoder, roles_of
from rawloop.families.higgs_audio_v2.speaking import speak
from rawloop.families.loading import library_errors, load_from, load_weights
from rawloop.families.made_up import spoken, spoken_in
from rawloop.families.packing import check_packing
from rawloop.families.shared import BaseFamily, documents, load_parts, perturbed, work_of
from rawloop.family_protocols import CodecInfo, Generated
from rawloop.files import hash_folder
from rawloop.losses import exact, without_adapter
from rawloop.settings import SamplingConfig

STREAMS = ("audio", "text")
INPUTS = ("input_ids", "audio_input_ids", "audio_input_ids_mask")
TEXT_STOPS = ("<|audio_eos|>", "<|eot_id|>")
CODEC = "model.codec"
CODEC_FILES = ["config.json", "*.safetensors"]
NO_TEXT_HEAD = {
    "text_lm_head.weight": "it has no text head; set model.stream_weights to {text: 0} to train on audio alone"
}


class HiggsAudioV2(BaseFamily):
    """The family of `HiggsAudioV2ForConditionalGeneration`: two streams, `audio` (per codebook) and `text`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, STREAMS)
        self.packing = False
        self.settings, self.tokenizer = load_parts(config, AutoTokenizer, "tokenizer.json or tokenizer_config.json")
        self._check_settings()
        self.num_ids = {"audio_input_ids": self.settings.codebook_size}
        self.encoder = HiggsEncoder(self.settings, self.tokenizer)

    def _check_settings(self) -> None:
        if self.settings.model_type != HiggsAudioV2ForConditionalGeneration.config_class.model_type:
            raise UserError(
                f"model.family is '{self.config.family}', and model.path is '{self.config.path}', a model of type "
                f"'{self.settings.model_type}': leave model.family at auto, or give a checkpoint of Higgs Audio v2"
            )
        if self.settings.audio_stream_eos_id >= self.settings.codebook_size:
            raise UserError(
                f"{self.config.path}/config.json has codebook_size {self.settings.codebook_size}, which leaves no room "
                f"for the stream's stop token {self.settings.audio_stream_eos_id}: real checkpoints have 1026 "
                "(1024 codes + BOS + EOS); set codebook_size to that"
            )
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.config.path} has no chat_template.jinja: prompts cannot be built as in generation")

    def load_model(self, path: str | None = None) -> nn.Module:
        """Load the model in its stored dtype, with the text head if the text stream has a weight."""
        model = load_weights(
            HiggsAudioV2ForConditionalGeneration, self.config, path, NO_TEXT_HEAD, use_text_head="text" in self.streams
        )
        if self.packing:
            check_packing(self, model, lambda: self._probe(2), self.config)
        return model

    def _codec_folder(self) -> Path:
        """Return the folder of the codec: `model.codec`, or the codec in the checkpoint's processor_config.json."""
        path, key = self.config.codec, CODEC
        if not path:
            name = "processor_config.json"
            file = local_folder(self.config.path, self.config.revision, [name]) / name
            named = read_json(file).get("audio_tokenizer", {}) if file.is_file() else {}
            path, key = expanduser(str(named.get("audio_tokenizer_name_or_path") or "")), f"the codec in {file}"
        if not path:
            raise UserError(f"{self.config.path} names no codec: set {CODEC} to the folder or hub id of its codec")
        check_path(path, key)
        return local_folder(path, None, CODEC_FILES, CODEC)

    def codec_hash(self) -> str:
        """Content hash of the checkpoint's codec."""
        return hash_folder(self._codec_folder())

    def load_codec(self, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
        """Load the codec in float32. Its encoder runs the same steps as the processor.

        Returns:
            its description, and its encoder: (samples,) float32 at `sample_rate` -> (frames, codebooks) int64 on the
            CPU.
        """
        codec, info = self._codec(device)
        with library_errors(self.config.path, "processor_config.json"):
            extractor: Any = DacFeatureExtractor.from_pretrained(self.config.path, revision=self.config.revision)

        @torch.no_grad()
        def encode(waveform: Tensor) -> Tensor:
            inputs = extractor(waveform.numpy(), sampling_rate=info.sample_rate, return_tensors="pt")
            codes: Tensor = codec.encode(inputs["input_values"].to(device)).audio_codes
            return codes[0].T.cpu()

        with library_errors(codec.name_or_path, "config.json", CODEC):  # a wrong config fails only when the codec runs
            encode(torch.zeros(info.sample_rate))
        return info, encode

    def load_decoder(self, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
        """Load the codec in float32.

        Returns:
            its description, and its decoder: (frames, codebooks) int64 -> (samples,) float32 at `sample_rate` on the
            CPU.
        """
        codec, info = self._codec(device)

        @torch.no_grad()
        def decode(codes: Tensor) -> Tensor:
            if not len(codes):
                return torch.zeros(0)
            values: Tensor = codec.decode(codes.T[None].to(device)).audio_values
            return values.flatten().float().cpu()

        with library_errors(codec.name_or_path, "config.json", CODEC):
            decode(torch.zeros(1, info.codebooks, dtype=torch.int64))
        return info, decode

    def _codec(self, device: torch.device) -> tuple[Any, CodecInfo]:
        folder = self._codec_folder()
        kind = read_json(folder / "config.json").get("model_type")
        if kind != HiggsAudioV2TokenizerModel.config_class.model_type:
            raise UserError(f"{CODEC} is '{folder}', a model of type '{kind}': give the folder of the codec")
        codec: Any = load_from(HiggsAudioV2TokenizerModel, str(folder), None, CODEC, dtype=torch.float32)
        codec.eval().to(device)
        settings = codec.config
        info = CodecInfo(
            hash=hash_folder(folder),
            sample_rate=settings.sample_rate,
            codebooks=settings.num_quantizers,
            codebook_size=settings.codebook_size,
            frame_rate=settings.sample_rate / settings.hop_length,
        )
        return codec, info

    def collate(self, examples: list[Example]) -> Batch:
        """Make a micro-batch: padded on the right, which needs no attention mask under a causal mask, or packed."""
        made = self.encoder.pack(examples) if self.packing else self.encoder.pad(examples)
        labels = {"audio": self._audio_labels(made), "text": Labels.shifted(made["labels"])}
        labels = {stream: labels[stream] for stream in self.streams}
        targets = {stream: int((pair.targets != IGNORE).sum()) for stream, pair in labels.items()}
        names = [name for name in (*INPUTS, "position_ids") if name in made]
        ids, work = [e.id for e in examples], work_of(examples, made["input_ids"])
        return Batch({name: made[name] for name in names}, labels, targets, ids, work)

    def _audio_labels(self, made: dict[str, Tensor]) -> Labels:
        places = self._placeholders(made["input_ids"])
        positions = places.flatten().nonzero().squeeze(1)  # row by row, as the model fills them
        targets = made["audio_labels"][made["audio_input_ids_mask"]]
        scored = (targets != IGNORE).any(1)
        return Labels(positions[scored] - 1, targets[scored])

    def logits(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Run the model once and return the float32 logits of targets only, as a vocabulary of 128,256 is large.

        Returns:
            `audio`: (targets, codebooks, codebook_size); `text`: (targets, vocabulary).
        """
        return {s: finish(exact(scored(rows))) for s, (scored, finish, rows) in self._heads(model, batch).items()}

    def _heads(self, model: nn.Module, batch: Batch) -> dict[str, tuple[head.Change, head.Change, Tensor]]:
        """Run the model; return each stream's head, the shape of its logits, and hidden states (targets, hidden)."""
        base = without_adapter(model)
        self.check_forward(base.model, batch.inputs)
        hidden = base.model(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        shape = (self.settings.num_codebooks, self.settings.codebook_size)
        heads: dict[str, tuple[head.Change, head.Change]] = {
            "audio": (base.audio_lm_head, lambda logits: logits.view(len(logits), *shape)),
            "text": (base.text_lm_head, head.unchanged),
        }
        return {s: (*heads[s], hidden.index_select(0, batch.labels[s].positions)) for s in self.streams}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        """Return the cross-entropy of each stream's targets, in nats; audio also per codebook."""
        sizes = {"audio": self.settings.codebook_size, "text": self.settings.vocab_size}
        many = any(batch.labels[s].targets.numel() * sizes[s] > head.WHOLE for s in self.streams)
        if many and type(self).logits is HiggsAudioV2.logits:
            made = self._heads(model, batch)
        else:  # the logits may be another class's
            made = {s: (head.unchanged, head.unchanged, rows) for s, rows in self.logits(model, batch).items()}
        nats = {s: head.cross_entropy(*made[s], batch.labels[s].targets, sizes[s]) for s in self.streams}
        parts, count, codebooks = nats["audio"].sum(0), batch.targets["audio"], self.settings.num_codebooks
        # Every trained clip has frames + 1 targets in each codebook, so the count splits evenly.
        result = {"audio": StreamLoss(parts.sum(), count, parts.detach(), (count // codebooks,) * codebooks)}
        if "text" in self.streams:
            result["text"] = StreamLoss(nats["text"].sum(), batch.targets["text"])
        return result

    def probe(self) -> Batch:
        """Return a fixed small batch with random codes, to compare two versions of a model by their logits."""
        return self._probe(1)

    def _probe(self, count: int) -> Batch:
        return self.collate([spoken(self.encoder, 25)] * count)

    def sized(self, positions: int, samples: int) -> Batch:
        """Return a batch of so many clips, each with its text and so many positions; see `SizedFamily`."""
        return self.collate([spoken_in(self.encoder, positions)] * samples)

    def generate(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        codes: Callable[[Path], Tensor],
        limits: Sequence[int],
        sampling: SamplingConfig,
    ) -> list[Generated]:
        """Generate the last trained clip of each sample; see `GeneratingFamily.generate`."""
        return speak(self.encoder, model, samples, codes, limits, sampling)

    def special_targets(self) -> Sequence[Special]:
        """The stop tokens, which must be learnt, and tokens that must not be, for the census to show."""
        said, settings = ("assistant",), self.settings
        found = [
            Special("audio", "EOS", settings.audio_stream_eos_id, required=True, roles=said),
            Special("audio", "BOS", settings.audio_stream_bos_id, required=False),
        ]
        if "text" in self.streams:
            number, delay = self.tokenizer.convert_tokens_to_ids, settings.audio_delay_token_id
            found += [Special("text", stop, number(stop), required=True, roles=said) for stop in TEXT_STOPS]
            found.append(Special("text", self.tokenizer.convert_ids_to_tokens(delay), delay, required=False))
        return found

    def pieces(self, example: Example) -> Sequence[Piece]:
        """Split an example where the role, the stream or `learnt` changes."""
        ids = example.input_ids.tolist()
        audio = self._placeholders(example.input_ids).tolist()
        learnt = ((example.labels != IGNORE) & ("text" in self.streams)).tolist()
        keys = list(zip(roles_of(ids, self.tokenizer), audio, learnt, strict=True))
        found: list[Piece] = []
        frame = 0
        for (role, is_audio, is_learnt), run in groupby(range(len(ids)), key=keys.__getitem__):
            places = list(run)
            count = len(places)
            if is_audio:
                targets = int((example.audio_labels[frame : frame + count] != IGNORE).sum())
                frame += count
                text = f"clip of {count - 1 - self.settings.num_codebooks} frames"  # without BOS, EOS and the delay
                found.append(Piece(role, "audio", text, count, targets))
            else:
                text = self.tokenizer.decode(ids[places[0] : places[-1] + 1], skip_special_tokens=False)
                found.append(Piece(role, "text", text, count, count if is_learnt else 0))
        return found

    def chance(self) -> Mapping[str, float]:
        """Return the loss of uniform guesses, nats per target."""
        sizes = {"audio": self.settings.codebook_size, "text": self.settings.vocab_size}
        return {stream: math.log(sizes[stream]) for stream in self.streams}

    def perturb(self, batch: Batch) -> Perturbed:
        """Change every token and code from the middle of a stream's targets on, or before it; see `perturbed`."""
        ids, frames, real = (batch.inputs[name] for name in INPUTS)
        places, size = self._placeholders(ids), self.settings.codebook_size
        other_text = (ids + 1) % self.settings.vocab_size
        for _ in range(2):  # the ids of the placeholders may be consecutive
            again = (other_text + 1) % self.settings.vocab_size
            other_text = torch.where(self._placeholders(other_text), again, other_text)
        codes = frames.new_full((ids.numel(), frames.shape[2]), IGNORE)
        codes[places.flatten()] = frames[real]

        def change(where: Tensor) -> dict[str, Tensor]:
            where, other = where.view_as(ids), frames.clone()
            # the codes of changed placeholders, in the order in which the model fills them
            other[real] = torch.where(where[places][:, None], (frames[real] + size // 2) % size, frames[real])
            return {"input_ids": torch.where(where & ~places, other_text, ids), "audio_input_ids": other}

        return perturbed(batch, {"audio": codes, "text": ids.flatten()}, documents(batch), "tokens and codes", change)

    def _placeholders(self, ids: Tensor) -> Tensor:
        """Return a mask of the positions of clips."""
        return torch.eq(ids, self.settings.audio_token_id) | torch.eq(ids, self.settings.audio_delay_token_id)
