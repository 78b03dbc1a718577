"""Which settings may change when a run is resumed: a table of those that may not, and the comparison.

Every checkpoint holds the config of the run that wrote it. A changed key is taken and printed, unless the table lists
it: a change that would make another run is refused before anything is written.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rawloop.checkpoint.pack import Packed, unpack
from rawloop.checkpoint.writer import STATE
from rawloop.config import RunConfig, known_keys
from rawloop.errors import UserError

WORLD_SIZE = "world_size"  # no key of the config, and compared like one
PART = "config"  # of a checkpoint
ORIGIN = "init_from"  # in that part


def _keys(*groups: str) -> frozenset[str]:
    """`optim lr eps` -> optim.lr, optim.eps; a dash stands for keys without a group."""
    split = [group.split() for group in groups]
    return frozenset(name if group == "-" else f"{group}.{name}" for group, *names in split for name in names)


FIXED = "fixed"
# The keys that are not free to change, and why: fixed, as the model, the samples or the numbers would be other ones,
# or taken where a check finds that they stand for the same thing as before.
NOT_FREE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            _keys(
                "- seed",
                "model family revision stream_weights template_date",
                "adapter mode rank alpha dropout target_modules modules_to_save dora rslora freeze unfreeze",
                "data task refs_in_scene default_scene max_seconds min_seconds packing shuffle",
                "precision trainable_dtype",
                "evaluation best_metric best_mode",
            ),
            FIXED,
        ),
        "model.path": "the digest of the frozen weights (part `base`), the digests of tokenizer and template",
        "model.codec": "the hash of the codec in the cache of codes",
        "data.train": "the digest of its samples and clips",
        "data.codes": "the digests of samples and clips",
        "train.batch_size": "the samples of a step over all ranks",
        "train.accumulation": "the samples of a step over all ranks",
        WORLD_SIZE: "the samples of a step over all ranks",
        "precision.mode": "the mode in which training goes on (part `precision`)",
        "precision.masters": "the masters (part `precision`)",
    }
)
# Their product is the number of samples in a step.
WINDOW = (WORLD_SIZE, "train.batch_size", "train.accumulation")
# Keys of one start, not of the run: equal runs have equal checkpoints, wherever they lie and however they were begun.
NOT_KEPT = frozenset({"output", "resume", "init_from"})
WAY_ON = "start another run from these weights with --init_from CHECKPOINT --output NEW"
SAME = "(the same samples)"
OTHER_CONTENTS = MappingProxyType(
    {
        "data.train": "the checkpoint was trained on other samples ({then} then, {now} in data.train now; texts, "
        f"order, further keys and clips count): put them back, or {WAY_ON}",
        "data.eval": "the run was evaluated on other samples ({then} then, {now} in data.eval now; texts, order, "
        "further keys and clips count), so its losses could not be compared: put them back, or give the new samples "
        "another path",
    }
)
OTHER_READING = (
    "the {name} of model.path is another than the checkpoint was trained with ({then} then, {now} now): the model "
    "would read other numbers; put it back, or point model.path at the earlier files"
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

    `facts` are `Contents.of_run`: digests of what was read, by what the settings say. `origin` says which checkpoint's
    weights the run has started from (`init_from`); all later checkpoints keep it.
    """

    def __init__(
        self,
        config: RunConfig,
        world_size: int,
        facts: Mapping[str, str] = MappingProxyType({}),
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.world_size, self.facts, self.origin = config, world_size, dict(facts), origin
        self.taken: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the resolved config, nested, but for `NOT_KEPT`, the number of ranks, and the facts."""
        kept = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in NOT_KEPT}
        return {"config": kept, WORLD_SIZE: self.world_size, "facts": self.facts, ORIGIN: self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare; see `compare`."""
        self.taken = compare(state, self.config, self.world_size, self.facts)
        self.origin = state.get(ORIGIN)


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
        a line for each change that is taken, such as `optim.lr 0.001 -> 0.0005`.

    Raises:
        UserError: settings or facts have changed that must not.
    """
    then = {**flat(dataclasses.asdict(RunConfig())), **flat(stored["config"]), WORLD_SIZE: stored[WORLD_SIZE]}
    now = {**flat(dataclasses.asdict(config)), WORLD_SIZE: world_size}
    changed = {
        key: f"{key} {_shown(then[key])} -> {_shown(now[key])}"
        for key in now
        if key not in NOT_KEPT and then[key] != now[key]
    }
    refused = [line for key, line in changed.items() if NOT_FREE.get(key) == FIXED]
    if refused:
        raise UserError(
            "the checkpoint was trained with other settings, which must not change within a run: "
            f"{', '.join(refused)}: set them back, or {WAY_ON}"
        )
    _check_origin(stored.get(ORIGIN), config.init_from)
    _check_window(then, now)
    others = other_facts(stored, facts)
    other_eval = others.pop("data.eval", None) if "data.eval" in changed else None
    _check_facts(others)
    lines = list(changed.values())
    if other_eval is not None:
        lines.append(f"data.eval has other contents ({other_eval[0]} -> {other_eval[1]})")
    elif "data.eval" in changed and "data.eval" in stored.get("facts", {}).keys() & facts.keys():
        lines = [f"{line} {SAME}" if line == changed["data.eval"] else line for line in lines]
    return lines


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
    _check_facts(others)
    return (
        "" if data is None else "data.eval has other samples than the run was evaluated on: compare no losses with it"
    )


def _check_facts(others: Mapping[str, tuple[str, str]]) -> None:
    for name in sorted(others):
        then, now = others[name]
        raise UserError(OTHER_CONTENTS.get(name, OTHER_READING).format(name=name, then=then, now=now))


def _check_origin(stored: Mapping[str, Any] | None, given: str | None) -> None:
    """Refuse to resume a run by a command that starts it from other weights than it was started from."""
    if given is None or (stored is not None and given == stored["given"]):
        return
    if stored is None:
        raise UserError(
            f"init_from is '{given}', and the run that is resumed was not started from a checkpoint's weights: leave "
            "init_from out to go on with it, or pass another --output and no --resume"
        )
    if str(Path(expanduser(given)).resolve()) != stored["checkpoint"]:
        raise UserError(
            f"init_from is '{given}', and the run that is resumed was started from '{stored['given']}' "
            f"({stored['checkpoint']}): set it back, or pass another --output and no --resume"
        )


def _check_window(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse another number of samples in a step, which is another data order, before a model is loaded for it."""
    had, has = (math.prod(values[key] for key in WINDOW) for values in (then, now))
    if had == has:
        return
    told = [
        f"{values[WORLD_SIZE]} process(es) x train.batch_size {values['train.batch_size']} x train.accumulation "
        f"{values['train.accumulation']}"
        for values in (then, now)
    ]
    rest = now[WORLD_SIZE] * now["train.batch_size"]
    mend = f"set train.accumulation to {had // rest}" if had % rest == 0 else f"choose them so that it is {had} again"
    raise UserError(
        f"a step of the checkpoint's run took {had} samples ({told[0]}), and would now take {has} ({told[1]}), in "
        f"another data order: {mend}, or {WAY_ON}"
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def stored_settings(slot: Path) -> dict[str, Any] | None:
    """The settings in a checkpoint that is verified; None if it has none."""
    file = slot / STATE / f"{PART}.json"
    return _of_run(unpack(Packed(json.loads(file.read_bytes()), {}))) if file.exists() else None


def _of_run(state: Any) -> dict[str, Any] | None:
    return state if isinstance(state, dict) and {"config", WORLD_SIZE} <= set(state) else None
