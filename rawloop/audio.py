"""Clips: names a file or a segment of it, and decodes it to a mono waveform at a model's sample rate.

A segment is named by its path with its times in seconds, `talk.flac#t=1.5,3`, as in W3C media fragments. So everything
that names a clip by its path (samples, the cache of codes, messages) distinguishes the segments of one recording.

libsndfile decodes wav, flac, ogg and mp3; the program ffmpeg, if it is installed, others. torchaudio resamples.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from rawloop.containers import STREAMED, Extent, cut_short
from rawloop.containers import BadAudio as BadAudio
from rawloop.errors import UserError
from rawloop.ffmpeg import can_convert, converted
from rawloop.files import open_regular, sha256_file
from rawloop.frames import measure

MARK = "#t="
FRAGMENT = re.compile(r"#t=(\d+(?:\.\d+)?)(?:,(\d+(?:\.\d+)?))?$")
OTHER_FORMATS = {
    b"\x1a\x45\xdf\xa3": "WebM or Matroska",
    b"\x30\x26\xb2\x75": "Windows Media",
    b"#!AMR": "AMR",
    b"\xff\xf1": "AAC",
    b"\xff\xf9": "AAC",
}
SILENCE_PEAK = 1e-3  # -60 dBFS: a clip below it has no speech that a codec could encode
LOUDEST_PEAK = 10.0  # +20 dBFS: float files above it were never scaled to [-1, 1]
MOST_TAPS = 20_000_000  # coefficients of the resampling filter: 80 MB; odd sample rates would need gigabytes
UNKNOWN = 2**62  # libsndfile gives about 2**63 samples if the header has no number
ROUNDED = 0.05  # seconds that a segment may end after its clip, as published lists round times
# The lines of libsndfile's log about a length beyond the end of the file, in aiff, au and w64.
CUT = re.compile(r"^(?: SSND|  Data Size  |riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
PADDING = 8  # bytes that such a file may lack at its end, as some writers forget them
BLOCK = 2**20  # samples decoded at a time, over all channels: 4 MB


class Segment(NamedTuple):
    """A part of an audio file, in seconds. An `end` of None is the end of the file."""

    file: Path
    start: float = 0.0
    end: float | None = None

    @property
    def whole(self) -> bool:
        """Return whether this is the whole file."""
        return self.end is None and not self.start

    def path(self) -> Path:
        """Return the path that names the segment; for a whole file, the file's path."""
        if self.whole:
            return self.file
        times = [f"{seconds:.6f}".rstrip("0").rstrip(".") for seconds in (self.start, self.end) if seconds is not None]
        return self.file.with_name(f"{self.file.name}{MARK}{','.join(times)}")


def segment_of(path: Path | str) -> Segment:
    """Return the file and the times that a path names."""
    found = FRAGMENT.search(str(path))
    if found is None:
        return Segment(Path(path))
    return Segment(Path(str(path)[: found.start()]), float(found[1]), float(found[2]) if found[2] else None)


def content_hash(path: Path | str) -> str:
    """Return the SHA-256 of a file, or of its hash and the times of a segment, as 64 hexadecimal digits."""
    if MARK not in str(path):
        return sha256_file(Path(path))
    file, start, end = segment_of(path)
    now = os.stat(file)
    whole = _hash_once(str(file), now.st_size, now.st_mtime_ns)
    return hashlib.sha256(f"{whole}{MARK}{start},{end}".encode()).hexdigest()


