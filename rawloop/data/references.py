"""Reference clips for voice cloning: in each epoch another clip of the speaker, never the one that is to be learnt.

A sample's references come from one group of clips of similar length. So its length with a reference is nearly the same
in every epoch, and known before training, which `train.max_frames` and the checks need.
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rawloop.audio import segment_of
from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.batches import Draw
from rawloop.data.config import DataConfig
from rawloop.data.eval_share import SPEAKER_KEYS, speaker_of
from rawloop.data.mapped import Say, hash64, told
from rawloop.data.metadata import CLONING, MULTI, MULTI_CLONING, TAG
from rawloop.data.spoken import around_scene
from rawloop.errors import BadSample, UserError, first_few
from rawloop.seed import derive_seed

GROUP = 6  # clips in a group, about: more are less alike in length (padding 4.7%, with eight 6.2%), fewer recur sooner
VOICE = "SPEAKER0:"  # before a reference in a scene


class Spoken(NamedTuple):
    """The only clip that a sample has to learn, and the words that it speaks."""

    words: str
    clip: Audio


def spoken(sample: Sample) -> Spoken | None:
    """Return what one speaker says in a sample's only trained turn, or None for other samples."""
    trained = [index for index, turn in enumerate(sample.turns) if turn.trained]
    if len(trained) != 1 or trained[0] == 0 or sample.task in (MULTI, MULTI_CLONING):
        return None
    asked, answer = sample.turns[trained[0] - 1], sample.turns[trained[0]]
    if len(answer.clips) != 1 or asked.role != "user" or not asked.words.strip() or len(set(_tags(asked.words))) > 1:
        return None
    return Spoken(asked.words, answer.clips[0])


def _tags(words: str) -> list[str]:
    found: list[str] = TAG.findall(words)
    return found


def with_reference(sample: Sample, other: Sample, config: DataConfig) -> Sample:
    """Return a sample with the clip of another one as its reference, as if its record named that clip.

    The clip follows its words in turns of its own, or is in the scene without them (`data.refs_in_scene`).
    """
    voice = spoken(other)
    assert voice is not None, "only such samples are drawn"
    if config.refs_in_scene:
        before, scene, after = around_scene(sample.turns, config.default_scene)
        parts = [part for part in scene.parts if not (isinstance(part, Text) and part.text.startswith(VOICE))]
        turns = (*before, replace(scene, parts=(*parts, Text(VOICE), voice.clip)), *after)
    else:
        first = next(index for index, turn in enumerate(sample.turns) if turn.role not in ("system", "scene"))
        pair = (Turn("user", (Text(voice.words),)), Turn("assistant", (voice.clip,)))
        turns = (*sample.turns[:first], *pair, *sample.turns[first:])
    return replace(sample, turns=turns, task=CLONING, source=f"{sample.source}, reference '{other.id}'")


