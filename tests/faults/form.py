"""The form of an exam: a fault with the answer that is expected, a control, and how findings are scored."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding, Whose
from tests.faults.loops import Loop

Group = Literal["origin", "weights", "gradients", "data", "jumps"]
Verdict = Literal["found", "cause only", "place only", "missed"]
FIRST = 3  # so many alarms are read, as a person reads them
EVERY = 5  # steps between costly looks: the loops are as short as that


@dataclass(frozen=True)
class Fault:
    """A loop with one mistake, and the answer that was written down before any was seen.

    Args:
        name: a few words.
        group: the kind of mistake.
        loop: the loop with the mistake in it.
        whose: the answers that are right; the finding's likeliest cause counts.
        words: a regular expression that the finding's kind, words or evidence must hold, in whatever case.
        place: whether a finding's place, step and `since` are right.
        mentions: a regular expression that another tool's message must hold to have named the place.
        crash: the error with which the loop ends because of the fault.
    """

    name: str
    group: Group
    loop: Callable[[], Loop]
    whose: tuple[Whose, ...]
    words: str
    place: Callable[[Finding], bool]
    mentions: str = "named by no module"
    crash: type[Exception] | None = None


@dataclass(frozen=True)
class Control:
    """A healthy loop, on which no alarm is allowed."""

    name: str
    loop: Callable[[], Loop]


class Answer(NamedTuple):
    """What the alarms of a loop are worth. `finding` is the best of the first ones."""

    verdict: Verdict
    finding: Finding | None
    alarms: int


def score(fault: Fault, findings: Sequence[Finding]) -> Answer:
    """Score the findings of one rank."""
    alarms = [finding for finding in findings if not finding.ordinary]
    best = max(alarms[:FIRST], key=lambda finding: _worth(fault, finding), default=None)
    verdicts: tuple[Verdict, ...] = ("missed", "place only", "cause only", "found")
    return Answer(verdicts[_worth(fault, best) if best else 0], best, len(alarms))


def best_of_ranks(fault: Fault, by_rank: Sequence[Sequence[Finding]]) -> Answer:
    """Score the rank that says it best: a person reads what all ranks print."""
    answers = [score(fault, findings) for findings in by_rank]
    return max(answers, key=lambda answer: _worth(fault, answer.finding) if answer.finding else -1)


def examine(case: Fault | Control) -> list[Finding]:
    """Train the loop under a watch with everything on, in this process; return the findings."""
    return case.loop().watched(WatchConfig(every=EVERY), case.crash if isinstance(case, Fault) else None)


def first_seen(finding: Finding) -> int:
    """The step since which it is so, as far as the finding says."""
    return finding.step if finding.since is None else finding.since


def within(finding: Finding, first: int, last: int) -> bool:
    """Whether a finding says that it began at one of these steps."""
    return first <= first_seen(finding) <= last


def words_of(finding: Finding) -> str:
    """What a finding says of itself and its likeliest cause, without the place; advice names more than it knows."""
    cause = finding.cause
    return " ".join([finding.kind.replace("_", " "), finding.what, cause.what, *map(str, cause.evidence)])


def _worth(fault: Fault, finding: Finding) -> int:
    cause = finding.cause.whose in fault.whose and re.search(fault.words, words_of(finding), re.IGNORECASE) is not None
    return 2 * cause + bool(fault.place(finding))
