"""Measures each pair of clip and words: a pair that does not fit, or a bad recording, spoils a voice.

Which pairs are unusual is told by comparison with the others of the data set, since speakers and languages differ.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rawloop.audio import BadAudio, decode, load_audio
from rawloop.contracts import Sample
from rawloop.data.encoding import ahead

FRAME = 0.02  # seconds
FLOOR = -60.0  # dBFS: a frame below it is silent,
BELOW = 40.0  # and one that is so many dB below the loudest frame
FULL, RUN = 0.999, 3  # so many samples in a row at full scale are clipped
QUIETEST = -120.0  # dBFS, of digital silence
UNUSUAL, TIMES = 3.5, 1.4  # robust standard deviations of the log of the speed; and the least factor
ENOUGH = 20  # pairs, to tell which speed is usual
MOST_CLIPPED, MOST_SILENT, LONGEST_EDGE, MOST_DB = 1e-4, 0.5, 1.0, 12.0
EXCERPT_SECONDS, EXCERPT_RATE = 10, 24_000
LANGUAGES = ("language", "lang", "locale")
FLAGS = {
    "unread": "the clip cannot be used",
    "fast": "many more characters a second than usual in its language: the clip may lack words",
    "slow": "many fewer characters a second than usual in its language: the words may lack what is spoken",
    "clipped": f"more than {MOST_CLIPPED:.2%} of the samples stand at full scale: the recording is distorted",
    "silent": f"more than {MOST_SILENT:.0%} of the clip is silence",
    "edges": f"more than {LONGEST_EDGE:g} s of silence before or after the words",
    "loudness": f"more than {MOST_DB:g} dB louder or quieter than usual",
}


@dataclass(frozen=True)
class Sound:
    """What is measured of a clip: times in seconds, levels in dBFS, shares from 0 to 1."""

    seconds: float
    rms: float
    peak: float
    clipped: float
    silence: float
    before: float
    after: float


def measure_sound(wave: Tensor, rate: int) -> Sound:
    """Measure a waveform, (samples,) float32 between -1 and 1 with at least one sample, at `rate` Hz."""
    size = max(1, round(FRAME * rate))
    padded = torch.nn.functional.pad(wave, (0, -len(wave) % size))
    levels = 10 * torch.log10(padded.view(-1, size).square().mean(1).clamp_min(10 ** (QUIETEST / 10)))
    loud = (levels >= max(FLOOR, float(levels.max()) - BELOW)).nonzero().squeeze(1)
    first, last = (int(loud[0]), int(loud[-1])) if len(loud) else (len(levels), -1)
    peak = float(wave.abs().max())
    return Sound(
        seconds=len(wave) / rate,
        rms=_decibels(float(wave.double().square().mean().sqrt())),
        peak=_decibels(peak),
        clipped=_clipped(wave),
        silence=1 - len(loud) / len(levels),
        before=first * FRAME,
        after=max(0, len(levels) - 1 - last) * FRAME,
    )


def excerpt(path: str) -> tuple[str, bytes] | None:
    """Return media type and bytes of a clip's beginning, small enough for a page; None if it cannot be read."""
    import soundfile

    try:
        wave = load_audio(Path(path), EXCERPT_RATE)[: EXCERPT_SECONDS * EXCERPT_RATE]
    except BadAudio:
        return None
    kind = "MP3" if "MP3" in soundfile.available_formats() else "FLAC"
    out = io.BytesIO()
    soundfile.write(out, wave.clamp(-1, 1).numpy(), EXCERPT_RATE, format=kind)
    return {"MP3": "audio/mpeg", "FLAC": "audio/flac"}[kind], out.getvalue()


def _decibels(level: float) -> float:
    return max(QUIETEST, 20 * math.log10(level)) if level > 0 else QUIETEST


