"""The real codec of Higgs Audio v2, tiny: what is cached is what it gives for one clip at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig

from rawloop.audio import load_audio
from rawloop.contracts import Audio, Sample, Turn
from rawloop.data.codes import CodeCache
from rawloop.data.prepare import prepare
from rawloop.family_protocols import CodecInfo
from rawloop.files import hash_folder


@pytest.fixture
def codec(tmp_path: Path) -> tuple[Any, Path]:
    """A codec of 25 frames/s at 24 kHz with random codebooks, and the folder it is saved in."""
    acoustic = DacConfig(encoder_hidden_size=8, downsampling_ratios=[8, 5, 4, 2, 3], decoder_hidden_size=32)
    semantic = HubertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    config = HiggsAudioV2TokenizerConfig(
        acoustic_model_config=acoustic.to_dict(),
        semantic_model_config=semantic.to_dict(),
        codebook_dim=16,
        codebook_size=1024,
        sample_rate=24000,
        target_bandwidths=[0.25, 2.0],
    )
    model = HiggsAudioV2TokenizerModel(config).eval()
    with torch.no_grad():
        for quantizer in model.quantizer.quantizers:
            quantizer.codebook.embed.normal_()
    model.save_pretrained(tmp_path / "codec")
    return model, tmp_path / "codec"


def test_codes_of_the_real_codec(codec: tuple[Any, Path], tone: Callable[..., Path], tmp_path: Path) -> None:
    model, folder = codec
    config = model.config

    def encode(waveform: Tensor) -> Tensor:
        codes: Tensor = model.encode(waveform[None, None]).audio_codes
        return codes[0].T

    info = CodecInfo(hash_folder(folder), config.sample_rate, 8, config.codebook_size, config.frame_rate)
    assert info.frame_rate == 25
    clips = [tone("a.wav", seconds=1.0), tone("b.flac", seconds=0.73, rate=44100, channels=2, hertz=500)]
    samples = [Sample("s", tuple(Turn("assistant", (Audio(path),), trained=True) for path in clips))]
    report = prepare(samples, encode, info, tmp_path / "codes", progress=False)
    assert report.encoded == 2
    cache = CodeCache(tmp_path / "codes", info.hash)
    with torch.inference_mode():
        for path in clips:
            assert torch.equal(cache(path), encode(load_audio(path, 24000)))
    assert cache(clips[0]).shape == (25, 8)
    assert len(set(cache(clips[0]).flatten().tolist())) > 10
