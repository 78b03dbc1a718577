"""What the steps of a run take, as configured and with other settings, for `rawloop plan`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from rawloop.adapters.config import AdapterConfig
from rawloop.cards import Choice, changes_that_fit
from rawloop.components import Data, build_family, read_data
from rawloop.config import RunConfig
from rawloop.contracts import Batch, Family
from rawloop.data.batches import Draw, Plan
from rawloop.data.lengths import Lengths
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.estimate import Estimate, estimate, skeleton_of
from rawloop.family_protocols import SizedFamily
from rawloop.planning import GB, advice, build_plan, costliest, measurer
from rawloop.precision.config import Name, PrecisionConfig

ADAPTERS: tuple[Literal["lora", "full"], ...] = ("lora", "full")
# At the end of a backward pass, at least: with the gradients, which are as large as the trained weights.
HELD = ("frozen weights", "trained weights", "trained weights", "masters", "optimizer")
ROUNDED = PrecisionConfig("bf16", trainable_dtype="bf16", masters="stochastic", fallback=[])
LOOKED_AT = 64  # micro-batches, of which the typical one is taken


class Work(NamedTuple):
    """What a run does: its costliest micro-batches, each as a function of the number of samples; a typical one; and its
    steps in an epoch (0: not known).
    """

    costliest: list[Callable[[int | None], Batch]]
    typical: Batch | None
    steps: int


@dataclass(frozen=True)
class Sizing:
    """Estimates of a run.

    Args:
        config: its settings.
        chosen: the configured choice.
        batch: the costliest micro-batch.
        typical: a typical one.
        steps: in an epoch; 0 if the data are not known.
        processes: of the run.
        costliest: estimates of the costliest micro-batch, by choice.
        as_usual: the estimate of the typical micro-batch.
        refused: the reason of each choice that contradicts the settings or the model.
        taken: the bytes at the peak of a step with a choice and a part of the costliest micro-batch, by its divisor.
    """

    config: RunConfig
    chosen: Choice
    batch: Batch
    typical: Batch
    steps: int
    processes: int
    costliest: dict[Choice, Estimate]
    as_usual: Estimate
    refused: dict[Choice, str]
    taken: Callable[[Choice, int], int]

    @property
    def own(self) -> Estimate:
        """The estimate of the costliest micro-batch as configured."""
        return self.costliest[self.chosen]

    @property
    def flops(self) -> float:
        """Floating-point operations of a step with typical micro-batches, on each device."""
        return self.as_usual.flops * self.config.train.accumulation


def size_run(config: RunConfig, processes: int = 1, positions: int = 0, samples: int = 0) -> Sizing:
    """Estimate a run, without its weights.

    Args:
        config: of the run.
        processes: how many train together.
        positions: of each sample of a micro-batch that is made up; 0 takes the batches of the data.
        samples: of that micro-batch; by default `train.batch_size`.

    Raises:
        UserError: config, data or model are wrong.
    """
    model = replace(config.model, activation_checkpointing=False)  # each estimate decides for itself
    if model.attention.startswith("flash"):
        model = replace(model, attention="sdpa")  # which keeps the same, and is there without the package
    family = build_family(replace(config, model=model))
    if positions:
        number = samples or config.train.batch_size
        work = Work([lambda rows: made_up(family, positions, rows or number)], None, 0)
    else:
        work = work_of(config, _data_of(config, family), processes)
    return _estimates(config, family, work, processes)


def _estimates(config: RunConfig, family: Family, work: Work, processes: int) -> Sizing:
    skeleton = skeleton_of(config, family)
    asked = "bf16" if config.precision.mode == "auto" else config.precision.mode
    rounded = config.precision.masters == "stochastic"
    chosen = Choice(asked, config.adapter.mode, config.model.activation_checkpointing, rounded)
    found = [estimate(config, family, skeleton, part(None), processes) for part in work.costliest]
    own = max(found, key=lambda each: each.total)
    part = work.costliest[found.index(own)]
    batch = part(None)
    as_usual = estimate(config, family, skeleton, work.typical, processes) if work.typical else own
    estimates, refused = {chosen: own}, {}
    for choice in other_choices(chosen, config.optim.name != "schedule_free"):
        try:
            estimates[choice] = estimate(with_choice(config, choice), family, skeleton, batch, processes)
        except UserError as error:
            refused[choice] = str(error)

    @cache
    def taken(choice: Choice, divisor: int) -> int:
        if divisor == 1:
            return estimates[choice].total
        fewer = replace(config, train=replace(config.train, accumulation=config.train.accumulation * divisor))
        fewer = fewer if choice == chosen else with_choice(fewer, choice)
        return estimate(fewer, family, skeleton, part(len(batch.ids) // divisor), processes).total

    typical = work.typical or batch
    return Sizing(config, chosen, batch, typical, work.steps, processes, estimates, as_usual, refused, taken)


def other_choices(chosen: Choice, rounds: bool) -> Iterator[Choice]:
    """Yield all choices but the configured one. Stochastic rounding is one if all weights train, and it `rounds`."""
    for adapter, checkpointing, mode in product(ADAPTERS, (False, True), get_args(Name)):
        usual = Choice(mode, adapter, checkpointing, chosen.rounded and mode == chosen.mode)
        may_round = rounds and mode == "bf16" and adapter == chosen.adapter == "full"
        ways = dict.fromkeys([usual, usual._replace(rounded=usual.rounded or may_round)])
        yield from (way for way in ways if way != chosen)


def changes_for(sized: Sizing, size: float) -> tuple[list[str], float] | None:
    """Return the cheapest changes with which a run fits into a card of `size` GB; see `changes_that_fit`."""
    least = {choice: sum(found.peak[kind] for kind in HELD) for choice, found in sized.costliest.items()}
    return changes_that_fit(size, sized.chosen, least, len(sized.batch.ids), sized.taken)


def what_would_fit(config: RunConfig, world: World) -> str:
    """Return what a plan says of a run that has run out of memory, and the settings that need less.

    Takes up to half a minute. A plan that fails is told, too.
    """
    try:
        sized = size_run(config, world.size)
    except Exception as error:  # the run ends in any case, for want of memory
        return f"{advice(config)} (there is no plan: {type(error).__name__}: {' '.join(str(error).split())})"
    parts = [f"{kind} {size / GB:.3g}" for kind, size in sized.own.peak.items() if size > 0.01 * sized.own.total]
    counted = f"a step takes {sized.own.total / GB:.3g} GB at its peak by `rawloop plan` ({', '.join(parts)})"
    if world.device.type != "cuda":
        return f"{counted}: {advice(config)}"
    memory = torch.cuda.get_device_properties(world.device).total_memory / GB
    found = changes_for(sized, memory)
    way = f"it would fit with {' and '.join(found[0])} ({found[1] / GB:.3g} GB)" if found and found[0] else ""
    return f"{counted}, and the device has {memory:.1f} GB: {f'{way}; or ' if way else ''}{advice(config)}"


def with_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """Return the settings with another choice. What belongs to the configured mode or adapter alone is left out."""
    changed = replace(config, model=replace(config.model, activation_checkpointing=choice.checkpointing))
    if choice.rounded and config.precision.masters != "stochastic":
        changed = replace(changed, precision=ROUNDED)
    elif choice.mode != config.precision.mode:
        changed = replace(changed, precision=PrecisionConfig(choice.mode, fallback=[]))
    if choice.adapter != config.adapter.mode:
        changed = replace(changed, adapter=AdapterConfig(choice.adapter, rank=config.adapter.rank))
    return changed


def work_of(config: RunConfig, data: Data, processes: int) -> Work:
    """Return the micro-batches of a run's data."""
    plan = build_plan(config, data, World(size=processes), data.contents())
    measure = measurer(config, data, "data.train")

    def part_of(draws: list[Draw], rows: int | None) -> Batch:
        return measure.batches.made(draws[:rows])[1]

    parts = [partial(part_of, draws) for draws in costliest(config, data, plan)]
    return Work([*parts], part_of(_typical(plan, measure), None), plan.windows(1.0))


def _data_of(config: RunConfig, family: Family) -> Data:
    try:
        return read_data(config, family, "train")
    except UserError as error:
        raise UserError(f"{error}; to plan without data, give --positions N --samples M") from error


def _typical(plan: Plan, measure: Lengths) -> list[Draw]:
    """Return the micro-batch, of the first ones, whose positions are nearest to their mean."""
    windows = range(min(plan.windows(1.0), -(-LOOKED_AT // plan.accumulation)))
    batches = [draws for window in windows for draws in plan.micro_batches(window)][:LOOKED_AT]
    sizes = np.array([len(draws) * max(measure(draw.sample) for draw in draws) for draws in batches])
    return batches[int(np.abs(sizes - sizes.mean()).argmin())]


def made_up(family: Family, positions: int, samples: int) -> Batch:
    """Return a micro-batch of so many samples with about so many positions each.

    Raises:
        UserError: the family makes none.
    """
    if not isinstance(family, SizedFamily):
        raise UserError(
            f"--positions is {positions}, and the family {type(family).__name__} has no method `sized` to make up a "
            "batch: leave --positions out, so that the data of data.train are taken"
        )
    return family.sized(positions, samples)
