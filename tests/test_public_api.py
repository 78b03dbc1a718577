"""The door for scripts: names that are typed, complete, imported on demand, and nothing else."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

import rawloop

# What a script needs that brings its own loop.
NEEDED = """
World PrecisionPolicy PrecisionConfig Evaluator Evaluation EvaluationConfig Checkpoints CheckpointManager
CheckpointConfig NamedOptimizerState SchedulerState RngState Records RecordsConfig DDPConfig LossModule StreamLoss call
build_run train Run RunConfig RawloopError UserError CheckpointError TrainingError Preempted Batch Stateful open_world
"""


def test_everything_that_a_loop_of_ones_own_needs_is_there_and_nothing_else_shows() -> None:
    names = dir(rawloop)
    assert set(NEEDED.split()) <= set(names)
    assert [name for name in names if name.startswith("_")] == ["__version__"]
    for name in names:
        found = getattr(rawloop, name)
        assert name == "__version__" or found.__name__ == name
    assert rawloop.__version__ == version("rawloop")
    with pytest.raises(AttributeError, match="has no attribute 'Evaluater'"):
        rawloop.Evaluater  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_same_names_at_the_same_places() -> None:
    tree = ast.parse(Path(rawloop.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen.keys() == set(dir(rawloop)) - {"__version__"}
    for name, module in seen.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(rawloop, name)
    assert files("rawloop").joinpath("py.typed").is_file()


SNIPPET = """
import torch
import rawloop
from rawloop import Checkpoints, Evaluator, World

world: World = rawloop.World.current()
model = torch.nn.Linear(1, 1)
score = Evaluator(lambda model, batch: (batch.sum(), 1), [torch.ones(1)], model=model, world=world)
with Checkpoints("runs/x", model=model, world=world) as checkpoints:
    step: int = checkpoints.resume_or_start()
    reveal_type(checkpoints.save(step, score.run()))
    reveal_type(rawloop.__version__)
    checkpoints.save(step, "no metrics")
rawloop.Evaluater
"""


def test_a_script_is_checked_by_mypy(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SNIPPET, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    skipped = "[mypy-torch.*,transformers.*,peft.*]\nfollow_imports = skip\n"  # they take minutes
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{skipped}")
    done = subprocess.run(
        [*command, "--config-file", "mypy.ini", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[2] for line in lines[:-1]] == [
        'note: Revealed type is "bool"',
        'note: Revealed type is "str"',
        'error: Argument 2 to "save" of "Checkpoints" has incompatible type "str"; expected '
        '"Evaluation | Mapping[str, float] | None"  [arg-type]',
        'error: Module has no attribute "Evaluater"; maybe "Evaluator"?  [attr-defined]',
    ], done.stdout + done.stderr
