"""A generated clip as a file, and measures of it: its silence, and how its codes repeat."""

import io
from pathlib import Path

import soundfile
from torch import Tensor

from rawloop.errors import UserError
from rawloop.files import in_words, replace_file

SILENT_DB = -50.0  # below full scale, as the level of a window
WINDOW = 0.02  # seconds


def write_wav(path: Path, waveform: Tensor, sample_rate: int) -> None:
    """Write (samples,) float32 as a wav file of 16 bits, completely or not at all. Samples beyond 1 are clipped.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, wav_bytes(waveform, sample_rate))
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {in_words(error)}") from error


def wav_bytes(waveform: Tensor, sample_rate: int) -> bytes:
    """Return (samples,) float32 as the content of a wav file of 16 bits."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.clamp(-1, 1).numpy(), sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def silence(waveform: Tensor, sample_rate: int) -> float:
    """Return the share of windows of 20 ms that are quieter than -50 dBFS (root mean square); 1 without a window."""
    size = int(WINDOW * sample_rate)
    windows = waveform[: len(waveform) // size * size].view(-1, size)
    if not len(windows):
        return 1.0
    return float((windows.square().mean(1) < 10 ** (SILENT_DB / 10)).float().mean())


def repetition(codes: Tensor) -> float:
    """Return the share of frames whose code in the first codebook is that of the frame before; 0 below two frames.

    Args:
        codes: (frames, codebooks) int64.
    """
    first = codes[:, 0]
    return float((first[1:] == first[:-1]).float().mean()) if len(first) > 1 else 0.0
