"""Reads a data set: finds its file, detects its format by the content, and turns every record into a sample.

The formats are train-higgs-audio's `metadata.json`, and JSONL of chat messages, of ms-swift and of plain text. Every
mistake in the data raises here, in one line that names the file and the record, before anything is encoded or trained.
"""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

from rawloop.contracts import Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.keys import METADATA_FILE, OTHER_CLIPS, PLAIN, KeyCheck, trained_mark
from rawloop.data.messages import MessagesReader
from rawloop.data.metadata import MetadataReader
from rawloop.data.record import DECODER, DoubledKey, Files, Record, key_names, parse_json, show
from rawloop.errors import BadSample, UserError, first_few, nearest
from rawloop.files import read_text

METADATA = "metadata.json"
SAMPLE_KEYS = ("messages", "audio_file", "text")  # the first of these with a value is the kind of the record
QUESTION = ("prompt", "completion", "question", "query", "response", "answer")
COMPRESSED = "is compressed: unpack it first (`gunzip`, `unzip`, `zstd -d`) and name the unpacked file"
TABLE = (
    'is a table: write a line of JSON for each of its rows, such as {"audio_file": "a.wav", "transcript": "Words."}, '
    "into a .jsonl file"
)
DATASET = (
    "is a table of Hugging Face datasets: write it with `Dataset.to_json('train.jsonl')`, clips as files beside it"
)
FOREIGN = {
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z"), COMPRESSED),
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".xls"), TABLE),
    **dict.fromkeys((".parquet", ".arrow"), DATASET),
    ".txt": 'is plain text: write {"text": "..."} for each document, a line each, into a .jsonl file',
}
MAGIC = {b"\x1f\x8b": ".gz", b"PK\x03\x04": ".zip", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"PAR1": ".parquet"}
OTHER_RECORDS = {
    ("conversations", "conversation"): "this is a ShareGPT record: call the list 'messages', 'from' 'role' (human is "
    "user, gpt is assistant) and 'value' 'content'",
    ("chosen", "rejected"): "these are preferences: rawloop learns from one answer; write prompt and chosen answer as "
    "'messages'",
    ("instruction", "output"): "this is an Alpaca record: write instruction and input as the user message of "
    "'messages', output as the assistant message",
    QUESTION: "write question and answer as the user and the assistant message of 'messages'",
    ("supervisions", "recording"): 'this is a cut of lhotse: write {"audio_file": "a.wav", "offset": 0.0, '
    '"duration": 2.5, "transcript": "Words."}, a line for each',
    (*OTHER_CLIPS, "path", "file", "file_name", "sentence", "transcription"): "call the clip that is learnt "
    "'audio_file', and its words 'transcript'",
}


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
            present = [key for key in SAMPLE_KEYS if key in record.values]
            kind = next((key for key in present if record.values[key] is not None), present[0])  # tables write nulls
            if trained_mark(record, record.values, "") is False:
                record.fail("it is marked as not trained: take the record out")
            samples.append(readers[kind](record, _identity(record, seen, repeated)))
    files.raise_missing()
    if not samples:
        raise UserError(f"{file} has no samples: a data set needs at least one")
    if notice is not None:
        for line in keys.notices(file):
            notice(line)
    return samples


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


def shared(train: Sequence[Sample], other: Sequence[Sample]) -> int:
    """Return how many of the `other` samples have the words and clips of a training sample."""

    def content(sample: Sample) -> int:
        return hash(tuple((turn.role, turn.parts) for turn in sample.turns))

    trained = set(map(content, train))
    return sum(content(sample) in trained for sample in other)


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
    if bad and not skip:
        raise UserError(
            f"{len(bad)} of {len(samples)} samples cannot be used: {named(bad)}. Or leave them out: "
            "--data.on_bad_sample skip"
        )
    return kept, bad


def named(reasons: Mapping[str, str]) -> str:
    """Return the first reasons in a line, and the number of the others."""
    return first_few(reasons.values(), "; ")


