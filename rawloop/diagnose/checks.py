"""Runs the checks before step 0 and reports their findings; the training that follows is the same as without them.

Each rank checks the first micro-batches that it will train on. Then the ranks join their results, so all of them take
the same decision.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

from rawloop.contracts import Batch, Family, has
from rawloop.diagnose import causality, verdict
from rawloop.diagnose.causality import Movement, probe
from rawloop.diagnose.census import Census, take_census
from rawloop.diagnose.config import ChecksConfig
from rawloop.diagnose.passes import Passes
from rawloop.diagnose.shared import Autocast
from rawloop.diagnose.verdict import Reading, Verdict, judge, read_losses
from rawloop.dist import World
from rawloop.errors import TrainingError, UserError
from rawloop.files import replace_file
from rawloop.losses import LossModule
from rawloop.records import Records
from rawloop.sharding import is_sharded

# The labels of at most this many samples are counted, over all ranks, until all required tokens are decided.
COUNTED = 512

PROBED = ("perturb", "logits")
NEEDED = {
    "pieces": "how much of each role is learnt",
    "special_targets": "whether stop tokens are learnt",
    "chance": "whether the first loss is better than guessing",
    "logits": "whether losses are those of the logits, and causality",
    "perturb": "causality",
}

Examples = Callable[[int, int], Sequence[Sequence[Any]]]


class Check(NamedTuple):
    """One check: its summary, further values for events.jsonl, the problems that stop the run, and the warnings."""

    summary: str
    fields: dict[str, Any]
    problems: list[str]
    warnings: list[str]


@dataclass
class Report:
    """The findings of all ranks together."""

    config: ChecksConfig
    census: Census
    verdicts: list[Verdict]
    movements: dict[str, Movement]
    seconds: float
    samples: int  # samples with a measured loss; labels may have been counted in more samples
    not_checked: list[str] = field(default_factory=list)  # the family lacks a method for these

    def labels(self) -> Check:
        """Return the findings of the census: required tokens that are no targets, empty samples, and learnt prompts."""
        census, problems, warnings = self.census, [], []
        missing, unseen, prompts = census.missing(), census.unseen(), census.prompts()
        if missing and not self.config.allow_missing_targets:
            problems.append(
                f"{'; '.join(missing)}: never a target in {census.samples} samples, so the model does not learn it, or "
                "unlearns it, and generation never stops: correct the labels, look at them with `rawloop inspect`, or "
                "train anyway with --checks.allow_missing_targets true"
            )
        if census.silent:
            warnings.append(
                f"{len(census.silent)} of {census.samples} samples have no target in any stream, so nothing is learnt "
                f"from them: {', '.join(dict.fromkeys(census.silent))}; correct their labels, or leave them out"
            )
        if prompts:
            turns = ", ".join(f"{count:,} in {role} turns" for role, count in prompts.items())
            warnings.append(
                f"prompts are learnt: there are targets in turns that the model does not say ({turns}); mask them, or "
                "look at them with `rawloop inspect`"
            )
        found = [f"missing among the targets: {'; '.join(missing)}"] if missing else []
        found += [f"not checked, as no sample needs it: {'; '.join(unseen)}"] if unseen else []
        summary = f"census of {census.samples} samples: {'; '.join(found) or 'every required token is a target'}"
        return Check(summary, {"check": "census", "seconds": self.seconds}, problems, warnings)

    def first_loss(self) -> Check:
        """Return the findings about the first loss. A codebook is listed if it differs from its stream."""
        kinds = {v.name: v.kind for v in self.verdicts}
        streams = [v for v in self.verdicts if "/" not in v.name]
        found = [(f"first loss of '{v.name}': MISMATCH, {v.mismatch}", "mismatch") for v in self.verdicts if v.mismatch]
        found += [
            (f"{_first_loss(v)}: {v.kind}, {v.why}", v.kind.lower())
            for v in self.verdicts
            if v.kind in ("LEAK", "DEAD") and (v in streams or v.kind != kinds[v.name.split("/")[0]])
        ]
        warnings = [
            f"{_first_loss(v)}: {v.why}; if that is expected, set checks.expect_chance to true"
            for v in streams
            if v.kind == "CHANCE" and not self.config.expect_chance
        ]
        losses = [f"{v.name} {v.loss:.4f} {v.kind}" for v in streams]
        losses += [f"{v.name} MISMATCH" for v in self.verdicts if v.mismatch]
        fields = {"check": "loss", "verdicts": [v._asdict() for v in self.verdicts]}
        return Check(f"first loss: {', '.join(losses)}", fields, self._not_allowed(found), warnings)

    def causality(self) -> Check:
        """Return the findings of the causality probe."""
        moved = {stream: {**m._asdict(), "outcome": m.outcome()} for stream, m in self.movements.items()}
        found = [
            (f"causality of '{stream}': {movement.outcome()}, {movement.why()}", movement.outcome().lower())
            for stream, movement in self.movements.items()
            if movement.outcome() in ("LEAK", "BLIND")
        ]
        outcomes = ", ".join(f"{stream} {values['outcome']}" for stream, values in moved.items())
        fields = {"check": "causality", "streams": moved}
        return Check(f"causality: {outcomes or 'not checked'}", fields, self._not_allowed(found), [])

    def _not_allowed(self, found: Iterable[tuple[str, str]]) -> list[str]:
        return [
            f"{text} (to train anyway: --checks.allow '[{kind}]')"
            for text, kind in found
            if kind not in self.config.allow
        ]

    def checks(self) -> list[Check]:
        """Return the three checks, and what was not checked."""
        rest = [Check(self._without(), {"check": "none"}, [], [])] if self.not_checked else []
        return [self.labels(), self.first_loss(), self.causality(), *rest]

    def _without(self) -> str:
        return f"not checked, as the family lacks a method for it: {', '.join(self.not_checked)}"

    def problems(self) -> list[str]:
        """Return the findings that stop the run, each with the key that allows it."""
        return [problem for check in self.checks() for problem in check.problems]

    def warnings(self) -> list[str]:
        """Return the findings that do not stop the run."""
        return [warning for check in self.checks() for warning in check.warnings]

    def stop_if_wrong(self) -> None:
        """Raise all problems in one message: a `UserError` if labels are wrong, else a `TrainingError`."""
        if found := self.problems():
            kind = UserError if self.labels().problems else TrainingError
            raise kind(f"checks before step 0: {'; '.join(found)}")

    def text(self) -> str:
        """Return all checks as tables."""
        loss = verdict.lines(self.verdicts, self.samples, self.config.expect_chance)
        rest = [self._without()] if self.not_checked else []
        return "\n".join([*self.census.lines(), "", *loss, "", *causality.lines(self.movements), *rest])

    def write_census(self, folder: Path) -> None:
        """Write census.json into a run's folder."""
        replace_file(folder / "census.json", json.dumps(self.census.as_json(), indent=1) + "\n")

    def record(self, records: Records) -> None:
        """Write census.json, and an event for each check and each warning. `text` has shown the checks."""
        self.write_census(records.folder)
        for check in self.checks():
            records.event("check", step=0, reason=check.summary, show=False, **check.fields)
        for reason in self.warnings():
            records.event("warning", step=0, reason=reason)


