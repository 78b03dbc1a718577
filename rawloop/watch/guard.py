"""Errors of the watch itself: each becomes a finding, and the part that failed stays off. The loop goes on."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import extract_tb
from typing import Any, TypeVar, cast

import torch

from rawloop.errors import LostRank
from rawloop.waiting import is_lost_rank
from rawloop.watch.findings import Cause, Place, short

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
            self.failed(part, error)

    def failed(self, part: str, error: Exception) -> None:
        """Switch off a part and report its error, or raise it if nobody takes reports."""
        if self.report is None:
            raise error
        self._off.add(part)
        self.report(part, cause_of(error))

    def call(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of a part, and return its result; None if the part is off or fails."""
        if torch.compiler.is_compiling() or part in self._off:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # not with `over`, which takes longer
            return self.failed(part, error)

    def shield(self, part: str, hook: Callable[..., object]) -> Callable[..., None]:
        """Return a hook that runs inside the user's calls and returns nothing, whatever happens in it."""

        def safe(*args: Any, **kwargs: Any) -> None:
            self.call(part, hook, *args, **kwargs)

        return safe


def guarded(part: str) -> Callable[[Method], Method]:
    """Return a decorator for methods of objects with a `guard`: they return None if the part is off or fails."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def safe(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.guard.call(part, method, self, *args, **kwargs)

        return cast(Method, safe)

    return decorate


def cause_of(error: Exception) -> Cause:
    """Return the cause of a finding for an error of the watch, with the last line of its traceback."""
    if isinstance(error, LostRank) or is_lost_rank(error):
        what = f"another rank did not come to this step: {short(error)}"
        advice = "Look at the messages of the other ranks: one has ended, has left the loop early, or has fewer batches"
        return Cause("distributed", what, Place(), {}, advice)
    frame = extract_tb(error.__traceback__)[-1]
    name = frame.filename.rpartition("/")[2]
    return Cause(
        "not known",
        f"the watch itself has an error, {short(error)}",
        Place(expression=f"{name}:{frame.lineno}: {frame.line}"),
        advice="The loop is not to blame, and goes on as it would without a watch; report the line to rawloop",
    )


def part_of(detector: object) -> str:
    """Return the name of the part that a detector is."""
    return f"the detector {type(detector).__name__}"
