"""The findings of the checks before step 0: tables, warnings, and what stops the run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rawloop.diagnose import causality, verdict
from rawloop.diagnose.causality import Movement
from rawloop.diagnose.census import Census
from rawloop.diagnose.config import ChecksConfig as ChecksConfig
from rawloop.diagnose.verdict import Verdict
from rawloop.errors import TrainingError, UserError
from rawloop.files import replace_file
from rawloop.records import Records

CENSUS = "census.json"


@dataclass
class Report:
    """The findings of all ranks together."""

    config: ChecksConfig
    census: Census
    verdicts: list[Verdict]
    movements: dict[str, Movement]
    seconds: float
    samples: int  # whose loss was measured; labels may have been counted in more
    not_checked: list[str] = field(default_factory=list)  # the family has no method for it

    def text(self) -> str:
        """All three as tables."""
        loss = verdict.lines(self.verdicts, self.samples, self.config.expect_chance)
        rest = [self._without()] if self.not_checked else []
        return "\n".join([*self.census.lines(), "", *loss, "", *causality.lines(self.movements), *rest])

    def _without(self) -> str:
        return f"not checked, as the family lacks a method for it: {', '.join(self.not_checked)}"

    def stop_if_wrong(self) -> None:
        """Raise all findings that stop the run in one message: `UserError` of labels, else `TrainingError`."""
        found = self.problems()
        if found:
            raise (UserError if self.wrong_labels() else TrainingError)(f"checks before step 0: {'; '.join(found)}")

    def problems(self) -> list[str]:
        """Return the findings that stop the run, a sentence each with the key that lets it pass."""
        return [*self.wrong_labels(), *self.wrong_losses(), *self.wrong_causality()]

    def wrong_labels(self) -> list[str]:
        """Return the findings of the census that stop the run."""
        missing = self.census.missing()
        if not missing or self.config.allow_missing_targets:
            return []
        return [
            f"{'; '.join(missing)}: never a target in {self.census.samples} samples, so that the model does not "
            "learn it, or unlearns it, and generation never stops: mend the labels, look at them with `rawloop "
            "inspect`, or train all the same with --checks.allow_missing_targets true"
        ]

    def wrong_losses(self) -> list[str]:
        """Return the findings of the first loss that stop the run; codebooks if they differ from their stream."""
        kinds = {v.name: v.kind for v in self.verdicts}
        found = [(f"first loss of '{v.name}': MISMATCH, {v.mismatch}", "mismatch") for v in self.verdicts if v.mismatch]
        found += [
            (f"{_first_loss(v)}: {v.kind}, {v.why}", v.kind.lower())
            for v in self.verdicts
            if v.kind in ("LEAK", "DEAD") and ("/" not in v.name or v.kind != kinds[v.name.split("/")[0]])
        ]
        return self._not_allowed(found)

    def wrong_causality(self) -> list[str]:
        """Return the findings of the causality probe that stop the run."""
        return self._not_allowed(
            (f"causality of '{stream}': {movement.outcome()}, {movement.why()}", movement.outcome().lower())
            for stream, movement in self.movements.items()
            if movement.outcome() in ("LEAK", "BLIND")
        )

    def _not_allowed(self, found: Iterable[tuple[str, str]]) -> list[str]:
        return [
            f"{text} (to train all the same: --checks.allow '[{kind}]')"
            for text, kind in found
            if kind not in self.config.allow
        ]

    def warnings(self) -> list[str]:
        """Return the findings that do not stop the run: samples without targets, learnt prompts, unexpected chance."""
        return [*self.label_warnings(), *self.loss_warnings()]

    def label_warnings(self) -> list[str]:
        """Name samples from which nothing is learnt, and prompts that are learnt."""
        found = []
        silent, prompts = self.census.silent, self.census.prompts()
        if silent:
            found.append(
                f"{len(silent)} of {self.census.samples} samples have no target in any stream, so that nothing is "
                f"learnt from them: {', '.join(dict.fromkeys(silent))}; mend their labels, or leave them out"
            )
        if prompts:
            turns = ", ".join(f"{count:,} in {role} turns" for role, count in prompts.items())
            found.append(
                f"prompts are learnt: there are targets where nothing is to be said ({turns}); mask them, or look at "
                "them with `rawloop inspect`"
            )
        return found

    def loss_warnings(self) -> list[str]:
        """Name streams whose first loss is that of guessing, if that is not expected."""
        return [
            f"{_first_loss(v)}: {v.why}; if that is expected, set checks.expect_chance to true"
            for v in self.verdicts
            if v.kind == "CHANCE" and "/" not in v.name and not self.config.expect_chance
        ]

    def write_census(self, folder: Path) -> None:
        """Write census.json into a run's folder."""
        replace_file(folder / CENSUS, json.dumps(self.census.as_json(), indent=1) + "\n")

    def record(self, records: Records) -> None:
        """Write down what was found, an event for each check and one for each warning."""
        self.write_census(records.folder)
        for reason, fields in self.events():
            records.event("check", step=0, reason=reason, **fields)
        for reason in self.warnings():
            records.event("warning", step=0, reason=reason)

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return a sentence and further values for each of the three checks, and for what was not checked."""
        judged = {
            "missing among the targets": self.census.missing(),
            "not judged, as no sample that was looked at needs it": self.census.unseen(),
        }
        census = "; ".join(f"{what}: {'; '.join(clauses)}" for what, clauses in judged.items() if clauses)
        census = census or "every required token is a target"
        loss = [f"{v.name} {v.loss:.4f} {v.kind}" for v in self.verdicts if "/" not in v.name]
        loss += [f"{v.name} MISMATCH" for v in self.verdicts if v.mismatch]
        moved = {stream: {**m._asdict(), "outcome": m.outcome()} for stream, m in self.movements.items()}
        outcomes = ", ".join(f"{stream} {values['outcome']}" for stream, values in moved.items())
        rest = [(self._without(), {"check": "none"})] if self.not_checked else []
        return [
            (f"census of {self.census.samples} samples: {census}", {"check": "census", "seconds": self.seconds}),
            (f"first loss: {', '.join(loss)}", {"check": "loss", "verdicts": [v._asdict() for v in self.verdicts]}),
            (f"causality: {outcomes or 'not checked'}", {"check": "causality", "streams": moved}),
            *rest,
        ]


def _first_loss(v: Verdict) -> str:
    return f"first loss of '{v.name}' is {v.loss:.4f}, chance is {verdict.number(v.chance)}"
