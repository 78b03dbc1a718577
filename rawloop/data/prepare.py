"""Encodes every clip of a data set once, so that training never runs the codec.

A clip in the cache is not encoded again, even under another path or in another data set. Clips are encoded one at a
time, since padding a batch of them would change their codes; threads decode the next clips meanwhile. A run may be
stopped at any moment; the next run continues.
"""

import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import takewhile
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from rawloop.audio import BadAudio, content_hash, load_audio, segment_of
from rawloop.contracts import Sample
from rawloop.data.config import DataConfig
from rawloop.data.shards import Row, ShardWriter, open_writer, write_file
from rawloop.errors import Preempted, RawloopError
from rawloop.family_protocols import CodecInfo
from rawloop.preempt import Preemption, watch_signals

T = TypeVar("T")
Encode = Callable[[Tensor], Tensor]
REPORT = "report.json"
DECODERS = 4  # threads that hash and decode ahead of the codec
AHEAD = 16  # clips decoded ahead: at most 50 MB of waveforms
LOG_SECONDS = 60.0  # between two lines of the progress bar if stderr is no terminal


@dataclass(frozen=True)
class BadClip:
    """A clip that cannot be used, the reason, and a sample that needs it."""

    path: str
    reason: str
    sample: str


@dataclass
class PrepareReport:
    """The results of `prepare`, which are written to `report.json` in the cache folder.

    `encoded` clips were encoded now; `reused` clips had codes, or the content of another clip. `left_out` has the ids
    of the samples that need a bad clip.
    """

    folder: str
    codec: CodecInfo
    on_bad_sample: str
    samples: int = 0
    clips: int = 0
    encoded: int = 0
    reused: int = 0
    bad: list[BadClip] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class BadClips(RawloopError):
    """Some clips cannot be used, and `on_bad_sample` is stop. All others are encoded; see `report`."""

    def __init__(self, report: PrepareReport) -> None:
        first = report.bad[0]
        super().__init__(
            f"{len(report.bad)} of {report.clips} clips cannot be used, and {len(report.left_out)} of {report.samples} "
            f"samples need them. {Path(report.folder) / REPORT} names all; the first is {first.path} ({first.reason}). "
            "Mend them, or leave their samples out with --data.on_bad_sample skip"
        )
        self.report = report


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
        samples: from `read_samples`; clips that several samples share are encoded once.
        encode: the codec: waveform (samples,) float32 on the CPU -> codes (frames, codebooks) of any integer type.
            None: clips are only decoded, and their lengths stored; see `heard_at`.
        codec: description of the codec and its codes.
        folder: of the cache.
        config: `on_bad_sample`, `max_seconds` and `min_seconds` are read from it.
        progress: show a progress bar and bad clips on stderr.
        shard_clips: write a shard after this number of clips,
        shard_seconds: or after this number of seconds, so that a kill loses little.
        preemption: says when to stop. Default: this function watches for SIGTERM and SIGUSR1.
        wait: wait for another process that writes to the folder, instead of raising.

    Returns the report, which is also written to `folder/report.json`.

    Raises:
        BadClips: some clips cannot be used and `on_bad_sample` is `stop`; all others are encoded.
        Preempted: on SIGTERM or SIGUSR1; encoded clips are kept. Likewise KeyboardInterrupt on SIGINT.
    """
    config = config or DataConfig()
    folder = Path(expanduser(folder))
    samples = list(samples)
    clips: dict[str, str] = {}  # path -> the first sample that needs it
    for sample in samples:
        for path in sample.audio_paths():
            clips.setdefault(str(path.absolute()), sample.id)
    report = PrepareReport(str(folder), codec, config.on_bad_sample, len(samples), len(clips))
    with _deferred_signals(preemption) as signalled:
        waiting = partial(_give_up, signalled) if wait else None
        with open_writer(folder, codec, shard_clips, shard_seconds, waiting) as writer:
            done = _encode_all(list(clips), writer, config, encode, report, signalled, progress)
    if done < len(clips):
        raise Preempted(f"stopped by {signalled()}; encoded clips are kept: run `rawloop prepare` again to go on")
    rows = [(writer.rows[path], sample) for path, sample in clips.items()]
    report.bad = [BadClip(row.path, row.bad, sample) for row, sample in rows if row.bad]
    bad = {clip.path for clip in report.bad}
    report.left_out = [sample.id for sample in samples if not bad.isdisjoint(map(str, sample.audio_paths()))]
    write_file(folder / REPORT, json.dumps(asdict(report), indent=1).encode())
    if report.bad and config.on_bad_sample == "stop":
        raise BadClips(report)
    return report


def _look_up(writer: ShardWriter, config: DataConfig, path: str) -> tuple[Row, Tensor | None]:
    """Return a clip's row, and its waveform if it must be encoded. Runs in threads, which only read the index."""

    def bad(row: Row, reason: str) -> tuple[Row, None]:
        return row._replace(bad=reason, skip=config.on_bad_sample == "skip"), None

    old = writer.rows.get(path)
    try:
        now = os.stat(segment_of(path).file)
        same = old is not None and (old.size, old.mtime_ns) == (now.st_size, now.st_mtime_ns)
        sha256 = old.sha256 if old is not None and same and writer.find(old.sha256) else content_hash(path)
    except OSError as error:
        return bad(Row(path, -1, -1), f"cannot be opened: {error.strerror}")
    row, codec = Row(path, now.st_size, now.st_mtime_ns, sha256), writer.codec
    twin = writer.find(sha256)
    if twin is not None:
        row = row.like(twin)
        fault = config.fault_of_length(row.frames, codec.frame_rate)
        return bad(row, fault) if fault else (row, None)
    ends: list[str] = []
    limits = (config.min_seconds, config.max_seconds)
    try:
        audio = load_audio(Path(path), codec.sample_rate, *limits, codec.frame_rate, lambda: ends.append(path))
    except BadAudio as error:
        return bad(row, str(error))
    return row._replace(open_end=bool(ends)), audio


