"""The table of what may change on a resume: every key is decided on, and what each decision means."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from rawloop.changes import (
    CHECKED,
    FIXED,
    FREE,
    NOT_KEPT,
    POSITION,
    SHAPES,
    WINDOW,
    WORLD_SIZE,
    SettingsState,
    compare,
    flat,
)
from rawloop.config import RunConfig, known_keys
from rawloop.data.batches import BatchPlan
from rawloop.errors import UserError
from rawloop.families import ModelConfig
from rawloop.loop import TrainConfig


def test_every_key_of_a_config_is_decided_on_once() -> None:
    decided = [*FREE, *CHECKED, *FIXED]
    assert sorted(decided) == sorted({*known_keys(), WORLD_SIZE})
    assert NOT_KEPT <= FREE


def test_what_identifies_the_data_can_be_forced_by_keys_that_there_are() -> None:
    assert set(POSITION) == set(BatchPlan(4, 2).identity())
    assert set().union(*POSITION.values()) <= {*CHECKED, *FIXED}


def changed(key: str) -> dict[str, Any]:
    """The stored settings of a default run, of which one key had another value."""
    state = SettingsState(RunConfig(), 2).state_dict()
    *groups, name = key.split(".")
    place = state if key == WORLD_SIZE else state["config"]
    for group in groups:
        place = place[group]
    place[name] = "another" if key not in WINDOW else 7
    return state


@pytest.mark.parametrize("key", sorted({*known_keys(), WORLD_SIZE}))
def test_each_key_is_taken_or_refused_as_the_table_says(key: str) -> None:
    stored = changed(key)
    if key in NOT_KEPT:
        assert compare(stored, RunConfig(), 2) == []
        return
    if key in SHAPES:
        for forced in ([], [key]):
            with pytest.raises(
                UserError, match=rf"{key} another -> .*own \({key} cannot be forced: the stored weights"
            ):
                compare(stored, replace(RunConfig(), resume="latest", resume_force=forced), 2)
        return
    if key in WINDOW:
        with pytest.raises(UserError, match=rf"run took \d+ samples .*force it by name, --resume_force '\[{key}\]'$"):
            compare(stored, RunConfig(), 2)
    elif key in FIXED:
        with pytest.raises(UserError, match=rf"{key} another -> .*force them by name, --resume_force '\[{key}\]'$"):
            compare(stored, RunConfig(), 2)
    else:
        (line,) = compare(stored, RunConfig(), 2)
        assert line.startswith(f"{key} another -> ")
    by_name = replace(RunConfig(), resume="latest", resume_force=[key])
    (line,) = compare(stored, by_name, 2)
    assert line.endswith(" (forced)")


def test_equal_settings_and_keys_of_other_versions_are_no_change() -> None:
    state = SettingsState(RunConfig(), 2).state_dict()
    assert compare(state, RunConfig(), 2) == []
    del state["config"]["optim"]["warmup_steps"]  # a key that there was not yet had its default
    state["config"]["optim"]["gone"] = 1
    assert compare(state, RunConfig(), 2) == []
    later = RunConfig()
    later.optim.warmup_steps = 5
    assert compare(state, later, 2) == ["optim.warmup_steps 0 -> 5"]


def test_a_step_of_another_number_of_samples_is_told_in_numbers() -> None:
    stored = SettingsState(replace(RunConfig(), train=TrainConfig(4, 2, max_steps=1)), 2).state_dict()
    assert len(compare(stored, replace(RunConfig(), train=TrainConfig(2, 8, max_steps=1)), 1)) == 3
    with pytest.raises(UserError) as told:
        compare(stored, replace(RunConfig(), train=TrainConfig(4, 2, max_steps=1)), 1)
    assert str(told.value) == (
        "a step of the checkpoint's run took 16 samples (2 process(es) x train.batch_size 4 x train.accumulation 2), "
        "and would now take 8 (1 process(es) x train.batch_size 4 x train.accumulation 2), in another data order: set "
        "train.accumulation to 4, or force it by name, --resume_force '[world_size]'"
    )
    with pytest.raises(UserError, match="choose them so that it is 16 again, or force it"):
        compare(stored, replace(RunConfig(), train=TrainConfig(3, 1, max_steps=1)), 1)


def test_what_can_be_forced_is_offered_beside_what_cannot() -> None:
    config = RunConfig()
    stored = SettingsState(replace(config, seed=1, adapter=replace(config.adapter, rank=4)), 1).state_dict()
    with pytest.raises(UserError, match=r"by name, --resume_force '\[seed\]' \(adapter.rank cannot be forced"):
        compare(stored, config, 1)


def test_weights_of_streams_are_one_value() -> None:
    weighted = replace(RunConfig(), model=ModelConfig(stream_weights={"text": 0.5}))
    assert flat(asdict(weighted))["model.stream_weights"] == {"text": 0.5}
    assert set(flat(asdict(weighted))) == known_keys()
