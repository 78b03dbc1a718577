"""Chat messages as JSON records: HF style content lists, boson's ChatML samples, and ms-swift's `audios`.

A record is a conversation already; its turns are kept as they are, a system turn included. What is decided here is
which of them are trained: by default the last assistant turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data.record import Files, Record, show
from rawloop.errors import nearest

ROLES = ("system", "scene", "user", "assistant")
AUDIO_KEYS = ("path", "audio", "url", "audio_url")
MARKER = "<audio>"
READ = frozenset(("id", "audio_id", "messages", "audios", "start_index"))


@dataclass
class MessagesReader:
    """Turns records with `messages` into samples."""

    files: Files

    def sample(self, record: Record, identity: str) -> Sample:
        """Return the sample of a record.

        Raises:
            UserError: a message has a wrong type, role or content, or no turn is trained.
        """
        messages = _messages(record)
        audios = _audios(record)
        queue = iter(audios)
        parts = [tuple(self._parts(message, record, queue, index)) for index, message in enumerate(messages)]
        markers = sum(_text(message).count(MARKER) for message in messages)
        if markers != len(audios):
            record.fail(f"{markers} {MARKER} marker(s) for {len(audios)} file(s) in 'audios': give one marker per file")
        trained = _trained(record, messages)
        turns = tuple(
            Turn(message["role"], content, index in trained)
            for index, (message, content) in enumerate(zip(messages, parts, strict=True))
        )
        return Sample(identity, turns, None, f"{record.file.name} {record.place}", record.without(READ))

    def _parts(
        self, message: dict[str, Any], record: Record, audios: Iterator[str], index: int
    ) -> Iterator[Text | Audio]:
        content = message.get("content")
        if isinstance(content, str):
            yield from self._marked(record.speakable(content), record, audios)
            return
        items = [content] if isinstance(content, dict) else content
        if not isinstance(items, list) or not items:
            record.fail(f"messages[{index}] has content {show(content)}: it must be a string or a list of parts")
        for item in items:
            yield self._part(item, record, f"messages[{index}]")

    def _marked(self, content: str, record: Record, audios: Iterator[str]) -> Iterator[Text | Audio]:
        first, *rest = content.split(MARKER)
        if first:
            yield Text(first)
        for text in rest:
            path = next(audios, None)
            if path is None:
                return  # the counts are compared for the whole record
            yield Audio(self.files.resolve(path, record))
            if text:
                yield Text(text)

    def _part(self, item: Any, record: Record, place: str) -> Text | Audio:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str):
            return Text(record.speakable(item["text"]))
        if kind == "audio":
            path = next((item[key] for key in AUDIO_KEYS if item.get(key) is not None), None)
            if not isinstance(path, str) or not path:
                record.fail(f"{place} has an audio part without a path: {show(item)}: add 'path' with a string")
            return Audio(self.files.resolve(path, record))
        record.fail(
            f'{place} has the part {show(item)}: parts are {{"type": "text", "text": ...}} '
            'or {"type": "audio", "path": ...}'
        )


def _messages(record: Record) -> list[dict[str, Any]]:
    messages = record.values.get("messages")
    if not isinstance(messages, list) or not messages:
        record.fail(f"'messages' is {show(messages)}: it must be a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            record.fail(f"messages[{index}] is {show(message)}: it must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            record.fail(f"messages[{index}] has role {show(role)}{hint}: it must be one of {', '.join(ROLES)}")
        if message.get("content") == "" and role != "system":
            record.fail(f"messages[{index}] ({role}) has empty content: write it, or remove the sample")
    return messages


def _audios(record: Record) -> list[str]:
    audios = record.values.get("audios") or []
    paths = [audios] if isinstance(audios, str) else audios
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        record.fail(f"'audios' is {show(audios)}: it must be a list of paths")
    return paths


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _trained(record: Record, messages: list[dict[str, Any]]) -> set[int]:
    assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    start = record.values.get("start_index")
    if start is None:
        trained = set(assistants[-1:])
    elif isinstance(start, int) and not isinstance(start, bool):
        trained = {index for index in assistants if index >= start}
    else:
        record.fail(f"'start_index' is {show(start)}: it must be a whole number, the first message to train")
    for index, message in enumerate(messages):
        loss = message.get("loss")
        if loss is not None and not isinstance(loss, bool):
            record.fail(f"messages[{index}] has loss {show(loss)}: it must be true or false")
        if loss and index not in assistants:
            record.fail(f"messages[{index}] has loss true and role {message['role']}: only assistant turns are trained")
        if loss is not None:
            (trained.add if loss else trained.discard)(index)
    if not trained:
        record.fail("no turn is trained: it needs an assistant message that start_index and loss do not rule out")
    return trained
