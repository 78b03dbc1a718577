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
    "data allow_outside on_bad_sample num_workers strict",
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
        "model.path": "the fingerprint of the frozen weights (part `base`), the digests of tokenizer and template",
        "model.codec": "the hash of the codec in the cache of codes",
        "data.train": "the digest of its samples and clips",
        "data.eval": "nothing; that the best value was measured on other samples is said",
        "data.codes": "the digests of samples and clips",
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
    "model family revision stream_weights template_date",
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
        "seed": frozenset({"seed"}),
        "shuffle": frozenset({"data.shuffle"}),
    }
)
# Whose force lets a fact of `rawloop.facts` differ, and what is said of one that does. All others belong to the model.
CONTENTS = MappingProxyType({"data.train": SAMPLES, "data.eval": SAMPLES - {"data.train"} | {"data.eval"}})
OF_MODEL = _keys("model path revision")
SAME = "(the same samples)"
OTHERS = MappingProxyType(
    {
        "data.train": "the checkpoint was trained on other samples ({then} then, {now} in data.train now; texts, "
        "order, further keys and clips count): put them back, start a run of its own, or force it by name, "
        "--resume_force '[data.train]'",
        "data.eval": "the run was evaluated on other samples ({then} then, {now} in data.eval now; texts, order, "
        "further keys and clips count), so its losses could not be compared: put them back, or give those of now "
        "another path, which is taken",
    }
)
OTHER_READING = (
    "the {name} of model.path is another than the checkpoint was trained with ({then} then, {now} now): the model "
    "would read other numbers; put it back, or point model.path at the files of then"
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
    """The config as a part of a checkpoint. Loading it compares, and keeps in `taken` a line for each change.

    `facts` are `Contents.of_run`: digests of what was read, by what the settings say.
    """

    def __init__(self, config: RunConfig, world_size: int, facts: Mapping[str, str] = MappingProxyType({})) -> None:
        self.config, self.world_size, self.facts = config, world_size, dict(facts)
        self.taken: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the resolved config, nested, but for `NOT_KEPT`, the number of ranks, and the facts."""
        kept = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in NOT_KEPT}
        return {"config": kept, WORLD_SIZE: self.world_size, "facts": self.facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare; see `compare`."""
        self.taken = compare(state, self.config, self.world_size, self.facts)


def compare(
    stored: Mapping[str, Any], config: RunConfig, world_size: int, facts: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Compare a checkpoint's settings with the present ones.

    Args:
        stored: what `SettingsState.state_dict` returned then. A key that it lacks had its default.
        config: the present config.
        world_size: the present number of ranks.
        facts: the present ones, as far as they are known yet. Those that the checkpoint lacks are not compared.

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
    others = other_facts(stored, facts)
    same = facts.get("data.eval") == stored.get("facts", {}).get("data.eval", "") and "data.eval" in changed
    lines = [f"{line} (forced)" if key in forced else line for key, line in changed.items()]
    lines = [f"{line} {SAME}" if same and line.startswith("data.eval ") else line for line in lines]
    lines += _check_facts(others, forced, "data.eval" in changed)
    idle = sorted(forced - set(changed) - set().union(*map(_keys_of, others)))
    return lines + [f"resume_force has {key}, which has not changed" for key in idle]


def other_facts(stored: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return (then, now) of each fact that a checkpoint's settings hold with another value."""
    then = stored.get("facts", {})
    return {name: (then[name], now) for name, now in facts.items() if name in then and then[name] != now}


def check_reading(stored: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """Refuse to evaluate a checkpoint with another tokenizer or template than it was trained with.

    Returns:
        a sentence where the evaluation samples are others than the run's, else "".

    Raises:
        UserError: see `compare`.
    """
    others = other_facts(stored, facts)
    data = others.pop("data.eval", None)
    _check_facts(others, set(), False)
    return (
        "" if data is None else "data.eval has other samples than the run was evaluated on: compare no losses with it"
    )


def _keys_of(fact: str) -> frozenset[str]:
    return CONTENTS.get(fact, OF_MODEL)


def _check_facts(others: Mapping[str, tuple[str, str]], forced: set[str], other_eval: bool) -> list[str]:
    """Return a line for each fact that may differ; an evaluation set under another path may.

    Raises:
        UserError: other facts differ.
    """
    taken = [name for name in others if _keys_of(name) & forced or (name == "data.eval" and other_eval)]
    for name in sorted(set(others) - set(taken)):
        then, now = others[name]
        raise UserError(OTHERS.get(name, OTHER_READING).format(name=name, then=then, now=now))
    return [f"{name} has other contents ({then} -> {now})" for name, (then, now) in others.items() if name in taken]


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
