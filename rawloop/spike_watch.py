"""A run's guard against spikes: it sees losses and gradient norms, and nothing of the weights.

`RunWatch` adds all that a watch finds. A run with sharded weights has the guard alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from rawloop.contracts import Batch
from rawloop.errors import TrainingError
from rawloop.precision.gradients import Measured, StepResult
from rawloop.records import json_value, to_stderr
from rawloop.run import Run
from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding
from rawloop.watch.spikes import SpikeGuard, spiked
from rawloop.watch.subject import StepRecord


class SpikeWatch:
    """Finds spikes before their update, and has them skipped if the settings say so."""

    def __init__(self, settings: WatchConfig) -> None:
        self.settings = settings
        self._run: Run | None = None
        self._guard = SpikeGuard()
        self._spike: str | None = None
        self._spikes = 0  # skipped ones
        self._ids: tuple[str, ...] = ()

    def start(self, run: Run) -> None:
        """See the run before its first step."""
        self._run = run
        run.policy.observer = self

    def finish(self) -> None:
        """See the end of the run."""

    def restart(self) -> None:
        """See that the run has gone back to a checkpoint."""

    def before_pass(self) -> None:
        """See that a pass begins."""

    def after_pass(self, run: Run, batch: Batch, loss: Tensor) -> None:
        """See a pass that is done."""

    def fields(self) -> dict[str, Any]:
        """Return values for the event of a skip."""
        return {}

    def running(self, run: Run) -> AbstractContextManager[None]:
        """Watch the whole run."""
        return nullcontext()

    @contextmanager
    def step(self, run: Run, window: list[Batch], targets: Mapping[str, int]) -> Iterator[None]:
        """Watch one step."""
        self._spike, self._ids = None, tuple(name for batch in window for name in batch.ids)
        yield

    def judge(self, found: Measured) -> str | None:
        """Return why a finite update is not to be applied, or None."""
        spikes = self.settings.spikes
        self._spike = self._guard.objection(found.loss, found.norm) if spikes != "off" else None
        return self._spike if spikes in ("skip", "rollback") else None

    def look(self, found: Measured, result: StepResult, *, last: bool) -> None:
        """Tell of a spike, or keep the numbers of a step that was applied."""
        self._count(found, result)
        if self._spike is None:
            return
        run = self._run
        assert run is not None
        record = StepRecord(run.state.step, ids=self._ids, loss=found.loss, grad_norm=found.norm)
        self._event(run, spiked(self._spike, record, run.world.rank, kept=False))

    def _event(self, run: Run, finding: Finding) -> None:
        """Write a finding as an event. An alarm is also a line."""
        fields, alarm = json_value(finding.as_json()), not finding.ordinary
        text = f"{'' if alarm else 'ordinary: '}{finding.reason()}"
        write = partial(run.records.event, "finding", step=finding.step, reason=text, show=alarm)
        run.record_or_defer(partial(write, finding=fields))
        if alarm and not run.world.is_main:
            to_stderr(f"[finding] {finding.text()}")

    def _count(self, found: Measured, result: StepResult) -> None:
        if self._spike is None and result.applied:
            self._guard.keep(found.loss, found.norm)
        self._spikes += result.objected

    def check(self, run: Run) -> None:
        """Raise TrainingError, on all ranks, if spikes are no exceptions any more."""
        most = self.settings.max_spikes
        if self._spikes > most:
            where = f"the last at step {run.state.step} ({self._spike or 'on another rank'})"
            raise run.world.raised_on_all(
                TrainingError(
                    f"{self._spikes} steps were skipped as spikes, more than watch.max_spikes ({most}), {where}: look "
                    "at their samples in the events, lower optim.lr, or raise watch.max_spikes"
                )
            )

    @property
    def rolls_back(self) -> bool:
        """Whether a skipped spike is to be followed by going back to the last checkpoint."""
        return self.settings.spikes == "rollback"
