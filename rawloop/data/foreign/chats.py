"""Text chats of ShareGPT and of Alpaca, as JSON or JSONL."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from rawloop.data.foreign.entries import BROKEN_LINE, Entry, Found, Unusable, each, json_lines, name_of
from rawloop.data.record import DoubledKey, parse_json, show
from rawloop.errors import UserError
from rawloop.files import open_regular, read_text

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
TALK = ("conversations", "conversation")
Rows = Iterator[tuple[str, dict[str, Any] | Unusable]]


def chat_rows(file: Path) -> Rows:
    """Yield place and object of each record of a JSON list, or of a JSONL file.

    Raises:
        UserError: the file is no JSON at all.
    """
    if first_letter(file) != "[":
        yield from json_lines(file)
        return
    try:
        values = parse_json(read_text(file))
    except (ValueError, OSError) as error:
        why = error if isinstance(error, json.JSONDecodeError | DoubledKey) else "it cannot be read"
        raise UserError(f"{file} is no JSON ({why}): mend it, or write one record a line into a .jsonl file") from error
    for index, value in enumerate(values):
        wrong = Unusable(BROKEN_LINE, f"it is {show(value)}, and no object")
        yield f"{file.name} record {index}", value if isinstance(value, dict) else wrong


def first_letter(file: Path) -> str:
    """Return the first character of a file that is not blank, or an empty string. Raises UserError."""
    try:
        with open_regular(file) as stream:
            return stream.read(4096).decode("utf-8-sig", errors="replace").lstrip()[:1]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def read_sharegpt(rows: Rows) -> Iterator[Found]:
    """Yield ShareGPT's conversations. All answers are trained, as other trainers do."""
    return each(rows, sharegpt)


def read_alpaca(rows: Rows) -> Iterator[Found]:
    """Yield Alpaca's instructions and answers."""
    return each(rows, alpaca)


def sharegpt(place: str, row: dict[str, Any]) -> list[Entry]:
    """Return the conversation of a record."""
    turns = next((row[key] for key in TALK if row.get(key)), None)
    if not isinstance(turns, list) or not turns:
        raise Unusable("no conversation", f"'conversations' is {show(turns)}")
    messages = [_message(turn) for turn in turns]
    if messages[0]["role"] != "system" and isinstance(system := row.get("system"), str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if "assistant" not in spoken:
        raise Unusable("no answer")
    if any(left == right for left, right in pairwise(spoken)):
        raise Unusable("two turns of one role in a row")
    record: dict[str, Any] = {"messages": messages, "start_index": 0}
    if row.get("tools"):
        record["tools"] = row["tools"]
    return [Entry(place, name_of(row.get("id")) or place, record)]


def _message(turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Unusable("a turn that is no object", show(turn))
    kind, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(kind, str) or kind not in ROLES:
        raise Unusable("a turn of another role", f"{show(kind)}: it must be one of {', '.join(ROLES)}")
    if not isinstance(text, str) or not text.strip():
        raise Unusable("an empty turn", f"{kind} says {show(text)}")
    return {"role": ROLES[kind], "content": text}


def alpaca(place: str, row: dict[str, Any]) -> list[Entry]:
    """Return the conversation of a record: earlier questions and answers, then instruction, input and output."""
    asked = [_text(row, key) for key in ("instruction", "input") if row.get(key)]
    answer = _text(row, "output") if row.get("output") is not None else ""
    if not any(map(str.strip, asked)):
        raise Unusable("no instruction")
    if not answer.strip():
        raise Unusable("no answer", "'output' is empty")
    messages = [{"role": "system", "content": row["system"]}] if _text(row, "system", "").strip() else []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise Unusable("a history that is no list of pairs", show(pair))
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n\n".join(text for text in asked if text.strip())
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [Entry(place, name_of(row.get("id")) or place, {"messages": messages, "start_index": 0})]


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise Unusable("a text that is no string", f"'{key}' is {show(value)}")
    return value
