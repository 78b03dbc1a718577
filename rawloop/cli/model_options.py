"""The options of the commands that take a trained model: generate, export and merge. Needs no torch."""

from dataclasses import dataclass, field
from typing import Literal

from rawloop.cli.options import Device
from rawloop.errors import UserError
from rawloop.families.config import ModelConfig
from rawloop.settings import SamplingConfig

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass
class GenerateOptions:
    """What is generated, and from which model.

    Args:
        run: folder of a run, checkpoint, adapter or model, or a hub id.
        text: what to say.
        lines: a file with a text on each line; or with records as in data.train (.jsonl, .json).
        output: the wav file, or for --lines a folder; for text a file. Default: print it.
        checkpoint: best, latest or a checkpoint's folder of the run. Default: best.
        adapter: folder with adapter_config.json, in place of a run.
        reference: a clip whose voice speaks; or, for models that hear, what they hear.
        reference_text: the words of the reference clip.
        scene: the scene, such as quiet_room or a sentence. Default: that of the training.
        max_seconds: the longest clip, in seconds.
        max_tokens: the longest text, in tokens.
        batch_size: prompts that are spoken at a time.
        seed: seed of the sampling; the same prompts and seed give the same result.
        device: where to run.
        dtype: dtype of the weights; auto is as stored, on the CPU float32.
        sampling: how tokens are drawn.
        model: the model, in place of a run.
    """

    run: str | None = None
    text: str | None = None
    lines: str | None = None
    output: str | None = None
    checkpoint: str | None = None
    adapter: str | None = None
    reference: str | None = None
    reference_text: str | None = None
    scene: str | None = None
    max_seconds: float = 30.0
    max_tokens: int = 256
    batch_size: int = 8
    seed: int = 0
    device: Device = "auto"
    dtype: Literal["auto", Dtype] = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.lines):
            raise UserError("give --text, or --lines with a file of texts")
        if self.scene and self.lines:
            raise UserError("--scene is given with --lines: write the records of a .jsonl file, each with its scene")
        if self.reference_text and not self.reference:
            raise UserError("--reference_text is given without --reference: name the clip that speaks these words")
        for name in ("max_seconds", "max_tokens", "batch_size"):
            if not 0 < getattr(self, name) < 1e9:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be above 0")


@dataclass
class ExportOptions:
    """Which model is written, and where.

    Args:
        output: the folder; must not exist yet.
        run: folder of a run, checkpoint, adapter or model.
        checkpoint: best, latest or a checkpoint's folder of the run. Default: best.
        adapter: folder with adapter_config.json, in place of a run.
        dtype: dtype of the written weights.
        push: upload the folder to this private repository of the hub (owner/name).
        dry_run: write the folder, and only show what --push would upload.
        model: the model, in place of a run.
    """

    output: str
    run: str | None = None
    checkpoint: str | None = None
    adapter: str | None = None
    dtype: Dtype = "float32"
    push: str | None = None
    dry_run: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        if self.dry_run and not self.push:
            raise UserError("--dry_run is given without --push: it shows what --push would upload")


@dataclass
class MergeOptions:
    """Which adapter is merged, and where the model is written.

    Args:
        adapter: folder with adapter_config.json.
        output: folder for the merged model; must not exist yet.
        dtype: dtype of the written weights.
        model: the base model.
    """

    adapter: str
    output: str
    dtype: Dtype = "float32"
    model: ModelConfig = field(default_factory=ModelConfig)
