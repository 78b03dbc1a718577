"""Encodes every clip of a data set once, so that training never runs the codec.

A clip in the cache is not encoded again, even under another path or in another data set. Clips are encoded one at a
time: padding a batch of them changes most of their codes. Several processes share the shards of a plan, see
`shard_plan`. A run may be stopped at any moment; the next run continues.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rawloop.contracts import Sample
from rawloop.data.config import DataConfig
from rawloop.data.encoding import Encode, Encoder
from rawloop.data.shard_plan import Plan, end_plan, start_plan
from rawloop.data.shards import Index, Row, ShardWriter, codec_folder, open_cache, read_rows, write_file
from rawloop.dist import World
from rawloop.errors import Preempted, RawloopError
from rawloop.family_protocols import CodecInfo
from rawloop.preempt import Preemption, first_reason, watch_signals

REPORT = "report.json"
LOG_SECONDS = 60.0  # between two lines of the progress bar if stderr is no terminal
KEEP_SECONDS = 120.0


@dataclass(frozen=True)
class BadClip:
    """A clip that cannot be used, the reason, and a sample that needs it."""

    path: str
    reason: str
    sample: str


@dataclass
class PrepareReport:
    """The results of `prepare`, which are written to `report.json` in the cache folder.

    `encoded` clips were encoded now, `hours` of audio in `seconds` of time; `reused` clips had codes, or the content of
    another clip. `left_out` has the ids of the samples that need a bad clip.
    """

    folder: str
    codec: CodecInfo
    on_bad_sample: str
    samples: int = 0
    clips: int = 0
    encoded: int = 0
    hours: float = 0.0
    seconds: float = 0.0
    reused: int = 0
    bad: list[BadClip] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def speed(self) -> str:
        """The speed in words; empty if nothing was encoded."""
        return f"; {self.hours:.3g} h of audio at {_per_minute(self.hours, self.seconds)}" if self.encoded else ""


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
    shard_clips: int | None = None,
    keep_seconds: float = KEEP_SECONDS,
    preemption: Preemption | None = None,
    wait: bool = False,
    world: World | None = None,
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
        shard_clips: clips of a shard. Default: 16 to 4096, so that there are about 256 shards.
        keep_seconds: keep the beginning of a shard after so many seconds, so that a kill loses little.
        preemption: says when to stop. Default: this function watches for SIGTERM and SIGUSR1.
        wait: wait for another process that writes to the folder, instead of raising.
        world: the processes that share the work, all of which call this with the same samples. Default: this one.

    Returns the report, which is also written to `folder/report.json`.

    Raises:
        BadClips: some clips cannot be used and `on_bad_sample` is `stop`; all others are encoded.
        Preempted: on SIGTERM or SIGUSR1; encoded clips are kept. Likewise KeyboardInterrupt on SIGINT.
    """
    config, world = config or DataConfig(), world or World()
    folder = Path(expanduser(folder))
    samples = list(samples)
    clips = _needed(samples)
    report = PrepareReport(str(folder), codec, config.on_bad_sample, len(samples), len(clips))
    how = (progress, shard_clips, keep_seconds, preemption, wait)
    if stopped := _encode_missing(report, list(clips), encode, config, world, *how):
        raise world.raised_on_all(Preempted(stopped))
    rows = read_rows(codec_folder(folder, codec))
    _name_bad_clips(report, samples, [(rows[path], sample) for path, sample in clips.items()])
    if world.is_main:
        write_file(folder / REPORT, json.dumps(asdict(report), indent=1).encode())
    if report.bad and config.on_bad_sample == "stop":
        raise world.raised_on_all(BadClips(report))
    return report


