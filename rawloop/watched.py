"""The watch inside a run: what it is shown in each step, where its findings go, and when a capsule is written.

Nothing here changes a number of the training, and nothing is read from the device beyond what the policy has measured,
except for a finding. Capsules and traces are local to a rank: no collective is called.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rawloop.contracts import Batch
from rawloop.dist import unwrap_ddp
from rawloop.errors import InterruptedUpdate, LostRank, UserError, add_place
from rawloop.kept import Again, Window, batch_state, contents
from rawloop.precision.gradients import Measured, StepResult
from rawloop.run import Run
from rawloop.seed import RngCapture
from rawloop.sharding import is_sharded
from rawloop.spike_watch import SpikeWatch
from rawloop.waiting import is_lost_rank
from rawloop.watch.capsule import Capsule, Capsules, FlightRecorder
from rawloop.watch.config import WatchConfig
from rawloop.watch.detectors import all_detectors
from rawloop.watch.spikes import spiked
from rawloop.watch.subject import Pass
from rawloop.watch.watch import Watch


class RunWatch(SpikeWatch):
    """Shows a run's steps to a watch. Findings become events, and bad steps capsules, with the run's config as YAML."""

    def __init__(self, watch: Watch, capsules: Capsules, config: str = "") -> None:
        super().__init__(watch.subject.config)
        self.watch, self.capsules, self.config = watch, capsules, config
        self.recorder = FlightRecorder(watch.subject.config.steps)
        self._rng = RngCapture()
        self._window = Window([], {})
        self._why = ""  # why the next step is to be kept
        self._told = 0
        self._written: Path | None = None
        self._error: Exception | None = None  # for which a capsule was written, if it was possible

    def start(self, run: Run) -> None:
        """Look at the run before its first step."""
        super().start(run)
        self.watch.start()
        self._tell(run)

    def finish(self) -> None:
        """Look at the end, unless a rank is lost, for which the device may wait without end."""
        if self._run is not None and not (self._error is not None and is_lost(self._error)):
            self.watch.finish()
            self._tell(self._run)

    def fields(self) -> dict[str, Any]:
        """Return the loss scales of the last steps, for the event of a skip."""
        return {"last_scales": [kept.record.scale for kept in self.recorder.steps]}

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """Write a capsule of the last step if another rank is lost, which is noticed between steps too."""
        try:
            yield
        except Exception as error:
            if self._error is not error and is_lost(error):
                self._failed(run, error)
            raise

    @contextmanager
    def step(self, run: Run, window: list[Batch], targets: Mapping[str, int]) -> Iterator[None]:
        """Watch one step. Of an error that leaves it, a capsule is written, and the error names it."""
        self._window = Window(window, dict(targets))
        self._written = self._spike = None
        ids = tuple(name for batch in window for name in batch.ids)
        self.watch.begin(window, ids, step=run.state.step)
        self._tell(run)
        try:
            yield
        except Exception as error:
            self._failed(run, error)
            raise
        record = self.watch.record
        self.watch.end()
        lr = max(float(group["lr"]) for group in run.optimizer.param_groups)
        self.recorder.keep(record, self._window.rng[0], lr)
        self._tell(run)

    def before_pass(self) -> None:
        """Keep the random streams that the next pass starts with."""
        self._window.rng.append(self._rng.take())

    def after_pass(self, run: Run, batch: Batch, loss: Tensor) -> None:
        """Keep a pass, so that it can be run again."""
        window, scale = self._window, run.policy.window.scale
        window.losses.append(loss.detach())
        again = Again(unwrap_ddp(run.module), run.policy, run.weights, window.targets, run.world.size, scale, batch)
        self.watch.record.passes.append(Pass(again.inputs, again, window.rng[-1], tuple(batch.ids), scale))

    def look(self, found: Measured, result: StepResult, *, last: bool) -> None:
        """Show the measured gradients to the watch, and write a capsule if there is a reason."""
        run = self._run
        assert run is not None
        with run.world.working():  # a trace may take long: the others wait
            self.watch.measured(found.loss, found.norm, found.scale, result.applied)
            self.watch.before_update()
            if self._spike is not None:
                self.watch.findings.add(spiked(self._spike, self.watch.record, run.world.rank))
            self._tell(run)
            why = "the policy leaves this mode: too many skips in a row" if last else self._spike or self._why
            if run.preemption and run.preemption.keep:
                run.preemption.keep, why = False, why or "asked for by SIGUSR2"
            if why:
                self._write(run, why, found)
        self._count(found, result)

    def restart(self) -> None:
        """Forget what the detectors know of the weights: the run has gone back to a checkpoint."""
        self.watch.finish()
        self.watch.detectors = all_detectors()
        self.watch.start()

    def _tell(self, run: Run) -> None:
        """Write findings that were not told before as events. An alarm is also a line, and a reason for a capsule."""
        findings = list(self.watch.findings)[self._told :]
        self._told += len(findings)
        for finding in findings:
            self._event(run, finding)
            if not finding.ordinary:
                self._why = f"finding {finding.kind}: {finding.what}"

    def _failed(self, run: Run, error: Exception) -> None:
        """Write a capsule of a step that has failed, and add to the error what is known."""
        self._error = error
        if isinstance(error, UserError):
            return
        self.watch.explain(error)
        lost = is_lost(error)
        if self._written is None:
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._write(run, why, None, host_only=lost or isinstance(error, InterruptedUpdate))
        alarms = [finding.text() for finding in self.watch.findings.alarms if finding.last == run.state.step]
        if alarms:
            add_place(error, " ".join(alarms), name_own=True)
        if self._written is not None:
            add_place(error, f"the step is kept: rawloop replay {self._written}", name_own=True)

    def _write(self, run: Run, why: str, found: Measured | None, host_only: bool = False) -> None:
        """Write a capsule, if there is room. A failure is an event: it must not hide what is wrong with the step."""
        self._why = ""
        if not self.capsules.has_room():
            return
        record, world = self.watch.record, run.world

        def make() -> Capsule:
            facts = self.recorder.facts(record, world, why, self.watch.findings.alarms)
            cuda = world.device.type == "cuda"
            facts["device"] = torch.cuda.get_device_name(world.device) if cuda else world.device.type
            capsule = contents(run, facts, self._window, record.passes, found, host_only=host_only)
            capsule.states["earlier"] = self.recorder.state(lambda batches: [*map(batch_state, batches)])
            capsule.texts = {"config.yaml": self.config}
            return capsule

        self._written, problem = self.capsules.write(run.state.step, make)
        reason = problem or f"kept the step in {self._written}: {why}"
        run.record_or_defer(partial(run.records.event, "capsule", step=run.state.step, reason=reason))


def is_lost(error: Exception) -> bool:
    """Return whether an error means that another rank is lost. The device may then wait for it without end."""
    return isinstance(error, LostRank) or is_lost_rank(error)


def build_watch(run: Run, folder: Path, settings: WatchConfig, config: str = "") -> SpikeWatch | None:
    """Build the watch of a run that is ready to start, and let it look at the run. `config` is YAML, for capsules.

    If the weights are sharded, it is only the guard against spikes, or nothing.
    """
    policy, world = run.policy, run.world
    assert policy.model is not None
    if is_sharded(policy.model):
        guard = SpikeWatch(settings) if settings.spikes != "off" else None
        if guard:
            guard.start(run)
        return guard
    watch = Watch(
        policy.model,
        run.optimizer,
        policy.scaler,
        config=settings,
        world=world,
        named=policy.named_parameters,
        say=lambda text: None,  # findings are events
    )
    built = RunWatch(watch, Capsules(folder, settings, world.rank), config)
    built.start(run)
    return built