def data_file(path: Path) -> Path:
    """Return the file with the records: `path` itself, or the only data file of that folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a folder with {METADATA}, or a JSON or JSONL file")
    if (path / METADATA).is_file():
        return path / METADATA
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} has several .jsonl files ({first_few(f.name for f in found)}): name one of them")
    others = sorted(path.iterdir())
    for file in others:
        if what := FOREIGN.get(file.suffix.lower()):
            raise UserError(f"{path} has neither {METADATA} nor a .jsonl file, but {file.name} {what}")
    listed = first_few(file.name for file in others) or "nothing"
    raise UserError(f"{path} has neither {METADATA} nor a .jsonl file (it has {listed})")


def read_records(file: Path, keys: KeyCheck) -> Iterator[Record]:
    """Yield the records of a data file in any format; `keys` checks the keys beside `samples`."""
    if file.suffix.lower() in FOREIGN:
        raise UserError(f"{file} {FOREIGN[file.suffix.lower()]}")
    text = _text(file)
    if not text.strip():
        raise UserError(f"{file} is empty: a data set needs at least one sample")
    try:
        value, end = DECODER.raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError) as error:
        if file.suffix == ".jsonl":
            yield from _lines(text, file)  # its error names the line
        raise _broken(error, file, "") from error
    if text[end:].strip():
        yield from _lines(text, file)
    elif isinstance(value, dict) and "samples" not in value and not value.keys().isdisjoint(SAMPLE_KEYS):
        yield Record(value, file, "line 1")
    elif isinstance(value, list):
        yield from _listed(value, file, "record")
    else:
        samples = _samples(value, file)
        keys.check(Record({}, file, "(beside 'samples')"), value, METADATA_FILE)
        yield from _listed(samples, file, "samples")


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except UnicodeDecodeError as error:
        known = next((kind for magic, kind in MAGIC.items() if error.object.startswith(magic)), None)
        if known is not None:
            raise UserError(f"{file} {FOREIGN[known]}") from error
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {line} is not UTF-8 (byte {error.start}): convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _broken(error: ValueError | RecursionError, file: Path, place: str) -> UserError:
    """Return the error for JSON that cannot be parsed; `place` is the line, or empty for a whole file."""
    why: object = f"a number in it is too long, or its nesting too deep ({error})"
    if isinstance(error, json.JSONDecodeError):
        place, why = place or f" line {error.lineno}", f"not JSON ({error.msg}, column {error.colno})"
    return UserError(f"{file}{place}: {error if isinstance(error, DoubledKey) else why}")


def _lines(text: str, file: Path) -> Iterator[Record]:
    # Not splitlines(): it also splits at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise _broken(error, file, f" line {number}") from error
        yield _record(value, file, f"line {number}")


def _listed(values: Any, file: Path, name: str) -> Iterator[Record]:
    if not isinstance(values, list):
        raise UserError(f"{file}: '{name}' is {show(values)}: it must be a list")
    for index, value in enumerate(values):
        yield _record(value, file, f"{name}[{index}]")


def _samples(value: Any, file: Path) -> Any:
    if isinstance(value, dict) and "samples" in value:
        return value["samples"]
    keys = f"it has the keys {key_names(value)}" if isinstance(value, dict) and value else f"it has {show(value)}"
    other = _other_record(value) if isinstance(value, dict) else ""
    alone = file.suffix == ".jsonl"
    fix = other or ("this is no sample" if alone else "metadata.json needs a list of samples under that key")
    raise UserError(f"{file} has no 'samples' ({keys}): {fix}")


def _other_record(value: dict[str, Any]) -> str:
    """Return which other layout has the keys of a record, or which of our keys is similar to one of them, or ""."""
    layout = next((what for keys, what in OTHER_RECORDS.items() if not value.keys().isdisjoint(keys)), "")
    hint = next(filter(None, (nearest(key, (*SAMPLE_KEYS, "samples")) for key in value)), "")
    return layout or (f"this is no sample{hint}" if hint else "")


def _record(value: Any, file: Path, place: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{file} {place} is {show(value)}: it must be an object")
    record = Record(value, file, place)
    if value.keys().isdisjoint(SAMPLE_KEYS):
        record.fail(
            f"none of 'messages', 'audio_file' and 'text' (it has the keys {key_names(value) or 'none'}): "
            f"{_other_record(value) or 'this is no sample'}"
        )
    return record
