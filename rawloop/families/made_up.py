"""Examples that are made up: to compare two versions of a model, and to estimate a step without data."""

from pathlib import Path
from typing import Any

import torch

from rawloop.contracts import Audio, Sample, Text, Turn

QUESTION, ANSWER = "One two three?", "Four five six."


def spoken(encoder: Any, frames: int) -> Any:
    """Return an example of a `HiggsEncoder`: a line and so many frames of random codes."""
    settings = encoder.settings
    turns = (Turn("user", (Text("One two three."),)), Turn("assistant", (Audio(Path("probe")),), trained=True))
    shape, generator = (frames, settings.num_codebooks), torch.Generator().manual_seed(0)
    codes = torch.randint(settings.audio_stream_bos_id, shape, generator=generator)
    return encoder.example(Sample("probe", turns), lambda _: codes)


def spoken_in(encoder: Any, positions: int) -> Any:
    """Return one that takes so many positions."""
    text = len(spoken(encoder, 1).input_ids) - 1
    return spoken(encoder, max(1, positions - text))


def heard(encoder: Any, length: int, answer: str = ANSWER) -> Any:
    """Return an example of a `ChatEncoder`: so many samples of noise, a question and its answer."""
    question = Turn("user", (Audio(Path("noise")), Text(QUESTION)))
    sample = Sample("probe", (question, Turn("assistant", (Text(answer),), trained=True)))
    noise = 0.1 * torch.randn(length, generator=torch.Generator().manual_seed(0))
    return encoder.encode(sample, [noise])


def heard_in(encoder: Any, positions: int) -> Any:
    """Return one that takes about so many positions, at most half of them for the clip."""
    second = encoder.sample_rate
    clip = max(second, min(int(encoder.longest * second), second * positions // 50))  # 25 positions a second
    short, long = (len(heard(encoder, clip, "one" + " one" * words).input_ids) for words in (0, 10))
    return heard(encoder, clip, "one" + " one" * round(max(0, positions - short) / (long - short) * 10))
