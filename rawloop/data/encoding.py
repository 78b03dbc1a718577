"""Encodes the clips of one shard: threads hash and decode the next clips while the codec works."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rawloop.audio import BadAudio, content_hash, load_audio, segment_of
from rawloop.data.config import DataConfig
from rawloop.data.shards import Row, ShardWriter
from rawloop.errors import RawloopError, happening
from rawloop.family_protocols import CodecInfo

S = TypeVar("S")
T = TypeVar("T")
Encode = Callable[[Tensor], Tensor]
DECODERS = 4  # threads that hash and decode ahead of the codec
AHEAD = 16  # clips decoded ahead: at most 50 MB of waveforms


@dataclass
class Encoder:
    """Encodes clips into shards, and counts them.

    Args:
        encode: waveform (samples,) float32 on the CPU -> codes (frames, codebooks); None to decode only.
        config: `on_bad_sample` and the limits are read.
        keep_seconds: after so many seconds, the beginning of a shard is written, so that a kill loses little.
        stopped: returns what asks to stop, or None.
        on_clip: gets the row of each clip, and its seconds if it was encoded now.
    """

    encode: Encode | None
    config: DataConfig
    keep_seconds: float
    stopped: Callable[[], str | None]
    on_clip: Callable[[Row, float], None]
    encoded: int = 0
    seconds: float = 0.0  # of audio encoded

    def make_shard(self, writer: ShardWriter, paths: Sequence[str]) -> bool:
        """Encode the clips of a shard, and write it. If it is stopped or fails, what is done is kept in a part.

        Returns whether the shard is written.
        """
        done = 0
        try:
            with closing(ahead(partial(self._look_up, writer), paths)) as clips:
                done = self._add_all(writer, clips, len(paths))
        finally:
            if done == len(paths):
                writer.write()
            else:
                writer.keep()
        return done == len(paths)

    def _add_all(self, writer: ShardWriter, clips: Iterable[tuple[Row, Tensor | None]], count: int) -> int:
        """Add clips until asked to stop, and return how many. The beginning of the shard is kept now and then."""
        done, last = 0, time.monotonic()
        for row, waveform in takewhile(lambda _: not self.stopped(), clips):
            self._add(writer, row, waveform)
            done += 1
            if time.monotonic() - last > self.keep_seconds and done < count:
                writer.keep()
                last = time.monotonic()
        return done

    def _look_up(self, writer: ShardWriter, path: str) -> tuple[Row, Tensor | None]:
        """Return a clip's row, and its waveform if it must be encoded. Runs in threads, which only read."""

        def bad(row: Row, reason: str) -> tuple[Row, None]:
            return row._replace(bad=reason, skip=self.config.on_bad_sample == "skip"), None

        old = writer.index.rows.get(path)
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
            fault = self.config.fault_of_length(row.frames, codec.frame_rate)
            return bad(row, fault) if fault else (row, None)
        if sha256 in writer.kept:
            return row._replace(open_end=writer.kept[sha256][0].open_end), None
        ends: list[str] = []
        limits = (self.config.min_seconds, self.config.max_seconds)
        try:
            audio = load_audio(Path(path), codec.sample_rate, *limits, codec.frame_rate, lambda: ends.append(path))
        except BadAudio as error:
            return bad(row, str(error))
        return row._replace(open_end=bool(ends)), audio

    def _add(self, writer: ShardWriter, row: Row, waveform: Tensor | None) -> None:
        """Encode a clip without codes, and put its row into the shard if the cache does not have it."""
        twin, old = writer.find(row.sha256), writer.index.rows.get(row.path)
        seconds = 0.0 if waveform is None or twin is not None else len(waveform) / writer.codec.sample_rate
        self.on_clip(row, seconds)
        if row.bad or twin is not None:
            row = row if row.bad or twin is None else row.like(twin)
            if row != old:
                writer.add(row)
            return
        kept = writer.kept.get(row.sha256)
        if kept is not None:
            writer.add(row._replace(frames=kept[0].frames), kept[1])
            return
        assert waveform is not None, "a clip is cached, kept or decoded"
        codes = _codes(waveform, self.encode, writer.codec, row.path) if self.encode else None
        writer.add(row._replace(frames=len(waveform)), codes)
        self.encoded += 1
        self.seconds += seconds


def _codes(waveform: Tensor, encode: Encode, codec: CodecInfo, path: str) -> Tensor:
    """Run the codec, and refuse codes that do not fit uint16 or the codec's description."""
    where = f"while encoding {path}, {len(waveform) / codec.sample_rate:.1f} s"
    with happening(where, less=lambda: "lower data.max_seconds"), torch.inference_mode():
        codes = encode(waveform).cpu()
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


def ahead(load: Callable[[S], T], paths: Iterable[S]) -> Generator[T, None, None]:
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
