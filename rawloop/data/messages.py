"""Chat messages as JSON records: HF style content lists, boson's ChatML samples, and ms-swift's `audios`.

A record is a conversation, and its turns are kept, including a system turn. `data.train_turns` says which of the
assistant's turns are trained. Speech samples of other trainers become conversations for a speech model: the user gives
the words, the assistant's clip speaks them, and a reference clip is a separate turn or part of the scene. Nothing is
invented: a clip without words is left unchanged, and the family refuses it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.keys import AUDIO_PART, CHAT, FIELDS, MARKS, MESSAGE, TEXT_PART, KeyCheck, clip_path, trained_mark
from rawloop.data.metadata import MARKER, MULTI, SINGLE
from rawloop.data.record import Files, Record, parse_json, show
from rawloop.errors import nearest

ROLES = ("system", "scene", "user", "assistant", "tool")
OTHER_ROLES = {
    "human": " (it is called 'user' here)",
    **dict.fromkeys(("gpt", "bot", "model", "chatbot", "ai"), " (it is called 'assistant' here)"),
    **dict.fromkeys(("function", "observation", "tool_response", "ipython"), " (it is called 'tool' here)"),
    "developer": " (it is called 'system' here)",
    "tool_call": " (put a call into the 'tool_calls' of an assistant message)",
}
AUDIO_KEYS = ("path", "audio", "url", "audio_url")
SCENE = re.compile(r"(.*?)\s*<\|scene_desc_start\|>(.*)<\|scene_desc_end\|>\s*", re.DOTALL)
CLIP = "\0"  # a placeholder for a clip in a text
Turns = tuple[Turn, ...]


@dataclass
class MessagesReader:
    """Turns records with `messages` into samples."""

    config: DataConfig
    files: Files
    keys: KeyCheck

    def sample(self, record: Record, identity: str) -> Sample:
        """Return the sample of a record."""
        self.keys.check(record, record.values, CHAT)
        messages = _messages(record)
        for index, message in enumerate(messages):
            self.keys.check(record, message, MESSAGE, f"messages[{index}]")
        contents = [list(self._parts(message, record, f"messages[{index}]")) for index, message in enumerate(messages)]
        audios, markers = _audios(record), sum(content.count(None) for content in contents)
        if markers != len(audios):
            record.fail(f"{markers} {MARKER} marker(s) for {len(audios)} file(s) in 'audios': give one marker per file")
        clips = (Audio(self.files.resolve(path, record)) for path in audios)
        trained = _trained(record, messages, self.config.train_turns == "all")
        turns: Turns = ()
        for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
            parts = tuple(next(clips) if part is None else part for part in content)
            turns += (Turn(message["role"], parts, index in trained, _fields(message, record, index)),)
        for index, turn in enumerate(turns):
            blank = not turn.clips and not turn.words.strip()
            if turn.trained and blank and "tool_calls" not in turn.fields:
                record.fail(f"messages[{index}] is trained and has only blanks: write it, or remove the sample")
        turns = self._as_speech(_with_system(turns, record))
        return Sample(identity, turns, None, record.source, record.without(CHAT.read), _tools(record))

    def _as_speech(self, turns: Turns) -> Turns:
        if not any(turn.clips for turn in turns):
            return turns
        turns = scene_from_system(words_before_clip(turns, self.config.task in (SINGLE, MULTI)))
        turns = clips_into_scene(turns, self.config.default_scene) if self.config.refs_in_scene else turns
        return with_default_scene(turns, self.config.default_scene)

    def _parts(self, message: dict[str, Any], record: Record, place: str) -> Iterator[Text | Audio | None]:
        """Yield the parts of a message, with None for each marker of a clip."""
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            return
        items = [content] if isinstance(content, dict | str) else content
        if not isinstance(items, list) or not items:
            record.fail(f"{place} has content {show(content)}: it must be a string or a list of parts")
        for item in items:
            kind = item.get("type") if isinstance(item, dict) else None
            if isinstance(item, str):
                yield from _marked(record.speakable(item))
            elif kind == "text" and isinstance(item.get("text"), str):
                self.keys.check(record, item, TEXT_PART, f"{place}, part text")
                yield from _marked(record.speakable(item["text"]))
            elif kind == "audio":
                self.keys.check(record, item, AUDIO_PART, f"{place}, part audio")
                file = self.files.resolve(_path(item, record, place), record)
                yield Audio(clip_path(record, item, file, f"{place}: "))
            else:
                record.fail(
                    f'{place} has the part {show(item)}: parts are {{"type": "text", "text": ...}} '
                    'or {"type": "audio", "path": ...}'
                )


def _marked(content: str) -> Iterator[Text | None]:
    for number, text in enumerate(content.split(MARKER)):
        if number:
            yield None
        if text:
            yield Text(text)


def _path(item: dict[str, Any], record: Record, place: str) -> str:
    given: dict[str, str] = {item[key]: key for key in AUDIO_KEYS if isinstance(item.get(key), str) and item[key]}
    path = record.only(given, f"{place} has an audio part in which ")
    if path is None or not all(isinstance(item.get(key) or "", str) for key in AUDIO_KEYS):
        record.fail(f"{place} has an audio part without a path: {show(item)}: add 'path' with a string")
    return path


def _messages(record: Record) -> list[dict[str, Any]]:
    messages = record.values.get("messages")
    if not isinstance(messages, list) or not messages:
        record.fail(f"'messages' is {show(messages)}: it must be a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            record.fail(f"messages[{index}] is {show(message)}: it must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            hint = OTHER_ROLES.get(role) or nearest(role, ROLES) if isinstance(role, str) else ""
            if role is None and "from" in message:
                record.fail(f"messages[{index}] is ShareGPT's: call 'from' 'role' and 'value' 'content'")
            record.fail(f"messages[{index}] has role {show(role)}{hint}: it must be one of {', '.join(ROLES)}")
        if message.get("content") == "" and role not in ("system", "tool") and not message.get("tool_calls"):
            record.fail(f"messages[{index}] ({role}) has empty content: write it, or remove the sample")
    return messages


def _with_system(turns: Turns, record: Record) -> Turns:
    """Put the record's `system` text before the conversation."""
    system = record.words("system")
    if system is None:
        return turns
    if turns[0].role != "system":
        return (Turn("system", (Text(system),)), *turns)
    if turns[0].words.strip() != system:
        record.fail(f"'system' is {show(system)}, and messages[0] is another system turn: keep one of them")
    return turns


