"""A trained model by what names it: a run, a checkpoint, an adapter or a whole model; and how it is loaded for use."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rawloop.adapters.merge import base_of, load_base, merge_adapter
from rawloop.changes import stored_settings
from rawloop.checkpoint.slots import BEST, CHECKPOINTS, MANIFEST, find_best, is_slot_name, verify
from rawloop.contracts import Family, has
from rawloop.data.config import DataConfig
from rawloop.errors import CheckpointError, RawloopError, UserError
from rawloop.families import ADAPTER, ModelConfig
from rawloop.weights import PARTS, resolve

C = TypeVar("C", ModelConfig, DataConfig)
Say = Callable[[str], None]
LATEST = "latest"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BOUND = 1e-4  # of the largest logit; float32 rounding gives about 1e-6


@dataclass(frozen=True)
class Trained:
    """A model to use: a base model with an adapter, or a whole model.

    Attributes:
        model: the base model, or the whole model with its tokenizer.
        adapter: the adapter's folder, or None.
        weights: the folder of a whole model's weights, if a checkpoint has them.
        slot: the checkpoint, if it comes from one.
        data: how the data of its run was read.
        settings: the config of its run; empty if it is not known.
    """

    model: ModelConfig
    adapter: Path | None = None
    weights: Path | None = None
    slot: Path | None = None
    data: DataConfig = field(default_factory=DataConfig)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return str(self.slot or self.adapter or self.model.path)


def find_trained(place: str | None, checkpoint: str | None, adapter: str | None, options: ModelConfig) -> Trained:
    """Find a trained model.

    Args:
        place: the folder of a run, of a checkpoint, of an adapter or of a whole model, or a hub id.
        checkpoint: best, latest or a checkpoint's folder, of the run `place`.
        adapter: an adapter's folder, in place of `place`.
        options: settings of the model; those that are not the default override the run's. A `path` alone is a whole
            model.

    Raises:
        UserError: nothing or several things are named, there is no such model, or its base is to be quantised.
        CheckpointError: the checkpoint is damaged.
    """
    if bool(place) + bool(adapter) > 1 or not (place or adapter or options.path):
        raise UserError("name one model: a run, a checkpoint, an adapter or a model's folder, such as runs/voice")
    if options.quantization:
        raise UserError(
            f"model.quantization is '{options.quantization}', and a trained model is used with the numbers of the base "
            "that it was trained beside, which its checkpoint knows: leave it out"
        )
    folder = Path(expanduser(place or adapter or ""))
    is_run = place is not None and (folder / CHECKPOINTS).is_dir()
    if checkpoint is not None and not is_run:
        raise UserError(f"--checkpoint is '{checkpoint}', and '{place or adapter}' is no run's folder: leave it out")
    if is_run:
        slot = slot_of(folder, checkpoint or (BEST if find_best(folder) else LATEST))
        return _of_slot(slot, options)
    if place is not None and ((folder / MANIFEST).exists() or (is_slot_name(folder) and folder.is_dir())):
        return _of_slot(slot_of(folder.parent, str(folder)), options)
    if adapter or (folder.is_dir() and (folder / ADAPTER).is_file()):
        return _of_adapter(folder, options)
    return Trained(_joined(ModelConfig, {"path": place} if place else {}, options))


def slot_of(run_folder: Path, checkpoint: str, say: Say = lambda line: None) -> Path:
    """Return the folder of `best`, `latest` or a named checkpoint, and verify all its files."""
    by_role = checkpoint in (BEST, LATEST)
    slot, damage = resolve(run_folder / checkpoint if by_role else Path(expanduser(checkpoint)))
    if slot is None and damage:
        raise CheckpointError(f"no checkpoint of {run_folder} is whole: {damage}")
    if slot is None or (by_role and not slot.is_dir()):
        raise UserError(
            f"--checkpoint is '{checkpoint}', and there is none in {run_folder}: is --output that of the run?"
        )
    if damage:
        say(f"skipped a damaged checkpoint: {damage}")
    if not (slot / MANIFEST).is_file() and not (slot.is_dir() and is_slot_name(slot)):
        raise UserError(
            f"--checkpoint is '{checkpoint}', which is no checkpoint's folder (it has no {MANIFEST}): pass best, "
            "latest, or a folder such as runs/x/checkpoints/step-00000500"
        )
    verify(slot)
    return slot


def _of_slot(slot: Path, options: ModelConfig) -> Trained:
    settings = (stored_settings(slot) or {}).get("config", {})
    part = next((slot / part for part in PARTS if (slot / part).is_dir()), None)
    if part is None or not settings:
        raise UserError(f"{slot} holds {'no weights of a model' if part is None else 'no settings of its run'}")
    model, data = _joined(ModelConfig, settings["model"], options), _joined(DataConfig, settings["data"])
    model = replace(model, activation_checkpointing=False)  # only for backward passes
    if part.name == "adapter":
        base_of(part)  # refuses what is no LoRA
        return Trained(model, part, None, slot, data, settings)
    return Trained(model, None, part, slot, data, settings)


def _of_adapter(folder: Path, options: ModelConfig) -> Trained:
    slot = folder.resolve().parent
    if (slot / MANIFEST).exists():
        verify(slot)
        if stored_settings(slot) is not None and (folder / ADAPTER).is_file():
            return _of_slot(slot, options)
    base, revision = base_of(folder)
    model = _joined(ModelConfig, {"path": base, "revision": revision}, options)
    if not model.path:
        raise UserError(f"--adapter is '{folder}', which does not name its base model: pass --model.path")
    return Trained(model, folder)


def _joined(kind: type[C], stored: Mapping[str, Any], options: C | None = None) -> C:
    """Return stored settings, without keys that are unknown now, overridden by options that are not the default."""
    known, default = {item.name for item in fields(kind)}, asdict(kind())
    given = {name: value for name, value in (asdict(options) if options else {}).items() if value != default[name]}
    return kind(**{**{name: value for name, value in stored.items() if name in known}, **given})


class Loaded(NamedTuple):
    """A model in evaluation mode; `logits` are those of the probe before merging, and `said` is about the merge."""

    model: nn.Module
    logits: Tensor | None
    said: str


def probe_logits(family: Family) -> Callable[[nn.Module], Tensor] | None:
    """Return a function that runs a model on the family's fixed batch; None if the family has no such batch."""
    if not has(family, "probe", "logits"):
        return None
    batch = family.probe()

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        return torch.cat([rows.flatten() for rows in family.logits(model.eval(), batch).values()])

    return logits


def load_trained(trained: Trained, family: Family, say: Say) -> Loaded:
    """Load a model on the CPU. An adapter is merged into its base in float32, and compared with base plus adapter.

    A whole model keeps its stored dtype, and `logits` is None. `say` gets a line if the base could not be checked.

    Raises:
        RawloopError: merging changes the model.
    """
    if trained.adapter is None:
        return Loaded(family.load_model(str(trained.weights) if trained.weights else None).eval(), None, "")
    logits = probe_logits(family)
    base, said = load_base(trained.adapter, family.load_model, trained.model.path, trained.model.revision)
    if said:
        say(said)
    merged, before, difference = merge_adapter(base.float(), trained.adapter, logits or (lambda _: torch.ones(1)))
    if not difference <= BOUND:
        raise RawloopError(
            f"the merged model's logits differ from base plus adapter by {difference:.1e} of the largest logit, "
            f"more than {BOUND:.0e}: nothing was written"
        )
    done = f"logits differ by {difference:.1e} of the largest (bound {BOUND:.0e})"
    if logits is None:
        done = f"its logits were not compared, as {type(family).__name__} has no `probe` or no `logits`"
    return Loaded(merged.eval(), before, f"merged {trained.adapter} into {trained.model.path}: {done}")
