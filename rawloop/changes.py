"""Which settings may change when a run is resumed: one table of all keys, and the comparison with the checkpoint's.

Every checkpoint holds the config of the run that wrote it. What may change is taken and said; what would make another
run of it is refused before anything is written, unless it is forced by name (`resume_force`).
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rawloop.checkpoint.pack import Packed, unpack
from rawloop.checkpoint.writer import STATE
from rawloop.config import RunConfig, known_keys, near
from rawloop.errors import UserError

WORLD_SIZE = "world_size"  # no key of the config, and compared like one
PART = "config"  # of a checkpoint


def _keys(*groups: str) -> frozenset[str]:
    """`optim lr eps` -> optim.lr, optim.eps; a dash stands for keys without a group."""
    split = [group.split() for group in groups]
    return frozenset(name if group == "-" else f"{group}.{name}" for group, *names in split for name in names)


# Taken as they are.
FREE = _keys(
    "- output resume resume_force device",
    "model attention activation_checkpointing trust_remote_code",
    "data allow_outside on_bad_sample num_workers",
    "train epochs max_steps log_every",
    "optim lr weight_decay beta1 beta2 eps schedule warmup_steps max_norm",
    "precision fallback tf32 max_skips max_nonfinite_losses",
    "precision.loss_scale init floor ceiling growth_interval hysteresis",
    "checks enabled batches expect_chance allow_missing_targets allow",
    "ddp find_unused_parameters broadcast_buffers gradient_as_bucket_view static_graph timeout",
    "evaluation enabled every batch_size patience",
    "checkpoint save_every keep_last keep_every save_at_end asynchronous max_failures",
    "records tensorboard wandb wandb_project progress",
)
# Taken where what they stand for is found to be the same, and what finds it.
CHECKED = MappingProxyType(
    {
        "model.path": "the fingerprint of the frozen weights (part `base`)",
        "model.codec": "the hash of the codec in the cache of codes",
        "data.train": "the number of samples and their digest (part `train`)",
        "data.eval": "nothing; that the best value was measured on other samples is said",
        "data.codes": "the hash of the codec in the cache of codes",
        "train.batch_size": "the samples of a step over all ranks (part `train`)",
        "train.accumulation": "the samples of a step over all ranks (part `train`)",
        WORLD_SIZE: "the samples of a step over all ranks (part `train`)",
        "precision.mode": "the mode in which training goes on (part `precision`)",
        "precision.trainable_dtype": "the masters (part `precision`)",
        "precision.masters": "the masters (part `precision`)",
    }
)
# Whose force lets the precision begin anew over the checkpoint's weights.
START_OVER = _keys("precision mode trainable_dtype masters")
# Refused: the model, the samples or the numbers would be other ones.
FIXED = _keys(
    "- seed",
    "model family revision stream_weights",
    "adapter mode rank alpha dropout target_modules modules_to_save dora rslora freeze unfreeze",
    "data task refs_in_scene default_scene max_seconds min_seconds packing shuffle",
    "evaluation best_metric best_mode",
)
# Of these, not even by force: the stored weights are of another shape, or of another model.
SHAPES = _keys("model family", "adapter mode rank target_modules modules_to_save dora")
# Whose product is the number of samples in a step.
WINDOW = (WORLD_SIZE, "train.batch_size", "train.accumulation")
# Where a run is and how it was begun: checkpoints do not depend on it, so that equal runs have equal ones.
NOT_KEPT = frozenset({"output", "resume", "resume_force"})
# Which samples there are.
SAMPLES = _keys("data train task refs_in_scene default_scene max_seconds min_seconds")
# What `TrainState` compares, and the keys whose force lets it differ.
POSITION = MappingProxyType(
    {
        "window_size": frozenset(WINDOW),
        "num_samples": SAMPLES,
        "samples": SAMPLES,
        "seed": frozenset({"seed"}),
        "shuffle": frozenset({"data.shuffle"}),
    }
)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted keys; the value of `model.stream_weights` is one, though a dict."""
    groups = {key.rpartition(".")[0] for key in known_keys()}
    values: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        values |= flat(value, f"{key}.") if key in groups and isinstance(value, dict) else {key: value}
    return values


