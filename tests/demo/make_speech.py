"""Speaks the sentences of `sentences.py` with espeak-ng: how the files in `speech/` were made.

Kept so that the data can be checked and made again: `python -m tests.demo.make_speech OUT`. The demo itself reads
the finished files and needs no espeak-ng.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio

from rawloop.errors import RawloopError, UserError
from tests.demo.sentences import SPLITS, VOICES, Dialogue, Line

Wave = npt.NDArray[np.float32]

SAMPLE_RATE = 24_000
PEAK = 0.7
# The low five of the 16 bits are zero, which FLAC stores for nothing: half the size, noise about 65 dB below.
SILENT_BITS = 5
EDGE_SECONDS = 0.06
TURN_SECONDS = 0.16
ROOM = "Audio is recorded from a quiet room."


def speak(line: Line) -> Wave:
    """Return the line as a mono wave (samples,) float32 at 24 kHz, peak 0.7, trimmed, with a short silence around it.

    Raises RawloopError if espeak-ng is not installed or fails.
    """
    voice = VOICES[line.voice]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "line.wav"
        options = ["-v", voice.espeak, "-s", str(voice.speed), "-p", str(voice.pitch), "-w", str(path)]
        try:
            subprocess.run(["espeak-ng", *options, line.text], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RawloopError(f"espeak-ng cannot speak {line.text!r} as {line.voice}: {error}") from error
        wave, rate = soundfile.read(path, dtype="float32")
    wave = torchaudio.functional.resample(torch.from_numpy(wave), rate, SAMPLE_RATE).numpy()
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    wave = wave[loud[0] : loud[-1] + 1]
    return np.pad(wave * (PEAK / np.abs(wave).max()), round(EDGE_SECONDS * SAMPLE_RATE)).astype(np.float32)


def write_flac(path: Path, wave: Wave) -> float:
    """Write a wave (samples,) in -1..1 as 16-bit mono FLAC with its low bits zero; return its duration in seconds."""
    scale = 2 ** (15 - SILENT_BITS)
    samples = np.round(wave * scale).clip(-scale, scale - 1).astype(np.int16) << SILENT_BITS
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)
    return round(len(wave) / SAMPLE_RATE, 3)


def line_sample(line: Line, wave_path: Path, references: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Speak one line into `wave_path` and return its metadata; the speaker's first clip becomes the reference."""
    duration = write_flac(wave_path, speak(line))
    sample = {"duration": duration, "speaker_id": line.voice, "speaker_name": VOICES[line.voice].name, "scene": ROOM}
    if line.clone:
        sample |= references[line.voice]
    references.setdefault(line.voice, {"ref_audio_file": wave_path.name, "ref_transcript": line.text})
    return {"transcript": line.text, **sample}


def dialogue_sample(dialogue: Dialogue, wave_path: Path, references: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Speak two lines one after the other into `wave_path` and return the metadata."""
    lines = (dialogue.first, dialogue.second)
    pause = np.zeros(round(TURN_SECONDS * SAMPLE_RATE), dtype=np.float32)
    duration = write_flac(wave_path, np.concatenate([speak(lines[0]), pause, speak(lines[1])]))
    sample: dict[str, Any] = {
        "transcript": "\n".join(f"[SPEAKER{i}] {line.text}" for i, line in enumerate(lines)),
        "duration": duration,
        "speaker_id": "+".join(line.voice for line in lines),
        "speaker_name": " and ".join(VOICES[line.voice].name for line in lines),
        "scene": ROOM,
    }
    if dialogue.clone:
        sample["ref_speakers"] = [
            {"speaker_tag": f"[SPEAKER{i}]", **references[line.voice]} for i, line in enumerate(lines)
        ]
    else:
        sample["speakers"] = {f"SPEAKER{i}": VOICES[line.voice].manner for i, line in enumerate(lines)}
    return sample


def make_split(name: str, entries: Sequence[Line | Dialogue], folder: Path) -> None:
    """Write one split: the clips, half of the transcripts as files beside them, and `metadata.json`."""
    folder.mkdir(parents=True)
    samples: list[dict[str, Any]] = []
    references: dict[str, dict[str, str]] = {}
    for number, entry in enumerate(entries, start=1):
        voice = VOICES[entry.voice if isinstance(entry, Line) else entry.first.voice]
        identity = f"{name}-{voice.language}-{number:02d}"
        wave_path = folder / f"{identity}.flac"
        if isinstance(entry, Line):
            sample = line_sample(entry, wave_path, references)
        else:
            sample = dialogue_sample(entry, wave_path, references)
        if number % 2:
            wave_path.with_suffix(".txt").write_text(sample.pop("transcript") + "\n", encoding="utf-8")
            sample["transcript_file"] = f"{identity}.txt"
        samples.append({"id": identity, "audio_file": wave_path.name, "language": voice.language, **sample})
    text = json.dumps({"dataset_info": describe(samples), "samples": samples}, ensure_ascii=False, indent=1)
    (folder / "metadata.json").write_text(text + "\n", encoding="utf-8")


def describe(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the `dataset_info` of a split; durations in seconds."""
    return {
        "total_samples": len(samples),
        "speakers": sorted({speaker for sample in samples for speaker in sample["speaker_id"].split("+")}),
        "languages": sorted({sample["language"] for sample in samples}),
        "total_duration": round(sum(sample["duration"] for sample in samples), 3),
        "created_from": ["espeak-ng"],
    }


def make_speech(folder: Path) -> None:
    """Write `folder/train` and `folder/eval`; neither may exist.

    Raises UserError if one does, RawloopError if espeak-ng is not installed or fails.
    """
    for name in SPLITS:
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already; name a folder that has no train/ and eval/ in it")
    for name, entries in SPLITS.items():
        make_split(name, entries, folder / name)


def main() -> None:
    """Run from the command line: `python -m tests.demo.make_speech OUT`."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.demo.make_speech OUT")
    try:
        make_speech(Path(sys.argv[1]))
    except RawloopError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
