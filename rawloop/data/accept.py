"""Decides which samples of a data set a run uses, once: the result is kept in a mapped file beside the index.

It depends on the records, the settings, the family with its tokenizer, and the cache of codes. A change of any of them
makes another file.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rawloop.audio import segment_of
from rawloop.contracts import Family, Sample
from rawloop.data.codes import ClipCheck, CodeCache
from rawloop.data.config import NO_MATTER, DataConfig, codes_folder
from rawloop.data.digests import Digests, content_hash, digester
from rawloop.data.eval_share import share_of
from rawloop.data.index import SampleIndex, digest, size_of
from rawloop.data.mapped import Say, open_or_build, told
from rawloop.data.prepare import BadClips, prepare
from rawloop.data.references import Voices
from rawloop.data.samples import named, refuse
from rawloop.data.shards import CODEC_FILE, codec_folder, heard_at
from rawloop.errors import BadSample, UserError
from rawloop.family_protocols import CodecFamily, HearingFamily
from rawloop.files import sketch_file

HEARD_RATE = 16_000  # Hz, to decode clips for a family without `sample_rate`


@dataclass
class Acceptance:
    """How the samples of a split are checked; `samples` returns those that a run uses.

    Args:
        config: the settings of the data.
        family: checks each sample.
        cache: of the family's codes, or None.
        split: train or eval.
        about: facts on which the family's checks depend. Different values of `model` have different files.
        say: prints a line about progress.
    """

    config: DataConfig
    family: Family
    cache: CodeCache | None
    split: str
    about: Mapping[str, Any] = field(default_factory=dict)
    say: Say = lambda line: None

    def samples(self, index: SampleIndex, notice: Say) -> SampleIndex:
        """Return the samples that are used. Raises like `load_samples`; `notice` gets lines about them."""
        if self.config.verify:
            arrays, meta = self._judge(index, self.say)
        else:
            settings = {name: value for name, value in asdict(self.config).items() if name not in NO_MATTER}
            name = digest([index.file.file.name, self.split, settings, self.about.get("model")])
            key = digest([index.key, name, self.about, self.cache.key if self.cache else None])
            file = open_or_build(
                codes_folder(self.config),
                f"{name[:16]}.accepted",
                key,
                lambda writer, tell: writer.finish(key, *self._judge(index, tell)),
                self.say,
            )
            arrays, meta = file.arrays, file.meta
        if self.cache is not None:
            self.cache.trust()
        for line in meta["lines"]:
            notice(line)
        return SampleIndex(index.file, arrays)

    def _judge(self, index: SampleIndex, say: Say) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Check every sample of the split. Return the arrays of a `SampleIndex`, and lines for the user."""
        lines: list[str] = []
        shared = share_of(index, self.config, self.split, lines.append) if self.config.eval_share else None
        rows = range(len(index)) if shared is None else shared
        cache = self.cache or (self._decoded(index) if index.has_clips else None)
        clips = ClipCheck(cache) if cache else None
        frames = cache.frames if cache and isinstance(self.family, CodecFamily | HearingFamily) else None
        voices = self._voices()
        used, left_out, bad = _Used(frames, self._clip_digest(), voices), dict[str, str](), dict[str, str]()
        mistake: UserError | None = None
        for row in told(rows, f"data.{self.split}: samples checked", len(rows), say):
            sample = index[row]
            try:
                if clips and not clips.accepts(sample):
                    continue
            except BadSample as reason:
                left_out[sample.id] = str(reason)
                continue
            try:
                if mistake is None:
                    self.family.check(sample, frames)
                    used.add(row, sample)
            except BadSample as reason:
                bad[sample.id] = str(reason)
            except UserError as caught:  # clips without codes come first
                mistake = caught
        if clips:
            clips.finish()
            ends = clips.open_ends()
            lines += [f"data.{self.split}: {ends}"] if ends else []
        if mistake is not None:
            raise mistake
        lines += self._left_out(left_out, bad, len(rows))
        arrays = used.arrays()
        if voices:
            chosen, line = voices.choose(index.__getitem__, partial(self.family.check, frames=frames), say)
            arrays |= chosen
            lines.append(line)
        return arrays, {"lines": lines}

    def _voices(self) -> Voices | None:
        """Return what chooses references, if they are drawn."""
        if self.config.references == "given":
            return None
        if self.cache is None:
            raise UserError(
                f"data.references is drawn, and the family {type(self.family).__name__} learns no voices: set it to "
                "given"
            )
        longest = round(self.config.reference_seconds * self.cache.codec.frame_rate)
        return Voices(self.split, self.config, self.cache.frames, self.cache.identity, longest)

    def _left_out(self, left_out: Mapping[str, str], bad: Mapping[str, str], number: int) -> list[str]:
        """Return a line about the samples that are left out. Raise UserError if they must not be, or are all."""
        if self.config.on_bad_sample == "stop":
            refuse(bad, number - len(left_out))
        reasons = {**left_out, **bad}
        if len(reasons) == number:
            path = getattr(self.config, self.split)
            raise UserError(f"data.{self.split} is '{path}', and no sample of it can be used: {named(reasons)}")
        if not reasons:
            return []
        return [
            f"data.{self.split}: {len(reasons)} of {number} samples left out, since data.on_bad_sample is skip, here "
            f"or in `rawloop prepare`: {named(reasons)}"
        ]

    def _decoded(self, index: SampleIndex) -> CodeCache:
        """Decode the clips of a family without a codec once, for their lengths."""
        for sample in index:
            with suppress(BadSample):  # checked again with the lengths of clips
                self.family.check(sample)
        rate = self.family.sample_rate if isinstance(self.family, HearingFamily) else HEARD_RATE
        return decode_once(index, codes_folder(self.config), rate, self.config)

    def _clip_digest(self) -> Callable[[Path], str]:
        """Return the function that identifies a clip: by its codes, or a sketch of its file."""
        return self.cache.identity if self.cache else lambda path: sketch_file(segment_of(path).file)


