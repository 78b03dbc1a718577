"""Measures of a clip, and its picture, on clips whose answer is known."""

import io
import math
import struct
import zlib
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from rawloop.errors import UserError
from rawloop.listen.listener import distance
from rawloop.listen.picture import mel_picture
from rawloop.listen.sound import repetition, silence, wav_bytes, write_wav

RATE = 24_000


def tone(hertz: float, seconds: float = 0.5, level: float = 0.5) -> Tensor:
    return level * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


def test_silence_is_the_share_of_quiet_windows() -> None:
    loud = tone(440)
    assert silence(loud, RATE) == 0.0
    assert silence(torch.cat([loud, torch.zeros(len(loud))]), RATE) == 0.5
    assert silence(tone(440, level=0.004), RATE) == 1.0  # -51 dBFS
    assert silence(torch.zeros(0), RATE) == 1.0


def test_repetition_is_of_the_first_codebook() -> None:
    codes = torch.tensor([[1, 9], [1, 8], [1, 7], [2, 7], [3, 7]])
    assert repetition(codes) == 0.5
    assert repetition(codes[:1]) == 0.0
    assert repetition(codes[:0]) == 0.0


@pytest.mark.parametrize(("one", "other", "edits"), [("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0)])
def test_the_distance_of_two_texts(one: str, other: str, edits: int) -> None:
    assert distance(one, other) == distance(other, one) == edits


def test_a_wav_file_has_the_samples_and_replaces_another(tmp_path: Path) -> None:
    for sound in (tone(100), 2 * tone(440)):
        write_wav(tmp_path / "deep" / "a.wav", sound, RATE)
    found, rate = soundfile.read(tmp_path / "deep" / "a.wav", dtype="float32")
    assert rate == RATE
    assert torch.allclose(torch.from_numpy(found), (2 * tone(440)).clamp(-1, 1), atol=1e-4)
    assert soundfile.read(io.BytesIO(wav_bytes(torch.zeros(0), RATE)))[0].shape == (0,)
    with pytest.raises(UserError, match="cannot be written"):
        write_wav(tmp_path / "deep", tone(1), RATE)


def rows_of(png: bytes) -> Tensor:
    """The pixels of a grey PNG, (height, width), read as the format's specification says."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    assert (depth, colour) == (8, 0)
    place, data = 8, b""
    while place < len(png):
        (size,), kind = struct.unpack(">I", png[place : place + 4]), png[place + 4 : place + 8]
        body = png[place + 8 : place + 8 + size]
        assert struct.unpack(">I", png[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + body)
        data += body if kind == b"IDAT" else b""
        place += 12 + size
    rows = torch.frombuffer(bytearray(zlib.decompress(data)), dtype=torch.uint8).view(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_the_picture_is_bright_where_the_tone_is() -> None:
    heights = []
    for hertz in (200, 1000, 5000):
        pixels = rows_of(mel_picture(tone(hertz), RATE)).float()
        row = int(pixels.mean(1).argmax())
        mel = 2595 * math.log10(1 + hertz / 700) / (2595 * math.log10(1 + RATE / 2 / 700))
        assert row == pytest.approx((1 - mel) * len(pixels), abs=2)
        heights.append(row)
    assert heights == sorted(heights, reverse=True)  # low tones at the bottom
    assert rows_of(mel_picture(torch.zeros(0), RATE)).shape[0] == 80
