"""The two splits of a run's data: encodes their clips, reads them, and checks every sample before step 0."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from rawloop.audio import import_torchaudio
from rawloop.contracts import Family, Sample
from rawloop.data.accept import HEARD_RATE, Acceptance
from rawloop.data.codes import CodeCache
from rawloop.data.config import DataConfig, codes_folder
from rawloop.data.index import SampleIndex, open_samples
from rawloop.data.mapped import Say
from rawloop.data.prepare import prepare
from rawloop.data.samples import named, read_samples, usable
from rawloop.data.shards import heard_at
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.family_protocols import CodecFamily, CodecInfo, HearingFamily
from rawloop.preempt import Preemption


def prepare_codes(
    config: DataConfig,
    family: Family,
    world: World | None = None,
    preemption: Preemption | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Encode the clips of both splits that are not in the cache, and return a line about it.

    For a model without codes, clips are decoded once. All ranks of a world share the work. With `about`, the facts of a
    training with this model, the index of the samples is built too. Raises like `prepare`.
    """
    import_torchaudio()
    world = world or World()
    if not isinstance(family, CodecFamily | HearingFamily):
        raise UserError(f"models of the family {type(family).__name__} need no codes: train without `rawloop prepare`")

    def warn(line: str) -> None:
        if world.is_main:
            print(line, file=sys.stderr, flush=True)

    def read() -> tuple[list[Sample], dict[str, str]]:
        splits = [path for path in (config.train, config.eval) if path is not None]
        samples = [sample for path in splits for sample in read_samples(path, config, notice=warn)]
        return usable(samples, family.check, config.on_bad_sample == "skip")

    def load() -> tuple[CodecInfo, Callable[[Tensor], Tensor] | None]:
        return (
            family.load_codec(world.device) if isinstance(family, CodecFamily) else (heard_at(family.sample_rate), None)
        )

    samples, bad = world.on_all_ranks(read) or ([], {})
    codec, encode = world.on_all_ranks(load) or (heard_at(HEARD_RATE), None)
    report = prepare(samples, encode, codec, codes_folder(config), config, preemption=preemption, world=world)

    def check() -> dict[str, str]:
        cache = CodeCache(codes_folder(config), codec.hash, config)
        if line := cache.open_ends(samples):
            warn(line)
        left, skip = cache.usable(samples)[0], config.on_bad_sample == "skip"
        unfit = usable(left, partial(family.check, frames=cache.frames), skip)[1]
        if about is not None:
            build_index(config, family, about, warn)
        return unfit

    bad |= world.on_all_ranks(check, only_main=True) or {}
    what, done = ("codes of ", "encoded") if encode else ("", "decoded")
    counts = f"{report.encoded} {done} now, {report.reused} already there, {len(report.bad)} left out{report.speed}"
    others = f"; {len(bad)} samples that the model cannot take are left out: {named(bad)}" if bad else ""
    return f"{what}{report.clips} clips in {report.folder}: {counts}{others}"


def build_index(config: DataConfig, family: Family, about: Mapping[str, Any], say: Say) -> None:
    """Build what the next start of a training reads; see `load_samples`."""
    cache = open_codes(config, family, say)
    for split in ("train", "eval"):
        if getattr(config, split) or (split == "eval" and config.eval_share):
            load_samples(config, family, cache, split, lambda line: None, about, say)


def open_codes(config: DataConfig, family: Family, say: Say = lambda line: None) -> CodeCache | None:
    """Open the cache of codes that `rawloop prepare` wrote. Returns None for a family without codes."""
    if not isinstance(family, CodecFamily):
        return None
    return CodeCache(codes_folder(config), family.codec_hash(), config, say)


def data_path(config: DataConfig, split: str) -> str:
    """Return the configured path of a split. Raises UserError if there is none."""
    path: str | None = config.train if config.eval_share else getattr(config, split)
    if not path:
        off = ", or data.eval_share, or switch evaluation off with --evaluation.enabled false"
        off = off if split == "eval" else ""
        raise UserError(f"data.{split} is not set: give a folder with metadata.json or a JSONL file{off}")
    return path


def load_samples(
    config: DataConfig,
    family: Family,
    cache: CodeCache | None,
    split: str,
    notice: Say,
    about: Mapping[str, Any] = MappingProxyType({}),
    say: Say = lambda line: None,
) -> SampleIndex:
    """Return the samples of one split that are used. The first call reads and checks every sample and all clips.

    Later calls with the same data, settings, family and codes take the result from the cache folder, and look up no
    audio file if there are codes. `data.verify` checks everything but the records again.

    Args:
        config: the settings of the data.
        family: checks each sample.
        cache: of the family's codes, or None.
        split: train or eval.
        notice: gets a line about everything that may be a mistake.
        about: facts on which the family's checks depend.
        say: gets lines about progress.

    Raises:
        UserError: a mistake in the data, or clips without codes.
    """
    # With codes, training needs no audio.
    index = open_samples(data_path(config, split), config, cache is None, codes_folder(config), say)
    for line in index.notices:
        notice(line)
    return Acceptance(config, family, cache, split, about, say).samples(index, notice)


def no_codes(path: Path) -> Tensor:
    """Replaces the cache of codes for a family without a codec."""
    raise AssertionError(f"{path} has no codes")
