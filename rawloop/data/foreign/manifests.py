"""The manifests of NeMo and of Lhotse: recordings by path, and segments of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rawloop.data.foreign.entries import (
    NO_CLIP,
    Entry,
    Found,
    Unusable,
    each,
    json_lines,
    name_of,
    transcript,
    without_nulls,
)
from rawloop.data.record import show
from rawloop.errors import UserError

WHOLE = 1e-3  # seconds by which a segment may be shorter than a recording that it covers
SPEAKERS = ("speaker", "speaker_id", "spk_id")
LANGUAGES = ("lang", "language", "target_lang")
WRONG = "times or channels that are no numbers"


def read_nemo(file: Path) -> Iterator[Found]:
    """Yield the clips of a NeMo manifest. An `offset` selects a segment of the file."""
    return each(json_lines(file), _nemo)


def _nemo(place: str, row: dict[str, Any]) -> list[Entry]:
    audio = name_of(row.get("audio_filepath"))
    if audio is None:
        raise Unusable(NO_CLIP)
    times = {key: row[key] for key in ("offset", "duration") if row.get(key) is not None} if "offset" in row else {}
    times = times if "offset" in times else {}  # a duration alone describes the whole file
    default = audio + "".join(f" {key} {value}" for key, value in times.items())
    identity = next(filter(None, (name_of(row.get(key)) for key in ("id", "utt_id", "utterance_id"))), default)
    speaker = next(filter(None, (name_of(row.get(key)) for key in SPEAKERS)), None)
    language = next(filter(None, (name_of(row.get(key)) for key in LANGUAGES)), None)
    values = without_nulls(transcript=transcript(row.get("text")), language=language)
    return [Entry(place, identity, {**times, **values}, audio, speaker)]


def read_cuts(file: Path) -> Iterator[Found]:
    """Yield the supervisions of Lhotse's cuts."""
    return each(json_lines(file), _cut)


def read_supervisions(supervisions: Path, recordings: Path) -> Iterator[Found]:
    """Yield the supervisions of Lhotse's manifest, whose recordings are in another.

    Raises:
        UserError: the manifest of recordings has a line that cannot be read.
    """
    known: dict[str, Any] = {}
    for place, row in json_lines(recordings):
        if isinstance(row, Unusable):
            raise UserError(f"{recordings.parent / place}: {row.detail}: mend the line or take it out")
        known[str(row.get("id"))] = row

    def make(place: str, row: dict[str, Any]) -> list[Entry]:
        recording = known.get(str(row.get("recording_id")))
        if recording is None:
            raise Unusable("no such recording", f"{show(row.get('recording_id'))} is not in {recordings.name}")
        return [_supervision(place, row, recording, 0.0)]

    return each(json_lines(supervisions), make)


def _cut(place: str, row: dict[str, Any]) -> Iterator[Entry]:
    if row.get("type") not in ("MonoCut", "MultiCut", "Cut") or not isinstance(row.get("recording"), dict):
        raise Unusable("a cut without a recording of its own", f"it is of type {show(row.get('type'))}")
    supervisions = row.get("supervisions")
    if not isinstance(supervisions, list) or not supervisions:
        raise Unusable("a cut without supervisions")
    start = _number(row, "start")
    return (_supervision(place, one, row["recording"], start) for one in supervisions)


def _supervision(place: str, row: Any, recording: dict[str, Any], cut_start: float) -> Entry:
    """Return the clip of a supervision, whose times count from `cut_start` seconds of its recording."""
    if not isinstance(row, dict):
        raise Unusable("a supervision that is no object", show(row))
    start, duration = cut_start + _number(row, "start"), _number(row, "duration")
    if start < 0 and start > -WHOLE:
        start = 0.0
    _check_channels(row, recording)
    whole = start == 0 and duration >= _number(recording, "duration") - WHOLE
    times = {} if whole else {"offset": round(start, 6), "duration": round(duration, 6)}
    values = without_nulls(transcript=transcript(row.get("text")), language=name_of(row.get("language")))
    identity = name_of(row.get("id")) or place
    return Entry(place, identity, {**times, **values}, _file(recording), name_of(row.get("speaker")))


def _number(row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(WRONG, f"'{key}' is {show(value)}")
    return float(value)


def _file(recording: dict[str, Any]) -> str:
    """Return the path of a recording. Raises Unusable if it is no single file, or is to be changed when it is read."""
    sources = recording.get("sources")
    if recording.get("transforms"):
        raise Unusable("a recording with transforms", "its audio is changed when Lhotse reads it: save the audio first")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise Unusable("a recording that is not one file", show(sources))
    kind, source = sources[0].get("type"), sources[0].get("source")
    if kind != "file" or not isinstance(source, str) or not source:
        raise Unusable("a recording that is no file", f"its source is of type {show(kind)}")
    return source


def _check_channels(row: dict[str, Any], recording: dict[str, Any]) -> None:
    """Refuse a supervision of some channels of a recording: rawloop mixes all of them."""
    ids = recording.get("channel_ids") or next((s.get("channels") for s in recording.get("sources") or [{}]), None)
    channel = row.get("channel", 0)
    spoken = channel if isinstance(channel, list) else [channel]
    if isinstance(ids, list) and not set(map(str, ids)) <= set(map(str, spoken)):
        detail = f"it speaks on channel {show(channel)} of {ids}, and all channels are mixed: split the file"
        raise Unusable("one channel of several", detail)
