"""rawloop: a PyTorch training loop to read in one sitting. It trains correctly, or it says exactly why not.

The public names are imported when they are first used, so `import rawloop` costs no torch.
"""

import importlib
from typing import Any

_HOME = {
    "Batch": "rawloop.contracts",
    "BatchPlan": "rawloop.data.batches",
    "BestTracker": "rawloop.checkpoint",
    "CheckpointConfig": "rawloop.checkpoint",
    "CheckpointManager": "rawloop.checkpoint",
    "CodeCache": "rawloop.data.codes",
    "EvaluationConfig": "rawloop.evaluate",
    "Evaluator": "rawloop.evaluate",
    "Family": "rawloop.contracts",
    "Labels": "rawloop.contracts",
    "LossModule": "rawloop.losses",
    "NamedOptimizerState": "rawloop.optim_state",
    "PrecisionConfig": "rawloop.precision",
    "PrecisionPolicy": "rawloop.precision",
    "RawloopError": "rawloop.errors",
    "Records": "rawloop.records",
    "Run": "rawloop.loop",
    "RunConfig": "rawloop.config",
    "Sample": "rawloop.contracts",
    "SchedulerState": "rawloop.optim_state",
    "StreamLoss": "rawloop.contracts",
    "TrainState": "rawloop.loop",
    "UserError": "rawloop.errors",
    "World": "rawloop.dist",
    "build_run": "rawloop.build",
    "call": "rawloop.inputs",
    "open_world": "rawloop.dist",
    "train": "rawloop.loop",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rawloop' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
