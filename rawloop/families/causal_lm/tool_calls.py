"""Whether a chat template writes the tools and the tool calls of a conversation: not all do, and none complains.

Written without the tools, or with another name or argument of a call, a conversation must become another text.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]
CALLS = "tool_calls"
ANOTHER = {"another": "argument"}


def unwritten(whole: str, messages: Messages, tools: Tools, render: Callable[[Messages, Tools], str]) -> str | None:
    """Name what of tools and tool calls is not in a text, or None.

    Args:
        whole: what `render(messages, tools)` gives.
        messages: a conversation.
        tools: that it has.
        render: the chat template.
    """
    if tools and render(messages, ()) == whole:
        return "'tools'"
    for index, message in enumerate(messages):
        for what, changed in _changed(message):
            if render([*messages[:index], {**message, **changed}, *messages[index + 1 :]], tools) == whole:
                return f"{what} in messages[{index}]"
    return None


def arguments_as_text(messages: Messages) -> Messages:
    """Return messages with the arguments of calls as JSON text, which some templates (DeepSeek's) want of them."""
    return [
        {**message, CALLS: [_with(call, "arguments", _text_of(call)) for call in message[CALLS]]}
        if CALLS in message
        else message
        for message in messages
    ]


def _text_of(call: Mapping[str, Any]) -> str:
    return json.dumps(call.get("function", call).get("arguments", {}), ensure_ascii=False)


def _changed(message: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a message with tool calls would be with another value somewhere, and where."""
    calls = message.get(CALLS, [])
    if calls and message["content"].strip():
        yield f"'content' beside '{CALLS}'", {"content": f"{message['content']} ."}
    for number, call in enumerate(calls):
        function = call.get("function", call)
        text = isinstance(function.get("arguments"), str)
        another: Any = json.dumps(ANOTHER) if text else ANOTHER
        for key, value in (("name", f"{function['name']}_"), ("arguments", another)):
            other = _with(call, key, value)
            yield f"the {key} of call {number} of '{CALLS}'", {CALLS: [*calls[:number], other, *calls[number + 1 :]]}


def _with(call: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a call with another value in its function."""
    if "function" in call:
        return {**call, "function": {**call["function"], key: value}}
    return {**call, key: value}
