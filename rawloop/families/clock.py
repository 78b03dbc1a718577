"""Chat templates that read the clock: they are told a date of the config's, so that a sample is the same every day.

transformers gives templates `strftime_now`, and no way to say what it returns. So a macro of that name is put before
the template. What reads the clock or draws at random in another way is found by making samples twice.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import torch
from torch import Tensor
from transformers.utils import chat_template_utils

from rawloop.contracts import Batch
from rawloop.errors import UserError

MARK = "{#- the clock is stopped at "
DIRECTIVES = (*"aAwdbBmyYHIpMSfzZjUWGuVcxXDFTeRh", "-d", "-m", "-I", "-H", "-M", "-S", "-j", "-y")
DRAWS = re.compile(r"\|\s*random\b|\blipsum\s*\(")  # all that Jinja has of it
LATER = timedelta(days=400, hours=13, minutes=37, seconds=11)  # another year, month, weekday, day and hour


def stop_clock(holder: Any, date: str) -> None:
    """Let the chat templates of a tokenizer or a processor, those that ask for the time, be told `date` (ISO 8601).

    Raises:
        UserError: a template draws at random.
    """
    templates = getattr(holder, "chat_template", None)
    if isinstance(templates, dict):
        holder.chat_template = {name: stopped(template, date) for name, template in templates.items()}
    elif isinstance(templates, str):
        holder.chat_template = stopped(templates, date)


def stopped(template: str, date: str) -> str:
    """Return a template whose `strftime_now` gives a date; a template that does not ask for it is returned as it is.

    Raises:
        UserError: the template draws at random.
    """
    if drawn := DRAWS.search(template):
        raise UserError(
            f"the chat template draws at random ({drawn.group().strip()}): the same sample would be other numbers each "
            "time; take that out of the template"
        )
    if "strftime_now" not in template or template.startswith(MARK):
        return template
    moment = datetime.fromisoformat(date)
    filters = "".join(f"|replace('%{d}', '{moment.strftime(f'%{d}')}')" for d in DIRECTIVES)
    macro = f"{{%- macro strftime_now(format) -%}}{{{{- format{filters}|replace('%%', '%') -}}}}{{% endmacro +%}}"
    return f"{MARK}{date} -#}}{macro}{template}"


def clock_notice(family: Any) -> str:
    """Return a sentence that says to which date a family's chat template is told it is, or "" if it does not ask."""
    holders = [getattr(family, name, None) for name in ("processor", "tokenizer")]
    for holder in filter(None, holders):
        templates = getattr(holder, "chat_template", None)
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if template is not None and template.startswith(MARK):
                date = template.removeprefix(MARK).partition(" ")[0]
                return (
                    f"the chat template asks for the time: it is told {date} (model.template_date), in training and in "
                    "evaluation, on whichever day"
                )
    return ""


def check_repeatable(make: Callable[[], Batch]) -> None:
    """Make a batch twice, the second time at another time of day and date.

    Raises:
        UserError: the two differ.
    """
    first = make()
    with _later():
        again = make()
    if not (_same(first.inputs, again.inputs) and _same(_labels(first), _labels(again))):
        raise UserError(
            f"the samples {', '.join(first.ids)} become other numbers each time they are made: the chat template or "
            "the family reads the clock, or draws at random in a way that no seed reaches; a family of your own can "
            "stop the clock of its templates with rawloop.families.clock.stop_clock, and seed its generators from "
            "torch's, Python's or numpy's global one"
        )


@contextmanager
def _later() -> Iterator[None]:
    """While this is open, chat templates are told another time; the process's own time goes on as it does."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + LATER

    before = chat_template_utils.datetime
    chat_template_utils.datetime = Later
    try:
        yield
    finally:
        chat_template_utils.datetime = before


def _labels(batch: Batch) -> dict[str, Tensor]:
    return {f"{stream} {i}": tensor for stream, pair in batch.labels.items() for i, tensor in enumerate(pair)}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    pairs = [(tensor, second.get(name)) for name, tensor in first.items()]
    return len(first) == len(second) and all(
        other is not None and tensor.shape == other.shape and torch.equal(tensor, other) for tensor, other in pairs
    )