def _encode_all(
    paths: list[str],
    writer: ShardWriter,
    config: DataConfig,
    encode: Encode | None,
    report: PrepareReport,
    signalled: Callable[[], str | None],
    progress: bool,
) -> int:
    """Encode the clips without codes until all are done or a signal arrives. Return the number of clips done."""
    done, every = 0, 0.1 if sys.stderr.isatty() else LOG_SECONDS
    what = "decoding" if encode is None else "encoding"
    bar = tqdm(
        total=len(paths), desc=what, unit="clip", disable=not progress, mininterval=every, maxinterval=max(every, 10.0)
    )
    with bar, closing(_ahead(partial(_look_up, writer, config), paths)) as clips:
        for row, waveform in takewhile(lambda clip: not signalled(), clips):
            _add(row, waveform, encode, writer, report)
            done += 1
            if row.bad and progress:
                bar.write(f"{row.path}: {row.bad}", file=sys.stderr)
            bar.update()
    return done


def _add(row: Row, waveform: Tensor | None, encode: Encode | None, writer: ShardWriter, report: PrepareReport) -> None:
    """Encode a clip without codes, and put its row into the index."""
    twin = writer.find(row.sha256)
    if not row.bad and twin is None:
        assert waveform is not None, "a clip is either cached or decoded"
        codes = _codes(waveform, encode, writer.codec, row.path) if encode else None
        writer.add(row._replace(frames=len(waveform)), codes)
        report.encoded += 1
        return
    if not row.bad and twin is not None:
        report.reused += 1
        row = row.like(twin)
    if writer.rows.get(row.path) != row:
        writer.add(row)


def _codes(waveform: Tensor, encode: Encode, codec: CodecInfo, path: str) -> Tensor:
    """Run the codec, and refuse codes that do not fit uint16 or the codec's description."""
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


def _ahead(load: Callable[[str], T], paths: list[str]) -> Generator[T, None, None]:
    """Yield `load(path)` for each path in order. Threads run a few clips ahead."""
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
    waiting: deque[Future[T]] = deque()
    try:
        for path in paths:
            waiting.append(pool.submit(load, path))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _give_up(signalled: Callable[[], str | None]) -> None:
    name = signalled()
    if name == "SIGINT":
        raise KeyboardInterrupt
    if name:
        raise Preempted(f"stopped by {name} while another process decoded the clips")


@contextmanager
def _deferred_signals(preemption: Preemption | None) -> Iterator[Callable[[], str | None]]:
    """Defer signals: yield a function that returns the name of the signal that has arrived, or None.

    SIGINT takes effect at the end of the block, a second SIGINT at once.
    """
    interrupts: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()  # only this thread may set handlers

    def record(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, before)

    if main:
        signal.signal(signal.SIGINT, record)
    try:
        with nullcontext(preemption) if preemption else watch_signals() as stop:
            yield lambda: "SIGINT" if interrupts else stop.wanted()
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if interrupts:
        signal.raise_signal(signal.SIGINT)