@lru_cache(maxsize=64)
def _hash_once(file: str, size: int, mtime_ns: int) -> str:
    """Hash a recording once for its segments, which are consecutive in the data."""
    return sha256_file(Path(file))


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
        path: wav, flac, ogg or mp3 file, or one that ffmpeg reads, with any sample rate and number of channels; or a
            segment of it.
        sample_rate: of the result, in Hz.
        min_seconds: shorter clips are bad.
        max_seconds: longer clips are bad; the header is read before anything is decoded.
        frame_rate: of the codec, in frames per second; a clip shorter than one frame is bad.
        on_open_end: is called if the file does not say where it ends, so that it may be cut short.

    Returns the waveform, (samples,) float32. Raises BadAudio if the clip cannot be decoded to its end, or is silent,
    too loud or not finite; the message is the reason.
    """
    waveform, rate = decode(path, max_seconds, on_open_end)
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
    """Open a file, and turn the errors of libsndfile into BadAudio."""
    import soundfile

    try:
        # Python opens the file, as the errors of libsndfile have no reason.
        with open_regular(path) as stream:
            yield stream
    except soundfile.LibsndfileError as error:
        raise BadAudio(f"cannot be decoded: {_unreadable(path) or _reason(error)}") from error
    except OSError as error:
        raise BadAudio(f"cannot be opened: {error.strerror}") from error


def _unreadable(path: Path) -> str | None:
    """Return why libsndfile cannot read a file, and the fix, by its first bytes."""
    with open(path, "rb") as stream:
        if stream.read(16).startswith(b"version https://"):
            return "it is the pointer of a Git LFS file: fetch the file itself with `git lfs pull`"
    kind = _other_format(path)
    return kind and f"it is {kind}, which is read if the program ffmpeg is installed (`apt-get install ffmpeg`)"


def _other_format(path: Path) -> str | None:
    """Return the format of a regular file that only ffmpeg reads, by its first bytes."""
    try:
        with open_regular(path) as stream:
            head = stream.read(16)
    except OSError:
        return None  # decoding it says why
    name = next((name for begin, name in OTHER_FORMATS.items() if head.startswith(begin)), None)
    if head[4:8] == b"ftyp":
        name = "MPEG-4"
    return name


def _reason(error: Any) -> str:
    return str(error.error_string).strip().rstrip(".")


def _sound(stream: BinaryIO, found: Extent) -> tuple[Any, int]:
    """Open a file with libsndfile, and return it with its number of samples per channel."""
    import soundfile

    os.lseek(stream.fileno(), 0, os.SEEK_SET)  # stream.seek may move only inside its buffer
    try:
        file = soundfile.SoundFile(stream.fileno(), closefd=False)
    except soundfile.LibsndfileError:  # libsndfile does not know every tag that may precede an mp3
        if not found.replaces:
            raise
        file = None
    # libsndfile would stop at the number of samples in the header, or at its guess.
    if file is None or (found.header and not 0 < found.samples <= file.frames < UNKNOWN):
        rest = os.pread(stream.fileno(), os.fstat(stream.fileno()).st_size, found.replaces)
        file = soundfile.SoundFile(io.BytesIO(found.header + rest))
    return file, found.samples or int(file.frames)


def decode(path: Path, max_seconds: float, on_open_end: Callable[[], None]) -> tuple[Tensor, int]:
    """Return a clip as mono, (samples,) float32, and its sample rate in Hz.

    Channels are mixed block by block, as a small file can decode to a huge one.
    """
    segment, kind = segment_of(path), _other_format(segment_of(path).file)
    if kind is not None and can_convert(kind):
        with converted(segment.file, kind) as wav:
            return decode(Segment(wav, segment.start, segment.end).path(), max_seconds, on_open_end)
    with _opened(segment.file) as stream:
        found = measure(stream)
        if found.open_end:
            on_open_end()
        file, frames = _sound(stream, found)
        with file:
            rate = int(file.samplerate)
            cut = CUT.search(file.extra_info)
            if cut and int(cut[2]) + PADDING < int(cut[1]) < STREAMED:
                raise BadAudio(f"is cut short: its header promises {cut[1]} bytes, it has {cut[2]}")
            first, last = _bounds(segment, frames, rate)
            if last == first:
                raise BadAudio("is empty: it has no samples")
            if last - first > max_seconds * rate:
                raise BadAudio(f"lasts {(last - first) / rate:.2f} s, longer than data.max_seconds ({max_seconds:g} s)")
            # An mp3 is decoded from its start, as its frames depend on earlier ones. GSM is not seekable.
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
    """Decode a file from its current sample `place`, and mix the samples from `first` to at most `end`."""
    import soundfile

    blocks, size = [torch.zeros(0)], max(1, BLOCK // file.channels)
    while place < end:
        try:
            samples = file.read(min(size, end - place), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            seconds = place / file.samplerate
            raise BadAudio(f"cannot be decoded beyond {seconds:.2f} s, as if cut short: {_reason(error)}") from error
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
    """Import torchaudio, or raise a UserError with the command that repairs it.

    PyPI's torchaudio is a CUDA build. With a CPU build of torch it cannot load its libraries, and transformers' models
    cannot be imported. rawloop uses only the part in plain PyTorch, which needs no libraries.
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
