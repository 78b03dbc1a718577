"""Converts audio that libsndfile cannot read (m4a, webm, ...) with the program ffmpeg, if it is installed."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rawloop.containers import BadAudio

PROGRAM = "ffmpeg"
# The demuxer of each format is named: ffmpeg would open the files that a playlist names, if it found one.
DEMUXERS = {"WebM or Matroska": "matroska", "Windows Media": "asf", "AMR": "amr", "AAC": "aac", "MPEG-4": "mov"}
SECONDS = 600.0  # for one file


def can_convert(kind: str | None) -> bool:
    """Return whether ffmpeg is installed and reads a format of `DEMUXERS`."""
    return kind in DEMUXERS and shutil.which(PROGRAM) is not None


@contextmanager
def converted(path: Path, kind: str) -> Iterator[Path]:
    """Yield a float32 wav of the first audio stream of a file, at its sample rate and with its channels.

    Raises:
        BadAudio: ffmpeg finds a fault in the file, also one that it could pass over.
    """
    with TemporaryDirectory(prefix="rawloop-") as folder:
        wav = Path(folder) / "audio.wav"
        limits = ["-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file"]
        source = ["-f", DEMUXERS[kind], "-i", f"file:{os.path.abspath(path)}"]
        command = [PROGRAM, *limits, *source, "-map", "0:a:0", "-c:a", "pcm_f32le", "-f", "wav", f"file:{wav}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise BadAudio(f"cannot be decoded: ffmpeg has not finished after {SECONDS:g} s") from error
        said = " ".join(done.stderr.split())[:300]
        if done.returncode or said:
            raise BadAudio(f"cannot be decoded: ffmpeg says: {said or f'exit code {done.returncode}'}")
        yield wav
