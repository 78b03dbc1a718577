"""Which samples are kept for the evaluation: whole speakers or recordings where there are several, else single ones.

The choice depends only on ids, speakers, share and seed, so all ranks, a resumed run and another machine choose alike.
"""

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Literal, NamedTuple

from rawloop.audio import segment_of
from rawloop.contracts import Sample
from rawloop.data.config import DataConfig
from rawloop.errors import UserError

SPEAKER_KEYS = ("speaker_id", "speaker", "client_id", "speaker_name")
SplitBy = Literal["speaker", "sample"]
TOO_MUCH = 2.0  # times the share: whole speakers that take more are worth a line


class Choice(NamedTuple):
    """The indices of the samples for the evaluation, whether they are whole speakers, and how many speakers."""

    chosen: frozenset[int]
    by: SplitBy
    speakers: int

    def advice(self, samples: int, share: float, key: str) -> str | None:
        """Return a line if whole speakers take much more than the share, or None. `key` is the option to change it."""
        got = len(self.chosen) / samples
        if self.by == "sample" or got <= TOO_MUCH * share:
            return None
        return (
            f"the evaluation has {got:.0%} of the samples instead of {share:.0%}, since no speaker has so few: "
            f"{key} sample takes single samples of all speakers"
        )


def choose(samples: Sequence[tuple[str, str | None]], share: float, by: SplitBy = "speaker", seed: int = 0) -> Choice:
    """Choose the samples for the evaluation.

    Args:
        samples: id of each sample, and its speaker or recording.
        share: of the samples, between 0 and 1; at least one is chosen, and at least one is left.
        by: `speaker` takes whole speakers, in a random order, as long as they fit into the share; if none fits, the
            one with the fewest samples. A sample without a speaker counts as a speaker. `sample`, or data of a single
            speaker, takes single samples.
        seed: of the random order.

    Raises:
        UserError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise UserError(f"{len(samples)} sample(s) cannot be divided into training and evaluation: add more")
    speakers = {speaker for _, speaker in samples if speaker is not None}
    by = by if len(speakers) > 1 else "sample"
    groups: dict[str, list[int]] = {}
    for index, (identity, speaker) in enumerate(samples):
        whole = by == "speaker" and speaker is not None
        groups.setdefault(f"speaker {speaker}" if whole else f"sample {identity}", []).append(index)
    order = sorted(groups, key=lambda name: sha256(f"{seed}\0{name}".encode(errors="surrogatepass")).digest())
    wanted = min(max(1, round(share * len(samples))), len(samples) - 1)
    chosen: list[int] = []
    for name in order:
        if len(chosen) + len(groups[name]) <= wanted:
            chosen += groups[name]
    if not chosen:
        chosen = min((groups[name] for name in order), key=len)
    return Choice(frozenset(chosen), by, len(speakers))


def share_of(samples: Iterable[Sample], config: DataConfig, split: str, say: Callable[[str], None]) -> list[int]:
    """Return the indices of the samples of a split of `data.train`, which `data.eval_share` divides."""
    assert config.eval_share, "data.eval_share is set"
    pairs = [(one.id, speaker_of(one) or _recording_of(one)) for one in samples]
    choice = choose(pairs, config.eval_share, config.eval_by, config.eval_seed)
    advice = choice.advice(len(pairs), config.eval_share, "--data.eval_by")
    if advice and split == "eval":
        say(advice)
    return [index for index in range(len(pairs)) if (index in choice.chosen) == (split == "eval")]


def speaker_of(sample: Sample) -> str | None:
    """Return the speaker that a sample's record names, or None."""
    values = (sample.extra.get(key) for key in SPEAKER_KEYS)
    return next((str(value) for value in values if isinstance(value, str | int) and str(value).strip()), None)


def _recording_of(sample: Sample) -> str | None:
    """Return the file of a sample's last clip if that is a segment, since others of its speaker may be beside it."""
    clips = sample.audio_paths()
    segment = segment_of(clips[-1]) if clips else None
    return None if segment is None or segment.whole else str(segment.file)