def _encode_missing(
    report: PrepareReport,
    paths: Sequence[str],
    encode: Encode | None,
    config: DataConfig,
    world: World,
    progress: bool,
    shard_clips: int | None,
    keep_seconds: float,
    preemption: Preemption | None,
    wait: bool,
) -> str | None:
    """Encode the clips without codes, and count them in the report. Return None, or what to say if it was stopped."""
    cache, codec = Path(report.folder), report.codec
    folder = codec_folder(cache, codec)
    with _deferred_signals(preemption) as signalled, ExitStack() as stack:
        waiting = partial(_give_up, signalled) if wait else None

        def begin() -> Plan:
            stack.enter_context(open_cache(cache, codec, waiting))
            return start_plan(folder, paths, codec, config, shard_clips)

        plan = world.from_main(world.on_all_ranks(begin, only_main=True))
        assert plan is not None, "rank 0 has made it"
        bar = _Bar(plan, len(paths), encode is None, progress, world)
        encoder = Encoder(encode, config, keep_seconds, signalled, bar.show)
        complete = _make_shards(folder, codec, plan, paths, encoder, world, bar)
        report.encoded, report.hours, report.seconds = _totals(encoder, bar, world)
        reason = first_reason(world.gather(signalled()))
        if complete and world.is_main:
            end_plan(folder)
    again = "encoded clips are kept: run `rawloop prepare` again to go on"
    return None if complete else f"stopped by {reason}; {again}"


def _needed(samples: Iterable[Sample]) -> dict[str, str]:
    """Return the absolute path of each clip, and the first sample that needs it."""
    clips: dict[str, str] = {}
    for sample in samples:
        for path in sample.audio_paths():
            clips.setdefault(str(path.absolute()), sample.id)
    return clips


def _name_bad_clips(report: PrepareReport, samples: Iterable[Sample], rows: Iterable[tuple[Row, str]]) -> None:
    """Put the bad clips into the report, and the samples that need them; `rows` have the first sample of each clip."""
    report.bad = [BadClip(row.path, row.bad, sample) for row, sample in rows if row.bad]
    bad = {clip.path for clip in report.bad}
    report.reused = report.clips - report.encoded - len(bad)
    report.left_out = [sample.id for sample in samples if not bad.isdisjoint(map(str, sample.audio_paths()))]


def _make_shards(
    folder: Path, codec: CodecInfo, plan: Plan, paths: Sequence[str], encoder: Encoder, world: World, bar: "_Bar"
) -> bool:
    """Make this rank's shards. The others wait for it, however long it takes. Return whether all ranks made theirs."""

    def work() -> bool:
        index = Index(folder, plan.first)
        with bar:
            for number, clips in plan.shards()[world.rank :: world.size]:
                writer = ShardWriter(folder, codec, number, index)
                if encoder.stopped() or not encoder.make_shard(writer, [paths[place] for place in clips]):
                    return False
        return True

    return all(world.gather(world.on_all_ranks(work)))


def _totals(encoder: Encoder, bar: "_Bar", world: World) -> tuple[int, float, float]:
    """Return how many clips all ranks have encoded, their hours of audio, and the seconds it took."""
    shares = world.gather((encoder.encoded, encoder.seconds, bar.elapsed))
    return sum(s[0] for s in shares), sum(s[1] for s in shares) / 3600, max(s[2] for s in shares)


def _per_minute(hours: float, seconds: float) -> str:
    return f"{60 * hours / max(seconds, 1e-9):.3g} h a minute"


class _Bar:
    """The progress bar of rank 0, over its own share of the clips, with the speed in hours of audio."""

    def __init__(self, plan: Plan, clips: int, decodes: bool, progress: bool, world: World) -> None:
        missing = sum(len(share) for _, share in plan.shards()[world.rank :: world.size])
        several = f" (process 1 of {world.size})" if world.size > 1 else ""
        every = 0.1 if sys.stderr.isatty() else LOG_SECONDS
        self.progress, self.elapsed, self.seconds = progress, 0.0, 0.0
        self.what = ("decoding" if decodes else "encoding") + several
        there = 0 if world.size > 1 else clips - missing
        shown = progress and world.is_main
        self.bar = tqdm(
            total=missing + there, initial=there, desc=self.what, unit="clip", disable=not shown, mininterval=every,
            maxinterval=max(every, 10.0),
        )  # fmt: skip
        self.start = time.monotonic()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.elapsed = time.monotonic() - self.start
        self.bar.close()

    def show(self, row: Row, seconds: float) -> None:
        """Count a clip, and name a bad one."""
        self.seconds += seconds
        if row.bad and self.progress:
            self.bar.write(f"{row.path}: {row.bad}", file=sys.stderr)
        speed = _per_minute(self.seconds / 3600, time.monotonic() - self.start)
        self.bar.set_postfix_str(speed if self.seconds else "", refresh=False)
        self.bar.update()


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
