"""An epoch with codes from the cache against one that decodes and encodes each clip when its batch is made.

    python tests/benchmarks/cached_codes.py

Both train the demo checkpoint on the bundled speech with the same batches, in turns, in one process. The codec is the
demo's, which is tiny, or one of the size of Higgs Audio v2's with random weights. Data time is what the steps wait for
batches, without data workers: with workers the same processor time is spent elsewhere.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

import torch
from torch import Tensor

from rawloop.audio import load_audio
from rawloop.components import build_family, read_data
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.data.batches import Draw, MicroBatches
from rawloop.data.splits import prepare_codes
from rawloop.families import ModelConfig
from rawloop.losses import LossModule

SPEECH = Path(__file__).parents[2] / "rawloop" / "demo" / "speech"
BATCH = 4
CPU = torch.device("cpu")


class Epoch(NamedTuple):
    """Seconds of an epoch: for the batches, and for forward, backward and update."""

    data: float
    steps: float

    @property
    def whole(self) -> float:
        """Seconds of the epoch."""
        return self.data + self.steps


def full_encoder() -> Callable[[Tensor], Tensor]:
    """Return the encoder of a codec of the true size with random weights: (samples,) -> (frames, 8)."""
    from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

    acoustic = DacConfig(encoder_hidden_size=64, downsampling_ratios=[8, 5, 4, 2, 3], decoder_hidden_size=1024)
    config = HiggsAudioV2TokenizerConfig(acoustic_model_config=acoustic.to_dict(), target_bandwidths=[0.25, 2.0])
    codec: Any = HiggsAudioV2TokenizerModel(config).eval()

    def encode(waveform: Tensor) -> Tensor:
        with torch.no_grad():
            codes: Tensor = codec.encode(waveform[None, None]).audio_codes
        return codes[0].T

    return encode


class Work:
    """The model, its data, and the ways to get the codes of a clip."""

    def __init__(self, demo: Path, folder: Path, full: bool) -> None:
        data = DataConfig(train=str(SPEECH / "train"), codes=str(folder / "codes"))
        config = RunConfig(model=ModelConfig(path=str(demo / "model")), data=data)
        family: Any = build_family(config)
        self.family = family
        prepare_codes(data, family)
        read = read_data(config, family, "train")
        assert read.cache is not None
        self.samples = read.samples["data.train"]
        info, encode = family.load_codec(CPU)
        encode = full_encoder() if full else encode

        def encoded(path: Path) -> Tensor:
            codes: Tensor = encode(load_audio(path, info.sample_rate, frame_rate=info.frame_rate))
            return codes

        self.ways: dict[str, Callable[[Path], Tensor]] = {"cached": read.cache, "on the fly": encoded}
        self.seconds = sum(read.cache.frames(path) for one in self.samples for path in one.audio_paths())
        self.seconds /= info.frame_rate
        torch.manual_seed(0)
        self.module = LossModule(family.load_model(), family.losses)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-5)

    def epoch(self, way: str) -> Epoch:
        """Train one epoch with the codes of a way, and return its seconds."""
        batches = MicroBatches(self.samples, partial(self.family.example, codes=self.ways[way]), self.family.collate)
        data = steps = 0.0
        for start in range(0, len(self.samples), BATCH):
            began = time.perf_counter()
            draws = [Draw(index, 0) for index in range(start, min(start + BATCH, len(self.samples)))]
            batch = batches.made(draws)[1]
            data += time.perf_counter() - began
            began = time.perf_counter()
            losses = self.module(batch)
            total: Any = torch.stack([loss.total for loss in losses.values()]).sum()
            total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            steps += time.perf_counter() - began
        return Epoch(data, steps)


def measure(work: Work, rounds: int) -> dict[str, list[Epoch]]:
    """Return the epochs of each way, which take turns. The first ones, which warm up, are not among them."""
    found: dict[str, list[Epoch]] = {way: [] for way in work.ways}
    for number in range(rounds + 1):
        for way in [*work.ways][:: 1 if number % 2 else -1]:
            epoch = work.epoch(way)
            if number:
                found[way].append(epoch)
    return found


def lines_of(name: str, found: dict[str, list[Epoch]], seconds: float) -> list[str]:
    """Return a row of the table for each way, and one of the ratios of neighbours in time."""
    rows = [
        f"| {name} | {way} | {statistics.median(e.data for e in epochs):.3f} | "
        f"{statistics.median(e.steps for e in epochs):.3f} | {statistics.median(e.whole for e in epochs):.3f} |"
        for way, epochs in found.items()
    ]
    pairs = list(zip(*found.values(), strict=True))
    data, whole = (
        statistics.median(getattr(slow, part) / getattr(fast, part) for fast, slow in pairs)
        for part in ("data", "whole")
    )
    return [*rows, f"| {name}, {seconds:.0f} s of speech | ratio | {data:.1f} | | {whole:.2f} |"]


HEAD = "| codec | codes | s of data time | s of steps | s of an epoch |\n|---|---|---|---|---|"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--demo", type=Path, help="folder of the demo checkpoint (default: built anew)")
    args = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        demo = args.demo
        if demo is None:
            from rawloop.demo.checkpoint import build_demo_checkpoint

            demo = Path(folder) / "demo"
            build_demo_checkpoint(demo, SPEECH)
        print(HEAD)
        for name, full in (("the demo's", False), ("of the true size", True)):
            work = Work(demo, Path(folder), full)
            print("\n".join(lines_of(name, measure(work, args.rounds), work.seconds)), flush=True)


if __name__ == "__main__":
    main()
