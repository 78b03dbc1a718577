"""Errors of the watch itself: each becomes a finding, and the part that failed stays off. The loop goes on."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import extract_tb
from typing import Any, TypeVar, cast

import torch

from rawloop.watch.findings import Cause, Finding, Place

Method = TypeVar("Method", bound=Callable[..., Any])


class Guard:
    """Runs the parts of a watch. An error of one ends neither the user's loop nor the other parts.

    Args:
        report: called with the part's name and the cause, for each part that fails. Without it errors are raised.
    """

    def __init__(self, report: Callable[[str, Cause], object] | None = None) -> None:
        self.report = report
        self._off: set[str] = set()

    def is_off(self, part: str) -> bool:
        """Whether a part has failed."""
        return part in self._off

    @contextmanager
    def over(self, part: str) -> Iterator[None]:
        """Report an error of a part, and switch the part off. The user's own calls do not belong inside."""
        try:
            yield
        except Exception as error:  # told as a finding: what looks at a loop must not end it
            if self.report is None:
                raise
            self._off.add(part)
            self.report(part, cause_of(error))

    def shield(self, part: str, hook: Callable[..., object]) -> Callable[..., None]:
        """Return a hook that runs inside the user's calls and returns nothing, whatever happens in it."""

        def safe(*args: Any, **kwargs: Any) -> None:
            if not torch.compiler.is_compiling() and not self.is_off(part):
                with self.over(part):
                    hook(*args, **kwargs)

        return safe


def cause_of(error: Exception) -> Cause:
    """Return the cause of a finding for an error of the watch, with the last line of its traceback."""
    frame = extract_tb(error.__traceback__)[-1]
    name = frame.filename.rpartition("/")[2]
    text = str(error).partition("\n")[0][:200]
    return Cause(
        "not known",
        f"the watch itself has an error, {type(error).__name__}: {text}",
        Place(expression=f"{name}:{frame.lineno}: {frame.line}"),
        advice="The loop is not to blame, and goes on as it would without a watch; report the line to rawloop",
    )


def failed(part: str, cause: Cause, step: int, rank: int) -> Finding:
    """Return the finding for a part of the watch that failed."""
    what = f"{part} failed and is off from here on; the other parts of the watch go on"
    return Finding("watch_failed", what, (cause,), step, rank)


def part_of(detector: object) -> str:
    """Return the name of the part that a detector is."""
    return f"the detector {type(detector).__name__}"


def guarded(part: str) -> Callable[[Method], Method]:
    """Return a decorator for methods of objects with a `guard`: they return None if the part is off or fails."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def safe(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and not self.guard.is_off(part):
                with self.guard.over(part):
                    return method(self, *args, **kwargs)
            return None

        return cast(Method, safe)

    return decorate
