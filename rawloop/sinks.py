"""TensorBoard and Weights & Biases, which receive copies of a run's metrics."""

import io
import secrets
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import soundfile

from rawloop.errors import UserError
from rawloop.settings import RecordsConfig

Value = float | int | str | None


def check_packages(config: RecordsConfig) -> None:
    """Raise UserError if the config asks for a package that is not installed."""
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if wanted and find_spec(package) is None:
            raise UserError(
                f"records.{package} is true, but the package {package} is not installed: "
                f"run `pip install {package}`, or set records.{package} to false"
            )


class Sinks:
    """Copies metrics to TensorBoard and Weights & Biases, as the config says."""

    def __init__(self, folder: Path, config: RecordsConfig, purge_step: int | None) -> None:
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        if config.wandb:
            identity = folder / "wandb-id"  # so that a resumed run continues the same run on W&B
            if not identity.exists():
                identity.write_text(secrets.token_hex(8))
            options = {"name": folder.name, "id": identity.read_text().strip(), "dir": str(folder), "resume": "allow"}
            self._wandb = import_module("wandb").init(project=config.wandb_project, **options)
            # W&B drops values for a step before its own counter, as after a resume: log the step as a metric instead.
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Write the metrics of one step; only numbers go to TensorBoard."""
        if self._tensorboard:
            for name in (name for name, value in values.items() if isinstance(value, float | int)):
                self._tensorboard.add_scalar(name, values[name], step)
        if self._wandb:
            self._wandb.log({"step": step, **values})

    def sounds(self, step: int, wavs: Mapping[str, bytes]) -> None:
        """Write clips, the contents of wav files by name, of one step."""
        for name, wav in wavs.items() if self._tensorboard or self._wandb else ():
            sound, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
            if self._tensorboard and len(sound):
                self._tensorboard.add_audio(name, sound[None], step, rate)
            if self._wandb and len(sound):
                self._wandb.log({"step": step, name: import_module("wandb").Audio(sound, sample_rate=rate)})

    def close(self) -> None:
        """Flush both, and end their threads."""
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()
