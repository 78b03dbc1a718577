"""Run folders as a run leaves them, written by hand: with any metric and any event."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from rawloop.records import json_value
from rawloop.report import compare, one

CONFIG = {
    "output": "runs/a",
    "model": {"path": "models/base", "family": "auto"},
    "adapter": {"mode": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0},
    "precision": {"mode": "amp_fp16"},
    "optim": {"lr": 0.003, "schedule": "cosine", "warmup_steps": 5},
    "train": {"batch_size": 4, "accumulation": 2},
    "data": {"train": "data/train"},
}


def lines(objects: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(json_value(one)) + "\n" for one in objects)


def event(kind: str, step: int, reason: str, **fields: Any) -> dict[str, Any]:
    return {"time": 1e9 + step, "kind": kind, "step": step, "rank": 0, "reason": reason, **fields}


def metrics(number: int = 12, **changed: list[float]) -> list[dict[str, Any]]:
    """Lines of `number` log steps, each 5 steps apart, and of an evaluation at every second of them."""
    found: list[dict[str, Any]] = []
    for k in range(number):
        loss = 13.0 - k
        books = {f"loss/audio/{book}": loss / 2 + book for book in range(3)}
        values = {"loss": loss, "loss/audio": loss / 2, **books, "grad_norm": 10.0 / (k + 1), "lr": 0.003 / (k + 1)}
        values |= {"loss_scale": 2.0 ** (16 - k), "samples_per_second": 30.0, "epoch": float(k), "skipped": 0.0}
        values |= {name: given[k] for name, given in changed.items() if k < len(given)}
        found.append({"step": 5 * k, "precision": "amp_fp16", **values})
        if k % 2 == 0:
            found.append(
                {
                    "step": 5 * k,
                    "eval_loss": loss + 0.5,
                    "eval_loss/audio": loss / 2 + 0.5,
                    "eval_seconds": 1.0,
                    "mine": 2.0,
                }
            )
    return found


EVENTS = [
    event("precision", 0, "precision.mode is 'amp_fp16'", mode="amp_fp16"),
    event("start", 0, "training to step 55", total_steps=55, world_size=2, device="cpu", torch="2.13.0"),
    event("save", 30, "wrote step-00000030"),
    event("best", 30, "eval_loss is 7.5", metric="eval_loss", value=7.5),
]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Give `write_run(name, metrics, events, config)`: the folder of a run."""

    def write(name: str = "a", found: Any = None, events: Any = EVENTS, config: Any = CONFIG, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(lines(metrics() if found is None else found))
        (folder / "events.jsonl").write_text(lines(events))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return folder

    return write


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, for tests that read the text alone."""
    for page in (one, compare):
        monkeypatch.setattr(page, "figures", lambda *_: [])


@pytest.fixture
def words() -> Callable[[str], str]:
    """Give `words(html)`: the text of a page on one line, without its drawings."""

    def text(html: str) -> str:
        bare = re.sub(r"<(svg|style|title)\b.*?</\1>", " ", html, flags=re.DOTALL)
        return " ".join(unescape(re.sub(r"<[^>]*>", " ", bare)).split())

    return text
