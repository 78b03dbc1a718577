"""Encodes every clip of a data set once, so that training never runs the codec.

A clip that is in the cache already is not encoded again, whichever data set or path it comes from. Clips are encoded
one at a time, since padding a batch of them would change their codes; threads decode ahead meanwhile. Stopped at any
moment, a second run goes on where the first one was.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import takewhile
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from rawloop.audio import BadAudio, load_audio
from rawloop.contracts import CodecInfo, Sample
from rawloop.data.codes import CodeCache
from rawloop.data.config import DataConfig
from rawloop.data.shards import Row, ShardWriter, heard_at, is_codec_folder, open_writer, write_file
from rawloop.errors import Preempted, RawloopError
from rawloop.preempt import Preemption, watched
from rawloop.segments import content_hash, segment_of

Encode = Callable[[Tensor], Tensor]
REPORT = "report.json"
DECODERS = 4  # threads that hash and decode ahead of the codec
AHEAD = 16  # clips decoded ahead: at most 50 MB of waveforms
LOG_SECONDS = 60.0  # between two states of the progress bar where stderr is no terminal


@dataclass(frozen=True)
class BadClip:
    """A clip that cannot be used, why, and one of the samples that need it."""

    path: str
    reason: str
    sample: str


@dataclass
class PrepareReport:
    """What `prepare` found and did. It is written to `report.json` in the cache folder.

    `encoded` clips went through the codec now, `reused` had codes before (or the content of another clip). `left_out`
    are the ids of the samples that need a bad clip. `audio_seconds` of the encoded clips, `seconds` of wall time.
    """

    folder: str
    codec: CodecInfo
    on_bad_sample: str
    samples: int = 0
    clips: int = 0
    encoded: int = 0
    reused: int = 0
    audio_seconds: float = 0.0
    seconds: float = 0.0
    bad: list[BadClip] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class BadClips(RawloopError):
    """Some clips cannot be used, and `prepare` was not asked to skip them. All others are encoded; see `report`."""

    report: PrepareReport


class Clip(NamedTuple):
    """An audio file, hashed and perhaps decoded: `waveform` (samples,) float32 if it must be encoded."""

    row: Row
    waveform: Tensor | None = None


def prepare(
    samples: Iterable[Sample],
    encode: Encode | None,
    codec: CodecInfo,
    folder: Path | str,
    config: DataConfig | None = None,
    *,
    progress: bool = True,
    shard_clips: int = 4096,
    shard_seconds: float = 120.0,
    preemption: Preemption | None = None,
    wait: bool = False,
) -> PrepareReport:
    """Encode every distinct clip of `samples` and cache its codes in `folder`.

    Args:
        samples: from `read_samples`; clips that several of them share are encoded once.
        encode: the codec: waveform (samples,) float32 on the CPU -> codes (frames, codebooks) of any integer type.
            None: clips are decoded only, and their length noted; see `heard_at`.
        codec: what identifies the codec and its codes.
        folder: of the cache.
        config: `on_bad_sample`, `max_seconds` and `min_seconds` are read from it.
        progress: show a progress bar, and name bad clips as they are found, on stderr.
        shard_clips: a shard is written at the latest after so many clips
        shard_seconds: or after so many seconds, so that a kill costs no more than these.
        preemption: says when to stop; without it SIGTERM and SIGUSR1 are watched for here.
        wait: if another process writes to the folder, wait for it instead of refusing.

    Returns:
        What was done; also written to `folder/report.json`.

    Raises:
        BadClips: some clips cannot be used and `on_bad_sample` is `stop`; all others have been encoded.
        Preempted: SIGTERM or SIGUSR1 came in; what was encoded until then is kept. SIGINT: KeyboardInterrupt, likewise.
        RawloopError: the disk is full, the cache is damaged, or the codec gave something that is no codes.
        UserError: the folder cannot be written, or another `rawloop prepare` writes to it.
    """
    config = config or DataConfig()
    folder = Path(expanduser(folder))
    samples = list(samples)
    clips = _clips(samples)
    report = PrepareReport(str(folder), codec, config.on_bad_sample, len(samples), len(clips))
    started = time.monotonic()
    with (
        _interrupt_held() as interrupted,
        nullcontext(preemption) if preemption else watched() as stop,
        open_writer(
            folder, codec, shard_clips, shard_seconds, partial(_waiting, interrupted, stop) if wait else None
        ) as writer,
    ):
        asked = partial(_asked, interrupted, stop)
        done = _encode_all(_Loader(writer, codec, config), list(clips), encode, report, asked, progress)
    if done < len(clips):
        raise Preempted(f"stopped by {stop.wanted()}; what was encoded is kept: run `rawloop prepare` again to go on")
    report.seconds = time.monotonic() - started
    _close(report, samples, [(writer.rows[path], sample) for path, sample in clips.items()])
    write_file(folder / REPORT, json.dumps(asdict(report), indent=1).encode())
    if report.bad and config.on_bad_sample == "stop":
        raise _bad_clips(report)
    return report


def _clips(samples: list[Sample]) -> dict[str, str]:
    """Return every distinct clip, by absolute path, with the first sample that needs it."""
    clips: dict[str, str] = {}
    for sample in samples:
        for path in sample.audio_paths():
            clips.setdefault(str(path.absolute()), sample.id)
    return clips


def _close(report: PrepareReport, samples: list[Sample], clips: list[tuple[Row, str]]) -> None:
    """Enter the bad clips and the samples that need them."""
    report.bad = [BadClip(row.path, row.bad, sample) for row, sample in clips if row.bad]
    bad = {clip.path for clip in report.bad}
    report.left_out = [sample.id for sample in samples if not bad.isdisjoint(map(str, sample.audio_paths()))]


def _bad_clips(report: PrepareReport) -> BadClips:
    first = report.bad[0]
    error = BadClips(
        f"{len(report.bad)} of {report.clips} clips cannot be used, and {len(report.left_out)} of {report.samples} "
        f"samples need them. {Path(report.folder) / REPORT} names all; the first is {first.path} ({first.reason}). "
        "Mend them, or leave their samples out with --data.on_bad_sample skip"
    )
    error.report = report
    return error


@dataclass(frozen=True)
class _Loader:
    """Looks a clip up in the index, hashes it and decodes it. Called from several threads; only reads the index."""

    writer: ShardWriter
    codec: CodecInfo
    config: DataConfig

    def __call__(self, path: str) -> Clip:
        old = self.writer.rows.get(path)
        try:
            now = os.stat(segment_of(path).file)
            same = old is not None and (old.size, old.mtime_ns) == (now.st_size, now.st_mtime_ns)
            known = same and old is not None and self.writer.find(old.sha256) is not None
            sha256 = old.sha256 if known and old is not None else content_hash(path)
        except OSError as error:
            return Clip(self._bad(Row(path, -1, -1), f"cannot be opened: {error.strerror}"))
        row = Row(path, now.st_size, now.st_mtime_ns, sha256)
        twin = self.writer.find(sha256)
        if twin is not None:
            row = row._replace(shard=twin.shard, frames=twin.frames, crc=twin.crc)
            fault = self.config.fault_of_length(row.frames, self.codec.frame_rate)
            return Clip(self._bad(row, fault) if fault else row)
        try:
            return Clip(row, self._decode(path))
        except BadAudio as error:
            return Clip(self._bad(row, str(error)))

    def _decode(self, path: str) -> Tensor:
        return load_audio(
            Path(path),
            self.codec.sample_rate,
            min_seconds=self.config.min_seconds,
            max_seconds=self.config.max_seconds,
            frame_rate=self.codec.frame_rate,
        )

    def _bad(self, row: Row, reason: str) -> Row:
        return row._replace(bad=reason, skip=self.config.on_bad_sample == "skip")


def _encode_all(
    load: _Loader,
    paths: list[str],
    encode: Encode | None,
    report: PrepareReport,
    asked: Callable[[], bool],
    progress: bool,
) -> int:
    """Encode the clips that have no codes, until all are done or a signal has come in. Returns how many are done."""
    done = 0
    every = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    bar = tqdm(
        total=len(paths),
        desc="decoding" if encode is None else "encoding",
        unit="clip",
        disable=not progress,
        mininterval=every,
        maxinterval=max(every, 10.0),
    )
    with bar, _decoders() as pool:
        for clip in takewhile(lambda clip: not asked(), _ahead(pool, load, paths)):
            _take(clip, encode, load.writer, report)
            done += 1
            if clip.row.bad and progress:
                bar.write(f"{clip.row.path}: {clip.row.bad}", file=sys.stderr)
            bar.update()
    return done


def _take(clip: Clip, encode: Encode | None, writer: ShardWriter, report: PrepareReport) -> None:
    """Encode a clip if nobody has, and put its row into the index."""
    row, twin = clip.row, writer.find(clip.row.sha256)
    if not row.bad and twin is None:
        assert clip.waveform is not None, "a clip is either cached or decoded"
        if encode is None:
            writer.add(row._replace(frames=len(clip.waveform)))
        else:
            writer.add(row, _codes(clip.waveform, encode, writer.codec, row.path))
        report.encoded += 1
        report.audio_seconds += len(clip.waveform) / writer.codec.sample_rate
        return
    if not row.bad and twin is not None:
        report.reused += 1
        row = row._replace(shard=twin.shard, frames=twin.frames, crc=twin.crc)
    if writer.rows.get(row.path) != row:
        writer.add(row)


def _codes(waveform: Tensor, encode: Encode, codec: CodecInfo, path: str) -> Tensor:
    """Run the codec and make sure that what it gives are codes that fit uint16 and the codec's own description."""
    try:
        with torch.inference_mode():
            codes = encode(waveform).cpu()
    except torch.OutOfMemoryError as error:
        seconds = len(waveform) / codec.sample_rate
        raise RawloopError(f"out of memory while encoding {path} ({seconds:.1f} s): lower data.max_seconds") from error
    limit = min(codec.codebook_size, 2**16)
    if codes.ndim != 2 or codes.shape[1] != codec.codebooks or len(codes) == 0 or codes.is_floating_point():
        raise RawloopError(
            f"the codec gave {codes.dtype} of shape {tuple(codes.shape)} for {path}: "
            f"codes must be integers of shape (frames, {codec.codebooks})"
        )
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= limit:
        raise RawloopError(f"the codec gave codes from {low} to {high} for {path}: they must lie in 0 to {limit - 1}")
    return codes


