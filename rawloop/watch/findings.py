"""Findings: what a watch has seen, as objects and as paragraphs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from textwrap import fill
from typing import Literal

from rawloop.errors import first_few
from rawloop.watch.nest import shown

Whose = Literal["data", "model", "loss", "precision", "optimizer", "distributed", "hardware", "not known"]
Evidence = Mapping[str, float | int | str]
PLACES = {
    "phase": "in {}",
    "module": "module '{}'",
    "parameter": "parameter '{}'",
    "expression": "{}",
    "tensor": "tensor '{}'",
}
MOST_CAUSES = 3
MOST_ALIKE = 2  # findings of one kind that one look may tell apart


@dataclass(frozen=True)
class Place:
    """Where something is wrong. What is not known, or has no meaning, is empty or None.

    `expression` is a line of the user's code: `train.py:41: loss = torch.log(p).mean()`. `phase` is forward, backward,
    update or data. `row` and `position` index the batch's tensor.
    """

    phase: str = ""
    module: str = ""
    parameter: str = ""
    expression: str = ""
    optimizer: str = ""
    tensor: str = ""
    sample: str = ""
    row: int | None = None
    position: int | None = None
    rank: int | None = None

    def __str__(self) -> str:
        phase = self.phase if self.phase in ("forward", "backward") else ""
        known = {**vars(self), "phase": phase, "tensor": shown(self.tensor)}
        parts = [
            PLACES.get(name, f"{name} {{}}").format(value) for name, value in known.items() if value not in ("", None)
        ]
        return ", ".join(parts) or "place not known"


@dataclass(frozen=True)
class Cause:
    """A cause of a finding: whose fault it is, one sentence, the place, the numbers behind it, and what to do."""

    whose: Whose
    what: str
    place: Place = Place()
    evidence: Evidence = field(default_factory=dict)
    advice: str = ""

    def text(self, known: str = "", rank: int | None = None) -> str:
        """Return the cause as a paragraph. It does not repeat what is `known`, nor the rank that has seen it."""
        place = replace(self.place, rank=None) if self.place.rank == rank else self.place
        numbers = ", ".join(f"{name} {_number(value)}" for name, value in self.evidence.items())
        parts = [f"[{self.whose}] {'' if self.what == known else f'{self.what} '}({place})."]
        parts += [f"Evidence: {numbers}."] if numbers else []
        parts += [f"{self.advice[0].upper()}{self.advice[1:]}."] if self.advice else []
        return " ".join(parts)


@dataclass
class Finding:
    """Something that a watch has seen."""

    kind: str  # a stable name for scripts and tests, such as `weights_not_finite`
    what: str  # the symptom in one sentence
    causes: tuple[Cause, ...]  # one to three, the likeliest first
    step: int  # at which it was seen first
    rank: int = 0  # that has seen it
    ordinary: bool = False  # it belongs to healthy training, such as the first skips of a loss scaler
    since: int | None = None  # the step since which it is so, if that is known to be an earlier one
    last: int = -1  # the step at which it was seen last
    times: int = 1  # how often it was seen
    world_size: int = 1  # with one rank, texts leave it out

    def __post_init__(self) -> None:
        assert 1 <= len(self.causes) <= MOST_CAUSES, "a finding has one to three causes, or one that is 'not known'"
        self.last = max(self.last, self.step)

    @property
    def cause(self) -> Cause:
        """The likeliest cause."""
        return self.causes[0]

    def key(self) -> tuple[object, ...]:
        """What makes two findings the same: it is then told once, and counted."""
        at = self.cause.place
        return self.kind, self.ordinary, at.module, at.parameter, at.expression, at.optimizer, at.tensor

    def text(self) -> str:
        """Return the finding as a paragraph."""
        since = f", since step {self.since}" if self.since is not None and self.since != self.step else ""
        times = f", {self.times} times until step {self.last}" if self.times > 1 else ""
        mark = "ordinary: " if self.ordinary else ""
        rank = f", rank {self.rank}" if self.world_size > 1 or self.rank else ""
        return f"step {self.step}{rank}{since}{times}: {mark}{self.reason()}"

    def reason(self) -> str:
        """Return what it is and its causes, without the step and the rank."""
        causes = [cause.text(self.what, self.rank) for cause in self.causes]
        if len(causes) > 1:
            causes = [f"({n}) {text}" for n, text in enumerate(causes, start=1)]
        return " ".join([f"{self.what}.", *causes])

    def as_json(self) -> dict[str, object]:
        """Return the finding as JSON values."""
        causes = []
        for cause in self.causes:
            place = {name: value for name, value in vars(cause.place).items() if value not in ("", None)}
            causes.append({**vars(cause), "place": place, "evidence": dict(cause.evidence)})
        return {**vars(self), "causes": causes}


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with those of one kind joined, if a look has made many: the first stands for all."""
    groups: dict[tuple[str, bool], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.ordinary), []).append(finding)
    return [one for group in groups.values() for one in ([_joined(group)] if len(group) > MOST_ALIKE else group)]


def _joined(group: Sequence[Finding]) -> Finding:
    first, *rest = group
    places = dict.fromkeys(_name(finding.cause.place) for finding in rest)
    evidence = {**first.cause.evidence, "others alike": len(rest)}
    what = f"{first.what}; the same in {first_few([*places])}"
    return replace(first, what=what, causes=(replace(first.cause, evidence=evidence), *first.causes[1:]))


def _name(place: Place) -> str:
    return place.parameter or place.module or place.tensor or place.sample or str(place)


class Findings:
    """The findings of a watch, in the order in which they were seen; equal ones are counted, not repeated."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[object, ...], Finding] = {}

    def add(self, finding: Finding) -> bool:
        """Add a finding. Return False if it was known, and is only counted."""
        known = self._by_key.setdefault(finding.key(), finding)
        if known is finding:
            return True
        known.times += 1
        known.last = max(known.last, finding.step)
        return False

    def extend(self, findings: Iterable[Finding]) -> list[Finding]:
        """Add findings, and return those that were not known."""
        return [finding for finding in findings if self.add(finding)]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def alarms(self) -> list[Finding]:
        """The findings that are not ordinary."""
        return [finding for finding in self if not finding.ordinary]

    def __str__(self) -> str:
        shown = sorted(self, key=lambda finding: finding.ordinary)
        return "\n\n".join(fill(finding.text(), 120) for finding in shown) or "nothing found"


def short(error: Exception) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _number(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
