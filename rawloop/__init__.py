"""rawloop: a PyTorch training loop to read in one sitting. It trains correctly, or it says exactly why not.

The public names are imported when they are first used, so `import rawloop` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    name: f"rawloop.{module}"
    for module, names in {
        "adapters.config": "AdapterConfig",
        "adapters.lora": "add_adapter",
        "build": "build_run",
        "checkpoint.best": "BestTracker",
        "checkpoint.config": "CheckpointConfig",
        "checkpoint.manager": "CheckpointManager",
        "checkpoints": "Checkpoints",
        "config": "RunConfig",
        "contracts": "Batch Family FolderState Labels Sample Stateful StreamLoss",
        "data.batches": "BatchPlan",
        "data.codes": "CodeCache",
        "dist": "World open_world",
        "errors": "BadSample CheckpointError InterruptedUpdate LostRank Preempted RawloopError TrainingError UserError",
        "evaluate": "Evaluation Evaluator",
        "inputs": "call",
        "listen.config": "ListenConfig",
        "listen.listener": "Ears Listener Prompt",
        "loop": "train",
        "run": "Run TrainState",
        "losses": "LossModule as_stream_losses",
        "optim": "build_optimizer lr_at",
        "optim_state": "NamedOptimizerState SchedulerState",
        "precision.config": "PrecisionConfig",
        "precision.gradients": "StepResult",
        "precision.policy": "PrecisionPolicy",
        "preempt": "Preemption watch_signals",
        "records": "Records read_events read_metrics",
        "seed": "RngState seed_all",
        "settings": "DDPConfig EvaluationConfig OptimConfig RecordsConfig TrainConfig",
        "watch.config": "WatchConfig",
        "watch.findings": "Finding",
        "watch.watch": "Watch",
    }.items()
    for name in names.split()
}

if TYPE_CHECKING:  # for type checkers and editors, which run nothing
    from rawloop.adapters.config import AdapterConfig as AdapterConfig
    from rawloop.adapters.lora import add_adapter as add_adapter
    from rawloop.build import build_run as build_run
    from rawloop.checkpoint.best import BestTracker as BestTracker
    from rawloop.checkpoint.config import CheckpointConfig as CheckpointConfig
    from rawloop.checkpoint.manager import CheckpointManager as CheckpointManager
    from rawloop.checkpoints import Checkpoints as Checkpoints
    from rawloop.config import RunConfig as RunConfig
    from rawloop.contracts import Batch as Batch
    from rawloop.contracts import Family as Family
    from rawloop.contracts import FolderState as FolderState
    from rawloop.contracts import Labels as Labels
    from rawloop.contracts import Sample as Sample
    from rawloop.contracts import Stateful as Stateful
    from rawloop.contracts import StreamLoss as StreamLoss
    from rawloop.data.batches import BatchPlan as BatchPlan
    from rawloop.data.codes import CodeCache as CodeCache
    from rawloop.dist import World as World
    from rawloop.dist import open_world as open_world
    from rawloop.errors import BadSample as BadSample
    from rawloop.errors import CheckpointError as CheckpointError
    from rawloop.errors import InterruptedUpdate as InterruptedUpdate
    from rawloop.errors import LostRank as LostRank
    from rawloop.errors import Preempted as Preempted
    from rawloop.errors import RawloopError as RawloopError
    from rawloop.errors import TrainingError as TrainingError
    from rawloop.errors import UserError as UserError
    from rawloop.evaluate import Evaluation as Evaluation
    from rawloop.evaluate import Evaluator as Evaluator
    from rawloop.inputs import call as call
    from rawloop.listen.config import ListenConfig as ListenConfig
    from rawloop.listen.listener import Ears as Ears
    from rawloop.listen.listener import Listener as Listener
    from rawloop.listen.listener import Prompt as Prompt
    from rawloop.loop import train as train
    from rawloop.losses import LossModule as LossModule
    from rawloop.losses import as_stream_losses as as_stream_losses
    from rawloop.optim import build_optimizer as build_optimizer
    from rawloop.optim import lr_at as lr_at
    from rawloop.optim_state import NamedOptimizerState as NamedOptimizerState
    from rawloop.optim_state import SchedulerState as SchedulerState
    from rawloop.precision.config import PrecisionConfig as PrecisionConfig
    from rawloop.precision.gradients import StepResult as StepResult
    from rawloop.precision.policy import PrecisionPolicy as PrecisionPolicy
    from rawloop.preempt import Preemption as Preemption
    from rawloop.preempt import watch_signals as watch_signals
    from rawloop.records import Records as Records
    from rawloop.records import read_events as read_events
    from rawloop.records import read_metrics as read_metrics
    from rawloop.run import Run as Run
    from rawloop.run import TrainState as TrainState
    from rawloop.seed import RngState as RngState
    from rawloop.seed import seed_all as seed_all
    from rawloop.settings import DDPConfig as DDPConfig
    from rawloop.settings import EvaluationConfig as EvaluationConfig
    from rawloop.settings import OptimConfig as OptimConfig
    from rawloop.settings import RecordsConfig as RecordsConfig
    from rawloop.settings import TrainConfig as TrainConfig
    from rawloop.watch.config import WatchConfig as WatchConfig
    from rawloop.watch.findings import Finding as Finding
    from rawloop.watch.watch import Watch as Watch
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'rawloop' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *sorted(_HOME)]
