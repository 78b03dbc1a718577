"""Whether a chat template writes the tools and the tool calls of a conversation: not all do, and none complains.

Written without the tools, or with another name or argument of a call, a conversation must become another text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]
CALLS = "tool_calls"


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


def _changed(message: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what a message with tool calls would be with another value somewhere, and where."""
    calls = message.get(CALLS, [])
    if calls and message["content"].strip():
        yield f"'content' beside '{CALLS}'", {"content": f"{message['content']} ."}
    for number, call in enumerate(calls):
        function = call.get("function", call)
        for key, value in (("name", f"{function['name']}_"), ("arguments", {"another": "argument"})):
            other = {**function, key: value}
            other = {**call, "function": other} if "function" in call else other
            yield f"the {key} of call {number} of '{CALLS}'", {CALLS: [*calls[:number], other, *calls[number + 1 :]]}
