"""Reads a data set: its content says which of the formats it has, and every record becomes a sample.

The formats are train-higgs-audio's `metadata.json`, and JSONL of chat messages, of ms-swift and of plain text. Every
mistake in the data ends here, in one line that names the file and the record, before anything is encoded or trained.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os.path import expanduser
from pathlib import Path

from rawloop.contracts import Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.files import SAMPLE_KEYS, data_file, read_records
from rawloop.data.keys import PLAIN, KeyCheck, trained_mark
from rawloop.data.messages import MessagesReader
from rawloop.data.metadata import MetadataReader
from rawloop.data.record import Files, Record, show
from rawloop.errors import BadSample, UserError

SHOWN = 5  # samples that one message names


def read_samples(
    path: Path | str,
    config: DataConfig | None = None,
    *,
    check_files: bool = True,
    notice: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Read a data set.

    Args:
        path: folder with a metadata.json or exactly one .jsonl file, or the path of a JSON or JSONL file.
        config: task, scene and path options (default: `DataConfig()`).
        check_files: look whether every audio file exists. Where there are codes, no audio is needed, and
            `CodeCache.check` looks at every clip.
        notice: gets a line about everything that its writer may have meant otherwise, such as unknown keys.

    Raises:
        UserError: anything in the data that cannot be used, with the file, the record and the fix.
    """
    config = config or DataConfig()
    file = data_file(Path(expanduser(path)))
    files = Files(file.parent, config.allow_outside, check_files)
    keys = KeyCheck(config.strict)
    readers: dict[str, Callable[[Record, str], Sample]] = {
        "messages": MessagesReader(config, files, keys).sample,
        "audio_file": MetadataReader(config, files, keys).sample,
        "text": partial(_plain_text, keys),
    }
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    repeated: Counter[str] = Counter()
    with _no_collection():
        for record in read_records(file, keys):
            reader = readers[_kind(record)]
            if trained_mark(record, record.values, "") is False:
                record.fail("it says of itself that it is not trained: take the record out")
            samples.append(reader(record, _identity(record, seen, repeated)))
    files.raise_missing()
    if not samples:
        raise UserError(f"{file} has no samples: a data set needs at least one")
    if notice is not None:
        for line in keys.notices(file):
            notice(line)
    return samples


def _plain_text(keys: KeyCheck, record: Record, identity: str) -> Sample:
    """Return the sample of a record with `text`: one trained turn whose role is text."""
    keys.check(record, record.values, PLAIN)
    text = record.values["text"]
    if not isinstance(text, str) or not text.strip():
        record.fail(f"'text' is {show(text)}: it must be a string with something in it; write it, or remove the sample")
    turns = (Turn("text", (Text(record.speakable(text)),), trained=True),)
    return Sample(identity, turns, None, f"{record.file.name} {record.place}", record.without(PLAIN.read))


def shared(train: Sequence[Sample], other: Sequence[Sample]) -> int:
    """Return how many of the `other` samples have the same words and clips as one that is trained."""
    trained = {_said(sample) for sample in train}
    return sum(_said(sample) in trained for sample in other)


def _said(sample: Sample) -> int:
    return hash(tuple((turn.role, turn.parts) for turn in sample.turns))


def usable(
    samples: Sequence[Sample], check: Callable[[Sample], None], skip: bool
) -> tuple[list[Sample], dict[str, str]]:
    """Return the samples that `check` accepts, and the reason for each one left out, by sample id.

    `check` raises BadSample for one that may be left out. Without `skip`, one UserError is about all of these.
    """
    kept: list[Sample] = []
    bad: dict[str, str] = {}
    for sample in samples:
        try:
            check(sample)
            kept.append(sample)
        except BadSample as reason:
            bad[sample.id] = str(reason)
    if bad and not skip:
        raise UserError(
            f"{len(bad)} of {len(samples)} samples cannot be used: {named(bad)}. Or leave them out: "
            "--data.on_bad_sample skip"
        )
    return kept, bad


def named(reasons: Mapping[str, str]) -> str:
    """Return the first reasons in a line, and how many more there are."""
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(list(reasons.values())[:SHOWN]) + more


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector: it would walk all samples again and again, and take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _kind(record: Record) -> str:
    """Return the key that says what a record is: the first with a value, as tables write null for absent ones."""
    present = [key for key in SAMPLE_KEYS if key in record.values]
    return next((key for key in present if record.values[key] is not None), present[0])


def _identity(record: Record, seen: dict[str, str], repeated: Counter[str]) -> str:
    """Return the id that a record gives itself; else its clip's name, or its place in the file."""
    given = record.identity()
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        record.fail(f"'id' is {show(given)}: it must be a string or a whole number")
    if given is None:
        audio = record.values.get("audio_file")
        name = audio if isinstance(audio, str) else f"{record.file.name} {record.place}"
        repeated[name] += 1
        given = name if repeated[name] == 1 else f"{name} {record.place}"
    identity = str(given)
    if identity in seen:
        raise UserError(f"{record} has the id of {seen[identity]}: give every sample an id of its own")
    seen[identity] = record.place
    return identity
