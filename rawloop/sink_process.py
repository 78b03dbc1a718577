"""The process of one sink: reads lines of JSON from standard input, and hands them to a logging library.

`rawloop.sinks` starts it. A library that imports for seconds, waits for a lost connection, changes the environment or
crashes does so here, and not in the training. After a failure a line is tried again, in growing intervals. Problems go
to standard output as lines of JSON: `{"problem": "..."}`. The process ends when its standard input ends.
"""

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from rawloop.sink_libraries import SINKS, Opening, Sink, TensorBoard

DELAYS = (1.0, 5.0, 20.0, 60.0)  # seconds before a line is tried again; later always the last
AT_LAST = 60  # seconds until the process ends itself after its standard input has ended
IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # they are for the training, which then ends this


class Delivery:
    """Delivers lines to one sink, which it opens with the first line and again after each failure."""

    def __init__(self, make: Callable[[Opening], Sink], opening: Opening, tell: Callable[[str], None]) -> None:
        self.make, self.opening, self.tell = make, opening, tell
        self.sink: Sink | None = None
        self.failing, self.lost = False, 0

    def deliver(self, line: Mapping[str, Any]) -> None:
        """Deliver one line. If the next line fails too, it waits: then the fault is not the line's."""
        if "purge_step" in line:  # lines from this step on are written again
            self.opening = self.opening._replace(purge_step=line["purge_step"])
            if isinstance(self.sink, TensorBoard):
                self.drop()
            return
        delays = iter(DELAYS)
        while not self.attempt(line):
            delay = next(delays, DELAYS[-1] if self.lost else None)
            if delay is None or has_ended(delay):
                self.lost += 1
                return

    def attempt(self, line: Mapping[str, Any]) -> bool:
        """Try to deliver a line, and tell where the failures begin and where they end."""
        step: int = line["step"]
        try:
            if self.sink is None:
                self.sink = self.make(self.opening)
                self.opening = self.opening._replace(purge_step=None)  # or what follows would be hidden at a reopening
            if "sounds" in line:
                self.sink.sounds(step, line["sounds"])
            else:
                self.sink.write(step, line["values"])
        except Exception as error:
            if not self.failing:
                with suppress(OSError):  # standard error may be a file on the disk that is full
                    traceback.print_exc()
                self.tell(f"does not take the line of step {step}, which is tried again: {in_one_line(error)}")
            self.failing = True
            self.drop()
            return False
        if self.failing:
            lost = f"{self.lost} line(s) were left out" if self.lost else "nothing was lost"
            self.tell(f"takes lines again, from step {step} on; {lost}")
        self.failing, self.lost = False, 0
        return True

    def drop(self) -> None:
        """Close the sink, whatever it says."""
        if self.sink is not None:
            with suppress(Exception):
                self.sink.close(complete=False)
        self.sink = None

    def close(self, complete: bool) -> None:
        """End the run, and tell what was left out."""
        if self.lost:
            self.tell(f"lacks the last {self.lost} line(s)")
        try:
            if self.sink is not None:
                self.sink.close(complete)
        except Exception as error:
            self.tell(f"cannot be closed: {in_one_line(error)}")


def in_one_line(error: Exception) -> str:
    """Return an error's kind and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}"


def has_ended(seconds: float) -> bool:
    """Wait, or until the training closes its end of standard input; return whether it has."""
    waiting = select.poll()
    waiting.register(0, 0)  # only for its end, not for lines
    ended = bool(waiting.poll(seconds * 1000))
    if ended:
        end_soon()
    return ended


def end_soon() -> None:
    """End this process after `AT_LAST` seconds in any case: a library may wait for ever for a lost connection."""
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, AT_LAST)


def check(sink: type[Sink], project: str, tell: Callable[[str], None]) -> None:
    """Tell what is wrong with the set-up of a library, if waiting does not mend it."""
    try:
        sink.check(project)
    except ImportError as error:
        tell(in_one_line(error))
    except Exception as error:
        if isinstance(error, sink.mistakes()):
            tell(in_one_line(error))


def main(name: str) -> None:
    """Serve the sink of this name."""
    for number in (getattr(signal, each) for each in IGNORED if hasattr(signal, each)):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def tell(problem: str) -> None:
        with suppress(BrokenPipeError):  # the training has ended
            print(json.dumps({"problem": problem}), file=answers, flush=True)

    lines = map(json.loads, sys.stdin.buffer)
    first = next(lines)
    if "check" in first:
        check(SINKS[name], first["check"], tell)
        return
    delivery, complete = Delivery(SINKS[name], Opening(**first), tell), False
    for line in lines:
        if "complete" in line:
            complete = line["complete"]
            break
        delivery.deliver(line)
    end_soon()
    delivery.close(complete)


if __name__ == "__main__":
    main(sys.argv[1])
