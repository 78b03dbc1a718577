"""A checkpoint's chat template: renders a conversation, and finds where an answer starts and ends in its tokens.

No names of tokens are assumed. An answer starts where the prompt of generation ends, and ends with the first control
token that the template writes after it. Templates for which this does not hold are refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from rawloop.contracts import Audio, Text
from rawloop.errors import UserError
from rawloop.families.loading import PASSED, cause, library_error

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]
QUESTION = {"role": "user", "content": "Hello."}
ANSWERS = ("One two.", "Three.")  # the text that follows both of them ends a turn
CALLS = "tool_calls"
REASONING = ("reasoning_content", "reasoning", "thinking")
MARK = "{#- the clock is stopped at "
DIRECTIVES = (*"aAwdbBmyYHIpMSfzZjUWGuVcxXDFTeRh", "-d", "-m", "-I", "-H", "-M", "-S", "-j", "-y")
DRAWS = re.compile(r"\|\s*random\b|\blipsum\s*\(")  # Jinja's random functions


class ChatTemplate:
    """The chat template of `owner`, a tokenizer or a processor with a tokenizer.

    `question` is a user message that the template accepts. `placeholder` is the id of the token of a clip, which a
    processor repeats for the clip's positions.
    """

    def __init__(
        self, owner: Any, path: str, question: Mapping[str, Any] = QUESTION, placeholder: int | None = None
    ) -> None:
        self.owner, self.path, self.question, self.placeholder = owner, path, dict(question), placeholder
        self.tokenizer = getattr(owner, "tokenizer", owner)

    def run(self, messages: Messages, **options: Any) -> Any:
        """Return the result of `apply_chat_template`. Raises UserError if the template refuses the messages."""
        try:
            return self.owner.apply_chat_template(messages, **options)
        except PASSED:
            raise
        except Exception as error:
            line = f"the chat template of {self.path} refuses it: {cause(error)}"
            if isinstance(error, TemplateError | ValueError):
                raise UserError(line) from error
            raise library_error(line, error) from error

    def render(self, messages: Messages, *, asks: bool = False, tools: Tools = ()) -> str:
        """Return a conversation as text. `asks` adds the header of the next answer."""
        options = {"tools": list(tools)} if tools else {}
        text: str = self.run(messages, tokenize=False, add_generation_prompt=asks, **options)
        return text

    def taken(self, messages: Messages, tools: Tools = ()) -> tuple[Messages, str]:
        """Return messages in a form that the template accepts, and their text."""
        try:
            return messages, self.render(messages, tools=tools)
        except UserError:  # some templates (DeepSeek's) need the arguments of tool calls as JSON text
            texts = [_with_text_arguments(message) for message in messages]
            if texts != messages:
                with suppress(UserError):  # report the first error, which is about the messages of the record
                    return texts, self.render(texts, tools=tools)
            raise

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a rendered text. Processors prepend BOS unless the template has written it."""
        bos = self.tokenizer.bos_token
        add_bos = self.owner is not self.tokenizer and not (bos and text.startswith(bos))
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_bos, verbose=False)["input_ids"]
        return ids

    @cached_property
    def end_of_turn(self) -> int:
        """Id of the token that ends an assistant turn. Refuses a template that cannot be split there."""
        parts = isinstance(self.question["content"], list)
        contents = ([{"type": "text", "text": a}] if parts else a for a in ANSWERS)
        try:
            first, second = (self.render([self.question, {"role": "assistant", "content": c}]) for c in contents)
            asked, plain = self.render([self.question], asks=True), self.render([self.question])
        except UserError as error:
            error.args = (f"a user and an assistant turn: {error}",)
            raise
        between = first[len(asked) :].partition(ANSWERS[0])[0]
        # A header that is written only with the answer would be learnt. A channel before the answer should be learnt.
        if not first.startswith(asked) or (asked == plain and between.strip()):
            raise UserError(
                f"the chat template of {self.path} cannot be split into prompt and answer: asked for an answer it ends "
                f"with {asked[-40:]!r}, with the answer it goes on {first[-80:]!r}: use a template whose "
                "{% if add_generation_prompt %} writes everything before an answer"
            )
        pairs = zip(reversed(self.ids(first)), reversed(self.ids(second)), strict=False)
        ending = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)][::-1]
        control = control_tokens(self.tokenizer)
        found = [token for token in ending if token in control]
        if not found:
            raise UserError(
                f"the chat template of {self.path} cannot be split into turns: it ends an assistant turn with "
                f"{self.tokenizer.decode(ending)!r}, in which there is no control token: the model could not learn to "
                "stop; use a template whose turns end with one"
            )
        return found[0]

    @cached_property
    def closing(self) -> list[int]:
        """The tokens that the template writes after the last turn of a conversation only, such as Phi's end of text."""
        parts = isinstance(self.question["content"], list)
        answer = [{"type": "text", "text": ANSWERS[0]}] if parts else ANSWERS[0]
        messages = [self.question, {"role": "assistant", "content": answer}]
        question, both = (self._short(self.ids(self.render(messages[:number]))) for number in (1, 2))
        return question[_parting(question, both) :]

    def span(self, messages: Messages, index: int, ids: list[int], tools: Tools = ()) -> tuple[int, int]:
        """Return where the answer `messages[index]` starts in the tokens of its conversation, and where its turn ends.

        Refuses a template that writes the first messages differently when more follow.
        """
        start = self.length(ids, messages[:index], asks=True, tools=tools)
        if self.end_of_turn not in ids[start:]:
            raise self._cannot_split(index, start)
        return start, ids.index(self.end_of_turn, start) + 1

    def check_span(self, messages: Messages, index: int, ids: list[int], tools: Tools = ()) -> None:
        """Refuse an answer whose tokens change when more messages follow; see `span`."""
        _, end = self.span(messages, index, ids, tools)
        if index < len(messages) - 1:
            alone = self._short(self.ids(self.render(messages[: index + 1], tools=tools)))
            whole = self._short(ids[:end])
            if alone[: len(whole)] != whole:
                raise self._cannot_split(index, _parting(alone, whole))

    def length(self, ids: list[int], messages: Messages, *, asks: bool = False, tools: Tools = ()) -> int:
        """Return how many of a conversation's tokens belong to its first messages, including all positions of clips."""
        first = self._short(self.ids(self.render(messages, asks=asks, tools=tools)))
        closing = [] if asks else self.closing
        first = first[: len(first) - len(closing)] if first[len(first) - len(closing) :] == closing else first
        places = [*self._places(ids), len(ids)]
        if len(first) >= len(places) or [ids[place] for place in places[: len(first)]] != first:
            raise self._cannot_split(len(messages), _parting(first, self._short(ids)))
        return places[len(first)]

    def _places(self, ids: list[int]) -> Sequence[int]:
        """Return the positions of tokens, without repetitions of the placeholder."""
        p = self.placeholder
        return range(len(ids)) if p is None else [i for i, t in enumerate(ids) if t != p or not i or ids[i - 1] != p]

    def _short(self, ids: list[int]) -> list[int]:
        return ids if self.placeholder is None else [ids[place] for place in self._places(ids)]

    def _cannot_split(self, index: int, place: int) -> UserError:
        return UserError(
            f"the chat template of {self.path} cannot be split at messages[{index}]: the conversation up to there has "
            f"other tokens (from {place} on) than its messages in the whole conversation. Train the last assistant "
            "turn only, take blanks from the beginning of the answer, or use a template with {% if "
            "add_generation_prompt %} that leaves earlier turns unchanged"
        )

    def check_words(self, text: str, messages: Messages, trained: Sequence[int] = ()) -> None:
        """Refuse a text that lacks words of its messages. Context answers may: some templates drop old reasoning."""
        written = "".join(text.split())
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index not in trained:
                continue
            for key, words in _words(message):
                # Llama 3's template writes the result of a tool as JSON text.
                quoted = json.dumps(words, ensure_ascii=False)[1:-1] if message["role"] == "tool" else words
                if not any("".join(form.split()) in written for form in (words, quoted)):
                    raise UserError(
                        f"the chat template of {self.path} drops or changes the words of messages[{index}] "
                        f"({message['role'] if key == 'content' else key}): write it as the template has it, or leave "
                        "it out"
                    )

    def check_tools(self, text: str, messages: Messages, tools: Tools) -> None:
        """Refuse a text that lacks a part of its tools or tool calls: changing the part does not change the text."""
        lost = "'tools'" if tools and self.render(messages) == text else None
        for index, message in enumerate(messages):
            for what, changed in _changed(message):
                others = [*messages[:index], {**message, **changed}, *messages[index + 1 :]]
                if lost is None and self.render(others, tools=tools) == text:
                    lost = f"{what} in messages[{index}]"
        if lost is not None:
            raise UserError(
                f"it has {lost}, which the chat template of {self.path} does not write: use a template that does, or "
                "take it out"
            )


