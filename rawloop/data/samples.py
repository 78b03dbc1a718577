"""Reads a data set: finds out by content which of its formats it has, and turns every record into a sample.

The formats are train-higgs-audio's `metadata.json`, and JSONL of chat messages, of ms-swift and of plain text. Every
mistake in the data ends here, in one line that names the file and the record, before anything is encoded or trained.
"""

import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rawloop.audio import BadAudio, clip_seconds
from rawloop.contracts import Sample
from rawloop.data.config import DataConfig
from rawloop.data.messages import MessagesReader
from rawloop.data.metadata import MetadataReader
from rawloop.data.record import Files, Record, show
from rawloop.data.texts import TextReader
from rawloop.errors import UserError

METADATA = "metadata.json"
SAMPLE_KEYS = ("messages", "audio_file", "text")  # each record has one of them; the first that it has says what it is
SHOWN = 10  # clips that one message names


def read_samples(path: Path | str, config: DataConfig | None = None, *, check_files: bool = True) -> list[Sample]:
    """Read a data set.

    Args:
        path: folder with a metadata.json or exactly one .jsonl file, or the path of a JSON or JSONL file.
        config: task, scene and path options (default: `DataConfig()`).
        check_files: look whether every audio file exists. Where there are codes, no audio is needed: `CodeCache.check`
            looks at every clip anyway.

    Raises:
        UserError: anything in the data that cannot be used, with the file, the record and the fix.
    """
    config = config or DataConfig()
    file = data_file(Path(path).expanduser())
    files = Files(file.parent, config.allow_outside, check_files)
    readers: dict[str, MessagesReader | MetadataReader | TextReader] = {
        "messages": MessagesReader(files),
        "audio_file": MetadataReader(config, files),
        "text": TextReader(),
    }
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    repeated: Counter[str] = Counter()
    with _no_collection():
        for record in read_records(file):
            reader = readers[next(key for key in SAMPLE_KEYS if key in record.values)]
            samples.append(reader.sample(record, _identity(record, seen, repeated)))
    files.raise_missing()
    if not samples:
        raise UserError(f"{file} has no samples: a data set needs at least one")
    return samples


def check_lengths(samples: Sequence[Sample], config: DataConfig) -> None:
    """Hold the clips of samples that are never prepared against `min_seconds` and `max_seconds`, by their headers.

    `rawloop prepare` does this, and more, for models that take codes. Nothing is decoded here: a clip that is silent,
    or a flac that was cut short, is found when its sample is reached.

    Raises:
        UserError: clips that cannot be opened, are too long or too short, each with a sample that needs it.
    """
    owners = {path: sample for sample in samples for path in sample.audio_paths()}
    bad: list[str] = []
    for path, sample in owners.items():
        try:
            clip_seconds(path, min_seconds=config.min_seconds, max_seconds=config.max_seconds)
        except BadAudio as reason:
            bad.append(f"{path} (sample '{sample.id}', {sample.source}) {reason}")
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise UserError(f"clips that cannot be used, {len(bad)} of {len(owners)}: {'; '.join(bad[:SHOWN])}{more}")


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


def data_file(path: Path) -> Path:
    """Return the file that holds the records: `path` itself, or the data file of that folder.

    Raises:
        UserError: nothing is there, or the folder has no data file or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a folder with {METADATA}, or a JSON or JSONL file")
    if (path / METADATA).is_file():
        return path / METADATA
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:5])
    problem = f"several .jsonl files ({names}): name one of them" if found else f"neither {METADATA} nor a .jsonl file"
    raise UserError(f"{path} has {problem}")


def read_records(file: Path) -> Iterator[Record]:
    """Yield the records of a data file, whatever its format.

    Raises:
        UserError: not UTF-8, broken JSON, no `samples`, or a record that is no object.
    """
    text = _text(file)
    if not text.strip():
        raise UserError(f"{file} is empty: a data set needs at least one sample")
    try:
        value, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except json.JSONDecodeError as error:
        if file.suffix == ".jsonl":
            yield from _lines(text, file)  # names the broken line itself
        raise UserError(f"{file} line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
    if text[end:].strip():
        yield from _lines(text, file)
    elif isinstance(value, dict) and "samples" not in value and not value.keys().isdisjoint(SAMPLE_KEYS):
        yield Record(value, file, "line 1")
    elif isinstance(value, list):
        yield from _listed(value, file, "record")
    else:
        yield from _listed(_samples(value, file), file, "samples")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte order mark, as Windows editors write it, is no mistake
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {line} is not UTF-8 (byte {error.start}): convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _lines(text: str, file: Path) -> Iterator[Record]:
    # Not splitlines(): it also splits at U+2028 and others that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} {place}: not JSON ({error.msg}, column {error.colno})") from error
        yield _record(value, file, place)


def _listed(values: Any, file: Path, name: str) -> Iterator[Record]:
    if not isinstance(values, list):
        raise UserError(f"{file}: '{name}' is {show(values)}: it must be a list")
    for index, value in enumerate(values):
        yield _record(value, file, f"{name}[{index}]")


def _samples(value: Any, file: Path) -> Any:
    if isinstance(value, dict) and "samples" in value:
        return value["samples"]
    keys = f"it has the keys {', '.join(value)}" if isinstance(value, dict) and value else f"it holds {show(value)}"
    raise UserError(f"{file} has no 'samples' ({keys}): metadata.json needs a list of samples under that key")


def _record(value: Any, file: Path, place: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{file} {place} is {show(value)}: it must be an object")
    record = Record(value, file, place)
    if value.keys().isdisjoint(SAMPLE_KEYS):
        record.fail(
            f"none of 'messages', 'audio_file' and 'text' (it has the keys {', '.join(value) or 'none'}): this is no "
            "sample"
        )
    return record


def _identity(record: Record, seen: dict[str, str], repeated: Counter[str]) -> str:
    """Return the id that a record gives itself; else its clip's name, or its place in the file."""
    given = next((record.values[key] for key in ("id", "audio_id") if record.values.get(key) not in (None, "")), None)
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
