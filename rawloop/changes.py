"""The settings and facts that must be the same on all ranks, and when a run is resumed.

Every checkpoint holds the config of its run. A resume accepts and prints changed keys, except for those in a table:
they would make it another run, and are refused before anything is written. A fact is a name with a value or a digest.
`World.check_equal` compares the facts of the ranks, `compare` those of a checkpoint.
"""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from os.path import expanduser
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.audio import segment_of
from rawloop.checkpoint.reader import stored_part
from rawloop.config import RunConfig
from rawloop.contracts import Family, Sample
from rawloop.data.codes import CodeCache
from rawloop.data.digests import Digests, digests_of
from rawloop.data.index import SampleIndex
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.families import reading_of, source_of
from rawloop.files import sha256_files, sketch_file
from rawloop.settings import read_older_records
from rawloop.versions import installed_versions

WORLD_SIZE = "world_size"  # not a key of the config, but compared like one
PART = "config"  # the part of a checkpoint
ORIGIN = "init_from"  # a key of that part


def _keys(*groups: str) -> frozenset[str]:
    """Expand `optim lr eps` to optim.lr, optim.eps; the group `-` is for keys without a group."""
    return frozenset(f"{group}.{name}".removeprefix("-.") for group, *names in map(str.split, groups) for name in names)


FIXED = "fixed"
# Keys with limits on a resume. A change of a FIXED key would change the model, the samples or the numbers, and is
# refused. A change of another key is accepted if the named check passes.
NOT_FREE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            _keys(
                "- seed",
                "model family revision stream_weights template_date quantization",
                "adapter mode rank alpha dropout target_modules modules_to_save dora rslora freeze unfreeze",
                "data task refs_in_scene references reference_seconds default_scene train_turns",
                "data max_seconds min_seconds packing shuffle",
                "precision trainable_dtype",
                "optim name",
                "evaluation best_metric best_mode",
            ),
            FIXED,
        ),
        "model.path": "the digest of the frozen weights (part `base`), the digests of tokenizer and template",
        "model.codec": "the hash of the codec in the cache of codes",
        "data.train": "the digest of its samples and clips",
        "data.codes": "the digests of samples and clips",
        **dict.fromkeys(_keys("data eval_share eval_by eval_seed"), "the digests of the samples of both splits"),
        "train.batch_size": "the samples of a step over all ranks",
        "train.accumulation": "the samples of a step over all ranks",
        "train.max_frames": "the micro-batches of a step over all ranks",
        WORLD_SIZE: "the samples of a step over all ranks",
        "precision.mode": "the mode in which training goes on (part `precision`)",
        "precision.masters": "the masters, or the rounding (part `precision`)",
    }
)
WINDOW = (WORLD_SIZE, "train.batch_size", "train.accumulation")  # their product is the number of samples in a step
# keys that no checkpoint holds, so that equal runs in different folders have equal checkpoints
FRAMES = "train.max_frames"
NOT_KEPT = frozenset({"output", "resume", "init_from"})
WAY_ON = "start another run from these weights with --init_from CHECKPOINT --output NEW"
SAME = "(the same samples)"
# Settings that may differ between ranks: paths (their contents are compared), and keys that change no result.
MAY_DIFFER = frozenset({"data.train", "data.eval", "data.codes", "model.path", "model.codec", "data.num_workers"})
BLOCKS = 64  # the ranks compare samples in so many blocks, to name the block that differs
ADVICE = "start every process with the same command, and the same data, model and code"
OTHER_CONTENTS = MappingProxyType(
    {
        "data.train": "the checkpoint was trained on other samples ({then} then, {now} in data.train now; texts, "
        f"order, further keys and clips count): put them back, or {WAY_ON}",
        "data.eval": "the run was evaluated on other samples ({then} then, {now} in data.eval now; texts, order, "
        "further keys and clips count), so its losses could not be compared: put them back, or give the new samples "
        "another path",
        FRAMES: "the samples have other lengths than in the checkpoint's run ({then} then, {now} now), in another data "
        f"order: put the code of the model's family back, or {WAY_ON}",
    }
)
OTHER_READING = (
    "the {name} of model.path is not the one that the checkpoint was trained with ({then} then, {now} now): the model "
    "would read other numbers; put it back, or point model.path at the earlier files"
)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config by dotted keys. The dict `model.stream_weights` is one value."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        is_group = isinstance(value, dict) and name != "stream_weights"
        values |= flat(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value}
    return values


