"""The settings of the data: its files, how they are read, and what happens to clips that cannot be used."""

import math
import os
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Literal

from rawloop.errors import UserError

MOST_WORKERS = 64  # on any machine; more where it has more than a quarter as many cores
CACHE_NAME = ".rawloop-codes"
# Keys that decide neither how a record is read nor which samples are used; and those that decide only on the latter.
# The index of a data set is built anew if any other key changes.
NO_MATTER = frozenset({"train", "eval", "codes", "num_workers", "shuffle", "verify"})
CHECKED_BY = frozenset(
    {"on_bad_sample", "max_seconds", "min_seconds", "packing"}
    | {"eval_share", "eval_by", "eval_seed", "reference_seconds"}
)


@dataclass
class DataConfig:
    """The data to train and evaluate on.

    Args:
        train: folder with metadata.json, or a metadata.json, JSONL or JSON file.
        eval: the same for evaluation.
        codes: folder of the codec's cached codes, written by `rawloop prepare`. Default: `.rawloop-codes` in the folder
            of the training data.
        task: task of every sample of a metadata.json: single_speaker_smart_voice, zero_shot_voice_cloning,
            multi_speaker_smart_voice or multi_speaker_voice_cloning. Default: the sample's task, or the one that its
            keys imply. With single_speaker_smart_voice or multi_speaker_smart_voice, recognition samples in chat
            messages (a clip, then its words) are reversed: the clip speaks the words.
        refs_in_scene: put reference clips into the scene, where they need no words, instead of into separate turns.
            Clips of chat messages in the user turn before a spoken answer are reference clips, too.
        references: reference clips of samples of one voice: those that their records name (given), or, for samples
            without, another clip of the same speaker in each epoch (drawn). The record names the speaker.
        reference_seconds: longer clips are not drawn as references.
        default_scene: scene of the samples without a scene: those of a metadata.json, and spoken chat messages without
            a system turn. null for no scene.
        train_turns: which assistant turns of chat messages are trained: the last one, or all. A record's `start_index`,
            and the marks of its messages, have precedence.
        eval_share: share of the samples of `train` that are evaluated and not trained, in place of `eval`.
        eval_by: how `eval_share` divides: whole speakers, if the data have several, or single samples.
        eval_seed: another number chooses other samples for `eval_share`.
        strict: refuse a record with an unknown key. Default: count such keys and print the counts.
        verify: check all samples and audio files again at each start, instead of taking the result of the first start
            with the same data, settings, tokenizer and codes.
        allow_outside: allow audio files outside the folder of the data.
        on_bad_sample: what to do about clips that cannot be used, and samples that are too long for the model or have
            letters that its tokenizer does not know: stop (`rawloop prepare` encodes all other clips and ends with
            exit code 1; training does not start) or skip (exactly these samples are left out).
        max_seconds: longer clips are bad, even if they are already encoded.
        min_seconds: shorter clips are bad, even if they are already encoded.
        num_workers: worker processes of each training process that make batches, and as many for the evaluation; 0
            makes batches in the training process.
        packing: concatenate the samples of a micro-batch into one row, without attention between them, instead of
            padding them to the longest (causal_lm only).
        shuffle: use another order of the training samples in every epoch.
    """

    train: str | None = None
    eval: str | None = None
    codes: str | None = None
    task: str | None = None
    refs_in_scene: bool = False
    references: Literal["given", "drawn"] = "given"
    reference_seconds: float = 15.0
    default_scene: str | None = "Audio is recorded from a quiet room."
    train_turns: Literal["last", "all"] = "last"
    eval_share: float | None = None
    eval_by: Literal["speaker", "sample"] = "speaker"
    eval_seed: int = 0
    strict: bool = False
    verify: bool = False
    allow_outside: bool = False
    on_bad_sample: Literal["stop", "skip"] = "stop"
    max_seconds: float = 30.0
    min_seconds: float = 0.0
    num_workers: int = 0
    packing: bool = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds < self.max_seconds:
            raise UserError(
                f"data.min_seconds is {self.min_seconds} and data.max_seconds is {self.max_seconds}: "
                "they need 0 <= min_seconds < max_seconds"
            )
        if not self.reference_seconds > 0:
            raise UserError(f"data.reference_seconds is {self.reference_seconds:g}: it must be above 0")
        if self.eval_share is not None and self.eval is not None:
            raise UserError(
                f"data.eval_share is {self.eval_share:g} and data.eval is '{self.eval}': set one of them; "
                "data.eval_share takes the evaluation samples out of data.train"
            )
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise UserError(f"data.eval_share is {self.eval_share:g}: it must lie between 0 and 1, such as 0.05")
        cores = os.cpu_count() or 1
        if not 0 <= self.num_workers <= max(MOST_WORKERS, 4 * cores):
            raise UserError(
                f"data.num_workers is {self.num_workers}: it must lie between 0 and {max(MOST_WORKERS, 4 * cores)}, as "
                f"this machine has {cores} cores"
            )

    def fault_of_length(self, frames: int, frame_rate: float) -> str | None:
        """Return the fault in the length of an encoded clip, or None.

        One frame more or less is allowed, as a codec rounds to frames; `rawloop prepare` checks the exact length.
        """
        seconds = frames / frame_rate
        if frames - 1 > math.ceil(self.max_seconds * frame_rate):
            return f"lasts {seconds:.2f} s, longer than data.max_seconds ({self.max_seconds:g} s)"
        if frames + 1 < math.floor(self.min_seconds * frame_rate):
            return f"lasts {seconds:.3f} s, shorter than data.min_seconds ({self.min_seconds:g} s)"
        return None


def codes_folder(config: DataConfig) -> Path:
    """Return the folder of the cached codes: `config.codes`, or `.rawloop-codes` in the folder of the data."""
    if config.codes is not None:
        return Path(expanduser(config.codes))
    data = config.train or config.eval
    if data is None:
        raise UserError("no data: set --data.train to a folder with metadata.json or to a JSONL file")
    path = Path(expanduser(data))
    return (path if path.is_dir() else path.parent) / CACHE_NAME
