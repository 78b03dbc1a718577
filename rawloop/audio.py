"""Turns an audio file into a mono waveform at a model's sample rate, or into the reason why it cannot be used.

libsndfile decodes (wav, flac, ogg, mp3), torchaudio resamples. `torchaudio.load` is not used: it needs FFmpeg.
"""

import importlib.metadata
import importlib.util
import io
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rawloop.containers import STREAMED, Extent, cut_short
from rawloop.containers import BadAudio as BadAudio
from rawloop.errors import UserError
from rawloop.frames import measure
from rawloop.hashing import open_regular
from rawloop.segments import Segment, segment_of

OTHER_FORMATS = {
    b"\x1a\x45\xdf\xa3": "WebM or Matroska",
    b"\x30\x26\xb2\x75": "Windows Media",
    b"#!AMR": "AMR",
    b"\xff\xf1": "AAC",
    b"\xff\xf9": "AAC",
}
SILENCE_PEAK = 1e-3  # -60 dBFS: a clip that never exceeds it holds no speech that a codec could keep
LOUDEST_PEAK = 10.0  # +20 dBFS: float files beyond this were never scaled to [-1, 1]
MOST_TAPS = 20_000_000  # coefficients of the resampling filter: 80 MB; odd sample rates would need gigabytes
UNKNOWN = 2**62  # libsndfile gives about 2**63 samples where a header does not say how many
ROUNDED = 0.05  # seconds by which a segment may end behind its clip, as published lists round times
# The lines of libsndfile's log about a length beyond the end of the file, in aiff, au and w64.
CUT = re.compile(r"^(?: SSND|  Data Size  |riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
PADDING = 8  # bytes that such a file may lack at its end, where writers forget them
BLOCK = 2**20  # samples decoded at a time, over all channels: 4 MB


def load_audio(
    path: Path,
    sample_rate: int,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
    frame_rate: float = 0.0,
    on_open_end: Callable[[], None] = lambda: None,
) -> Tensor:
    """Decode a clip, mix it to mono and resample it.

    Args:
        path: wav, flac, ogg or mp3 file, of any sample rate and number of channels, or a segment of one.
        sample_rate: of the result, in Hz.
        min_seconds: shorter clips are bad.
        max_seconds: longer clips are bad; the headers are read before anything is decoded.
        frame_rate: of the codec, in frames per second; a clip shorter than one frame is bad.
        on_open_end: is called if the file does not say where it ends, so that it may have been cut short.

    Returns the waveform, (samples,) float32. Raises BadAudio if the clip cannot be decoded whole, or no voice could be
    learnt from it; the message says why.
    """
    waveform, rate = _decode(path, max_seconds, on_open_end)
    shortest = max(min_seconds, 1 / frame_rate if frame_rate else 0.0)
    if len(waveform) < shortest * rate:
        what = "data.min_seconds" if shortest == min_seconds else "one frame of the codec"
        raise BadAudio(f"lasts {len(waveform) / rate:.3f} s, shorter than {what} ({shortest:g} s)")
    peak = float(waveform.abs().max())
    if not math.isfinite(peak):
        raise BadAudio("has samples that are not finite (NaN or infinity)")
    if peak > LOUDEST_PEAK:
        raise BadAudio(f"peaks at {peak:g}: a float file must be scaled to lie between -1 and 1")
    if peak < SILENCE_PEAK:
        level = f"{20 * math.log10(peak):.0f} dBFS" if peak else "digital silence"
        raise BadAudio(f"is silent (peak {level}, limit -60 dBFS)")
    return _resample(waveform, rate, sample_rate)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a clip, and turn the errors of libsndfile into BadAudio."""
    import soundfile

    try:
        # Python opens it, as libsndfile only says "System error".
        with open_regular(path) as stream:
            yield stream
    except soundfile.LibsndfileError as error:
        raise BadAudio(f"cannot be decoded: {_other_format(path) or _words(error)}") from error
    except OSError as error:
        raise BadAudio(f"cannot be opened: {error.strerror}") from error


def _other_format(path: Path) -> str | None:
    """Return what a file is that libsndfile does not read, by its first bytes."""
    with open(path, "rb") as stream:
        head = stream.read(16)
    if head.startswith(b"version https://"):
        return "it is the pointer of a Git LFS file: fetch the file itself with `git lfs pull`"
    name = next((name for begin, name in OTHER_FORMATS.items() if head.startswith(begin)), None)
    if head[4:8] == b"ftyp":
        name = "MPEG-4 (m4a, mp4)"
    convert = f"`ffmpeg -i {shlex.quote(path.name)} {shlex.quote(path.stem + '.flac')}`"
    return name and f"it is {name}, and wav, flac, ogg and mp3 are read: convert it, as with {convert}"


def _words(error: Any) -> str:
    return str(error.error_string).strip().rstrip(".")


def _sound(stream: BinaryIO, found: Extent) -> tuple[Any, int]:
    """Open a clip for libsndfile, and return it with its number of samples per channel."""
    import soundfile

    os.lseek(stream.fileno(), 0, os.SEEK_SET)  # stream.seek may only move inside its buffer
    try:
        file = soundfile.SoundFile(stream.fileno(), closefd=False)
    except soundfile.LibsndfileError:  # it does not know every tag that may stand before an mp3
        if not found.replaces:
            raise
        file = None
    # libsndfile would stop at the wrong number of samples that it has read or guessed.
    if file is None or (found.header and not 0 < found.samples <= file.frames < UNKNOWN):
        rest = os.pread(stream.fileno(), os.fstat(stream.fileno()).st_size, found.replaces)
        file = soundfile.SoundFile(io.BytesIO(found.header + rest))
    return file, found.samples or int(file.frames)


def _decode(path: Path, max_seconds: float, on_open_end: Callable[[], None]) -> tuple[Tensor, int]:
    """Return a clip as mono, (samples,) float32, and its sample rate in Hz.

    The header is read first and channels are mixed block by block, as a small file can decode to a huge one.
    """
    segment = segment_of(path)
    with _opened(segment.file) as stream:
        found = measure(stream)
        if found.open_end:
            on_open_end()
        file, frames = _sound(stream, found)
        with file:
            rate = int(file.samplerate)
            cut = CUT.search(file.extra_info)
            if cut and int(cut[2]) + PADDING < int(cut[1]) < STREAMED:
                raise BadAudio(f"is cut short: its header promises {cut[1]} bytes, it holds {cut[2]}")
            first, last = _bounds(segment, frames, rate)
            if last == first:
                raise BadAudio("is empty: it has no samples")
            if last - first > max_seconds * rate:
                raise BadAudio(f"lasts {(last - first) / rate:.2f} s, longer than data.max_seconds ({max_seconds:g} s)")
            # An mp3 is decoded from its beginning, as its frames lean on earlier ones; GSM cannot be sought in at all.
            place = file.seek(first) if first and not found.slack and file.seekable() else 0
            waveform = _mono(file, place, first, last)
            if len(waveform) < last - first - found.slack:
                raise cut_short(last / rate, (first + len(waveform)) / rate)
    return waveform, rate


def _bounds(segment: Segment, frames: int, rate: int) -> tuple[int, int]:
    first, last = round(segment.start * rate), frames if segment.end is None else round(segment.end * rate)
    if not segment.whole and (first >= frames or last > frames + ROUNDED * rate):
        end = "its end" if segment.end is None else f"{segment.end:g} s"
        raise BadAudio(
            f"is no segment of its clip: it runs from {segment.start:g} s to {end}, the clip lasts "
            f"{frames / rate:.3f} s: mend its times, or take them out if the whole clip is meant"
        )
    return first, min(last, frames)


def _mono(file: Any, place: int, first: int, end: int) -> Tensor:
    """Decode a file whose next sample is `place`, and mix the samples from `first` to `end` at most."""
    import soundfile

    blocks, size = [torch.zeros(0)], max(1, BLOCK // file.channels)
    while place < end:
        try:
            samples = file.read(min(size, end - place), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            seconds = place / file.samplerate
            raise BadAudio(f"cannot be decoded beyond {seconds:.2f} s, as if cut short: {_words(error)}") from error
        if not len(samples):
            break
        blocks.append(torch.from_numpy(samples[max(first - place, 0) :]).mean(dim=1))
        place += len(samples)
    return torch.cat(blocks)


def _resample(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    if rate == wanted:
        return waveform
    divisor = math.gcd(rate, wanted)
    if (rate // divisor) * (wanted // divisor) > MOST_TAPS:
        raise BadAudio(f"has a sample rate of {rate} Hz, which has no simple ratio to {wanted} Hz: resample it first")
    resampled: Tensor = import_torchaudio().functional.resample(waveform, rate, wanted)
    return resampled


def import_torchaudio() -> ModuleType:
    """Import torchaudio, or raise a UserError with the command that mends it.

    PyPI's torchaudio is a CUDA build. Beside a CPU build of torch it fails to load its libraries, and no model of
    transformers can be imported either. rawloop uses only the part that is plain PyTorch and needs none of them.
    """
    try:
        import torchaudio
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: mend it with `pip install torchaudio`") from error
    except (OSError, RuntimeError, ImportError) as error:
        found = importlib.util.find_spec("torchaudio")
        folder = Path(found.origin).parent / "lib" if found and found.origin else Path("torchaudio/lib")
        command = f"rm {shlex.quote(str(folder))}/*.so"
        version = importlib.metadata.version("torchaudio")
        raise UserError(
            f"torchaudio {version} does not fit torch {torch.__version__} ({str(error).splitlines()[0]}): "
            f"mend it with `bash launch/setup.sh` or `{command}`; rawloop needs none of these libraries"
        ) from error
    module: ModuleType = torchaudio
    return module
