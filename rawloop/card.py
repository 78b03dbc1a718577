"""The model card of an exported model: base, data, settings, losses, precision and versions of its run.

It names no folder of this machine: of a path it has the last part.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rawloop.adapters.fingerprint import stored_fingerprint
from rawloop.changes import flat, stored_settings
from rawloop.checkpoint.best import BestRecord
from rawloop.checkpoint.slots import read_manifest
from rawloop.config import RunConfig
from rawloop.families import HUB_ID
from rawloop.records import EVENTS, METRICS, read_events, read_metrics
from rawloop.trained import Trained

TOLD = ("precision", "fallback", "skip")  # events of the precision
PATHS = ("model.path", "model.codec", "data.train", "data.eval", "data.codes")
USE = """```python
from transformers import AutoProcessor, {model}

model = {model}.from_pretrained("{name}", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}")
```
"""


def model_card(trained: Trained, name: str, dtype: str, model_class: str) -> str:
    """Return the card as Markdown with its YAML head.

    Args:
        trained: the exported model.
        name: of the folder.
        dtype: of the written weights.
        model_class: the class that wrote the weights.
    """
    base = _shown(trained.model.path)
    head = ["---", "library_name: transformers", "tags: [rawloop]"]
    head += [f"base_model: {base}"] if HUB_ID.fullmatch(base) else []
    settings = trained.settings
    how = _how(settings) if settings else ("an adapter, merged" if trained.adapter else "a whole model")
    lines = [*head, "---", "", f"# {name}", "", f"{how[:1].upper()}{how[1:]}, in {dtype}.", ""]
    lines += ["| | |", "|---|---|", f"| base | {base}{_revision(trained)} |"]
    if trained.slot is not None:
        lines += _of_run(trained, trained.slot)
    lines += ["", "## Use", "", USE.format(model=model_class, name=name)]
    if settings:
        lines += ["## Settings other than the defaults", "", "| key | value |", "|---|---|", *_changed(settings), ""]
    return "\n".join(lines)


def _how(settings: Mapping[str, Any]) -> str:
    adapter = settings["adapter"]
    if adapter["mode"] != "lora":
        return "fine-tuned in full"
    targets = ", ".join(adapter["target_modules"])
    return f"fine-tuned with LoRA of rank {adapter['rank']} and alpha {adapter['alpha']:g} on {targets}, merged"


def _revision(trained: Trained) -> str:
    weights = (stored_fingerprint(trained.adapter)[0] if trained.adapter else {}).get("weights")
    parts = [f"revision {trained.model.revision}"] if trained.model.revision else []
    parts += [f"frozen weights {weights[:16]}"] if weights else []
    return f" ({', '.join(parts)})" if parts else ""


def _of_run(trained: Trained, slot: Path) -> list[str]:
    """Return rows about the run: data, steps, losses, precision and versions."""
    manifest, run, rows = read_manifest(slot), slot.parent.parent, []
    facts = (stored_settings(slot) or {}).get("facts", {})
    for key in ("data.train", "data.eval"):
        if key in facts:
            rows.append(_row(key, f"{_shown(str(flat(trained.settings)[key]))}: {facts[key]}"))
    rows.append(_row("step", f"{manifest.step:,}"))
    if (best := BestRecord.read(manifest.meta.get("best"))) is not None:
        rows.append(_row(f"best {best.metric}", f"{best.value:.4f} at step {best.step:,}"))
    if (run / METRICS).is_file():
        rows += _losses([line for line in read_metrics(run) if int(line["step"] or 0) <= manifest.step])
    if (run / EVENTS).is_file():
        told = Counter((event["kind"], str(event["reason"])) for event in read_events(run) if event["kind"] in TOLD)
        rows += [_row(kind, f"{why}{f' ({n} times)' if n > 1 else ''}") for (kind, why), n in told.items()]
    versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items() if version)
    return [*rows, _row("versions", versions)]


def _losses(lines: list[dict[str, Any]]) -> list[str]:
    """Return a row for each loss of an evaluation: the first and the last."""
    rows = []
    evaluated = [line for line in lines if isinstance(line.get("eval_loss"), float)]
    for name in sorted({key for line in evaluated for key in line if key.startswith("eval_loss")}):
        found = [(line["step"], line[name]) for line in evaluated if isinstance(line.get(name), float)]
        if found and name.count("/") < 2:  # not of every codebook
            rows.append(_row(name, ", ".join(f"{value:.4f} at step {step:,}" for step, value in (found[0], found[-1]))))
    return rows


def _row(name: str, value: str) -> str:
    return f"| {name} | {' '.join(value.split()).replace('|', '&#124;')} |"


def _changed(settings: Mapping[str, Any]) -> list[str]:
    default = flat(dataclasses.asdict(RunConfig()))
    rows = []
    for key, value in flat(settings).items():
        if key in default and value != default[key]:
            rows.append(_row(key, _shown(str(value)) if key in PATHS else str(value)))
    return rows


def _shown(path: str) -> str:
    """Return a hub id, or the last part of a path."""
    return path if HUB_ID.fullmatch(path) and not Path(path).exists() else Path(path).name
