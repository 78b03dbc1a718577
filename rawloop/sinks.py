"""Copies of a run's metrics for TensorBoard and Weights & Biases."""

import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path


class Sinks:
    """Writes metrics to TensorBoard, if asked for, and to Weights & Biases, if given a project."""

    def __init__(self, folder: Path, tensorboard: bool, wandb_project: str | None, purge_step: int | None) -> None:
        self._tensorboard = self._wandb = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        if wandb_project is not None:
            identity = folder / "wandb-id"  # a resumed run goes on as the same run there
            if not identity.exists():
                identity.write_text(secrets.token_hex(8))
            options = {"name": folder.name, "id": identity.read_text().strip(), "dir": str(folder), "resume": "allow"}
            self._wandb = import_module("wandb").init(project=wandb_project, **options)
            # W&B drops what is logged for an earlier step than its own counter, as after a rewind; ours is a metric
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Write the metrics of one step. TensorBoard gets the numbers alone: others have no place on a curve."""
        if self._tensorboard:
            for name, value in values.items():
                if isinstance(value, float | int):
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Flush, and end the threads of both."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
