"""Fits the demo's codec, a small `HiggsAudioV2TokenizerModel`, to the bundled speech.

A codec built from its config has codebooks of zeros, so every frame has code 0 and losses on the codes mean nothing.
Here the encoder is random, but scaled to pass the energy of random frequency bands, and the codebooks are residual
k-means over its outputs. The decoder is random too, so its sound is noise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SEMANTIC_SHARE = 0.3  # scale of the semantic features, as a random HuBERT says little about speech
# Each codebook is fitted to the residuals at all these scales, so most codes are for louder and rougher sounds. The
# speech then uses about 150 of 1024 codes: a run over 90 seconds sees each code often enough to learn it.
HEADROOM = (1.0, 2.0, 4.0)
ITERATIONS = 8


def fit_codec(codec: Any, clips: Sequence[Tensor], seed: int) -> None:
    """Fit a codec to `clips`, each (samples,) float32 at its sample rate, with at least 400 frames in total.

    On one machine, the same codec, seed and clips give the same weights bit for bit.
    """
    generator = torch.Generator().manual_seed(seed)
    with one_thread(), torch.no_grad():
        scale_acoustics(codec, generator)
        standardise(codec, torch.cat([features(codec, clip) for clip in clips]))
        fit_codebooks(codec, torch.cat([codec.fc(features(codec, clip)) for clip in clips]), generator)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that the order of sums is fixed. Such small tensors gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def scale_acoustics(codec: Any, generator: torch.Generator) -> None:
    """Scale the weights of the acoustic encoder and decoder so that sound passes; biases become zero.

    The strided convolutions of the encoder get positive weights. They average each band, which keeps its energy (Snake
    squares) and removes its phase, which differs from frame to frame.
    """
    for name, module in (*codec.acoustic_encoder.named_modules(), *codec.acoustic_decoder.named_modules()):
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            continue
        fan_in = module.in_channels * module.kernel_size[0] / module.stride[0] ** isinstance(module, nn.ConvTranspose1d)
        module.weight.normal_(0.0, fan_in**-0.5, generator=generator)
        if module.bias is not None:
            module.bias.zero_()
        if "res_unit" in name:
            module.weight.mul_(0.3)
        elif isinstance(module, nn.Conv1d) and module.stride[0] > 1:
            module.weight.abs_().mul_(fan_in**-0.5)
    codec.acoustic_encoder.conv1.weight.mul_(3.0)


def features(codec: Any, clip: Tensor) -> Tensor:
    """Return the input of `fc` in `codec.encode` for a clip (samples,): (frames, acoustic + semantic) float32."""
    caught: list[Tensor] = []
    handle = codec.fc.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    try:
        codec.encode(clip[None, None])
    finally:
        handle.remove()
    return caught[0][0]


def standardise(codec: Any, outputs: Tensor) -> None:
    """Make `fc` map encoder outputs (frames, hidden) to mean 0 and variance 1, the semantic outputs to less."""
    share = torch.ones(outputs.shape[1])
    share[codec.config.acoustic_model_config.hidden_size :] = SEMANTIC_SHARE
    scale = share / outputs.std(0)
    codec.fc.weight.copy_(torch.diag(scale))
    codec.fc.bias.copy_(-outputs.mean(0) * scale)


def fit_codebooks(codec: Any, residual: Tensor, generator: torch.Generator) -> None:
    """Fit each codebook to the residual of the embeddings (frames, hidden) after the earlier codebooks.

    `project_in` is the orthonormal projection on the directions of the residual with the most variance, `project_out`
    its transpose. Together they never increase the residual.
    """
    codes, dim = codec.config.codebook_size, codec.config.codebook_dim
    for quantizer in codec.quantizer.quantizers:
        directions = torch.linalg.eigh(residual.T @ residual).eigenvectors[:, -dim:]
        projected = residual @ directions
        quantizer.project_in.weight.copy_(directions.T)
        quantizer.project_out.weight.copy_(directions)
        quantizer.project_in.bias.zero_()
        quantizer.project_out.bias.zero_()
        centres = kmeans(torch.cat([projected * scale for scale in HEADROOM]), codes, generator)
        quantizer.codebook.embed.copy_(centres)
        quantizer.codebook.embed_avg.copy_(centres)
        quantizer.codebook.cluster_size.fill_(1.0)
        residual = residual - quantizer.decode(quantizer.encode(residual.T[None]))[0].T


def kmeans(points: Tensor, centres: int, generator: torch.Generator) -> Tensor:
    """Return `centres` centres (centres, dim) of `points` (points, dim) after a few iterations of Lloyd's algorithm.

    Needs at least as many points as centres. A centre without points moves to a random point.
    """
    found = points[torch.randperm(len(points), generator=generator)[:centres]]
    for _ in range(ITERATIONS):
        nearest = (found.pow(2).sum(1) - 2 * points @ found.T).argmin(1)
        counts = torch.bincount(nearest, minlength=centres)
        sums = torch.zeros_like(found).index_add_(0, nearest, points)
        strays = points[torch.randint(len(points), (centres,), generator=generator)]
        found = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], strays)
    return found
