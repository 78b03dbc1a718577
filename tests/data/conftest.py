"""Real audio files, a deterministic codec made of plain arithmetic, and data files around them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from rawloop.family_protocols import CodecInfo

HOP = 960  # samples per frame: 25 frames/s at 24 kHz, as in the codec of Higgs Audio v2


@pytest.fixture
def info() -> CodecInfo:
    return CodecInfo(hash="c0dec" + "0" * 59, sample_rate=24000, codebooks=8, codebook_size=1024, frame_rate=25.0)


@pytest.fixture
def encode() -> Callable[[Tensor], Tensor]:
    """Give a codec that quantises the mean level of each eighth of a frame: (samples,) -> (frames, 8)."""

    def run(waveform: Tensor) -> Tensor:
        frames = waveform[: len(waveform) // HOP * HOP].reshape(-1, 8, HOP // 8)
        return (frames.abs().mean(dim=-1) * 1023).long()

    return run


@pytest.fixture
def tone(tmp_path: Path) -> Callable[..., Path]:
    """Give `tone(name, seconds=0.4, rate=24000, channels=1, level=0.5, hertz=220, **soundfile options)`."""

    def write(
        name: str,
        seconds: float = 0.4,
        rate: int = 24000,
        channels: int = 1,
        level: float = 0.5,
        hertz: float = 220.0,
        **options: Any,
    ) -> Path:
        moments = torch.arange(round(seconds * rate)) / rate
        wave = level * torch.sin(2 * math.pi * hertz * moments)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave[:, None].repeat(1, channels).numpy(), rate, **options)
        return path

    return write


@pytest.fixture
def metadata(tmp_path: Path) -> Callable[..., Path]:
    """Give `metadata(*samples)`, which writes a metadata.json and returns its folder."""

    def write(*samples: object) -> Path:
        text = json.dumps({"dataset_info": {}, "samples": samples}, ensure_ascii=False)
        (tmp_path / "metadata.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Give `jsonl(*records, name="train.jsonl")`, which writes one JSON object per line."""

    def write(*records: object, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return path

    return write
