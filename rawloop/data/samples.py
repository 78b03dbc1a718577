"""Reads a data set: turns every record of its file into a sample, by the content of the record.

The formats are train-higgs-audio's `metadata.json`, and JSONL of chat messages, of ms-swift and of plain text. Every
mistake in the data raises here, in one line that names the file and the record, before anything is encoded or trained.
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
from rawloop.data.keys import PLAIN, KeyCheck, trained_mark
from rawloop.data.messages import MessagesReader
from rawloop.data.metadata import MetadataReader
from rawloop.data.reading import SAMPLE_KEYS, data_file, read_records
from rawloop.data.record import Files, Record, show
from rawloop.errors import BadSample, UserError, first_few


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
        check_files: check that every audio file exists. Not needed with cached codes: training needs no audio, and
            `CodeCache.check` checks every clip.
        notice: gets a line about everything that may be a mistake, such as unknown keys.

    Raises:
        UserError: a mistake in the data, with the file, the record and the fix.
    """
    reader = SampleReader(path, config or DataConfig(), check_files)
    with _no_collection():
        samples = list(reader)
    if notice is not None:
        for line in reader.notices():
            notice(line)
    return samples


class SampleReader:
    """Reads the samples of a data set one after another; see `read_samples`. It may be iterated once.

    `file` is the data file. After the iteration, `looked_up` has the files beside it that the samples depend on: files
    with transcripts, and the audio files if `check_files`.
    """

    def __init__(self, path: Path | str, config: DataConfig, check_files: bool) -> None:
        self.file = data_file(Path(expanduser(path)))
        self.keys = KeyCheck(config.strict)
        self.files = Files(self.file.parent, config.allow_outside, check_files)
        self.readers: dict[str, Callable[[Record, str], Sample]] = {
            "messages": MessagesReader(config, self.files, self.keys).sample,
            "audio_file": MetadataReader(config, self.files, self.keys).sample,
            "text": partial(_plain_text, self.keys),
        }

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples. Raises UserError for a mistake; missing files are named at the end."""
        seen: dict[str, str] = {}
        repeated: Counter[str] = Counter()
        for record in read_records(self.file, self.keys):
            present = [key for key in SAMPLE_KEYS if key in record.values]
            kind = next((key for key in present if record.values[key] is not None), present[0])  # tables write nulls
            if trained_mark(record, record.values, "") is False:
                record.fail("it is marked as not trained: take the record out")
            yield self.readers[kind](record, _identity(record, seen, repeated))
        self.files.raise_missing()
        if not seen:
            raise UserError(f"{self.file} has no samples: a data set needs at least one")

    @property
    def looked_up(self) -> list[str]:
        """The paths of the files beside the data file that the samples depend on."""
        return list(self.files.looked_up)

    def notices(self) -> list[str]:
        """Return a line about everything that may be a mistake, such as unknown keys."""
        return list(self.keys.notices(self.file))


def _plain_text(keys: KeyCheck, record: Record, identity: str) -> Sample:
    """Return the sample of a record with `text`: one trained turn with the role text."""
    keys.check(record, record.values, PLAIN)
    text = record.values["text"]
    if not isinstance(text, str) or not text.strip():
        record.fail(f"'text' is {show(text)}: it must be a string with something in it; write it, or remove the sample")
    turns = (Turn("text", (Text(record.speakable(text)),), trained=True),)
    return Sample(identity, turns, None, record.source, record.without(PLAIN.read))


def _identity(record: Record, seen: dict[str, str], repeated: Counter[str]) -> str:
    """Return the id of a record; without an id, the name of its clip, or its place in the file."""
    given = record.identity()
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        record.fail(f"'id' is {show(given)}: it must be a string or a whole number")
    if given is None:
        audio = record.values.get("audio_file")
        name = audio if isinstance(audio, str) else record.source
        repeated[name] += 1
        given = name if repeated[name] == 1 else f"{name} {record.place}"
    identity = str(given)
    if identity in seen:
        raise UserError(f"{record} has the id of {seen[identity]}: give every sample its own id")
    seen[identity] = record.place
    return identity


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector, which would traverse all samples again and again and take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def usable(
    samples: Sequence[Sample], check: Callable[[Sample], None], skip: bool
) -> tuple[list[Sample], dict[str, str]]:
    """Return the samples that `check` accepts, and the reason for each rejected sample, by its id.

    `check` raises BadSample for a sample that may be left out. Without `skip`, this raises one UserError about all.
    """
    kept: list[Sample] = []
    bad: dict[str, str] = {}
    for sample in samples:
        try:
            check(sample)
            kept.append(sample)
        except BadSample as reason:
            bad[sample.id] = str(reason)
    if not skip:
        refuse(bad, len(samples))
    return kept, bad


def refuse(bad: Mapping[str, str], number: int) -> None:
    """Raise one UserError about all bad samples among `number`, if there are any."""
    if bad:
        raise UserError(
            f"{len(bad)} of {number} samples cannot be used: {named(bad)}. Or leave them out: --data.on_bad_sample skip"
        )


def named(reasons: Mapping[str, str]) -> str:
    """Return the first reasons in a line, and the number of the others."""
    return first_few(reasons.values(), "; ")
