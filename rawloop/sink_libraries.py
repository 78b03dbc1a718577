"""The logging libraries behind `rawloop.sink_process`: each opens one run, and writes the lines of its metrics.

A method raises whatever its library raises. The sink is then closed, and opened again for the same line.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml


class Opening(NamedTuple):
    """What a sink is opened with: the run's folder, the project, the run's settings, and where TensorBoard begins."""

    folder: str
    project: str
    settings: dict[str, Any]
    purge_step: int | None = None

    @property
    def name(self) -> str:
        """The name of the run."""
        return Path(self.folder).resolve().name

    def identity(self, sink: str, make: Callable[[], str]) -> tuple[str, bool]:
        """Return the run's id in a sink, and whether this call made it. A resumed run continues under its id."""
        file = Path(self.folder) / f"{sink}-id"
        if file.exists():
            return file.read_text().strip(), False
        made = make()
        file.write_text(made)
        return made, True


class Sink:
    """One run in one logging library."""

    def __init__(self, opening: Opening) -> None:
        """Open the run."""

    @classmethod
    def check(cls, project: str) -> None:
        """Raise an error if the library is not set up."""

    @classmethod
    def mistakes(cls) -> tuple[type[Exception], ...]:
        """Return the errors of `check` that waiting does not mend."""
        return ()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the metrics of one step."""
        raise NotImplementedError

    def sounds(self, step: int, wavs: Mapping[str, str]) -> None:
        """Write clips: names and paths of wav files."""

    def close(self, complete: bool) -> None:
        """End the run; it is `complete` if it has reached its last step."""


class TensorBoard(Sink):
    """Event files in `tensorboard/` of the run's folder, written without torch, which takes seconds to import."""

    def __init__(self, opening: Opening) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events, self._summaries = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(Path(opening.folder) / "tensorboard"))
        if opening.purge_step is not None:  # hides what an earlier process wrote from this step on
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(opening.purge_step, session_log=started)
        if opening.settings:
            text = yaml.safe_dump(opening.settings, sort_keys=False, allow_unicode=True)
            self._add_text(opening.purge_step or 0, "config", f"```yaml\n{text}```")

    @classmethod
    def check(cls, project: str) -> None:
        """Import it."""
        import_module("tensorboard.summary.writer.event_file_writer")

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(step=step, wall_time=time.time(), **content))
        self._writer.flush()  # so that it is shown at once, and a full disk is noticed here

    def _add_values(self, step: int, values: list[dict[str, Any]]) -> None:
        made = [self._summaries.Summary.Value(**value) for value in values]
        self._add(step, summary=self._summaries.Summary(value=made))

    def _add_text(self, step: int, name: str, text: str) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

        kind = self._summaries.SummaryMetadata.PluginData
        about = kind(plugin_name="text", content=TextPluginData(version=0).SerializeToString())
        metadata = self._summaries.SummaryMetadata(plugin_data=about)
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        self._add_values(step, [{"tag": f"{name}/text_summary", "metadata": metadata, "tensor": tensor}])

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write scalars."""
        self._add_values(step, [{"tag": name, "simple_value": value} for name, value in numbers(values)])

    def sounds(self, step: int, wavs: Mapping[str, str]) -> None:
        """Write clips as they are."""
        import soundfile

        for name, path in wavs.items():
            about = soundfile.info(path)
            audio = self._summaries.Summary.Audio(
                sample_rate=about.samplerate,
                num_channels=about.channels,
                length_frames=about.frames,
                encoded_audio_string=Path(path).read_bytes(),
                content_type="audio/wav",
            )
            self._add_values(step, [{"tag": name, "audio": audio}])

    def close(self, complete: bool) -> None:
        """Close the file."""
        self._writer.close()


class Wandb(Sink):
    """A run on Weights & Biases, or with WANDB_MODE=offline in `wandb/` of the run's folder."""

    def __init__(self, opening: Opening) -> None:
        os.environ.setdefault("WANDB_CONSOLE", "off")  # this process prints nothing of the training
        self._wandb: Any = import_module("wandb")
        identity, _ = opening.identity("wandb", lambda: secrets.token_hex(8))
        options = {"name": opening.name, "id": identity, "dir": opening.folder, "resume": "allow"}
        self._run = self._wandb.init(project=opening.project, **options)
        self._run.config.update(opening.settings, allow_val_change=True)
        # W&B drops values for a step before its own counter, as after a resume: log the step as a metric instead.
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def check(cls, project: str) -> None:
        """Look for a key."""
        import_module("wandb").login()

    @classmethod
    def mistakes(cls) -> tuple[type[Exception], ...]:
        """A missing key."""
        return (import_module("wandb").errors.UsageError,)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write metrics, strings too."""
        self._run.log({"step": step, **values})

    def sounds(self, step: int, wavs: Mapping[str, str]) -> None:
        """Write clips."""
        self._run.log({"step": step, **{name: self._wandb.Audio(path) for name, path in wavs.items()}})

    def close(self, complete: bool) -> None:
        """Wait for the upload."""
        self._run.finish(exit_code=0 if complete else 1)


class MLflow(Sink):
    """A run in MLflow's tracking store, MLFLOW_TRACKING_URI."""

    def __init__(self, opening: Opening) -> None:
        # Its own trials would hold up a line for minutes, and are repeated anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._client = import_module("mlflow").MlflowClient()
        self._entities: Any = import_module("mlflow.entities")
        # Of a store in files each name is a path, and beside a file `loss` there can be no folder for `loss/audio`.
        self._slash = "." if self._client.tracking_uri.startswith(("file:", "/", ".")) else "/"

        def create() -> str:
            found = self._client.get_experiment_by_name(opening.project)
            experiment = found.experiment_id if found else self._client.create_experiment(opening.project)
            tags = {"rawloop.folder": str(Path(opening.folder).resolve())}
            return str(self._client.create_run(experiment, run_name=opening.name, tags=tags).info.run_id)

        self._id, _ = opening.identity("mlflow", create)
        self._client.update_run(self._id, status="RUNNING")
        self._write_settings(opening.settings)

    def _write_settings(self, settings: dict[str, Any]) -> None:
        """Write settings as parameters. MLflow never changes a parameter: what a resume has changed becomes a tag."""
        known = self._client.get_run(self._id).data.params
        now = {name: str(value)[:6000] for name, value in flattened(settings)}  # MLflow's limit
        new = [self._entities.Param(name, value) for name, value in now.items() if name not in known]
        for start in range(0, len(new), 100):  # MLflow's limit for one request
            self._client.log_batch(self._id, params=new[start : start + 100])
        for name, value in now.items():
            if known.get(name, value) != value:
                self._client.set_tag(self._id, f"resumed.{name}", value)

    @classmethod
    def check(cls, project: str) -> None:
        """Open the store."""
        import_module("mlflow").MlflowClient()

    @classmethod
    def mistakes(cls) -> tuple[type[Exception], ...]:
        """A store that cannot be used."""
        return (import_module("mlflow.exceptions").MlflowException,)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers."""
        named = [(name.replace("/", self._slash), value) for name, value in numbers(values)]
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._entities.Metric(name, value, now, step) for name, value in named])

    def sounds(self, step: int, wavs: Mapping[str, str]) -> None:
        """Write none: a store of files needs rights of its own. The clips are in the run's folder."""

    def close(self, complete: bool) -> None:
        """Mark the run as finished, or as ended before its last step."""
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