class References:
    """The samples of a split with a reference each, as a function of (seed, epoch, sample).

    Args:
        samples: the samples that are used.
        others: the samples whose clips may be references.
        arrays: `references` int32, places in `others`; the references of sample k are those from `first`[k] int32 on,
            as many as `number`[k] int32, except for `own`[k] int32, its own clip, and those that overlap with it.
        config: of the data; see `with_reference`.
        seed: of the run.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        others: Sequence[Sample],
        arrays: Mapping[str, np.ndarray],
        config: DataConfig,
        seed: int,
    ) -> None:
        self.samples, self.others, self.config, self.seed = samples, others, config, seed
        self.references, self.first, self.number, self.own = (
            arrays[name] for name in ("references", "first", "number", "own")
        )

    def __call__(self, draw: Draw) -> Sample:
        """Return a sample with its reference in an epoch. A sample that cannot have one is returned unchanged."""
        sample, number = self.samples[draw.sample], int(self.number[draw.sample])
        if not number:
            return sample
        seed = derive_seed("reference", self.seed, draw.epoch, draw.sample)
        places = random.Random(seed).sample(range(number), number)
        other = next(other for place in places if (other := self._candidate(sample, draw.sample, place)) is not None)
        return with_reference(sample, other, self.config)

    def costliest(self, index: int, length: Callable[[Sample], int]) -> Sample:
        """Return a sample with the reference that makes it longest, by `length`."""
        sample = self.samples[index]
        places = range(int(self.number[index]))
        others = [other for place in places if (other := self._candidate(sample, index, place)) is not None]
        return max((with_reference(sample, other, self.config) for other in others), key=length, default=sample)

    def _candidate(self, sample: Sample, index: int, place: int) -> Sample | None:
        """Return the sample at a place of a group, or None if its clip must not be the reference of `sample`."""
        place += int(self.first[index])
        if place == self.own[index]:
            return None
        other = self.others[int(self.references[place])]
        target, voice = spoken(sample), spoken(other)
        assert target is not None, "only such samples get references"
        assert voice is not None, "only such samples are drawn"
        return None if overlap(target.clip.path, voice.clip.path) else other


def overlap(one: Path, other: Path) -> bool:
    """Return whether two clips have a part of a recording in common."""
    (file, start, end), (file_, start_, end_) = segment_of(one), segment_of(other)
    return file == file_ and (end_ is None or start < end_) and (end is None or start_ < end)


@dataclass
class Voices:
    """Collects the used samples of a split by speaker, and chooses the group of each sample's references.

    Args:
        split: train or eval.
        config: of the data.
        frames: returns the frames of a clip.
        identity: returns a text that identifies the content of a clip.
        longest: frames of the longest reference.
    """

    split: str
    config: DataConfig
    frames: Callable[[Path], int]
    identity: Callable[[Path], str]
    longest: int

    def __post_init__(self) -> None:
        self.rows, self.sizes, self.contents = array("I"), array("i"), array("Q")
        self.speakers = array("i")  # a number for each speaker; -1 for a sample whose clip cannot be a reference
        self.wants = bytearray()  # whether the sample may get a reference
        self.names: dict[str, int] = {}
        self.unnamed = self.given = self.others = 0

    def add(self, row: int, sample: Sample) -> None:
        """Add a used sample and its place in the index."""
        voice, speaker = spoken(sample), speaker_of(sample)
        own = len(sample.audio_paths()) > 1
        self.given += own
        self.others += voice is None and not own
        self.unnamed += voice is not None and not own and speaker is None
        self.rows.append(row)
        usable = voice is not None and speaker is not None
        self.speakers.append(self.names.setdefault(speaker, len(self.names)) if usable and speaker else -1)
        self.wants.append(usable and not own)
        self.sizes.append(self.frames(voice.clip.path) if voice else 0)
        self.contents.append(hash64(self.identity(voice.clip.path)) if voice else 0)

    def choose(
        self, read: Callable[[int], Sample], check: Callable[[Sample], None], say: Say = lambda line: None
    ) -> tuple[dict[str, np.ndarray], str]:
        """Return the arrays of `References`, and a line about them.

        `read` returns the sample in a row of the index. `check` raises BadSample for a sample that is too long. `say`
        gets lines about progress.

        Raises:
            UserError: no sample of the training set can have a reference.
        """
        order, starts, groups_of = self._groups()
        rows = np.frombuffer(self.rows, np.uint32)
        place_of = {int(content): place for place, content in enumerate(np.frombuffer(self.contents, np.uint64)[order])}
        own = np.array([place_of.get(content, -1) for content in self.contents], np.int32)
        first, number = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
        alone, turns = list[str](), Counter[int]()
        wanting = np.flatnonzero(np.frombuffer(self.wants, np.uint8)).tolist()
        for index in told(wanting, f"data.{self.split}: references chosen", len(wanting), say):
            sample = read(int(rows[index]))
            speaker = self.speakers[index]
            groups = groups_of.get(speaker, range(0))
            turns[speaker] += 1  # a speaker's samples take their groups in turn
            for shift in range(len(groups)):
                group = groups[(turns[speaker] + shift) % len(groups)]
                places = [place for place in range(starts[group], starts[group + 1]) if place != own[index]]
                if self._fits(sample, [read(int(rows[order[place]])) for place in places], check):
                    first[index], number[index] = starts[group], starts[group + 1] - starts[group]
                    break
            else:
                alone.append(sample.id)
        drawn = int((number > 0).sum())
        if not drawn and self.split == "train":
            raise UserError(
                "data.references is drawn, and no sample of data.train can have one: its record must name the speaker "
                f"({', '.join(SPEAKER_KEYS)}), and the speaker must have another clip of at most "
                "data.reference_seconds; or set it to given"
            )
        arrays = {"references": rows[order], "first": first, "number": number, "own": own}
        return arrays, self._line(drawn, len(order), alone)

    def _groups(self) -> tuple[np.ndarray, list[int], dict[int, range]]:
        """Return the clips that may be references, by speaker and length; where groups start; the groups of a speaker.

        Of clips with equal content only one is among them.
        """
        speakers, sizes = np.frombuffer(self.speakers, np.int32), np.frombuffer(self.sizes, np.int32)
        kept = np.flatnonzero((speakers >= 0) & (sizes <= self.longest))
        contents = np.frombuffer(self.contents, np.uint64)[kept]
        kept = kept[np.sort(np.unique(contents, return_index=True)[1])]
        order = kept[np.lexsort((kept, sizes[kept], speakers[kept]))]
        changes = np.flatnonzero(np.diff(speakers[order])) + 1
        starts, groups_of = [0], dict[int, range]()
        for start, end in pairwise([0, *changes.tolist(), len(order)]) if len(order) else ():
            number = max(1, round((end - start) / GROUP))
            groups_of[int(speakers[order[start]])] = range(len(starts) - 1, len(starts) - 1 + number)
            starts += [start + (end - start) * (group + 1) // number for group in range(number)]
        return order, starts, groups_of

    def _fits(self, sample: Sample, others: Sequence[Sample], check: Callable[[Sample], None]) -> bool:
        """Return whether a sample can have one of the references, and is not too long with any of them."""
        clip = spoken(sample)
        assert clip is not None, "only such samples get references"
        found = False
        for other in others:
            voice = spoken(other)
            if voice is None or overlap(clip.clip.path, voice.clip.path):
                continue
            try:
                check(with_reference(sample, other, self.config))
            except BadSample:
                return False
            found = True
        return found

    def _line(self, drawn: int, clips: int, alone: Sequence[str]) -> str:
        parts = [
            f"data.{self.split}: references are drawn for {drawn} of {len(self.rows)} samples in each epoch, among "
            f"{clips} clips of {len(self.names)} speaker(s)"
        ]
        if alone:
            parts.append(
                f"{len(alone)} have no other clip of their speaker that fits, and are used without a reference: "
                f"{first_few(alone)}"
            )
        if self.unnamed:
            parts.append(f"{self.unnamed} name no speaker, and are used without a reference")
        if self.given:
            parts.append(f"{self.given} keep the references of their records")
        if self.others:
            parts.append(f"{self.others} are not one clip of one voice, and stay as they are")
        return "; ".join(parts)