class SettingsState:
    """The config as a part of a checkpoint. Loading it compares, and keeps in `taken` a line for each change."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self.config, self.world_size = config, world_size
        self.taken: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the resolved config, nested, but for `NOT_KEPT`, and the number of ranks."""
        kept = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in NOT_KEPT}
        return {"config": kept, WORLD_SIZE: self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare; see `compare`."""
        self.taken = compare(state, self.config, self.world_size)


def compare(stored: Mapping[str, Any], config: RunConfig, world_size: int) -> list[str]:
    """Compare a checkpoint's settings with the present ones.

    Args:
        stored: what `SettingsState.state_dict` returned then. A key that it lacks had its default.
        config: the present config.
        world_size: the present number of ranks.

    Returns:
        a line for each change that is taken, such as `optim.lr 0.001 -> 0.0005`, and for each key that is forced and
        has not changed: as when a command that forces is started again after a kill.

    Raises:
        UserError: settings have changed that must not and are not forced, all of them named; or a key is forced that
            there is not.
    """
    then = {**flat(dataclasses.asdict(RunConfig())), **flat(stored["config"]), WORLD_SIZE: stored[WORLD_SIZE]}
    now = {**flat(dataclasses.asdict(config)), WORLD_SIZE: world_size}
    changed = {
        key: f"{key} {_shown(then[key])} -> {_shown(now[key])}"
        for key in now
        if key not in NOT_KEPT and then[key] != now[key]
    }
    forced = set(config.resume_force)
    _check_forced(forced)
    _check_fixed(changed, forced)
    _check_window(then, now, forced)
    lines = [f"{line} (forced)" if key in forced else line for key, line in changed.items()]
    idle = sorted(forced - set(changed) - {"data.train"})  # whose files may have changed: seen when they are read
    return lines + [f"resume_force has {key}, which has not changed" for key in idle]


def _check_fixed(changed: Mapping[str, str], forced: set[str]) -> None:
    refused = [key for key in changed if key in SHAPES or key in FIXED - forced]
    if not refused:
        return
    free, stuck = ([key for key in refused if (key in SHAPES) == known] for known in (False, True))
    advice = "set them back, or start a run of its own"
    if free:
        advice = f"set them back, start a run of its own, or force them by name, --resume_force '[{', '.join(free)}]'"
    if stuck:
        advice += f" ({', '.join(stuck)} cannot be forced: the stored weights would not fit)"
    raise UserError(
        "the checkpoint was trained with other settings, which must not change within a run: "
        f"{', '.join(changed[key] for key in refused)}: {advice}"
    )


def _check_window(then: Mapping[str, Any], now: Mapping[str, Any], forced: set[str]) -> None:
    """Refuse another number of samples in a step, which is another data order, before a model is loaded for it."""
    had, has = (math.prod(values[key] for key in WINDOW) for values in (then, now))
    if had == has or forced & set(WINDOW):
        return
    told = [
        f"{values[WORLD_SIZE]} process(es) x train.batch_size {values['train.batch_size']} x train.accumulation "
        f"{values['train.accumulation']}"
        for values in (then, now)
    ]
    rest = now[WORLD_SIZE] * now["train.batch_size"]
    mend = f"set train.accumulation to {had // rest}" if had % rest == 0 else f"choose them so that it is {had} again"
    names = ", ".join(key for key in WINDOW if then[key] != now[key])
    raise UserError(
        f"a step of the checkpoint's run took {had} samples ({told[0]}), and would now take {has} ({told[1]}), in "
        f"another data order: {mend}, or force it by name, --resume_force '[{names}]'"
    )


def _check_forced(forced: set[str]) -> None:
    for key in sorted(forced):
        if key not in known_keys() | {WORLD_SIZE}:
            raise UserError(f"resume_force has '{key}', which is no key{near(key, known_keys())}")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def may_differ(forced: list[str]) -> frozenset[str]:
    """What of the data's identity may differ, as the keys are forced that decide it."""
    return frozenset(item for item, keys in POSITION.items() if keys & set(forced))


def stored_settings(slot: Path) -> dict[str, Any] | None:
    """The settings in a checkpoint that is verified; None if it has none."""
    file = slot / STATE / f"{PART}.json"
    return _of_run(unpack(Packed(json.loads(file.read_bytes()), {}))) if file.exists() else None


def _of_run(state: Any) -> dict[str, Any] | None:
    return state if isinstance(state, dict) and {"config", WORLD_SIZE} <= set(state) else None