class SettingsState:
    """The config as a part of a checkpoint. Loading compares it, and sets `taken` to a line for each accepted change.

    `facts` are `Contents.of_run`. `origin` describes the checkpoint of `init_from`; a resume restores it.
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
        """Return the config without `NOT_KEPT`, the number of ranks, the facts and the origin."""
        kept = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in NOT_KEPT}
        return {"config": kept, WORLD_SIZE: self.world_size, "facts": self.facts, ORIGIN: self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the settings; see `compare`."""
        self.taken = compare(state, self.config, self.world_size, self.facts)
        self.origin = state.get(ORIGIN)


def compare(
    stored: Mapping[str, Any], config: RunConfig, world_size: int, facts: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Compare a checkpoint's settings with the present ones, and the facts that both have.

    Returns:
        a line for each accepted change, such as `optim.lr 0.001 -> 0.0005`.

    Raises:
        UserError: a setting or fact has changed that must stay the same.
    """
    then = {**flat(stored["config"]), WORLD_SIZE: stored[WORLD_SIZE]}
    read_older_records(then, "the checkpoint")
    now = {**flat(dataclasses.asdict(config)), WORLD_SIZE: world_size}
    if now.keys() - then.keys() - NOT_KEPT:
        then = {**flat(dataclasses.asdict(RunConfig())), **then}
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
    other_eval = _check_facts(stored, facts, may_differ="data.eval" if "data.eval" in changed else "")
    if other_eval is not None:
        changed[""] = f"data.eval has other contents ({other_eval[0]} -> {other_eval[1]})"
    elif "data.eval" in changed and "data.eval" in stored.get("facts", {}).keys() & facts.keys():
        changed["data.eval"] += f" {SAME}"
    return list(changed.values())


def check_reading(stored: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """Refuse to evaluate a checkpoint with another tokenizer or template than it was trained with.

    Returns a notice if the evaluation samples are not those of the run, else "".
    """
    differs = _check_facts(stored, facts, may_differ="data.eval") is not None
    return "data.eval has other samples than the run was evaluated on: compare no losses with it" if differs else ""


def _check_facts(stored: Mapping[str, Any], facts: Mapping[str, str], may_differ: str) -> tuple[str, str] | None:
    """Refuse facts that differ from a checkpoint's. Returns (then, now) of the fact `may_differ` if that differs."""
    known = stored.get("facts", {})
    others = {name: (known[name], now) for name, now in facts.items() if name in known and known[name] != now}
    for name, (then, now) in sorted(others.items()):
        if name != may_differ:
            raise UserError(OTHER_CONTENTS.get(name, OTHER_READING).format(name=name, then=then, now=now))
    return others.get(may_differ)


def _check_origin(stored: Mapping[str, Any] | None, given: str | None) -> None:
    """Refuse to resume a run with an `init_from` that names other weights than the run was started from."""
    if given is None:
        return
    origin = "not started from a checkpoint's weights: leave init_from out to resume it"
    if stored is not None:
        if given == stored["given"] or str(Path(expanduser(given)).resolve()) == stored["checkpoint"]:
            return
        origin = f"started from '{stored['given']}' ({stored['checkpoint']}): set it back"
    raise UserError(
        f"init_from is '{given}', and the run that is resumed was {origin}, or pass another --output and no --resume"
    )


def _check_window(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a step of another number of samples, or with `FRAMES` of micro-batches: it changes the data order."""
    frames = (then[FRAMES], now[FRAMES])
    keys, unit = ((WINDOW[0], WINDOW[2]), "micro-batches") if any(frames) else (WINDOW, "samples")
    had, has = (math.prod(values[key] for key in keys) for values in (then, now))
    if had == has and frames[0] == frames[1]:
        return
    sizes = [
        " x ".join([f"{values[WORLD_SIZE]} process(es)", *(f"{key} {values[key]}" for key in keys[1:])])
        + (f", {FRAMES} {values[FRAMES]}" if any(frames) else "")
        for values in (then, now)
    ]
    rest = math.prod(now[key] for key in keys if key != WINDOW[2])
    fix = f"set train.accumulation to {had // rest}" if had % rest == 0 else f"choose them so that it is {had} again"
    if frames[0] != frames[1]:
        fix = f"set {FRAMES} to {frames[0]}"
    raise UserError(
        f"a step of the checkpoint's run took {had} {unit} ({sizes[0]}), and would now take {has} ({sizes[1]}), in "
        f"another data order: {fix}, or {WAY_ON}"
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def stored_settings(slot: Path) -> dict[str, Any] | None:
    """Return the settings in a verified checkpoint; None if it has none."""
    state = stored_part(slot, PART, tensors=False)
    return state if isinstance(state, dict) and {"config", WORLD_SIZE} <= set(state) else None


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that all ranks must share."""
    return {key: value for key, value in flat(dataclasses.asdict(config)).items() if key not in MAY_DIFFER}


def code_of_rank() -> dict[str, Any]:
    """Return the versions and the digest of the code that all ranks must share."""
    code = {**installed_versions(), "tokenizers": version("tokenizers"), "Python": platform.python_version()}
    return {**code, "rawloop's source": sha256_files(Path(__file__).parent.rglob("*.py"))[:16]}


def check_settings_of_ranks(config: RunConfig, world: World) -> None:
    """Raise UserError on all ranks if their settings, kinds of device or code differ."""
    world.check_equal({**settings_of(config), **code_of_rank(), "device type": world.device.type}, ADVICE)


@dataclasses.dataclass
class Contents:
    """The facts of one rank's data: how it reads samples, the samples, and the digest of each."""

    reading: dict[str, str]
    source: str
    digests: Mapping[str, Digests]
    samples: Mapping[str, Sequence[Sample]]

    def of_run(self) -> dict[str, str]:
        """Return the facts that a resumed run must have again."""
        samples = {
            key: f"{len(digests)} samples, digest {digests.together(0, len(digests))}"
            for key, digests in self.digests.items()
        }
        return {**self.reading, **samples}

    def check_ranks(self, base: BaseFingerprint | None, world: World) -> None:
        """Raise UserError on all ranks if their samples, tokenizers, templates or weights differ."""
        facts = {**self.reading, "the source of the model's family": self.source}
        for split, digests in self.digests.items():
            size = -(-len(digests) // BLOCKS) or 1
            facts[f"number of samples of {split}"] = str(len(digests))
            for start in range(0, len(digests), size):
                end = min(start + size, len(digests))
                name = f"samples[{start}{f':{end}' if size > 1 else ''}] of {split}"
                facts[name] = f"{digests.together(start, end)[:8]} (from {self.samples[split][start].source} on)"
        if base is not None:
            base.share_sums(world)
            facts["the model's config"] = str(base.origin["config"])[:12]
            facts |= {f"the weight {name}": value for name, value in base.sums.items()}
        world.check_equal(facts, ADVICE)


def contents_of(family: Family, cache: CodeCache | None, samples: Mapping[str, Sequence[Sample]]) -> Contents:
    """Return the facts of a rank's samples, given by key. A clip is compared by its codes, or a sketch of its file."""

    def clip(path: Path) -> str:
        return sketch_file(segment_of(path).file) if cache is None else cache.identity(path)

    digests = {
        key: given.digests if isinstance(given, SampleIndex) else Digests.of(digests_of(given, clip))
        for key, given in samples.items()
    }
    return Contents(reading_of(family), source_of(type(family)), digests, samples)