def content_of(parts: Iterable[Text | Audio], clip: str) -> list[dict[str, Any]]:
    """Return the parts of a turn as the content of a message; `clip` is the key of a clip's path."""
    return [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "audio", clip: str(part.path)}
        for part in parts
    ]


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return id and name of every special token. They structure a conversation, and no text may contain them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens))
    return {tokenizer.convert_tokens_to_ids(name): name for name in names}


def stop_clock(holder: Any, date: str) -> None:
    """Fix the time of `strftime_now` in the chat templates of a tokenizer or a processor to `date` (ISO 8601).

    transformers always passes the current time, so a macro of the same name is put before the template. Refuses a
    template that draws random numbers.
    """
    templates = getattr(holder, "chat_template", None)
    if isinstance(templates, dict):
        holder.chat_template = {name: _stopped(template, date) for name, template in templates.items()}
    elif isinstance(templates, str):
        holder.chat_template = _stopped(templates, date)


def _stopped(template: str, date: str) -> str:
    if drawn := DRAWS.search(template):
        raise UserError(
            f"the chat template draws at random ({drawn.group().strip()}): a sample would have other tokens each "
            "time; take that out of the template"
        )
    if "strftime_now" not in template or template.startswith(MARK):
        return template
    moment = datetime.fromisoformat(date)
    filters = "".join(f"|replace('%{d}', '{moment.strftime(f'%{d}')}')" for d in DIRECTIVES)
    macro = f"{{%- macro strftime_now(format) -%}}{{{{- format{filters}|replace('%%', '%') -}}}}{{% endmacro +%}}"
    return f"{MARK}{date} -#}}{macro}{template}"


