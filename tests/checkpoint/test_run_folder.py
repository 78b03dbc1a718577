"""Claiming a run folder: nothing of another run is ever written over."""

from pathlib import Path

import pytest

from rawloop.checkpoint import claim_run_folder
from rawloop.dist import World
from rawloop.errors import UserError


def test_a_fresh_folder_is_made_and_one_with_other_things_is_taken(tmp_path: Path) -> None:
    claim_run_folder(tmp_path / "a" / "b", World(), resume=False)
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "notes.txt").write_text("mine")
    claim_run_folder(tmp_path, World(), resume=False)


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.jsonl", "events.jsonl", "best.json", "best", "checkpoints"])
def test_a_folder_of_another_run_is_refused_unless_resuming(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).mkdir()
    with pytest.raises(UserError, match=rf"already holds a run \({mark}\): it has no checkpoint"):
        claim_run_folder(tmp_path, World(), resume=False)
    claim_run_folder(tmp_path, World(), resume=True)


def test_the_advice_is_to_resume_where_that_is_possible(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(UserError, match="pass --resume latest to go on with it, or another --output"):
        claim_run_folder(tmp_path, World(), resume=False)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file"):
        claim_run_folder(tmp_path / "x", World(), resume=False)
    with pytest.raises(UserError, match="cannot be made"):
        claim_run_folder(tmp_path / "x" / "y", World(), resume=True)
