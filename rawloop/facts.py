"""Facts that the numbers of a run depend on. They must be the same on all ranks, and again when the run is resumed.

A fact is a name and a value, or the digest of one. `World.check_equal` compares them between ranks, `changes.compare`
with those of a checkpoint.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rawloop.adapters.fingerprint import BaseFingerprint
from rawloop.changes import flat
from rawloop.checkpoint.manifest import installed_versions
from rawloop.config import RunConfig
from rawloop.contracts import Family, Sample
from rawloop.data.codes import CodeCache
from rawloop.dist import World
from rawloop.families.identity import reading_of, source_of
from rawloop.hashing import sha256_files, sketch_file
from rawloop.segments import segment_of

# Settings that machines may have of their own: paths, whose contents are compared, and what no number depends on.
MAY_DIFFER = frozenset({"data.train", "data.eval", "data.codes", "model.path", "model.codec", "data.num_workers"})
BLOCKS = 64  # in how many parts the samples are compared between ranks, to name the part that differs
ADVICE = "start every process with the same command, and the same data, model and code"


def check_settings_of_ranks(config: RunConfig, world: World) -> None:
    """Refuse ranks with other settings, another kind of device, or other code; see `World.check_equal`."""
    code = {**installed_versions(), "tokenizers": version("tokenizers"), "Python": platform.python_version()}
    own = sha256_files(Path(__file__).parent.rglob("*.py"))[:16]
    settings = {key: value for key, value in flat(dataclasses.asdict(config)).items() if key not in MAY_DIFFER}
    world.check_equal({**settings, **code, "rawloop's source": own, "device type": world.device.type}, ADVICE)


@dataclasses.dataclass
class Contents:
    """The facts of one rank's data: how it reads samples, a digest of each sample, and the place of each in its file.

    A digest covers everything in a sample but its id and folders, and its clips: their codes if there are any, else the
    size and a few kilobytes of each file.
    """

    reading: dict[str, str]
    source: str
    samples: Mapping[str, list[str]]
    places: Mapping[str, list[str]]

    def of_run(self) -> dict[str, str]:
        """The facts that a resumed run must find again."""
        read = {key: f"{len(digests)} samples, digest {_digest(*digests)}" for key, digests in self.samples.items()}
        return {**self.reading, **read}

    def check_ranks(self, base: BaseFingerprint | None, world: World) -> None:
        """Refuse ranks with other samples, another tokenizer or template, or other weights."""
        facts = {**self.reading, "the source of the model's family": self.source}
        for split, digests in self.samples.items():
            size = -(-len(digests) // BLOCKS) or 1
            facts[f"number of samples of {split}"] = str(len(digests))
            for start in range(0, len(digests), size):
                end = min(start + size, len(digests))
                name = f"samples[{start}{f':{end}' if size > 1 else ''}] of {split}"
                facts[name] = f"{_digest(*digests[start:end])[:8]} (from {self.places[split][start]} on)"
        if base is not None:
            base.share_sums(world)
            facts["the model's config"] = str(base.origin["config"])[:12]
            facts |= {f"the weight {name}": value for name, value in base.sums.items()}
        world.check_equal(facts, ADVICE)


def contents_of(family: Family, cache: CodeCache | None, samples: Mapping[str, Sequence[Sample]]) -> Contents:
    """Return the facts of a rank's samples, which are given by key."""
    clip = partial(_clip, cache)
    digests = {key: digests_of(given, clip) for key, given in samples.items()}
    places = {key: [sample.source for sample in given] for key, given in samples.items()}
    return Contents(reading_of(family), source_of(family), digests, places)


def digests_of(samples: Iterable[Sample], clip: Callable[[Path], str]) -> list[str]:
    """Return a digest of each sample, 16 hexadecimal digits; a clip counts by its name and by `clip(path)`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return [value.name, clip(value)]
        if not dataclasses.is_dataclass(value):
            return repr(value)
        return {name: item for name, item in vars(value).items() if item and name not in ("id", "source")}

    encode = json.JSONEncoder(default=plain).encode
    return [_digest(encode(sample)) for sample in samples]


def _clip(cache: CodeCache | None, path: Path) -> str:
    return sketch_file(segment_of(path).file) if cache is None else cache.identity(path)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
