"""The layout of train-higgs-audio: a `metadata.json` whose `samples` pair a clip with its transcript.

Each sample becomes the turns of one of four tasks. Nothing is made up: a reference without a transcript is an error,
and speakers are described only in the sample's own words. The system turn belongs to the model family.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.record import Files, Record, show
from rawloop.errors import UserError, nearest

SINGLE, CLONING = "single_speaker_smart_voice", "zero_shot_voice_cloning"
MULTI, MULTI_CLONING = "multi_speaker_smart_voice", "multi_speaker_voice_cloning"
TASKS = (SINGLE, CLONING, MULTI, MULTI_CLONING)
TAG = re.compile(r"\[(SPEAKER\d+)\]")
SPEAKER = re.compile(r"\[?(SPEAKER\d+)\]?")
# Published samples name the commonest scene by a key; the base model knows it by a sentence with an article.
SCENES = {"quiet_room": "a quiet room"}
TEXT_KEYS = ("transcript", "text")  # the first one that is given counts, and before `transcript_file`
REFERENCE_KEYS = ("ref_audio_file", "ref_transcript", "ref_speakers")
READ = frozenset(
    (
        *TEXT_KEYS,
        *REFERENCE_KEYS,
        "id",
        "audio_id",
        "audio_file",
        "transcript_file",
        "task",
        "task_type",
        "scene",
        "speakers",
    )
)


@dataclass(frozen=True)
class Reference:
    """A reference clip with its transcript. `speaker` is `SPEAKER0` or the like, None for a single speaker."""

    audio: Path
    text: str
    speaker: str | None = None


@dataclass
class MetadataReader:
    """Turns records of a metadata.json into samples."""

    config: DataConfig
    files: Files
    _scenes: dict[str | None, list[Turn]] = field(default_factory=dict)  # most samples of a data set share one

    def __post_init__(self) -> None:
        if self.config.task is not None and self.config.task not in TASKS:
            raise UserError(f"data.task is {_unknown_task(self.config.task)}")

    def sample(self, record: Record, identity: str) -> Sample:
        """Return the sample of a record.

        Raises:
            UserError: a key is missing, empty, of a wrong type, or does not fit the task.
        """
        audio = record.text("audio_file")
        if audio is None:
            record.fail("'audio_file' is missing or empty: name the clip that speaks the transcript")
        text = _transcript(record, self.files)
        task = self.config.task or _task(record, text)
        references = self._references(record, task, text)
        in_scene = references if task == MULTI_CLONING and self.config.refs_in_scene else []
        turns = list(self._scene(record, in_scene))
        for reference in [] if in_scene else references:
            turns += _pair(reference)
        turns.append(Turn("user", (Text(text),)))
        turns.append(Turn("assistant", (Audio(self.files.resolve(audio, record)),), trained=True))
        source = f"{record.file.name} {record.place}"
        return Sample(identity, tuple(turns), task, source, record.without(READ))

    def _references(self, record: Record, task: str, text: str) -> list[Reference]:
        if task == CLONING:
            return [self._reference(record, record, None)]
        if task == MULTI_CLONING:
            return self._speaker_references(record, text)
        if task == MULTI and len(set(TAG.findall(text))) < 2:
            record.fail(f"task {MULTI} needs a transcript with two or more [SPEAKERn] tags: {show(text)}")
        return []

    def _reference(self, record: Record, part: Record, speaker: str | None) -> Reference:
        audio, text = part.text("ref_audio_file"), part.words("ref_transcript")
        if audio is None or text is None:
            missing = "ref_audio_file" if audio is None else "ref_transcript"
            part.fail(f"'{missing}' is missing or empty: voice cloning needs the reference clip and its words")
        return Reference(self.files.resolve(audio, record), text, speaker)

    def _speaker_references(self, record: Record, text: str) -> list[Reference]:
        speakers = record.values.get("ref_speakers")
        if not isinstance(speakers, list) or not speakers:
            record.fail(f"task {MULTI_CLONING} needs 'ref_speakers', a list of references: got {show(speakers)}")
        references: dict[str, Reference] = {}
        for index, values in enumerate(speakers):
            if not isinstance(values, dict):
                record.fail(f"ref_speakers[{index}] is {show(values)}: it must be an object")
            part = Record(values, record.file, f"{record.place} ref_speakers[{index}]")
            speaker = _speaker(part.text("speaker_tag"), part, "speaker_tag")
            if speaker in references:
                part.fail(f"'speaker_tag' is [{speaker}] a second time: give every speaker one reference")
            references[speaker] = self._reference(record, part, speaker)
        unknown = sorted(set(TAG.findall(text)) - set(references))
        if unknown:
            record.fail(f"the transcript speaks as [{unknown[0]}], which 'ref_speakers' has no reference for")
        return list(references.values())

    def _scene(self, record: Record, references: list[Reference]) -> list[Turn]:
        scene, voices = record.words("scene"), _speakers(record)
        if voices or references:
            return self._scene_turn(scene, voices, references)
        if scene not in self._scenes:
            self._scenes[scene] = self._scene_turn(scene, {}, [])
        return self._scenes[scene]

    def _scene_turn(self, scene: str | None, voices: dict[str, str], references: list[Reference]) -> list[Turn]:
        """Return the scene's turn, or nothing where there is nothing to say."""
        sentence = self.config.default_scene if scene is None else scene_sentence(scene)
        parts: list[Text | Audio] = [Text(sentence)] if sentence else []
        heard = {reference.speaker for reference in references}
        parts += [Text(f"{name}: {voice}") for name, voice in voices.items() if name not in heard]
        for reference in references:
            parts += [Text(f"{reference.speaker}:"), Audio(reference.audio)]
        return [Turn("scene", tuple(parts))] if parts else []


