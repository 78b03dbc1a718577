"""What may change on a resume: every key is decided on, and each decision is kept."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from rawloop.changes import FIXED, FRAMES, NOT_FREE, NOT_KEPT, WINDOW, WORLD_SIZE, SettingsState, compare, flat
from rawloop.config import RunConfig, known_keys
from rawloop.errors import UserError
from rawloop.families import ModelConfig
from rawloop.loop import TrainConfig
from rawloop.settings import RecordsConfig

# A key that is added to the config is free on a resume, unless `NOT_FREE` lists it. Decide which, and list it here or
# there: a key is free if no weight, sample or number of the finished steps depends on it.
FREE = """
output resume init_from device parallel
model: attention compile compile_backend activation_checkpointing trust_remote_code
data: eval allow_outside on_bad_sample num_workers strict verify
train: epochs max_steps log_every rehearse
optim: lr weight_decay beta1 beta2 eps schedule warmup_steps warmup_ratio max_norm
precision: fallback tf32 max_skips max_nonfinite_losses
precision.loss_scale: init floor ceiling growth_interval hysteresis
checks: enabled batches expect_chance allow_missing_targets allow
ddp: find_unused_parameters broadcast_buffers gradient_as_bucket_view static_graph timeout
evaluation: enabled every batch_size patience
checkpoint: save_every keep_last keep_every save_at_end asynchronous max_failures
records: report_to project progress
watch: enabled every steps capsules capsule_mb spikes max_spikes
listen: samples prompts every longest max_seconds max_tokens seed transcriber similarity
listen.sampling: temperature top_k top_p ras_window ras_repeats
"""


def free_keys() -> set[str]:
    keys = set()
    for line in FREE.strip().splitlines():
        group, _, names = line.rpartition(":")
        keys |= {f"{group}.{name}" if group else name for name in names.split()}
    return keys


def test_every_key_of_a_config_is_decided_on_once() -> None:
    assert free_keys() == known_keys() - set(NOT_FREE)
    assert set(NOT_FREE) <= {*known_keys(), WORLD_SIZE}
    assert free_keys() >= NOT_KEPT


def changed(key: str) -> dict[str, Any]:
    """The stored settings of a default run, of which one key had another value."""
    state = SettingsState(RunConfig(), 2).state_dict()
    *groups, name = key.split(".")
    place = state if key == WORLD_SIZE else state["config"]
    for group in groups:
        place = place[group]
    place[name] = "another" if key not in (*WINDOW, FRAMES) else 7
    return state


@pytest.mark.parametrize("key", sorted({*known_keys(), WORLD_SIZE}))
def test_each_key_is_taken_or_refused_as_the_table_says(key: str) -> None:
    stored = changed(key)
    way_on = "or start another run from these weights with --init_from CHECKPOINT --output NEW$"
    if key in NOT_KEPT:
        assert compare(stored, RunConfig(), 2) == []
    elif key in WINDOW:
        with pytest.raises(UserError, match=rf"run took \d+ samples .*in another data order: .*, {way_on}"):
            compare(stored, RunConfig(), 2)
    elif key == FRAMES:
        with pytest.raises(
            UserError, match=rf"took 2 micro-batches .*in another data order: set {FRAMES} to 7, {way_on}"
        ):
            compare(stored, RunConfig(), 2)
    elif NOT_FREE.get(key) == FIXED:
        with pytest.raises(UserError, match=rf"must not change within a run: {key} another -> .*: set .*, {way_on}"):
            compare(stored, RunConfig(), 2)
    else:
        (line,) = compare(stored, RunConfig(), 2)
        assert line.startswith(f"{key} another -> ")


def test_equal_settings_and_keys_of_other_versions_are_no_change() -> None:
    state = SettingsState(RunConfig(), 2).state_dict()
    assert compare(state, RunConfig(), 2) == []
    del state["config"]["optim"]["warmup_steps"]  # a key that there was not yet had its default
    state["config"]["optim"]["gone"] = 1
    assert compare(state, RunConfig(), 2) == []
    later = RunConfig()
    later.optim.warmup_steps = 5
    assert compare(state, later, 2) == ["optim.warmup_steps 0 -> 5"]


def test_the_sinks_of_an_older_run_are_no_change() -> None:
    state = SettingsState(RunConfig(), 2).state_dict()
    state["config"]["records"] = {"tensorboard": True, "wandb": False, "wandb_project": "rawloop", "progress": True}
    config = replace(RunConfig(), records=RecordsConfig(["tensorboard"]))
    assert compare(state, config, 2) == []
    assert compare(state, RunConfig(), 2) == ['records.report_to ["tensorboard"] -> []']


def test_a_step_of_another_number_of_samples_is_told_in_numbers() -> None:
    stored = SettingsState(replace(RunConfig(), train=TrainConfig(4, 2, max_steps=1)), 2).state_dict()
    assert len(compare(stored, replace(RunConfig(), train=TrainConfig(2, 8, max_steps=1)), 1)) == 3
    with pytest.raises(UserError) as told:
        compare(stored, replace(RunConfig(), train=TrainConfig(4, 2, max_steps=1)), 1)
    assert str(told.value) == (
        "a step of the checkpoint's run took 16 samples (2 process(es) x train.batch_size 4 x train.accumulation 2), "
        "and would now take 8 (1 process(es) x train.batch_size 4 x train.accumulation 2), in another data order: set "
        "train.accumulation to 4, or start another run from these weights with --init_from CHECKPOINT --output NEW"
    )
    with pytest.raises(UserError, match="choose them so that it is 16 again, or start another"):
        compare(stored, replace(RunConfig(), train=TrainConfig(3, 1, max_steps=1)), 1)


def test_with_max_frames_the_product_of_processes_and_accumulation_must_stay() -> None:
    def config(accumulation: int, frames: int = 99, size: int = 1) -> RunConfig:
        return replace(RunConfig(), train=TrainConfig(size, accumulation, max_steps=1, max_frames=frames))

    stored = SettingsState(config(2), 2).state_dict()
    assert compare(stored, config(4, size=3), 1) == [
        "train.batch_size 1 -> 3",
        "train.accumulation 2 -> 4",
        "world_size 2 -> 1",
    ]
    with pytest.raises(UserError) as told:
        compare(stored, config(2), 1)
    assert str(told.value) == (
        "a step of the checkpoint's run took 4 micro-batches (2 process(es) x train.accumulation 2, train.max_frames "
        "99), and would now take 2 (1 process(es) x train.accumulation 2, train.max_frames 99), in another data order: "
        "set train.accumulation to 4, or start another run from these weights with --init_from CHECKPOINT --output NEW"
    )


def test_weights_of_streams_are_one_value() -> None:
    weighted = replace(RunConfig(), model=ModelConfig(stream_weights={"text": 0.5}))
    assert flat(asdict(weighted))["model.stream_weights"] == {"text": 0.5}
    assert set(flat(asdict(weighted))) == known_keys()
