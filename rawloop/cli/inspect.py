"""`rawloop inspect`: prints a batch as the model gets it, with turns, codes and targets, to find wrong labels.

Targets are in brackets; on a terminal everything else is dimmed.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from rawloop.cli import read_config
from rawloop.components import Data, build_family, checked_with
from rawloop.config import RunConfig
from rawloop.contracts import IGNORE, Batch, Family, Piece, Sample, has
from rawloop.data.batches import Draw, MicroBatches
from rawloop.data.lengths import shape_of
from rawloop.data.splits import load_samples, no_codes, open_codes
from rawloop.diagnose.shared import table
from rawloop.dist import World
from rawloop.errors import UserError, nearest
from rawloop.planning import build_plan

WIDTH = 100  # characters of text in a line
HEAD, TAIL = 9, 9  # first and last frames of a clip that are shown: the delay of eight codebooks and one more
DIM, OFF = "\x1b[2m", "\x1b[0m"


def run(argv: list[str]) -> None:
    """Print one batch."""
    config, options, _ = read_config("inspect", argv)
    split = options.split
    family = build_family(config)
    tell = partial(print, file=sys.stderr, flush=True)
    cache = open_codes(config.data, family, tell)
    samples = load_samples(config.data, family, cache, split, tell, checked_with(config, family), tell)
    draws = chosen(Data(family, cache, {f"data.{split}": samples}, []), config, split, options.sample)
    example, pick = partial(family.example, codes=cache or no_codes), samples.references(config.data, config.seed)
    batches = MicroBatches(samples, example, family.collate, seed=config.seed, pick=pick)
    examples, batch = batches.made(draws)
    color = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    view = View(family, [batches.pick(draw) for draw in draws], examples, batch, color)
    print("\n".join(view.lines()), flush=True)


def chosen(data: Data, config: RunConfig, split: str, name: str | None) -> list[Draw]:
    """Return the draw of the sample with that id, or the draws of the first batch of the split."""
    samples = data.samples[f"data.{split}"]
    if name is not None:
        found = [Draw(index, epoch=0) for index, sample in enumerate(samples) if sample.id == name]
        if not found:
            ids = [sample.id for sample in samples]
            raise UserError(
                f"--sample is '{name}'{nearest(name, ids)}: data.{split} has no such sample among its {len(ids)}, the "
                f"first are {', '.join(ids[:3])}"
            )
        return found
    if split == "eval":
        return [Draw(index, epoch=0) for index in range(min(len(samples), config.evaluation.batch_size))]
    config = replace(config, train=replace(config.train, accumulation=1))
    return build_plan(config, data, World(), data.contents()).micro_batches(0)[0]


@dataclass
class View:
    """A batch with its samples and examples."""

    family: Family
    samples: Sequence[Sample]
    examples: Sequence[Any]
    batch: Batch
    color: bool

    def lines(self) -> Iterator[str]:
        """Yield the batch as lines of text."""
        pieces = [self._pieces(example) for example in self.examples]
        lengths = [sum(piece.positions for piece in example) for example in pieces]
        rows, width = shape_of(self.batch)
        targets = ", ".join(f"{stream} {count:,}" for stream, count in self.batch.targets.items())
        yield f"a batch of {rows} x {width} positions, {1 - sum(lengths) / (rows * width):.1%} of them padding"
        yield f"targets: {targets}; they are in brackets, [codes] and [[text]]; everything else is context"
        head: list[object] = ["sample", "task", "positions", *(f"{stream} targets" for stream in self.batch.targets)]
        summary: list[list[object]] = [head]
        for sample, example, length in zip(self.samples, self.examples, lengths, strict=True):
            counts = self.family.collate([example]).targets.values()
            summary.append([sample.id, sample.task or "-", length, *counts])
        yield from table("ll" + "r" * (len(head) - 2), summary)
        for row, example in enumerate(pieces):
            yield ""
            yield f"== {self.samples[row].id} ({self.samples[row].source})"
            yield from self._sample(row, example)

    def _pieces(self, example: Any) -> Sequence[Piece]:
        """Return the pieces of an example, or a single piece if the family has no `pieces`."""
        if has(self.family, "pieces"):
            return self.family.pieces(example)
        alone = self.family.collate([example])
        text = f"(not shown: {type(self.family).__name__} has no `pieces`)"
        return [Piece("sample", "", text, shape_of(alone)[1], sum(alone.targets.values()))]

    def _sample(self, row: int, pieces: Sequence[Piece]) -> Iterator[str]:
        role, column, frame = "", 0, 0
        for piece in pieces:
            if piece.role != role:
                role = piece.role
                yield role
            if piece.stream in self._codebooks():
                yield f"    {piece.text}: {piece.positions} positions, {piece.targets:,} targets"
                yield from self._clip(row, piece, column, frame)
                frame += piece.positions
            else:
                yield from self._text(piece)
            column += piece.positions

    def _codebooks(self) -> dict[str, int]:
        pairs = self.batch.labels.items()
        return {stream: labels.targets.shape[1] for stream, labels in pairs if labels.targets.dim() == 2}

    def _text(self, piece: Piece) -> Iterator[str]:
        text = piece.text.replace("\n", "↵")
        text = f"[[{text}]]" if piece.targets else text  # double: speakers are named by tags such as [SPEAKER0]
        for start in range(0, len(text), WIDTH):
            yield f"    {self._marked(text[start : start + WIDTH], piece.targets > 0)}"

    def _marked(self, text: str, learnt: bool) -> str:
        return f"{DIM}{text}{OFF}" if self.color and not learnt else text

    def _clip(self, row: int, piece: Piece, column: int, frame: int) -> Iterator[str]:
        """Yield the codes of a clip, a line per codebook; `code>label` if the label differs from the code."""
        codes = self._codes(piece.stream)
        if codes is None:
            return
        clip = codes[row, frame : frame + piece.positions]
        labels = self._labels(piece, row, column)
        special = self.family.special_targets() if has(self.family, "special_targets") else ()
        names = {s.id: s.name for s in special if s.stream == piece.stream}
        shown = list(range(piece.positions))
        if len(shown) > HEAD + TAIL + 1:
            shown = [*shown[:HEAD], -1, *shown[-TAIL:]]
        grid = [["frame", *("..." if t < 0 else str(t) for t in shown)]]
        for book in range(clip.shape[1]):
            cells = ["" if t < 0 else _cell(int(clip[t, book]), int(labels[t, book]), names) for t in shown]
            grid.append([f"book {book}", *cells])
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        for cells in grid:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
            yield "    " + " ".join(self._marked(cell, "[" in cell) for cell in padded).rstrip()

    def _codes(self, stream: str) -> Tensor | None:
        """Return the input with a stream's codes, (batch, frames, codebooks), or None."""
        books = self._codebooks()[stream]
        fitting = (t for t in self.batch.inputs.values() if t.dim() == 3 and t.shape[2] == books)
        return next((tensor for tensor in fitting if not tensor.is_floating_point()), None)

    def _labels(self, piece: Piece, row: int, column: int) -> Tensor:
        """Return the labels of a clip, each at its own frame: one position after the one that predicts it."""
        width = shape_of(self.batch)[1]
        positions, targets = self.batch.labels[piece.stream]
        frames = positions + 1 - row * width - column
        inside = (frames >= 0) & (frames < piece.positions)
        labels = targets.new_full((piece.positions, targets.shape[1]), IGNORE)
        labels[frames[inside]] = targets[inside]
        return labels


def _cell(code: int, label: int, names: dict[int, str]) -> str:
    shown = names.get(code, str(code))
    if label == IGNORE:
        return f"{shown} "
    return f"[{shown}]" if label == code else f"[{shown}>{names.get(label, str(label))}]"
