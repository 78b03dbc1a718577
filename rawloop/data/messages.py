"""Chat messages as JSON records: HF style content lists, boson's ChatML samples, and ms-swift's `audios`.

A record is a conversation, and its turns are kept, including a system turn. `data.train_turns` says which of the
assistant's turns are trained. Speech samples of other trainers become conversations for a speech model: the user gives
the words, the assistant's clip speaks them, and a reference clip is a separate turn or part of the scene. Nothing is
invented: a clip without words is left unchanged, and the family refuses it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.config import DataConfig
from rawloop.data.keys import AUDIO_PART, CHAT, FIELDS, MARKS, MESSAGE, TEXT_PART, KeyCheck, clip_path, trained_mark
from rawloop.data.metadata import MARKER, MULTI, SINGLE
from rawloop.data.record import Files, Record, parse_json, show
from rawloop.data.spoken import Turns, clips_into_scene, scene_from_system, with_default_scene, words_before_clip
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
