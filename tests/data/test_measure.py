"""What is measured of a clip, and which pairs of clip and words are unusual."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.measure import excerpt, measure_pairs, measure_sound, pairs_of

RATE = 16000
Tone = Callable[..., Path]


def sine(seconds: float, level: float = 0.5) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * 220 * torch.arange(round(seconds * RATE)) / RATE)


def test_levels_times_and_shares() -> None:
    wave = torch.cat([torch.zeros(RATE), sine(2.0), torch.zeros(RATE // 2)])
    sound = measure_sound(wave, RATE)
    assert sound.seconds == 3.5
    assert sound.peak == pytest.approx(20 * math.log10(0.5), abs=0.01)
    assert sound.rms == pytest.approx(20 * math.log10(0.5 * math.sqrt(2 / 3.5 / 2)), abs=0.01)
    assert (sound.before, sound.after) == pytest.approx((1.0, 0.5), abs=0.021)
    assert sound.silence == pytest.approx(1.5 / 3.5, abs=0.01)
    assert sound.clipped == 0


def test_digital_silence_and_a_single_sample() -> None:
    sound = measure_sound(torch.zeros(100), RATE)
    assert (sound.rms, sound.peak, sound.silence, sound.after) == (-120.0, -120.0, 1.0, 0.02)
    assert measure_sound(torch.ones(1), RATE).peak == 0


def test_clipping_is_a_run_at_full_scale() -> None:
    wave = sine(1.0)
    wave[100], wave[200:202], wave[300:304] = 1.0, -1.0, -1.0
    assert measure_sound(wave, RATE).clipped == pytest.approx(4 / RATE)
    assert measure_sound((10 * sine(1.0)).clamp(-1, 1), RATE).clipped > 0.5


def pair(identity: str, path: Path, words: str, **extra: object) -> Sample:
    turns = (Turn("user", (Text(words),)), Turn("assistant", (Audio(path),), trained=True))
    return Sample(identity, turns, extra=extra)


def test_unusual_pairs_are_flagged(tone: Tone, tmp_path: Path) -> None:
    samples = [pair(f"{n}", tone(f"{n}.wav", seconds=1.0 + n / 100), "x" * (15 + n % 3)) for n in range(30)]
    other = [pair(f"zh{n}", tone(f"zh{n}.wav", seconds=1.0), "字" * 4, language="zh") for n in range(20)]
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    wave, rate = soundfile.read(tone("half.wav", seconds=1.0))
    soundfile.write(tmp_path / "half.wav", [*[0.0] * 2 * rate, *wave], rate)
    soundfile.write(tmp_path / "loud.wav", (20 * wave).clip(-1, 1), rate)
    odd = {
        "fast": pair("fast", tone("fast.wav", seconds=0.3), "x" * 15),
        "slow": pair("slow", tone("slow.wav", seconds=1.0), "x" * 4),
        "unread": pair("unread", tmp_path / "text.wav", "x" * 15),
        "silent edges": pair("silent", tmp_path / "half.wav", "x" * 45),
        "clipped": pair("clipped", tmp_path / "loud.wav", "x" * 15),
        "loudness": pair("quiet", tone("quiet.wav", seconds=1.0, level=0.05), "x" * 15),
    }
    report = measure_pairs([*samples, *other, *odd.values()])
    flags = {clip["id"]: " ".join(clip["flags"]) for clip in report["clips"]}
    assert {flags[sample.id]: sample.id for sample in odd.values()} == {kind: s.id for kind, s in odd.items()}
    assert not any(flags[sample.id] for sample in [*samples, *other])
    assert report["letters"]["字"] == [80, "zh0"]
    assert report["usual"]["seconds"] == pytest.approx(1.0, abs=0.2)
    json.dumps(report, allow_nan=False)


def test_a_language_of_few_pairs_is_compared_with_all(tone: Tone) -> None:
    samples = [pair(f"{n}", tone(f"{n}.wav", seconds=1.0), "x" * 15, language=f"l{n % 3}") for n in range(30)]
    odd = pair("odd", tone("odd.wav", seconds=0.3), "x" * 15, language="l0")
    assert [clip["id"] for clip in measure_pairs([*samples, odd])["clips"] if clip["flags"]] == ["odd"]


def test_few_pairs_have_no_usual_speed(tone: Tone) -> None:
    report = measure_pairs([pair(f"{n}", tone(f"{n}.wav", seconds=1.0), "x" * 5 * 4**n) for n in range(4)])
    assert not any(clip["flags"] for clip in report["clips"])


def test_pairs_are_trained_clips_with_words(tone: Tone) -> None:
    clip = tone("a.wav")
    reference = (Turn("user", (Text("Reference."),)), Turn("assistant", (Audio(clip),)))
    spoken = pair("a", clip, " Words. ", locale="en")
    heard = Sample("b", (Turn("user", (Audio(clip),)), Turn("assistant", (Text("Words."),), trained=True)))
    found = list(pairs_of([Sample("a", (*reference, *spoken.turns), extra=spoken.extra), heard]))
    assert found == [("a", clip, "Words.", "en")]


def test_an_excerpt_is_short_and_can_be_played(tone: Tone, tmp_path: Path) -> None:
    kind, content = excerpt(str(tone("long.wav", seconds=15.0))) or ("", b"")
    assert kind in ("audio/mpeg", "audio/flac")
    (tmp_path / "excerpt").write_bytes(content)
    assert soundfile.info(tmp_path / "excerpt").duration == pytest.approx(10, abs=0.2)
    assert len(content) < 300_000
    (tmp_path / "text.wav").write_text("no audio", encoding="utf-8")
    assert excerpt(str(tmp_path / "text.wav")) is None