def _clipped(wave: Tensor) -> float:
    """Return the share of samples in runs at full scale. A single sample there is no distortion."""
    full = wave.abs() >= FULL
    if len(wave) < RUN or not bool(full.any()):
        return 0.0
    starts = full.unfold(0, RUN, 1).all(1)
    runs = torch.zeros_like(full)
    for shift in range(RUN):
        runs[shift : shift + len(starts)] |= starts
    return float(runs.double().mean())


class Pair(NamedTuple):
    """A trained clip, its words, and their language; "" if the record names none."""

    id: str
    path: Path
    words: str
    language: str


def pairs_of(samples: Iterable[Sample]) -> Iterator[Pair]:
    """Yield each trained clip whose user turn says what it speaks."""
    for sample in samples:
        language = next((str(sample.extra[key]) for key in LANGUAGES if sample.extra.get(key)), "")
        for asked, answer in zip(sample.turns, sample.turns[1:], strict=False):
            if answer.trained and len(answer.clips) == 1 and asked.role == "user" and asked.words.strip():
                yield Pair(sample.id, answer.clips[0].path, asked.words.strip(), language)


def measure_pairs(samples: Iterable[Sample], on_pair: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Decode and measure all pairs, and return the data report, of values that JSON can hold.

    `clips` has the measures of each pair and its `flags`, keys of FLAGS; `usual` has medians; `letters` has the number
    and the first sample of each letter.
    """
    pairs = list(pairs_of(samples))
    clips = []
    for found in ahead(_measure, pairs):
        clips.append(found)
        on_pair()
    usual = {key: median(values) for key in ("seconds", "rms", "silence", "speed") if (values := _values(clips, key))}
    for language in {clip["language"] for clip in clips}:  # languages have different speeds
        alike = [clip for clip in clips if clip["language"] == language]
        speeds = _values(alike if len(alike) >= ENOUGH else clips, "speed")
        spread = _spread([math.log(speed) for speed in speeds])
        for clip in alike:
            clip["flags"] = list(_flags(clip, usual, spread))
    letters: Counter[str] = Counter()
    first: dict[str, str] = {}
    for pair in pairs:
        letters.update(pair.words)
        for letter in set(pair.words):
            first.setdefault(letter, pair.id)
    counted = {letter: [number, first[letter]] for letter, number in letters.most_common()}
    hours = sum(_values(clips, "seconds")) / 3600
    return {"hours": hours, "usual": usual, "flags": FLAGS, "letters": counted, "clips": clips}


def _measure(pair: Pair) -> dict[str, Any]:
    clip: dict[str, Any] = {**pair._asdict(), "path": str(pair.path), "characters": len(pair.words)}
    try:
        wave, rate = decode(pair.path, math.inf, lambda: None)
    except BadAudio as error:
        return {**clip, "unread": str(error)}
    if not bool(wave.isfinite().all()):
        return {**clip, "unread": "has samples that are not finite (NaN or infinity)"}
    sound = measure_sound(wave, rate)
    return {**clip, **asdict(sound), "speed": len(pair.words) / sound.seconds}


def _values(clips: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [clip[key] for clip in clips if key in clip]


def _spread(logs: Sequence[float]) -> tuple[float, float]:
    """Return centre and robust standard deviation; the deviation is infinite if there are too few values."""
    if len(logs) < ENOUGH:
        return 0.0, math.inf
    centre = median(logs)
    return centre, max(1.4826 * median(abs(value - centre) for value in logs), 1e-6)


def _flags(clip: dict[str, Any], usual: dict[str, float], spread: tuple[float, float]) -> Iterator[str]:
    if "unread" in clip:
        yield "unread"
        return
    away = math.log(clip["speed"]) - spread[0]
    if abs(away) > max(UNUSUAL * spread[1], math.log(TIMES)):
        yield "fast" if away > 0 else "slow"
    if clip["clipped"] > MOST_CLIPPED:
        yield "clipped"
    if clip["silence"] > MOST_SILENT:
        yield "silent"
    if max(clip["before"], clip["after"]) > LONGEST_EDGE:
        yield "edges"
    if abs(clip["rms"] - usual["rms"]) > MOST_DB:
        yield "loudness"
