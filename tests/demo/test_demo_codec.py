"""The demo's codec is a codec: 25 frames a second, codebooks in use, each of which takes some of the error away."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import HiggsAudioV2TokenizerModel

from rawloop.demo import SPEECH
from rawloop.demo.checkpoint import read_split
from rawloop.demo.codec import features, kmeans


@pytest.fixture(scope="module")
def codec(demo_checkpoint: Path) -> HiggsAudioV2TokenizerModel:
    return HiggsAudioV2TokenizerModel.from_pretrained(demo_checkpoint / "codec").eval()


@pytest.fixture(scope="module")
def held_out() -> list[Tensor]:
    return [clip for _, clip in read_split(SPEECH / "eval")]


def test_config_is_24_khz_25_frames_8_codebooks(codec: HiggsAudioV2TokenizerModel) -> None:
    config = codec.config
    assert (config.sample_rate, config.hop_length, config.frame_rate) == (24_000, 960, 25)
    assert (config.num_quantizers, config.codebook_size, config.codebook_dim) == (8, 1024, 16)
    assert config.target_bandwidths == [0.25, 2.0]


@torch.no_grad()
@pytest.mark.parametrize("num_samples", [24_000, 23_999, 24_001, 24_960, 4_321])
def test_any_length_is_encoded_to_whole_frames_and_decoded(codec: HiggsAudioV2TokenizerModel, num_samples: int) -> None:
    codes = codec.encode(torch.randn(1, 1, num_samples)).audio_codes
    frames = codes.shape[2]
    assert codes.shape[:2] == (1, 8)
    assert abs(frames - num_samples / 960) < 1
    assert codec.decode(codes).audio_values.shape == (1, 1, frames * 960)


@torch.no_grad()
def test_at_least_100_codes_of_each_codebook_occur_in_held_out_clips(
    codec: HiggsAudioV2TokenizerModel, held_out: list[Tensor]
) -> None:
    codes = torch.cat([codec.encode(clip[None, None]).audio_codes[0] for clip in held_out], dim=1)
    assert len(codes) == 8
    assert min(len(row.unique()) for row in codes) >= 100


@torch.no_grad()
def test_each_codebook_reduces_the_error_on_held_out_clips(
    codec: HiggsAudioV2TokenizerModel, held_out: list[Tensor]
) -> None:
    embeddings = torch.cat([codec.fc(features(codec, clip)) for clip in held_out]).T[None]
    codes = codec.quantizer.encode(embeddings)
    errors = [embeddings.square().mean().item()]
    errors += [(embeddings - codec.quantizer.decode(codes[:n])).square().mean().item() for n in range(1, 9)]
    assert all(after < 0.95 * before for before, after in pairwise(errors))
    assert errors[-1] < 0.05 * errors[0]


@torch.no_grad()
def test_codes_are_learnable(codec: HiggsAudioV2TokenizerModel, held_out: list[Tensor]) -> None:
    # The best that a model can do without context: how often each code came in the train clips.
    train = torch.cat([codec.encode(clip[None, None]).audio_codes[0] for _, clip in read_split(SPEECH / "train")], 1)
    unseen = torch.cat([codec.encode(clip[None, None]).audio_codes[0] for clip in held_out], 1)
    counts = torch.stack([torch.bincount(row, minlength=1024) for row in train]) + 0.1
    losses = -(counts / counts.sum(1, keepdim=True)).log().gather(1, unseen)
    assert losses.mean() < 0.8 * math.log(1026)


def test_kmeans_finds_separate_clusters_and_fills_every_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = torch.cat([place + 0.1 * torch.randn(50, 2, generator=generator) for place in places])
    centres = kmeans(points, 16, generator)
    nearest = torch.cdist(points, centres).min(1).values
    assert centres.shape == (16, 2)
    assert nearest.max() < 0.5
