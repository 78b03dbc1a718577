"""A watch over somebody's own training loop, whose scaler, dtypes, optimizer and loss stay as they are."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.records import json_value
from rawloop.watch.bad_steps import BadSteps
from rawloop.watch.config import WatchConfig
from rawloop.watch.detectors import all_detectors
from rawloop.watch.findings import Cause, Finding, Findings, merged
from rawloop.watch.guard import Guard, guarded, part_of
from rawloop.watch.hooks import Hooks
from rawloop.watch.ids import EXPLAINS
from rawloop.watch.keeping import Keeper
from rawloop.watch.misuse import left_by, without_backward
from rawloop.watch.named import NamedWeights
from rawloop.watch.recorder import Recorder
from rawloop.watch.scalars import Scalars
from rawloop.watch.subject import Detector, Pass, StepRecord, Subject
from rawloop.watch.tape import Replay
from rawloop.watch.wrappers import bare_model, bare_optimizer, is_compiled

MOST_PASSES = 64  # of one update, that are kept to be run again
FINDINGS = "findings.jsonl"


class Watch:
    """Watches a loop and collects findings; it changes nothing that the loop computes.

    A step whose loss or gradients are not finite is run again, from a tape of its operations, to find the place.

    Args:
        model: the model that the loop calls: bare, in DDP, or compiled.
        optimizer: the optimizer, or several.
        scaler: the loop's GradScaler.
        out: a folder for findings and capsules; nothing is written without it.
        config: the settings.
        detectors: what to look for; everything by default.
        world: the ranks; those of the current process group by default.
        named: returns the parameters that the optimizers hold, by name; by default those of the model.
        say: called with each new alarm as text; by default it is printed to stderr.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        scaler: Any = None,
        *,
        out: str | Path | None = None,
        config: WatchConfig | None = None,
        detectors: Sequence[Detector] | None = None,
        world: World | None = None,
        named: Callable[[], Iterable[tuple[str, nn.Parameter]]] | None = None,
        say: Callable[[str], object] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"rawloop.Watch takes a model (nn.Module) first: it got a {type(model).__name__}")
        bare = bare_model(model)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        for one in optimizers:
            if not isinstance(one, Optimizer):
                raise UserError(f"rawloop.Watch takes torch optimizers after the model: it got a {type(one).__name__}")
        optimizers = [bare_optimizer(one) for one in optimizers]
        world, config = world or World.current(), config or WatchConfig()
        self.guard = Guard(self._failed)
        self.subject = Subject(
            bare, optimizers, scaler, named or NamedWeights(bare), world, config, is_compiled(model), self.guard
        )
        self.out = Path(out) if out else None
        self.findings = Findings()
        self.detectors = list(all_detectors() if detectors is None else detectors)
        self.say = say or (lambda text: tqdm.write(text, file=sys.stderr))
        self.record = StepRecord(0)
        self._recorder = Recorder(model, bare, self._called, self._backward, self.guard)
        self._scalars = Scalars(self.subject)
        self._hooks = Hooks(self.subject, self._recorder, self._scalars, lambda: self.record, self._before, self._after)
        self._replays: deque[tuple[Replay, tuple[str, ...], bool]] = deque(maxlen=MOST_PASSES)
        self._keeper = Keeper(self.subject, self.out) if self.out is not None else None
        self._contexts = ExitStack()
        self._left = self._began = time.perf_counter()
        self._bad = BadSteps(self.subject, self._keeper, self._add, self._tell)
        self._step = self._measured = 0

    def __enter__(self) -> Self:
        self._contexts.enter_context(self._hooks.installed())
        self._contexts.enter_context(self._recorder.installed())
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._contexts.close()
        if self.record.applied is not None:
            self.end()
        self.finish()

    def start(self) -> None:
        """Look before the first step. A loop without `with` calls this, `begin`, `measured`, ... and `finish`."""
        self._look("start")
        self._bad.start()
        self._left = time.perf_counter()

    def finish(self) -> None:
        """Look at the end."""
        self._look("finish")

    @contextmanager
    def step(self, batch: Any = None, ids: Sequence[str] = ()) -> Iterator[None]:
        """Watch one step of the loop, in a `with` block: forward and backward passes, and the update if it makes one.

        Args:
            batch: a nest of tensors.
            ids: the names of the samples, one for each row.
        """
        self.begin(batch, ids)
        record, backwards = self.record, self.record.facts.backwards
        try:
            with self._recorder.block(batch), self._hooks.clipping():
                try:
                    yield
                except Exception as error:
                    self._recorder.pause()
                    self._ended_by(error)
                    raise
                self._recorder.pause()
                if self._recorder.calls and record.facts.backwards == backwards and record.applied is None:
                    self._without_backward()
        finally:
            record.seconds = (record.seconds or 0.0) + time.perf_counter() - self._began
            if record.applied is not None or (record.facts.backwards and not self.subject.optimizers):
                self.end()
            self._left = time.perf_counter()

    def begin(self, batch: Any = None, ids: Sequence[str] = (), *, step: int | None = None) -> None:
        """Begin a step. Without `step`, continue one that has not made its update yet, with another micro-batch.

        A loop that counts its applied updates gives them as `step`, and adds its passes to the record.
        """
        if step is not None:
            self._step, self.record = step, StepRecord(step)
        elif self.record.applied is not None:
            self.end()
        if self._bad.damage:
            self._bad.look_for_damage(self.record.step)
        record = self.record
        record.step, record.batch, record.ids = self._step, batch, tuple(ids)
        self._began = time.perf_counter()
        record.data_seconds = (record.data_seconds or 0.0) + self._began - self._left
        record.probing = record.probing or self._bad.streak > 0 or self.subject.config.is_due(self._step)
        self._look("batch", record)

    def measured(
        self, loss: float | None, grad_norm: float | None, scale: float = 1.0, applied: bool | None = None
    ) -> None:
        """Take the numbers of a step from a loop that has measured them; they are as in `StepRecord`."""
        record = self.record
        record.loss, record.grad_norm, record.scale, record.applied = loss, grad_norm, scale, applied

    def before_update(self) -> None:
        """Look at the gradients, after `measured` and before the update."""
        record = self.record
        with self._recorder.silent(), torch.enable_grad():
            self._look("gradients", record)
            if all(number is None or math.isfinite(number) for number in (record.loss, record.grad_norm)):
                self._bad.streak = 0
            else:
                self._bad.trace(record)
            self._bad.keep(record, self.findings.alarms, self._scalars.losses)

    def end(self) -> None:
        """Look at a step after its update, or after the decision to skip it, and count it."""
        record = self.record
        record.seconds = record.seconds or time.perf_counter() - self._began
        self._look("end", record)
        if self._bad.streak and record.applied:
            self._bad.look_for_damage(record.step)
        self._bad.ended(record)
        self._left = time.perf_counter()
        self._step += record.applied is not False
        self._replays.clear()
        self._hooks.clear()
        self.record = StepRecord(self._step)

    def explain(self, error: Exception) -> bool:
        """Look for what explains an exception that has left the step, and return whether something does."""
        if isinstance(error, IndexError | RuntimeError):
            self._look("failed", self.record)
        return any(one.kind in EXPLAINS and one.last == self.record.step for one in self.findings)

    @guarded("the look at an exception")
    def _ended_by(self, error: Exception) -> None:
        if isinstance(error, StopIteration) or self._bad.damage:  # the end of a loader; known
            return
        if not self.explain(error):
            line = self._recorder.lines.in_traceback(error.__traceback__)
            self._add([left_by(self.subject, self.record, error, str(line))])
        if self.record.applied is None:
            self._bad.keep(self.record, self.findings.alarms, self._scalars.losses, failed=True)

    @guarded("the look at a step without a backward pass")
    def _without_backward(self) -> None:
        """Report a block that left before its backward pass, as a loop does that has its own test of the loss."""
        record, (scalar, line, replay) = self.record, self._recorder.last_scalar()
        value = None if scalar is None else float(scalar)
        self._add([without_backward(self.subject, record, value, str(line))])
        if value is not None and not math.isfinite(value) and replay is not None and not replay.why_not():
            before = record.loss, record.passes
            record.loss, record.passes = value, [Pass(replay.inputs, replay, replay.rng, record.ids)]
            with self._recorder.silent(), torch.enable_grad():
                self._bad.trace(record)
                self._bad.keep(record, self.findings.alarms, self._scalars.losses)
            record.loss, record.passes = before

    def _called(self, training: bool) -> None:
        self.record.facts.calls += 1
        self.record.facts.evaluating += not training

    def _backward(self, roots: list[Tensor], replay: Replay) -> Callable[[bool], None]:
        facts, ids = self.record.facts, self.record.ids
        after, scaled = self._hooks.before_backward(roots), facts.scaled

        def done(succeeded: bool) -> None:
            after(succeeded)
            self._replays.append((replay, ids, facts.scaled > scaled))

        return done

    @guarded("the measurement of gradients")
    def _before(self) -> None:
        """Measure and look, once for each window."""
        record, facts = self.record, self.record.facts
        if self._measured == facts.backwards and record.loss is not None:
            return
        self._measured = facts.backwards
        loss, norm, scale = self._scalars.read(facts, record.probing)
        record.scales = {id(optimizer): scale for optimizer in self._scalars.still_scaled(facts)}
        self.measured(loss if facts.backwards else None, norm, scale if facts.is_scaled else 1.0, record.applied)
        record.passes, record.why_no_passes = [], ""
        for replay, ids, scaled in self._replays:
            if reason := replay.why_not():
                record.why_no_passes = reason
            else:
                record.passes.append(Pass(replay.inputs, replay, replay.rng, ids, scale if scaled else 1.0))
        self.before_update()

    def _after(self, applied: bool) -> None:
        self.record.applied = applied or bool(self.record.applied)
        if applied:
            self._replays.clear()  # the weights have changed: the passes so far cannot run again
            self._recorder.after_update()

    def _look(self, method: str, *record: StepRecord) -> None:
        for detector in self.detectors:
            if getattr(type(detector), method) is getattr(Detector, method):
                continue
            found: list[Finding] = []  # has those before an error, too
            self.guard.call(part_of(detector), _extend, found, getattr(detector, method), self.subject, *record)
            if found and not self._bad.damage:
                self._add(merged(found))

    def _failed(self, part: str, cause: Cause) -> None:
        what = f"{part} failed and is off from here on; the other parts of the watch go on"
        self._add([Finding("watch_failed", what, (cause,), self.record.step, self.subject.world.rank)])

    def _add(self, findings: Iterable[Finding]) -> None:
        for finding in self.findings.extend(findings):
            finding.world_size = self.subject.world.size
            if self.out is not None:
                self.guard.call("the file of the findings", self._write, self.out, finding)
            if not finding.ordinary:
                self._tell(fill(finding.text(), 120))

    def _tell(self, text: str) -> None:
        self.guard.call("the printing of alarms", self.say, text)

    def _write(self, out: Path, finding: Finding) -> None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / FINDINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(json_value(finding.as_json()), allow_nan=False) + "\n")
        if self._keeper is not None:
            self._keeper.found(finding)


def _extend(found: list[Finding], look: Callable[..., Iterable[Finding]], *args: Any) -> None:
    found += look(*args)