@contextmanager
def _decoders() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ThreadPoolExecutor, load: Callable[[str], Clip], paths: list[str]) -> Iterator[Clip]:
    """Yield `load(path)` for each path in order, while the pool works a few clips ahead."""
    waiting: deque[Future[Clip]] = deque()
    for path in paths:
        waiting.append(pool.submit(load, path))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def decode_once(samples: Sequence[Sample], folder: Path | str, sample_rate: int, config: DataConfig) -> CodeCache:
    """Decode every clip that was not decoded before, for models that take no codes, and return what is known of all.

    That is their lengths in samples at `sample_rate`, and which are bad. Several processes may call this at once: one
    decodes, the others wait for it.

    Raises:
        UserError, Preempted: see `prepare`. Bad clips are for `CodeCache.usable` and `CodeCache.check` to tell of.
    """
    codec = heard_at(sample_rate)
    known = CodeCache(folder, codec.hash, config) if is_codec_folder(Path(expanduser(folder)), codec) else None
    new = [sample for sample in samples if known is None or not known.knows(sample)]
    if new or known is None:
        with suppress(BadClips):
            prepare(new, None, codec, folder, config, wait=True)
        known = CodeCache(folder, codec.hash, config)
    return known


def _waiting(interrupted: list[int], stop: Preemption) -> None:
    if interrupted:
        raise KeyboardInterrupt
    if stop.wanted() is not None:
        raise Preempted(f"stopped by {stop.wanted()} while another process decoded the clips")


def _asked(interrupted: list[int], stop: Preemption) -> bool:
    return bool(interrupted) or stop.wanted() is not None


@contextmanager
def _interrupt_held() -> Iterator[list[int]]:
    """Note SIGINT in the list instead of obeying it; obey at the end of the block.

    Whoever looks at the list between two clips can stop there. At the second one the process does at once what it would
    have done without us.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set signal handlers, and only there do signals arrive
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        signal.raise_signal(signal.SIGINT)
        raise RawloopError("stopped by SIGINT; what was encoded is kept: run `rawloop prepare` again to go on")
