"""What the fuzzer feeds: per kind of input, how it is damaged, and what rawloop does with it.

A target returns what it has accepted, in words. It raises what rawloop raises, with the way of damage as `way`, and
`Silent` where something was accepted that should not have been.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mutators  # type: ignore[import-not-found]  # beside this file
import torch
import yaml

import rawloop.cli.merge
import rawloop.cli.train
import rawloop.families.audio_chat
import rawloop.families.causal_lm
import rawloop.families.higgs_audio_v2
from rawloop.checkpoint.slots import find_latest, verify
from rawloop.cli import main
from rawloop.config import known_keys, parse
from rawloop.contracts import IGNORE, Audio, Sample, Text, Turn
from rawloop.data import DataConfig
from rawloop.data.codes import CodeCache
from rawloop.data.limits import Limits
from rawloop.data.samples import read_samples
from rawloop.families import ModelConfig, load_family

CHAT = (Turn("user", (Text("Say it."),)), Turn("assistant", (Text("One, two."),), trained=True))
SPEECH = (Turn("user", (Text("One, two."),)), Turn("assistant", (Audio(Path("clip.flac")),), trained=True))
TURNS = {"text": CHAT, "chat": CHAT, "higgs": SPEECH}


class Silent(AssertionError):
    """Something was dropped, or taken for whole, without a word."""


@contextmanager
def fed(way: str) -> Iterator[None]:
    """Name the way of damage on whatever is raised."""
    try:
        yield
    except BaseException as error:
        error.way = way  # type: ignore[attr-defined]
        raise


def model(rng: random.Random, base: Path, work: Path) -> str:
    """A model's folder: the family, an example, the weights, and a loss."""
    kind = rng.choice(["text", "text", "chat", "higgs"])
    if rng.random() < 0.04:  # one checkpoint's folder where another's is asked for
        way = rng.choice(["text", "chat", "higgs", "codec", "adapter"])
        shutil.copytree(base / way, work / "model")
    else:
        way = mutators.mutate_folder(rng, base / kind, work / "model")
    name = rng.choice(["auto"] * 5 + ["causal_lm", "audio_chat", "higgs_audio_v2"])
    with fed(f"{kind} as {name}, {way}"):
        family = load_family(ModelConfig(path=str(work / "model"), family=name))
        sample = Sample("s", TURNS["higgs" if name == "higgs_audio_v2" else kind if name == "auto" else "text"])
        family.check(sample)
        codes = torch.zeros(9, getattr(getattr(family, "settings", None), "num_codebooks", 8), dtype=torch.int64)
        batch = family.collate([family.example(sample, lambda path: codes)])
        loaded = family.load_model()
        Limits.of(family, loaded)
        losses = family.losses(loaded, batch)
    return f"{kind} as {name}, {way}: {sum(float(loss.total.detach()) for loss in losses.values()):.3f}"


def codec(rng: random.Random, base: Path, work: Path) -> str:
    """A codec's folder, as `rawloop prepare` takes it."""
    way = mutators.mutate_folder(rng, base / "codec", work / "codec")
    with fed(f"codec, {way}"):
        family: Any = load_family(ModelConfig(path=str(base / "higgs"), codec=str(work / "codec")))
        info, encode = family.load_codec(torch.device("cpu"))
        family.codec_hash()
        codes = encode(torch.linspace(-0.5, 0.5, info.sample_rate))
    return f"codec, {way}: {tuple(codes.shape)}"


def records(rng: random.Random, base: Path, work: Path) -> str:
    """A file of records: read, checked, and each made into an example; every record must be there, with targets."""
    speech = rng.random() < 0.4
    source = base / "data" / "train" / "metadata.json" if speech else base / "text_data" / "train.jsonl"
    folder = Path(shutil.copytree(source.parent, work / "data"))
    file = folder / source.name
    if rng.random() < 0.25:
        file.write_bytes(mutators.mutated_bytes(rng, file.read_bytes()))
        way = "bytes"
    elif speech:
        file.write_bytes(mutators.json_text(rng, mutators.mutated_json(rng, json.loads(file.read_bytes()))))
        way = "json"
    else:
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        place = rng.randrange(len(lines))
        lines[place] = mutators.mutated_json(rng, lines[place])
        file.write_bytes(b"\n".join(mutators.json_text(rng, line) for line in lines))
        way = "json"
    with fed(f"{'speech' if speech else 'text'}, {way}: {file.read_bytes()[:1500]!r}"):
        samples = read_samples(file, DataConfig(strict=rng.random() < 0.2))
        content = file.read_text(encoding="utf-8-sig")
        number = (
            len(_listed(json.loads(content))) if speech else sum(bool(line.strip()) for line in content.split("\n"))
        )
        if len(samples) != number:
            raise Silent(f"{len(samples)} samples of {number} records")
        family = load_family(ModelConfig(path=str(base / ("higgs" if speech else "text"))))
        codes = torch.zeros(9, 8, dtype=torch.int64)
        for sample in samples:
            family.check(sample)
            batch = family.collate([family.example(sample, lambda path: codes)])
            counted = {stream: int((pair.targets != IGNORE).sum()) for stream, pair in batch.labels.items()}
            if counted != batch.targets or not all(counted.values()):
                raise Silent(f"targets of {sample.id}: {counted}, said to be {batch.targets}")
    return f"{'speech' if speech else 'text'}, {way}: {len(samples)} samples"