class _Used:
    """Collects the arrays about samples that are used; see `SampleIndex`."""

    def __init__(
        self, frames: Callable[[Path], int] | None, clip: Callable[[Path], str], voices: Voices | None
    ) -> None:
        self.frames, self.digest, self.voices = frames, digester(clip), voices
        self.rows, self.sizes, self.contents = array("I"), array("i"), array("Q")
        self.digests: list[str] = []

    def add(self, row: int, sample: Sample) -> None:
        """Add a sample and its place in the index."""
        self.rows.append(row)
        self.digests.append(self.digest(sample))
        self.contents.append(content_hash(sample))
        self.sizes.append(size_of(sample, self.frames))
        if self.voices:
            self.voices.add(row, sample)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays."""
        return {
            "rows": np.frombuffer(self.rows, np.uint32),
            "digests": Digests.of(self.digests).text,
            "contents": np.frombuffer(self.contents, np.uint64),
            "sizes": np.frombuffer(self.sizes, np.int32),
        }


def decode_once(samples: Sequence[Sample], folder: Path, sample_rate: int, config: DataConfig) -> CodeCache:
    """Decode every clip that was not decoded before. Return a cache with their lengths in samples at `sample_rate`.

    So a bad clip is found before training. Several processes may call this: one decodes, the others wait.
    """
    codec = heard_at(sample_rate)
    exists = (codec_folder(folder, codec) / CODEC_FILE).is_file()
    known = CodeCache(folder, codec.hash, config) if exists else None
    new = [sample for sample in samples if known is None or not known.knows(sample)]
    if new or known is None:
        with suppress(BadClips):
            prepare(new, None, codec, folder, config, wait=True)
        known = CodeCache(folder, codec.hash, config)
    return known