def clock_notice(family: Any) -> str:
    """Return a sentence about the date that a family's chat template gets, or "" if it does not ask for the time."""
    for holder in (getattr(family, name, None) for name in ("processor", "tokenizer")):
        templates = getattr(holder, "chat_template", None)
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if template is not None and template.startswith(MARK):
                date = template.removeprefix(MARK).partition(" ")[0]
                return (
                    f"the chat template asks for the time: it always gets {date} (model.template_date), in training "
                    "and in evaluation"
                )
    return ""


def _words(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a message that a template must write, each with its key."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    yield from (("content", part["text"]) for part in parts if part["type"] == "text")
    yield from ((key, message[key]) for key in REASONING if isinstance(message.get(key), str))


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if CALLS not in message:
        return message
    texts = [json.dumps(c.get("function", c).get("arguments", {}), ensure_ascii=False) for c in message[CALLS]]
    return {**message, CALLS: [_with(c, "arguments", t) for c, t in zip(message[CALLS], texts, strict=True)]}


def _changed(message: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield changes of a message with tool calls, each with the name of the changed part."""
    calls = message.get(CALLS, [])
    if calls and message["content"].strip():
        yield f"'content' beside '{CALLS}'", {"content": f"{message['content']} ."}
    for number, call in enumerate(calls):
        function = call.get("function", call)
        another: Any = {"another": "argument"}
        another = json.dumps(another) if isinstance(function.get("arguments"), str) else another
        for key, value in (("name", f"{function['name']}_"), ("arguments", another)):
            changed = [*calls[:number], _with(call, key, value), *calls[number + 1 :]]
            yield f"the {key} of call {number} of '{CALLS}'", {CALLS: changed}


def _with(call: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a call with another value of a key of its function."""
    return {**call, "function": {**call["function"], key: value}} if "function" in call else {**call, key: value}


def _parting(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the first position at which two sequences differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
