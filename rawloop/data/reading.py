"""Finds the file of a data set, and reads its records in any format: JSONL, a list, or `samples` of an object."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rawloop.data.keys import METADATA_FILE, OTHER_CLIPS, KeyCheck
from rawloop.data.record import DECODER, DoubledKey, Record, key_names, parse_json, show
from rawloop.data.stream import NotStreamed, stream_values
from rawloop.errors import UserError, first_few, nearest
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
    count = 0
    values = stream_values(file)
    try:
        while True:
            place, value = next(values)
            yield _record(value, file, place)
            count += 1
    except StopIteration as end:
        if end.value is not None:
            keys.check(Record({}, file, "(beside 'samples')"), end.value, METADATA_FILE)
    except NotStreamed:
        yield from islice(_whole(file, keys), count, None)


def _whole(file: Path, keys: KeyCheck) -> Iterator[Record]:
    """Yield the records of a file that is read whole, or raise UserError about its mistake."""
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
