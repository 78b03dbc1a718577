"""The mel spectrogram of a clip as a small PNG, without a plotting library."""

import struct
import zlib

import torch
from torch import Tensor

WINDOW, HOP, MELS = 1024, 256, 80  # samples, samples, rows
RANGE_DB = 80.0  # below the loudest point is black


def mel_picture(waveform: Tensor, sample_rate: int) -> bytes:
    """Return the log mel spectrogram of (samples,) float32 as a grey PNG, low frequencies at the bottom."""
    if len(waveform) < WINDOW:
        waveform = torch.cat([waveform, waveform.new_zeros(WINDOW - len(waveform))])
    spectrum = torch.stft(waveform, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    decibels = 10 * (_filters(sample_rate) @ spectrum).clamp_min(1e-10).log10()
    light = ((decibels - decibels.max()) / RANGE_DB + 1).clamp(0, 1)
    return _png((light.flip(0) * 255).to(torch.uint8))


def _filters(sample_rate: int) -> Tensor:
    """Return triangular mel filters of HTK's scale, (mels, frequencies)."""
    frequencies = torch.linspace(0, sample_rate / 2, WINDOW // 2 + 1)
    top = 2595 * torch.log10(torch.tensor(1 + sample_rate / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, float(top), MELS + 2) / 2595) - 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0)


def _png(grey: Tensor) -> bytes:
    """Return (height, width) uint8 as a PNG of 8-bit grey."""
    height, width = grey.shape
    rows = torch.cat([grey.new_zeros(height, 1), grey], 1)  # each row begins with the number of its filter: none
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.numpy().tobytes())),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