def _audios(record: Record) -> list[str]:
    audios = record.values.get("audios") or []
    paths = [audios] if isinstance(audios, str) else audios
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        record.fail(f"'audios' is {show(audios)}: it must be a list of paths")
    return paths


def _fields(message: dict[str, Any], record: Record, index: int) -> dict[str, Any]:
    """Return the other keys of a message for the chat template. Arguments of tool calls become objects."""
    fields = {key: message[key] for key in sorted(FIELDS & message.keys()) if message[key] not in (None, "", [])}
    if fields:
        record.speakable(json.dumps(fields, ensure_ascii=False))
    calls = fields.get("tool_calls")
    if calls is None:
        return fields
    place = f"messages[{index}]"
    if message["role"] != "assistant" or not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        record.fail(f"{place}: 'tool_calls' is {show(calls)}: it must be a list of objects in an assistant message")
    fields["tool_calls"] = [_call(call, record, place) for call in calls]
    return fields


def _call(call: dict[str, Any], record: Record, place: str) -> dict[str, Any]:
    """Return a tool call with an object as arguments: templates would quote the JSON text that OpenAI writes."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        record.fail(f"{place}: the tool call {show(call)} has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI writes "" for no arguments
        what = f"{place}: 'arguments' of {function['name']}"
        function = {**function, "arguments": _parsed(arguments, record, what) if arguments.strip() else {}}
    return {**call, "function": function} if "function" in call else function


def _parsed(text: str, record: Record, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        record.fail(f"{what} is {show(text)}, which is no JSON ({error}): mend it")


def _tools(record: Record) -> Sequence[dict[str, Any]]:
    tools = record.values.get("tools") or []
    if isinstance(tools, str):  # ms-swift and others write JSON text inside the JSON
        tools = _parsed(tools, record, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        record.fail(f"'tools' is {show(tools)}: it must be a list of functions, each an object")
    if tools:
        record.speakable(json.dumps(tools, ensure_ascii=False))
    return tools or ()


def _trained(record: Record, messages: list[dict[str, Any]], every: bool) -> set[int]:
    assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    start = record.values.get("start_index")
    if start is None:
        trained = set(assistants if every else assistants[-1:])
    elif isinstance(start, int) and not isinstance(start, bool):
        trained = {index for index in assistants if index >= start}
    else:
        record.fail(f"'start_index' is {show(start)}: it must be a whole number, the first message to train")
    for index, message in enumerate(messages):
        mark = trained_mark(record, message, f"messages[{index}]: ")
        if mark and index not in assistants:
            record.fail(
                f"messages[{index}] has role {message['role']} and is marked as trained: only assistant turns can be"
            )
        if mark is not None:
            (trained.add if mark else trained.discard)(index)
    if not trained:
        marks = [f"'{key}' of messages[{index}]" for index in assistants for key in MARKS if key in messages[index]]
        marks += ["'start_index'"] if start is not None else []
        ruled = f": {', '.join(sorted(marks))} rules it out" if assistants and marks else ""
        record.fail(f"no turn is trained{ruled}: a sample needs an assistant message to learn; else take it out")
    return trained


def words_before_clip(turns: Turns, recognition: bool = False) -> Turns:
    """Put the words of a conversation's only clip into the user turn, and the clip into the assistant turn.

    Without a user turn, the answer must be the clip and its words (`<audio>words` of ms-swift). With `recognition`, the
    clip may also be in the user turn and its words in the answer. The user's instruction is left out then, since it
    asks a model to listen. Other conversations are returned unchanged.
    """
    before = tuple(turn for turn in turns if turn.role in ("system", "scene"))
    said = [turn for turn in turns if turn not in before]
    clips = said[0].clips if said else []
    roles, words = [turn.role for turn in said], said[-1].words.strip() if said else ""
    reverse = recognition and roles == ["user", "assistant"] and clips == [c for turn in turns for c in turn.clips]
    if len(clips) != 1 or not words or not (roles == ["assistant"] or reverse):
        return turns
    return (*before, Turn("user", (Text(words),)), Turn("assistant", tuple(clips), said[-1].trained))


def scene_from_system(turns: Turns) -> Turns:
    """Move the scene out of a system turn with clips, since chat templates drop clips there.

    Other trainers write it between `<|scene_desc_start|>` and `<|scene_desc_end|>`, with a line for the scene and for
    each speaker.
    """
    if not turns or turns[0].role != "system" or not turns[0].clips:
        return turns
    clips = iter(turns[0].clips)
    text = "".join(part.text if isinstance(part, Text) else CLIP for part in turns[0].parts)
    found = SCENE.fullmatch(text)
    if found is None or CLIP in found[1] or CLIP in turns[0].words:
        return turns
    parts: list[Text | Audio] = []
    for line in filter(None, (line.strip() for line in found[2].splitlines())):
        for piece in re.split(f"({CLIP})", line):
            if piece == CLIP:
                parts.append(next(clips))
            elif piece.strip():
                parts.append(Text(piece.strip()))
    return (Turn("system", (Text(found[1]),)), Turn("scene", tuple(parts)), *turns[1:])


def clips_into_scene(turns: Turns, default_scene: str | None) -> Turns:
    """Move the clips of user turns before spoken answers into the scene, as the voices of SPEAKER0, SPEAKER1, ...

    There Higgs Audio v2 needs no transcript of a voice. A conversation without a scene gets the default scene.
    """
    moved: list[Audio] = []
    kept: list[Turn] = []
    for turn, answer in zip(turns, (*turns[1:], None), strict=True):
        spoken = answer is not None and answer.role == "assistant" and answer.clips
        words = turn.words.strip()
        if turn.role == "user" and turn.clips and spoken and words:
            moved += turn.clips
            kept.append(Turn("user", (Text(words),), turn.trained, turn.fields))
        else:
            kept.append(turn)
    if not moved:
        return turns
    before, scene, after = _around_scene(kept, default_scene)
    parts = list(scene.parts)
    for number, clip in enumerate(moved, len(scene.clips)):
        parts += [Text(f"SPEAKER{number}:"), clip]
    return (*before, Turn("scene", tuple(parts)), *after)


def with_default_scene(turns: Turns, default_scene: str | None) -> Turns:
    """Give a spoken conversation without instructions of its own the scene that a metadata.json's samples get."""
    spoken = any(turn.trained and turn.clips for turn in turns)
    if not spoken or default_scene is None or turns[0].role in ("system", "scene"):
        return turns
    return (Turn("scene", (Text(default_scene),)), *turns)


def _around_scene(turns: Sequence[Turn], default_scene: str | None) -> tuple[Sequence[Turn], Turn, Sequence[Turn]]:
    """Split a conversation at its scene: a turn, a part of the system text, or else the default scene."""
    at = 1 if turns[0].role == "system" else 0
    if turns[at].role == "scene":
        return turns[:at], turns[at], turns[at + 1 :]
    written = SCENE.fullmatch(turns[0].words.strip()) if at else None
    if written is not None:
        return [Turn("system", (Text(written[1]),))], Turn("scene", (Text(written[2].strip()),)), turns[at:]
    return turns[:at], Turn("scene", (Text(default_scene),) if default_scene else ()), turns[at:]
