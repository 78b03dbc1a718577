"""The two splits of a run's data: encodes their clips, reads them, and checks every sample before step 0."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor

from rawloop.audio import import_torchaudio
from rawloop.contracts import Family, Sample
from rawloop.data.codes import CodeCache
from rawloop.data.config import DataConfig, codes_folder
from rawloop.data.eval_share import choose
from rawloop.data.prepare import BadClips, prepare
from rawloop.data.samples import named, read_samples, usable
from rawloop.data.shards import CODEC_FILE, codec_folder, heard_at
from rawloop.dist import World
from rawloop.errors import BadSample, UserError
from rawloop.family_protocols import CodecFamily, CodecInfo, HearingFamily
from rawloop.preempt import Preemption

SPEAKER_KEYS = ("speaker_id", "speaker", "client_id", "speaker_name")
HEARD_RATE = 16_000  # Hz, to decode clips for a family without `sample_rate`


def prepare_codes(
    config: DataConfig, family: Family, world: World | None = None, preemption: Preemption | None = None
) -> str:
    """Encode the clips of both splits that are not in the cache, and return a line about it.

    For a model without codes, clips are decoded once. All ranks of a world share the work. Raises like `prepare`.
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
        return usable(left, partial(family.check, frames=cache.frames), skip)[1]

    bad |= world.on_all_ranks(check, only_main=True) or {}
    what, done = ("codes of ", "encoded") if encode else ("", "decoded")
    counts = f"{report.encoded} {done} now, {report.reused} already there, {len(report.bad)} left out{report.speed}"
    others = f"; {len(bad)} samples that the model cannot take are left out: {named(bad)}" if bad else ""
    return f"{what}{report.clips} clips in {report.folder}: {counts}{others}"


def open_codes(config: DataConfig, family: Family) -> CodeCache | None:
    """Open the cache of codes that `rawloop prepare` wrote. Returns None for a family without codes."""
    return CodeCache(codes_folder(config), family.codec_hash(), config) if isinstance(family, CodecFamily) else None


def load_samples(
    config: DataConfig, family: Family, cache: CodeCache | None, split: str, say: Callable[[str], None]
) -> list[Sample]:
    """Read one split of the data, and check every sample and that all clips are encoded."""
    path = config.train if config.eval_share else getattr(config, split)
    if not path:
        off = ", or data.eval_share, or switch evaluation off with --evaluation.enabled false"
        off = off if split == "eval" else ""
        raise UserError(f"data.{split} is not set: give a folder with metadata.json or a JSONL file{off}")
    # With codes, training needs no audio.
    samples = read_samples(path, config, check_files=cache is None, notice=say)
    if config.eval_share:
        samples = share_of(samples, config, split, say)
    number, frames = len(samples), None
    left_out: dict[str, str] = {}
    if cache is None and any(sample.audio_paths() for sample in samples):
        for sample in samples:
            with suppress(BadSample):  # checked again with the lengths of clips
                family.check(sample)
        rate = family.sample_rate if isinstance(family, HearingFamily) else HEARD_RATE
        cache = decode_once(samples, codes_folder(config), rate, config)
    if cache is not None:
        samples, left_out = cache.usable(samples)
        cache.check(samples)
        if line := cache.open_ends(samples):
            say(f"data.{split}: {line}")
        frames = cache.frames if isinstance(family, CodecFamily | HearingFamily) else None
    samples, bad = usable(samples, lambda one: family.check(one, frames), config.on_bad_sample == "skip")
    left_out |= bad
    if not samples:
        raise UserError(f"data.{split} is '{path}', and no sample of it can be used: {named(left_out)}")
    if left_out:
        say(
            f"data.{split}: {len(left_out)} of {number} samples left out, since data.on_bad_sample is skip, here or in "
            f"`rawloop prepare`: {named(left_out)}"
        )
    return samples


def share_of(samples: Sequence[Sample], config: DataConfig, split: str, say: Callable[[str], None]) -> list[Sample]:
    """Return the samples of a split of `data.train`, which `data.eval_share` divides."""
    assert config.eval_share, "data.eval_share is set"
    pairs = [(one.id, speaker_of(one)) for one in samples]
    choice = choose(pairs, config.eval_share, config.eval_by, config.eval_seed)
    advice = choice.advice(len(samples), config.eval_share, "--data.eval_by")
    if advice and split == "eval":
        say(advice)
    return [one for index, one in enumerate(samples) if (index in choice.chosen) == (split == "eval")]


def speaker_of(sample: Sample) -> str | None:
    """Return the speaker that a sample's record names, or None."""
    values = (sample.extra.get(key) for key in SPEAKER_KEYS)
    return next((str(value) for value in values if isinstance(value, str | int) and str(value).strip()), None)


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


def no_codes(path: Path) -> Tensor:
    """Replaces the cache of codes for a family without a codec."""
    raise AssertionError(f"{path} has no codes")
