"""The layout of train-higgs-audio: a `metadata.json` with `samples` of a clip and its transcript.

Each sample becomes the turns of one of four tasks. Nothing is invented: a reference without a transcript is an error,
and only the sample's own words describe speakers. The family adds the system turn.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.keys import CLIP, REFERENCE, KeyCheck, clip_path
from rawloop.data.record import Files, Record, quoted, show
from rawloop.errors import UserError, nearest
from rawloop.files import read_text

SINGLE, CLONING = "single_speaker_smart_voice", "zero_shot_voice_cloning"
MULTI, MULTI_CLONING = "multi_speaker_smart_voice", "multi_speaker_voice_cloning"
TASKS = (SINGLE, CLONING, MULTI, MULTI_CLONING)
TAG = re.compile(r"\[(SPEAKER\d+)\]")
SPEAKER = re.compile(r"\[?(SPEAKER\d+)\]?")
# The base model was trained with an article in the sentence of this scene.
SCENES = {"quiet_room": "a quiet room"}
NO_SCENE = ("unknown", "none", "n/a")  # from tools that do not know the scene
NO_TASK = ("audio_generation", "text_to_speech", "tts")  # from tools with a single task
TEXT_KEYS = ("transcript", "text")  # they have precedence over `transcript_file`
REFERENCE_AUDIO, REFERENCE_TEXT = ("ref_audio_file", "ref_audio"), ("ref_transcript", "ref_text")
MARKER = "<audio>"  # ms-swift's marker of a clip, which converters leave before the words


@dataclass(frozen=True)
class Reference:
    """A reference clip with its transcript, which a scene does not need. `speaker` is like `SPEAKER0`, or None."""

    audio: Path
    text: str | None
    speaker: str | None = None


@dataclass
class MetadataReader:
    """Turns records of a metadata.json into samples."""

    config: DataConfig
    files: Files
    keys: KeyCheck

    def __post_init__(self) -> None:
        if self.config.task is not None and self.config.task not in TASKS:
            raise UserError(f"data.task is {_unknown_task(self.config.task)}")

    def sample(self, record: Record, identity: str) -> Sample:
        """Return the sample of a record."""
        self.keys.check(record, record.values, CLIP)
        audio = record.text("audio_file")
        if audio is None:
            record.fail("'audio_file' is missing or empty: name the clip that speaks the transcript")
        text = self._unmarked(_transcript(record, self.files), record)
        task = self.config.task or _task(record, text)
        references = self._references(record, task, text)
        in_scene = references if self.config.refs_in_scene else []
        turns = list(self._scene(record, in_scene))
        for reference in [] if in_scene else references:
            turns += _pair(reference)
        turns.append(Turn("user", (Text(text),)))
        clip = clip_path(record, record.values, self.files.resolve(audio, record), "")
        turns.append(Turn("assistant", (Audio(clip),), trained=True))
        return Sample(identity, tuple(turns), task, record.source, record.without(CLIP.read))

    def _unmarked(self, text: str, record: Record) -> str:
        """Return the words without the marker before them, which only says that the sample has a clip."""
        if MARKER not in text:
            return text
        words = text.removeprefix(MARKER).strip()
        if not words or MARKER in words:
            record.fail(f"the transcript {show(text)} has the marker {MARKER} among or without words: take it out")
        self.keys.markers += 1
        return words

    def _references(self, record: Record, task: str, text: str) -> list[Reference]:
        if task == CLONING:
            if self.config.references == "drawn" and record.text(*REFERENCE_AUDIO) is None:
                return []
            return [self._reference(record, "SPEAKER0" if self.config.refs_in_scene else None)]
        if task == MULTI_CLONING:
            return self._speaker_references(record, text)
        if task == MULTI and len(set(TAG.findall(text))) < 2:
            record.fail(f"task {MULTI} needs a transcript with two or more [SPEAKERn] tags: {show(text)}")
        return []

    def _reference(self, part: Record, speaker: str | None) -> Reference:
        audio, text = part.text(*REFERENCE_AUDIO), part.words(*REFERENCE_TEXT)
        if audio is None:
            part.fail("'ref_audio_file' is missing or empty: voice cloning needs the reference clip")
        if text is None and not self.config.refs_in_scene:
            part.fail(
                "'ref_transcript' is missing or empty: voice cloning needs the words of the reference clip, or "
                "--data.refs_in_scene true, which puts the clip into the scene without them"
            )
        return Reference(self.files.resolve(audio, part), text, speaker)

    def _speaker_references(self, record: Record, text: str) -> list[Reference]:
        speakers = record.values.get("ref_speakers")
        if not isinstance(speakers, list) or not speakers:
            record.fail(f"task {MULTI_CLONING} needs 'ref_speakers', a list of references: got {show(speakers)}")
        references: dict[str, Reference] = {}
        for index, values in enumerate(speakers):
            if not isinstance(values, dict):
                record.fail(f"ref_speakers[{index}] is {show(values)}: it must be an object")
            part = Record(values, record.file, f"{record.place} ref_speakers[{index}]")
            self.keys.check(part, values, REFERENCE)
            speaker = _speaker(part.text("speaker_tag"), part, "speaker_tag")
            if speaker in references:
                part.fail(f"'speaker_tag' is [{speaker}] a second time: give every speaker one reference")
            reference = self._reference(part, speaker)
            references[speaker] = replace(reference, audio=clip_path(part, values, reference.audio, ""))
        unknown = sorted(set(TAG.findall(text)) - set(references))
        if unknown:
            record.fail(f"the transcript speaks as [{unknown[0]}], which 'ref_speakers' has no reference for")
        return list(references.values())

    def _scene(self, record: Record, references: list[Reference]) -> list[Turn]:
        """Return the turn of the scene, or no turn if the scene is empty."""
        scene, voices = record.words("scene"), _speakers(record)
        named = scene is not None and scene.casefold() not in NO_SCENE
        sentence = scene_sentence(scene) if scene and named else self.config.default_scene
        if not (voices or references):
            return [_scene_turn(sentence)] if sentence else []
        parts: list[Text | Audio] = [Text(sentence)] if sentence else []
        heard = {reference.speaker for reference in references}
        parts += [Text(f"{name}: {voice}") for name, voice in voices.items() if name not in heard]
        for reference in references:
            parts += [Text(f"{reference.speaker}:"), Audio(reference.audio)]
        return [Turn("scene", tuple(parts))] if parts else []


@lru_cache
def _scene_turn(sentence: str) -> Turn:
    return Turn("scene", (Text(sentence),))  # cached, as most samples of a data set share it


def scene_sentence(scene: str) -> str:
    """Return a scene as a sentence: a key such as `noisy_street` becomes `Audio is recorded from noisy street.`

    Only `quiet_room` gets an article, as the base model was trained with it. A value with a space is a sentence and is
    returned unchanged.
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
        file = files.resolve(name, record)
        files.looked_up[str(file)] = None
        text = read_text(file).strip()
    except UnicodeDecodeError as error:
        record.fail(f"transcript_file {quoted(name)} is not UTF-8 (byte {error.start}): convert it to UTF-8")
    except OSError as error:
        record.fail(f"transcript_file {quoted(name)} cannot be read: {error.strerror}")
    if not text:
        record.fail(f"transcript_file {quoted(name)} is empty: write the words that the clip speaks into it")
    return text


def _task(record: Record, text: str) -> str:
    for key in ("task", "task_type"):
        task = record.text(key)
        if task is None or task in NO_TASK:
            continue
        if task not in TASKS:
            record.fail(f"'{key}' is {_unknown_task(task)}, or --data.task must name one for all samples")
        if task in (SINGLE, MULTI) and (record.values.get("ref_speakers") or record.text(*REFERENCE_AUDIO)):
            record.fail(f"'{key}' is '{task}', which takes no reference clip: take the reference out, or the task")
        return task
    if record.values.get("ref_speakers"):
        return MULTI_CLONING
    if record.text(*REFERENCE_AUDIO):
        return CLONING
    if record.text(*REFERENCE_TEXT):
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
    text = reference.text or ""
    if reference.speaker and not text.startswith(tag):
        text = f"{tag} {text}"
    return [Turn("user", (Text(text),)), Turn("assistant", (Audio(reference.audio),))]
