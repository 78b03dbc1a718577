"""What the checks before step 0 look for and found: what is expected and allowed, the tables, what stops the run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rawloop.diagnose import causality, verdict
from rawloop.diagnose.causality import Movement
from rawloop.diagnose.census import Census
from rawloop.diagnose.config import ChecksConfig as ChecksConfig
from rawloop.diagnose.verdict import Verdict
from rawloop.errors import TrainingError, UserError
from rawloop.records import Records

CENSUS = "census.json"


@dataclass
class Report:
    """What all ranks found together."""

    config: ChecksConfig
    census: Census
    verdicts: list[Verdict]
    movements: dict[str, Movement]
    seconds: float
    samples: int  # whose loss was measured; labels may have been counted of more

    def text(self) -> str:
        """All three as tables."""
        loss = verdict.lines(self.verdicts, self.samples, self.config.expect_chance)
        return "\n".join([*self.census.lines(), "", *loss, "", *causality.lines(self.movements)])

    def stop_if_wrong(self) -> None:
        """Raise what stops the run, in one message.

        Raises:
            UserError: a required token is never a target.
            TrainingError: a loss or the causality is wrong.
        """
        found = self.problems()
        if found:
            kind = UserError if self.census.missing() and not self.config.allow_missing_targets else TrainingError
            raise kind(f"checks before step 0: {'; '.join(found)}")

    def problems(self) -> list[str]:
        """What stops the run, a sentence each with the key that lets it pass."""
        return [*self.wrong_labels(), *self.wrong_losses(), *self.wrong_causality()]

    def wrong_labels(self) -> list[str]:
        """What the census found that stops the run."""
        missing = self.census.missing()
        if not missing or self.config.allow_missing_targets:
            return []
        return [
            f"{'; '.join(missing)}: never a target in {self.census.samples} samples, so that the model does not "
            "learn it, or unlearns it, and generation never stops: mend the labels, look at them with `rawloop "
            "inspect`, or train all the same with --checks.allow_missing_targets true"
        ]

    def wrong_losses(self) -> list[str]:
        """What the first loss shows that stops the run: of a codebook only what its whole stream does not show."""
        streams = {v.name: v.kind for v in self.verdicts}
        mismatches = [
            f"first loss of '{v.name}': MISMATCH, {v.mismatch}{_pass('MISMATCH')}"
            for v in self.verdicts
            if v.mismatch and "mismatch" not in self.config.allow
        ]
        return mismatches + [
            f"first loss of '{v.name}' is {v.loss:.4f}, chance is {v.chance:.4f}: {v.kind}, {v.why}{_pass(v.kind)}"
            for v in self.verdicts
            if v.kind in ("LEAK", "DEAD") and v.kind.lower() not in self.config.allow
            if "/" not in v.name or v.kind != streams[v.name.split("/")[0]]
        ]

    def wrong_causality(self) -> list[str]:
        """What the causality probe found that stops the run."""
        return [
            f"causality of '{stream}': {movement.outcome()}, {movement.why()}{_pass(movement.outcome())}"
            for stream, movement in self.movements.items()
            if movement.outcome() in ("LEAK", "BLIND") and movement.outcome().lower() not in self.config.allow
        ]

    def warnings(self) -> list[str]:
        """What is likely wrong and does not stop the run: samples without targets, prompts, unexpected chance."""
        return [*self.label_warnings(), *self.loss_warnings()]

    def label_warnings(self) -> list[str]:
        """Samples from which nothing is learnt, and prompts that are."""
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
        """A first loss of chance that nobody expects."""
        if self.config.expect_chance:
            return []
        guesses = [v for v in self.verdicts if v.kind == "CHANCE" and "/" not in v.name]
        mismatches = [
            f"first loss of '{v.name}': MISMATCH, {v.mismatch}{_pass('MISMATCH')}"
            for v in self.verdicts
            if v.mismatch and "mismatch" not in self.config.allow
        ]
        return mismatches + [
            f"first loss of '{v.name}' is {v.loss:.4f}, chance is {v.chance:.4f}: {v.why}; if that is expected, set "
            "checks.expect_chance to true"
            for v in guesses
        ]

    def write_census(self, folder: Path) -> None:
        """Write census.json into a run's folder."""
        temporary = folder / f".tmp-{CENSUS}"
        temporary.write_text(json.dumps(self.census.as_json(), indent=1) + "\n")
        temporary.rename(folder / CENSUS)

    def record(self, records: Records) -> None:
        """Write down what was found, an event for each check and one for each warning."""
        self.write_census(records.folder)
        for reason, fields in self.events():
            records.event("check", step=0, reason=reason, **fields)
        for reason in self.warnings():
            records.event("warning", step=0, reason=reason)

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """A sentence and further values for each of the three checks."""
        missing = self.census.missing()
        unseen = self.census.unseen()
        census = "; ".join(
            [f"missing among the targets: {'; '.join(missing)}"] * bool(missing)
            + [f"not judged, as no sample that was looked at needs it: {'; '.join(unseen)}"] * bool(unseen)
        )
        census = census or "every required token is a target"
        loss = [f"{v.name} {v.loss:.4f} {v.kind}" for v in self.verdicts if "/" not in v.name]
        loss += [f"{v.name} MISMATCH" for v in self.verdicts if v.mismatch]
        moved = {stream: {**m._asdict(), "outcome": m.outcome()} for stream, m in self.movements.items()}
        outcomes = ", ".join(f"{stream} {values['outcome']}" for stream, values in moved.items())
        return [
            (f"census of {self.census.samples} samples: {census}", {"check": "census", "seconds": self.seconds}),
            (f"first loss: {', '.join(loss)}", {"check": "loss", "verdicts": [v._asdict() for v in self.verdicts]}),
            (f"causality: {outcomes}", {"check": "causality", "streams": moved}),
        ]


def _pass(kind: str) -> str:
    return f" (to train all the same: --checks.allow '[{kind.lower()}]')"