def _listed(content: Any) -> Any:
    return content["samples"] if isinstance(content, dict) else content


def settings(rng: random.Random, base: Path, work: Path) -> str:
    """A YAML file or a command line; now and then the run that it asks for, of one step."""
    config = yaml.safe_load((base / "run.yaml").read_text())
    words: list[str] = []
    match rng.randrange(4):
        case 0:
            text = mutators.mutated_bytes(rng, yaml.safe_dump(config).encode())
        case 1:
            text = yaml.safe_dump(mutators.mutated_json(rng, config), default_flow_style=rng.random() < 0.5).encode()
        case 2:
            text = f"{rng.choice(sorted(known_keys()))}: {_value(rng)}\n".encode("utf-8", "replace")
        case _:
            text = yaml.safe_dump(config).encode()
            words = [f"--{rng.choice(sorted(known_keys()))}", _value(rng)]
            words = rng.choice(
                [words, ["=".join(words)], words[:1], words[1:], [*words, *words], [f"{words[0]}+", words[1]]]
            )
    (work / "run.yaml").write_bytes(text)
    arguments = ["--config", str(work / "run.yaml"), *words]
    with fed(f"{text[-400:]!r} {words!r:.400}"):
        parsed = parse(arguments, "rawloop train")[0]
        if rng.random() < 0.08 and parsed.data.num_workers < 3 and parsed.resume != "latest":
            last = ["--output", str(work / "run"), "--train.max_steps", "1", "--data.num_workers", "0"]
            code = main(["train", *arguments, *last])
            if code not in (0, 1, 2):
                raise Silent(f"exit code {code}")
            return f"trained: {code}"
    return "parsed"


def _value(rng: random.Random) -> str:
    value = rng.choice(
        [*mutators.VALUES, "[", "{", "&a [*a]", "[" * 2000, "9" * 5000, "*", "!!int x", "2020-99-99", "'"]
    )
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**9)
    return text.strip().removesuffix("...").strip()


def adapter(rng: random.Random, base: Path, work: Path) -> str:
    """An adapter's folder, merged into its base."""
    way = mutators.mutate_folder(rng, base / "adapter", work / "adapter")
    with fed(f"adapter, {way}"):
        asked = [
            "--adapter",
            str(work / "adapter"),
            "--output",
            str(work / "merged"),
            "--model.path",
            str(base / "text"),
        ]
        rawloop.cli.merge.run(asked)
    return f"adapter, {way}"


def cache(rng: random.Random, base: Path, work: Path) -> str:
    """A cache of codes: every code of every sample must be the one that was written, or the cache is refused."""
    way = mutators.mutate_folder(rng, base / "codes", work / "codes")
    data = DataConfig()
    samples = read_samples(base / "data" / "train", data)
    kept: dict[str, torch.Tensor] = torch.load(base / "codes.pt")
    with fed(f"cache, {way}"):
        found = CodeCache(work / "codes", (base / "codec_hash").read_text(), data)
        usable, left_out = found.usable(samples)
        found.check(usable)
        if len(usable) + len(left_out) != len(samples):
            raise Silent(f"{len(usable)} samples and {len(left_out)} left out, of {len(samples)}")
        for sample in usable:
            for path in sample.audio_paths():
                if not torch.equal(found(path), kept[str(path)]):
                    raise Silent(f"other codes of {path}")
    return f"cache, {way}: {len(usable)} samples"


def checkpoint(rng: random.Random, base: Path, work: Path) -> str:
    """A run's checkpoints: what is taken for whole is what was written, and a resume goes on or says why not."""
    run = Path(shutil.copytree(base / "run", work / "run", symlinks=True))
    slot = run / "checkpoints" / rng.choice(["step-00000001", "step-00000002"])
    files = sorted(path for path in slot.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    way = mutators.mutate_file(rng, rng.choice(files), files)
    changed = {path for path in files if not path.is_file() or path.read_bytes() != before[path]}
    with fed(f"{slot.name}: {way}"):
        if changed and find_latest(run).slot == slot:
            raise Silent("it is the latest whole checkpoint, and was changed")
        if rng.random() < 0.15:
            code = main(["train", "--config", str(base / "run.yaml"), "--output", str(run), "--resume", "latest"])
            if code not in (0, 1, 2):
                raise Silent(f"exit code {code}")
            return f"{slot.name}: {way}: resumed, {code}"
        verify(slot)
        if changed:
            raise Silent(f"verified, and changed: {sorted(path.name for path in changed)}")
    return f"{slot.name}: {way}"


TARGETS: dict[str, Callable[[random.Random, Path, Path], str]] = {
    "records": records,
    "settings": settings,
    "model": model,
    "codec": codec,
    "adapter": adapter,
    "cache": cache,
    "checkpoint": checkpoint,
}