def scene_sentence(scene: str) -> str:
    """Return a scene as a sentence: a key such as `noisy_street` becomes `Audio is recorded from noisy street.`

    No article is added, except for `quiet_room`, which becomes the sentence that the base model was trained with. A
    value with a space in it is taken as a sentence and kept.
    """
    if any(character.isspace() for character in scene):
        return scene
    return f"Audio is recorded from {SCENES.get(scene, scene.replace('_', ' '))}."


def _transcript(record: Record, files: Files) -> str:
    text = record.words(*TEXT_KEYS)
    if text is not None:
        return text
    name = record.text("transcript_file")
    if name is None:
        record.fail("the transcript is missing or empty: give 'transcript' or 'transcript_file'")
    try:
        text = files.resolve(name, record).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        record.fail(f"transcript_file '{name}' is not UTF-8 (byte {error.start}): convert it to UTF-8")
    except OSError as error:
        record.fail(f"transcript_file '{name}' cannot be read: {error.strerror}")
    if not text:
        record.fail(f"transcript_file '{name}' is empty: write the words that the clip speaks into it")
    return text


def _task(record: Record, text: str) -> str:
    task = record.text("task", "task_type")
    if task is not None:
        if task not in TASKS:
            record.fail(f"'task' is {_unknown_task(task)}")
        return task
    if record.values.get("ref_speakers"):
        return MULTI_CLONING
    if record.text("ref_audio_file"):
        return CLONING
    if record.text("ref_transcript"):
        record.fail("'ref_transcript' is given without 'ref_audio_file': add the clip, or remove the words")
    return MULTI if len(set(TAG.findall(text))) > 1 else SINGLE


def _unknown_task(task: str) -> str:
    return f"'{task}', which is no task{nearest(task, TASKS)}: it must be one of {', '.join(TASKS)}"


def _speakers(record: Record) -> dict[str, str]:
    speakers: Any = record.values.get("speakers") or {}
    if not isinstance(speakers, dict):
        record.fail(f'\'speakers\' is {show(speakers)}: it must be an object such as {{"SPEAKER0": "feminine"}}')
    described = {}
    for name, voice in speakers.items():
        if not isinstance(voice, str) or not voice.strip():
            record.fail(f"'speakers' describes {name} as {show(voice)}: it must be a string such as 'feminine'")
        described[_speaker(name, record, "speakers")] = record.speakable(voice.strip())
    return described


def _speaker(name: str | None, record: Record, key: str) -> str:
    found = SPEAKER.fullmatch(name or "")
    if found is None:
        record.fail(f"'{key}' has {show(name)}: a speaker is called SPEAKER0 or [SPEAKER0], with a number")
    return found[1]


def _pair(reference: Reference) -> list[Turn]:
    tag = f"[{reference.speaker}]"
    text = reference.text
    if reference.speaker and not text.startswith(tag):
        text = f"{tag} {text}"
    return [Turn("user", (Text(text),)), Turn("assistant", (Audio(reference.audio),))]