def _first_loss(v: Verdict) -> str:
    return f"first loss of '{v.name}' is {v.loss:.4f}, chance is {verdict.number(v.chance)}"


def run_checks(
    config: ChecksConfig,
    family: Family,
    module: LossModule,
    examples: Examples,
    autocast: Autocast,
    world: World,
) -> Report:
    """Run the three checks on all ranks together. The model and random streams do not change.

    Args:
        config: the findings that are expected or allowed.
        family: the model's family.
        module: the raw model with its loss, prepared by the policy, without DDP.
        examples: `examples(start, stop)` returns a list of examples for each of this rank's micro-batches from `start`
            to `stop`; fewer at the end of the data.
        autocast: returns the context of training's forward passes.
        world: the ranks.
    """
    start = time.perf_counter()
    made = world.on_all_ranks(partial(_batches_of, family, module, examples, config.batches))
    assert made is not None
    measure = partial(_measure, family, module, made, autocast, world)
    # In the passes of a sharded model a rank raises its error at once: the others may be inside of a pass.
    share = measure() if is_sharded(module) else world.on_all_ranks(measure)
    assert share is not None
    censuses = world.gather(made.census)
    readings, movements = zip(*world.gather(share), strict=True)
    total = _count_more(reduce(add, censuses), family, examples, config.batches, world)
    names = dict.fromkeys(name for one in readings for name in one)
    chance = family.chance() if has(family, "chance") else {}
    verdicts = [
        judge(name, reduce(add, (one[name] for one in readings if name in one)), chance.get(name.split("/")[0]))
        for name in names
    ]
    probed = family.streams if has(family, *PROBED) else ()
    moved = {stream: reduce(Movement.join, (one[stream] for one in movements)) for stream in probed}
    measured = sum(census.samples for census in censuses)
    seconds = round(time.perf_counter() - start, 3)
    lacking = [f"{what} (no `{name}`)" for name, what in NEEDED.items() if not has(family, name)]
    return Report(config, total, verdicts, moved, seconds, measured, lacking)


def _count_more(total: Census, family: Family, examples: Examples, start: int, world: World) -> Census:
    """Count the labels of more micro-batches, twice as many each time, until all required tokens are decided."""
    while total.undecided() and total.samples < COUNTED:
        share = world.on_all_ranks(partial(_census_of, family, examples, start, 2 * start))
        assert share is not None
        more = reduce(add, world.gather(share))
        if not more.samples:
            break
        total, start = total + more, 2 * start
    return total


def _census_of(family: Family, examples: Examples, start: int, stop: int) -> Census:
    groups = examples(start, stop)
    return take_census(family, chain.from_iterable(groups), [family.collate(list(group)) for group in groups])


class Made(NamedTuple):
    """What a rank checks: examples by micro-batch, the batches on the model's device, their labels, and a batch with a
    row for each stream.
    """

    groups: Sequence[Sequence[Any]]
    batches: list[Batch]
    census: Census
    rows: Batch


def _batches_of(family: Family, module: LossModule, examples: Examples, number: int) -> Made:
    groups = examples(0, number)
    batches = [family.collate(list(group)) for group in groups]
    census = take_census(family, chain.from_iterable(groups), batches)
    device = next(module.parameters()).device
    rows = family.collate([groups[0][0]] * len(family.streams))  # each stream's targets get their own row
    return Made(groups, [batch.to(device) for batch in batches], census, rows.to(device))


def _measure(
    family: Family, module: LossModule, made: Made, autocast: Autocast, world: World
) -> tuple[dict[str, Reading], dict[str, Movement]]:
    passes = Passes(family, module, autocast, made.batches, made.groups, world)
    readings = read_losses(family, module, made.batches, autocast, made.groups, passes)
    probed = has(family, *PROBED)
    movements = probe(family, module.model, made.rows, autocast, passes.logits) if probed else {}
    passes.finish()
    return readings, movements
