"""A watch over somebody's own training loop, whose scaler, dtypes, optimizer and loss stay as they are."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rawloop.dist import World, unwrap_ddp
from rawloop.errors import UserError
from rawloop.watch.batches import Batches
from rawloop.watch.calls import Calls
from rawloop.watch.changed import ChangedWeights
from rawloop.watch.config import WatchConfig
from rawloop.watch.findings import Finding, Findings
from rawloop.watch.jumps import Jumps
from rawloop.watch.leaks import Leaks
from rawloop.watch.optimizer import OptimizerSettings, OptimizerState
from rawloop.watch.rates import LearningRates
from rawloop.watch.subject import Detector, StepRecord, Subject
from rawloop.watch.updates import Updates
from rawloop.watch.weights import UnsoundWeights


class Watch:
    """Watches a loop and collects findings; it changes nothing that the loop computes.

    Args:
        model: the model that the loop calls: bare, in DDP, or compiled.
        optimizer: the optimizer, or several.
        scaler: the loop's GradScaler.
        out: a folder for findings and capsules; nothing is written without it.
        config: the settings.
        detectors: what to look for; everything by default.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"rawloop.Watch takes a model (nn.Module) first: it got a {type(model).__name__}")
        bare = bare_model(model)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.subject = Subject(
            bare,
            optimizers,
            scaler,
            named or (lambda: list(bare.named_parameters())),
            world or World.current(),
            config or WatchConfig(),
        )
        self.out = Path(out) if out else None
        self.findings = Findings()
        self.detectors = list(all_detectors() if detectors is None else detectors)
        self._hooks = ExitStack()
        self._losses: list[Tensor] = []
        self._record = StepRecord(0)
        self._left = time.perf_counter()
        self._step = 0

    def __enter__(self) -> Self:
        for optimizer in self.subject.optimizers:
            self._hooks.callback(optimizer.register_step_pre_hook(self._before_update).remove)
            self._hooks.callback(optimizer.register_step_post_hook(self._after_update).remove)
        self._look(lambda detector: detector.start(self.subject))
        self._left = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self._look(lambda detector: detector.finish(self.subject))

    @property
    def record(self) -> StepRecord:
        """The step that is under way."""
        return self._record

    def start(self) -> None:
        """Look at a loop that calls `begin`, `measured`, `before_update` and `end` itself."""
        self._look(lambda detector: detector.start(self.subject))

    def finish(self) -> None:
        """Look at the end of such a loop."""
        self._look(lambda detector: detector.finish(self.subject))

    def begin(self, batch: Any, ids: Sequence[str] = (), *, step: int) -> None:
        """Begin a step."""
        self._record = StepRecord(step, batch, tuple(ids), probing=step % self.subject.config.every == 0)
        self._left = time.perf_counter()
        self._look(lambda detector: detector.batch(self.subject, self._record))

    def measured(self, loss: float, grad_norm: float, scale: float, applied: bool) -> None:
        """Take the numbers of the step."""
        self._record.loss, self._record.grad_norm = loss, grad_norm
        self._record.scale, self._record.applied = scale, applied

    def before_update(self) -> None:
        """Look at the gradients."""
        self._look(lambda detector: detector.gradients(self.subject, self._record))

    def end(self) -> None:
        """End the step."""
        self._record.seconds = time.perf_counter() - self._left
        self._look(lambda detector: detector.end(self.subject, self._record))

    @contextmanager
    def step(self, batch: Any = None, ids: Sequence[str] = ()) -> Iterator[None]:
        """Watch one step of the loop: its forward and backward passes, and its update if it makes one.

        Args:
            batch: a nest of tensors.
            ids: the names of the samples, one for each row.
        """
        entered = time.perf_counter()
        record = self._record
        record.step, record.batch, record.ids = self._step, batch, tuple(ids)
        record.data_seconds = entered - self._left
        record.probing = self._step % self.subject.config.every == 0
        self._look(lambda detector: detector.batch(self.subject, record))
        with self._seeing_backward():
            yield
        record.seconds = time.perf_counter() - entered
        if record.applied is None and self.subject.scaler is not None and self._losses:
            self._measure(record)
            record.applied = False
        self._look(lambda detector: detector.end(self.subject, record))
        self._step += bool(record.applied)
        self._losses.clear()
        self._record = StepRecord(self._step)
        self._left = time.perf_counter()

    @contextmanager
    def _seeing_backward(self) -> Iterator[None]:
        original = torch.autograd.backward

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            original(tensors, *args, **kwargs)
            for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
                self._losses.append(tensor.detach())

        torch.autograd.backward = backward
        try:
            yield
        finally:
            torch.autograd.backward = original

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._measure(self._record)
        self._look(lambda detector: detector.gradients(self.subject, self._record))

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._record.applied = True

    def _measure(self, record: StepRecord) -> None:
        scale = float(self.subject.scaler.get_scale()) if self.subject.scaler is not None else 1.0
        grads = [p.grad for _, p in self.subject.named() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)) if grads else torch.zeros(1)
        losses = torch.stack([loss.float().sum().to(norms.device) for loss in self._losses] or [torch.tensor(math.nan)])
        record.grad_norm, record.loss = torch.stack([torch.linalg.vector_norm(norms), losses.sum() / scale]).tolist()

    def _look(self, method: Callable[[Detector], Iterable[Finding]]) -> None:
        for detector in self.detectors:
            self.findings.extend(method(detector))


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and DDP."""
    while True:
        inner = unwrap_ddp(getattr(model, "_orig_mod", model))
        if inner is model:
            return model
        model = inner


def all_detectors() -> list[Detector]:
    """Return a new detector of every kind."""
    optimizers = [LearningRates(), Updates(), OptimizerSettings(), OptimizerState()]
    return [UnsoundWeights(), ChangedWeights(), *optimizers, Batches(), Calls(), Leaks(), Jumps()]
