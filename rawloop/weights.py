"""`init_from`: a new run that starts from the weights of a checkpoint, and from nothing else of it."""

from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rawloop.adapters.files import ModelFiles
from rawloop.adapters.fingerprint import BaseFingerprint, stored_fingerprint
from rawloop.checkpoint.reader import stored_part
from rawloop.checkpoint.slots import CHECKPOINTS, MANIFEST, find_latest, is_slot_name, resolve_best, verify
from rawloop.contracts import Family
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.files import sha256_file, sha256_files
from rawloop.sharding import assign, write_part

PARTS = ("adapter", "model")
FORMS = "name RUN/best, RUN/latest, a checkpoint such as RUN/checkpoints/step-00000500, or an adapter/ or model/ folder"


@dataclass(frozen=True)
class Source:
    """The weights that a run starts from.

    Attributes:
        given: the value of `init_from`.
        folder: the folder with the weights.
        slot: the slot that contains the folder; None for a copied folder.
        step: of the slot.
        digest: SHA-256 of the slot's manifest, or of the copied files.
        damage: the newer checkpoints that were skipped, and why; or "".
    """

    given: str
    folder: Path
    slot: Path | None
    step: int | None
    digest: str
    damage: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the origin of the weights, for the checkpoints of the run."""
        place = str((self.slot or self.folder).resolve())
        return {"given": self.given, "checkpoint": place, "step": self.step, "digest": self.digest}


def find_source(given: str, world: World) -> Source:
    """Find the weights that `init_from` names, the same on all ranks. Every rank verifies every file."""
    source = world.on_all_ranks(lambda: _find(given))
    assert source is not None
    world.check_equal({"init_from": f"digest {source.digest[:16]}"}, "put the same checkpoint on all machines")
    return source


def resolve(path: Path) -> tuple[Path | None, str]:
    """Return the slot of RUN/best or RUN/latest, or any other path unchanged; and why newer slots were skipped."""
    if path.name != "latest" or path.exists():
        return resolve_best(path), ""
    found = find_latest(path.parent)
    return found.slot, "; ".join(found.damaged.values())


def _find(given: str) -> Source:
    named = Path(expanduser(given))
    path, damage = resolve(named)
    if path is None:
        reasons = f" ({damage})" if damage else ""
        raise UserError(f"init_from is '{given}', and no checkpoint of {named.parent} is whole{reasons}: {FORMS}")
    if not path.is_dir():
        raise UserError(f"init_from is '{given}', which is no folder: {FORMS}")
    if (path / CHECKPOINTS).is_dir():
        raise UserError(f"init_from is '{given}', which is a run: say {given}/best or {given}/latest")
    path = path.resolve()
    files = [file for file in path.glob("*.safetensors") if not file.name.startswith(".")]
    if (path / MANIFEST).exists() or (is_slot_name(path) and not files):
        slot, folder = path, next((path / part for part in PARTS if (path / part).is_dir()), None)
    else:
        slot, folder = path.parent, path if files else None
    if not (slot / MANIFEST).exists() and slot != path:
        if folder is None:
            raise UserError(f"init_from is '{given}', which is no checkpoint and holds no safetensors file: {FORMS}")
        return Source(given, folder, None, None, sha256_files(files))
    manifest = verify(slot)
    if folder is None or folder.name not in PARTS:
        raise UserError(f"init_from is '{given}', which holds no weights of a model: {FORMS}")
    return Source(given, folder, slot, manifest.step, sha256_file(slot / MANIFEST), damage)


def load_weights(source: Source, model: nn.Module, base: BaseFingerprint, family: Family) -> list[str]:
    """Load the weights into a model, before a precision policy casts it. Returns notices for the user.

    Trained weights become float32, so that nothing is rounded before the policy casts them. If the checkpoint has
    float32 masters of 16-bit weights, the weights take the values of the masters.
    """
    files = ModelFiles(model, family.load_model)
    is_adapter = (source.folder / "adapter_config.json").is_file()
    if is_adapter != files.is_adapter:
        kinds = {True: "an adapter (adapter.mode lora)", False: "a whole model (adapter.mode full)"}
        raise UserError(
            f"init_from is '{source.given}', which holds {kinds[is_adapter]}, and this run trains "
            f"{kinds[files.is_adapter]}: set adapter.mode to the checkpoint's, or point model.path at a merged or "
            "whole model instead"
        )
    notices = _check_base(source, base) if is_adapter else []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            assign(parameter, parameter.data.float())
    files.load(source.folder)
    precision = stored_part(source.slot, "precision") if source.slot else None
    kept = precision["masters"] if precision else {}
    if kept.get("kind") == "Masters":
        named = dict(model.named_parameters())
        for name in sorted(kept["kept"].keys() & named.keys()):
            write_part(named[name], kept["kept"][name])
        notices.append(f"the weights take the values of the checkpoint's {len(kept['kept'])} float32 masters")
    elif kept.get("kept"):  # residuals, which older versions of rawloop had
        notices.append("the weights are taken in 16 bits, without the checkpoint's residuals")
    if source.damage:
        notices.append(f"skipped a damaged checkpoint: {source.damage}")
    place = f"{source.slot} at step {source.step}" if source.slot else f"{source.folder}, which has no manifest"
    return [
        f"weights from {place} (digest {source.digest[:16]}); counters, optimizer, schedule, random streams and best "
        "value start anew",
        *notices,
    ]


def _check_base(source: Source, base: BaseFingerprint) -> list[str]:
    stored, unchecked = stored_fingerprint(source.folder)
    if unchecked:
        return [f"the base model could not be compared with that of {source.folder}: {unchecked}"]
    base.load_state_dict(stored)
    return [base.notice] if base.notice else []