class Trackio(Sink):
    """A run of trackio: in a database of this machine, or in the space that TRACKIO_SPACE_ID names."""

    def __init__(self, opening: Opening) -> None:
        trackio: Any = import_module("trackio")
        # trackio resumes by name: runs of equal names in other folders are other runs.
        name, new = opening.identity("trackio", lambda: f"{opening.name}-{secrets.token_hex(2)}")
        options = {"resume": "never" if new else "allow", "embed": False}
        self._run = trackio.init(project=opening.project, name=name, config=opening.settings, **options)
        self._audio = trackio.Audio

    @classmethod
    def check(cls, project: str) -> None:
        """Check the project's name."""
        import_module("trackio").SQLiteStorage.validate_project_name(project)

    @classmethod
    def mistakes(cls) -> tuple[type[Exception], ...]:
        """A name that it does not take."""
        return (ValueError,)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write metrics, strings too."""
        self._run.log(dict(values), step=step)

    def sounds(self, step: int, wavs: Mapping[str, str]) -> None:
        """Write clips."""
        self._run.log({name: self._audio(path) for name, path in wavs.items()}, step=step)

    def close(self, complete: bool) -> None:
        """Send what is left."""
        self._run.finish()


SINKS: Mapping[str, type[Sink]] = MappingProxyType(
    {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}
)


def numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the values that are numbers."""
    yield from ((name, value) for name, value in values.items() if isinstance(value, float | int))


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested settings."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
