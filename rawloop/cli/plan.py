"""`rawloop plan`: memory and time of a run, and on which cards it fits, without a GPU and without weights."""

from collections.abc import Iterator
from typing import get_args

from rawloop.allocations import KINDS
from rawloop.cards import CARDS, CUDA, RESERVE, SIZES, Choice
from rawloop.cli import read_config
from rawloop.cli.options import PlanOptions
from rawloop.diagnose.shared import table
from rawloop.errors import UserError
from rawloop.estimate import BUCKETS, EXTRA
from rawloop.launcher import num_processes
from rawloop.planning import described
from rawloop.precision.config import Name
from rawloop.sizing import ADAPTERS, Sizing, changes_for, size_run

SHORT = {
    "frozen weights": "frozen",
    "trained weights": "trained",
    "loss head": "head",
    BUCKETS: "buckets",
}
GB = 1e9


def run(argv: list[str]) -> None:
    """Estimate the run, and print the tables."""
    config, options, _ = read_config("plan", argv)
    if num_processes() > 1:
        raise UserError("rawloop plan works in one process: call it without torchrun, and give --processes")
    print("\n".join(plan_lines(size_run(config, options.processes, options.positions, options.samples), options)))


def plan_lines(sized: Sizing, options: PlanOptions) -> Iterator[str]:
    """Yield the lines of a plan."""
    own, chosen, model = sized.own, sized.chosen, sized.config.model
    how = f"{chosen.adapter}, {chosen.mode}, activation checkpointing {'on' if chosen.checkpointing else 'off'}"
    yield f"{model.path or model.family}: {own.parameters:,} parameters, {own.trained:,} trained ({how})"
    yield f"costliest micro-batch: {described(sized.batch)}"
    if sized.typical is not sized.batch:
        yield f"a typical one takes {_gb(sized.as_usual.total)} GB: {described(sized.typical)}"
    yield ""
    yield "GB at the peak of a step with the costliest micro-batch, by what they are; on and off: with and without"
    yield "activation checkpointing; * as configured"
    rows = [*memory_rows(sized)]
    yield from table("ll" + "r" * (len(rows[0]) - 2), rows)
    for why in dict.fromkeys(sized.refused.values()):
        names = dict.fromkeys(f"{choice.adapter} {choice.mode}" for choice, w in sized.refused.items() if w == why)
        yield f"left out: {', '.join(names)}: {why}"
    if own.host:
        yield f"host memory for the copy of an asynchronous save: {_gb(own.host)} GB"
    yield ""
    yield f"as configured on a card, with {CUDA / GB:g} GB for CUDA and {RESERVE:.0%} in reserve"
    yield from table("rl", [[f"{size} GB", _fit(sized, size)] for size in SIZES])
    yield ""
    yield from time_lines(sized, options)


def memory_rows(sized: Sizing) -> Iterator[list[str]]:
    """Yield the table of bytes, with its head: a row for each mode and adapter."""
    found_in = sized.costliest.values()
    kinds = [kind for kind in (*KINDS, *EXTRA) if kind in KINDS or any(each.peak[kind] for each in found_in)]
    yield ["", "", *(SHORT.get(kind, kind) for kind in kinds), "total", "on", "off"]
    own = sized.chosen
    for adapter in ADAPTERS:
        for mode in get_args(Name):
            choice = Choice(mode, adapter, own.checkpointing, own.rounded and mode == own.mode)
            found = sized.costliest.get(choice)
            if found is None:
                continue
            other = [sized.costliest.get(choice._replace(checkpointing=on)) for on in (True, False)]
            totals = [_gb(each.total) if each else "-" for each in (found, *other)]
            yield [adapter, f"{mode}{' *' if choice == own else ''}", *(_gb(found.peak[k]) for k in kinds), *totals]


def _gb(size: float) -> str:
    size = max(0.0, size)  # of a small kind, what follows from few blocks may be below 0
    return f"{size / GB:.2f}" if size < 99.5e9 else f"{size / GB:.0f}"


def _fit(sized: Sizing, size: int) -> str:
    found = changes_for(sized, size)
    if found is None:
        return "does not fit, and none of these changes makes it fit"
    changes, taken = found
    return f"fits with {' and '.join(changes)}: {_gb(taken)} GB" if changes else "fits"


def time_lines(sized: Sizing, options: PlanOptions) -> Iterator[str]:
    """Yield the operations of a step, and its time by card."""
    epoch = f", {sized.steps:,} steps in an epoch" if sized.steps else ""
    yield (
        f"{sized.flops / 1e12:.3g} TFLOP in a step on each card{epoch}; seconds at {options.utilisation:.0%} of the "
        "peak speed"
    )
    rows = [["card", "GB", "TFLOPS", "s / step", *(["h / epoch"] if sized.steps else [])]]
    for card in CARDS:
        mode = "amp_fp16" if sized.config.precision.mode == "auto" and not card.bf16 else sized.chosen.mode
        rate = card.tflops(mode, sized.config.precision.tf32)
        seconds = sized.flops / (rate * 1e12 * options.utilisation) if rate else None
        times = (
            [f"{seconds:.3g}", f"{seconds * sized.steps / 3600:.3g}"] if seconds else [f"no {sized.chosen.mode}", "-"]
        )
        rows.append([card.name, str(card.memory), f"{rate:g}" if rate else "-", *times[: 1 + bool(sized.steps)]])
    yield from table("lrrrr"[: len(rows[0])], rows)
