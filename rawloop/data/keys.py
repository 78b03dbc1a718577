"""The keys of a data file: which are read, which are ignored, and which are refused.

Ignoring a refused key would change the training. Keys in none of the lists are counted, and the counts are printed
once. A misspelling of a key that is read is an error.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rawloop.audio import ROUNDED, Segment
from rawloop.data.record import Record, show

TYPO = 0.88  # an unknown key at least this similar to a known one is a misspelling: 'start_indx' has 0.95
EMPTY: tuple[object, ...] = (None, "", [], {})
SWITCHES = ("prefix", "continue_final_message")  # clients write them into every message; false is harmless
NO_IMAGES = "no family of rawloop sees images or videos: leave these samples out"
RENAME_REFERENCE = "call a reference clip 'ref_audio_file' and its words 'ref_transcript'"
BY_TEMPLATE = "it would change what the chat template writes, and is not supported: take it out"


@dataclass(frozen=True)
class Kind:
    """The keys of one kind of object: those read, those ignored, and those refused, with the fix."""

    name: str
    read: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def known(self) -> frozenset[str]:
        """All keys that are read or ignored."""
        return self.read | self.harmless


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _fix(fix: str, keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), fix)


ABOUT = _words(  # descriptions in published data sets
    """
    speaker speaker_id speaker_name speaker_ids speaker_gender lang language language_id locale gender sex age
    accent accents dialect emotion style tone sampling_rate sample_rate num_samples n_samples channels duration_ms
    dataset dataset_name dataset_info source sources quality_score score scores rating snr wer cer mos dnsmos pesq
    original_audio_path original_path user_instruction misc meta metadata license url topic category domain tags title
    timestamp created_at model model_name model_id conversation_id prompt_id chapter_id book_id segment_id session_id
    index idx up_votes down_votes client_id sentence_id parallel_tool_calls
    """
)
MARKS = _words("loss train weight loss_scale")  # whether a message or record is trained
SEGMENT = _words("offset duration start end start_time end_time")
TIMES = SEGMENT - {"duration"}
LONGEST = 1e6  # seconds
IDENTITY = _words("id audio_id")
IMAGES = _fix(NO_IMAGES, "image images video videos image_url objects bbox pixel_values")
TEMPLATE = _fix(
    BY_TEMPLATE,
    "chat_template chat_template_kwargs enable_thinking thinking_budget documents continue_final_message prefix",
)
OTHER_TURNS = _fix(
    "only 'messages' is read: put this turn into it, or take the key out",
    "history query response instruction completion",
)
FUNCTIONS = {
    "functions": 'write "tools": [{"type": "function", "function": {...}}]',
    "function_call": 'write "tool_calls": [{"type": "function", "function": {...}}]',
}
OTHER_REFERENCES = _fix(
    RENAME_REFERENCE,
    "prompt_audio prompt_text prompt_wav prompt_speech reference_audio reference_text ref_wav ref_wav_text "
    "reference_audio_file reference_transcript ref_audio_path",
) | _fix("cut this part of the reference clip out, into a file of its own", "ref_offset ref_duration")
OTHER_CLIPS = _fix(
    "call the clip that is learnt 'audio_file'", "audio audio_path audio_filepath audio_filename wav wav_path"
)

CHAT = Kind(
    "record",
    IDENTITY | MARKS | _words("messages audios start_index system tools"),
    ABOUT | _words("duration text prompt"),
    IMAGES
    | TEMPLATE
    | OTHER_TURNS
    | FUNCTIONS
    | OTHER_REFERENCES
    | dict.fromkeys(TIMES, "put the times of a segment into its audio part, beside 'path'")
    | dict.fromkeys(
        (*OTHER_CLIPS, "audio_file", "ref_audio", "ref_audio_file"),
        "a record with 'messages' names its clips there or in 'audios'",
    ),
)
CLIP = Kind(
    "record",
    IDENTITY
    | MARKS
    | SEGMENT
    | _words("audio_file transcript text transcript_file task task_type scene speakers ref_speakers")
    | _words("ref_audio_file ref_audio ref_transcript ref_text"),
    ABOUT,
    IMAGES | OTHER_REFERENCES | {"system": "the model's system text is fixed: use 'scene'"},
)
REFERENCE = Kind("reference", SEGMENT | _words("speaker_tag ref_audio_file ref_audio ref_transcript ref_text"), ABOUT)
PLAIN = Kind(
    "record",
    IDENTITY | MARKS | {"text"},
    ABOUT | {"duration"},
    IMAGES | OTHER_CLIPS | _fix("it belongs to a chat: give 'messages' for 'text'", "tools system audios"),
)
FIELDS = _words("tool_calls reasoning_content reasoning thinking name tool_call_id")  # for the chat template
MESSAGE = Kind(
    "message",
    MARKS | FIELDS | _words("role content"),
    ABOUT | _words("id refusal annotations num_tokens tokens"),
    IMAGES
    | FUNCTIONS
    | _fix("recipients of a turn are not supported: write a tool call as 'tool_calls'", "recipient")
    | _fix(BY_TEMPLATE, "prefix")
    | _fix("put it into 'content', as a part of type audio", "audio")
    | _fix("put it into 'content', as a part of type audio, or beside 'messages'", "audios")
    | _fix("the words of a message belong in 'content'", "text value"),
)
TEXT_PART = Kind("part", _words("type text"), ABOUT | _words("id cache_control annotations"), IMAGES)
AUDIO_PART = Kind(
    "part",
    SEGMENT | _words("type path audio url audio_url"),
    ABOUT | _words("id cache_control row_id format"),
    IMAGES
    | _fix("audio inside the data file is not read: write it to a file and name it by 'path'", "raw_audio array bytes")
    | _fix("a clip's words belong in a part of type text", "text transcript"),
)
METADATA_FILE = Kind(
    "file",
    _words("samples"),
    ABOUT | _words("version info name description"),
    _fix(
        "beside 'samples' nothing reads it: write it into the samples",
        "task task_type scene speakers ref_audio_file ref_transcript ref_speakers transcript",
    ),
)


@dataclass
class KeyCheck:
    """Checks the keys of the objects of a data file, and counts those that are in none of the lists.

    Args:
        strict: refuse an unknown key instead of counting it (`data.strict`).
    """

    strict: bool = False
    unknown: Counter[str] = field(default_factory=Counter)
    markers: int = 0  # transcripts that had a marker before them

    def check(self, record: Record, values: Mapping[str, Any], kind: Kind, place: str = "") -> None:
        """Refuse or count keys of `values`, which are in `record` at `place`."""
        if values.keys() <= kind.known:
            return
        where = f"{place}: " if place else ""
        for key in values:
            if key in kind.known or values[key] in EMPTY or (key in SWITCHES and values[key] is False):
                continue
            if key in kind.refused:
                record.fail(f"{where}'{key}' is {show(values[key])}: {kind.refused[key]}")
            near = _misspelt(key, kind.read)
            if near:
                record.fail(f"{where}'{key}' is no key (did you mean '{near[0]}'?): rename it, or take it out")
            if self.strict:
                record.fail(
                    f"{where}'{key}' is no key of a {kind.name} that is known, and data.strict is true: take it out, "
                    "or set data.strict to false"
                )
            self.unknown[key if kind.name == "record" else f"{key} (of a {kind.name})"] += 1

    def notices(self, file: object) -> Iterator[str]:
        """Yield a line about unknown keys, and a line about markers."""
        if self.unknown:
            counts = ", ".join(f"'{key}' {count} times" for key, count in self.unknown.most_common())
            yield f"{file}: keys that nothing reads: {counts} (data.strict: true refuses them)"
        if self.markers:
            yield f"{file}: {self.markers} transcripts start with <audio>, the marker of a clip, which is left out"


def trained_mark(record: Record, values: Mapping[str, Any], place: str) -> bool | None:
    """Return whether an object is marked as trained (`loss`, `train`, `weight`, `loss_scale`); None without a mark."""
    marked: dict[bool, str] = {}
    for key in sorted(MARKS & values.keys()):
        value = values[key]
        if value is None:
            continue
        if key in ("loss", "train") and not isinstance(value, bool):
            record.fail(f"{place}'{key}' is {show(value)}: it must be true or false")
        if not isinstance(value, int | float) or value not in (0, 1):
            record.fail(f"{place}'{key}' is {show(value)}: 0 (not trained) or 1 (trained); weights are not supported")
        marked[bool(value)] = key
    if len(marked) > 1:
        record.fail(f"{place}'{marked[True]}' says that it is trained, '{marked[False]}' that it is not: take one out")
    return next(iter(marked), None)


def clip_path(record: Record, values: Mapping[str, Any], file: Path, place: str) -> Path:
    """Return `file`, or its segment given by `offset` and `duration`, or by `start` and `end`.

    A `duration` alone describes the whole clip and is ignored.
    """
    if values.keys().isdisjoint(TIMES):
        return file
    start = _seconds(record, values, place, ("offset", "start", "start_time"))
    end = _seconds(record, values, place, ("end", "end_time"))
    duration = _seconds(record, values, place, ("duration",)) if start is not None else None
    if start is None and end is None:
        return file
    start = start or 0.0
    if duration is not None and end is not None and abs(start + duration - end) > ROUNDED:
        record.fail(
            f"{place}a segment from {start:g} s ends at {end:g} s and has a duration of {duration:g} s: mend it"
        )
    if end is None and duration is not None:
        end = start + duration
    if end is not None and end <= start:
        record.fail(f"{place}a segment from {start:g} s to {end:g} s has nothing in it: mend its times")
    return Segment(file, start, end).path()


def _seconds(record: Record, values: Mapping[str, Any], place: str, keys: tuple[str, ...]) -> float | None:
    found: dict[float, str] = {}
    for key in keys:
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LONGEST:
            record.fail(f"{place}'{key}' is {show(value)}: it must be a number of seconds, from 0 on")
        found[float(value)] = key
    return record.only(found, place)


@lru_cache(maxsize=1024)
def _misspelt(key: str, known: frozenset[str]) -> list[str]:
    swapped = [name for name in known if name[0] == key[:1] and sorted(name) == sorted(key)]  # 'wieght' is at 0.83
    return swapped or get_close_matches(key, known, n=1, cutoff=TYPO)
