"""The codec of Higgs Audio v2 for `rawloop prepare`: the same steps as in the processor, once per clip."""

from collections.abc import Callable
from os.path import expanduser
from typing import Any

import torch
from torch import Tensor
from transformers import DacFeatureExtractor, HiggsAudioV2TokenizerModel

from rawloop.errors import UserError
from rawloop.families import ModelConfig, check_path, local_folder, read_json
from rawloop.families.loading import library_errors, load_from
from rawloop.family_protocols import CodecInfo
from rawloop.hashing import hash_folder

FILES = ["config.json", "*.safetensors"]
KEY = "model.codec"


def codec_path(config: ModelConfig) -> str:
    """Return the codec's folder or hub id: `model.codec`, or what the checkpoint's processor_config.json names."""
    if config.codec:
        check_path(config.codec, KEY)
        return config.codec
    file = local_folder(config.path, config.revision, ["processor_config.json"]) / "processor_config.json"
    named = read_json(file).get("audio_tokenizer", {}) if file.is_file() else {}
    path = named.get("audio_tokenizer_name_or_path")
    if not path:
        raise UserError(f"{config.path} names no codec: set model.codec to the folder or hub id of its codec")
    check_path(str(path), f"the codec in {file}")
    return expanduser(str(path))


def load_codec(config: ModelConfig, device: torch.device) -> tuple[CodecInfo, Callable[[Tensor], Tensor]]:
    """Load the codec in float32.

    Returns:
        its description, and its encoder: (samples,) float32 at `sample_rate` -> (frames, codebooks) int64 on the CPU.
    """
    path = codec_path(config)
    folder = local_folder(path, None, FILES, KEY)
    named = read_json(folder / "config.json").get("model_type")
    if named != HiggsAudioV2TokenizerModel.config_class.model_type:
        raise UserError(f"model.codec is '{path}', a model of type '{named}': give the folder of the codec")
    codec: Any = load_from(HiggsAudioV2TokenizerModel, str(folder), None, KEY, dtype=torch.float32).eval().to(device)
    with library_errors(config.path, "processor_config.json"):
        extractor: Any = DacFeatureExtractor.from_pretrained(config.path, revision=config.revision)
    settings = codec.config
    info = CodecInfo(
        hash=hash_folder(folder),
        sample_rate=settings.sample_rate,
        codebooks=settings.num_quantizers,
        codebook_size=settings.codebook_size,
        frame_rate=settings.sample_rate / settings.hop_length,
    )

    @torch.no_grad()
    def encode(waveform: Tensor) -> Tensor:
        inputs = extractor(waveform.numpy(), sampling_rate=info.sample_rate, return_tensors="pt")
        codes: Tensor = codec.encode(inputs["input_values"].to(device)).audio_codes
        return codes[0].T.cpu()

    with library_errors(path, "config.json", KEY):  # a wrong config fails only when the codec runs
        encode(torch.zeros(info.sample_rate))
    return info, encode


def codec_hash(config: ModelConfig) -> str:
    """Return the content hash of the codec without loading it."""
    return hash_folder(local_folder(codec_path(config), None, FILES, KEY))
