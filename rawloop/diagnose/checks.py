"""Runs the checks before step 0; the training that follows is the same as without them.

Each rank looks at the first micro-batches that it will train on. Then the ranks join their results and decide alike.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import Any

from rawloop.contracts import Family, has
from rawloop.diagnose.causality import Movement, probe
from rawloop.diagnose.census import Census, take_census
from rawloop.diagnose.report import ChecksConfig, Report
from rawloop.diagnose.verdict import Autocast, Reading, judge, read_losses
from rawloop.dist import World
from rawloop.losses import LossModule

# Labels are counted in up to so many samples of all ranks, if the first ones do not show whether a token that must be
# learnt is a target.
COUNTED = 512

PROBED = ("perturb", "logits")
NEEDED = {
    "pieces": "how much of each role is learnt",
    "special_targets": "whether stop tokens are learnt",
    "chance": "whether the first loss is better than guessing",
    "logits": "whether losses are those of the logits, and causality",
    "perturb": "causality",
}

Examples = Callable[[int, int], Sequence[Sequence[Any]]]


def run_checks(
    config: ChecksConfig,
    family: Family,
    module: LossModule,
    examples: Examples,
    autocast: Autocast,
    world: World,
) -> Report:
    """Run the three checks, all ranks together; the model and random streams are left as they are.

    Args:
        config: the findings that are expected or allowed.
        family: of the model.
        module: the raw model with its loss, prepared by the policy, not wrapped in DDP.
        examples: gives this rank's examples of its micro-batches from one number up to another, a list for each; fewer
            where the data ends.
        autocast: gives the context in which training runs its forward passes.
        world: the ranks.
    """
    start = time.perf_counter()
    share = world.on_all_ranks(partial(_own_share, family, module, examples, config.batches, autocast))
    assert share is not None
    censuses, readings, movements = zip(*world.gather(share), strict=True)
    total = _decided(reduce(add, censuses), family, examples, config.batches, world)
    names = dict.fromkeys(name for own in readings for name in own)
    chance = family.chance() if has(family, "chance") else {}
    verdicts = [
        judge(name, reduce(add, (own[name] for own in readings if name in own)), chance.get(name.split("/")[0]))
        for name in names
    ]
    probed = family.streams if has(family, *PROBED) else ()
    moved = {stream: reduce(Movement.join, (own[stream] for own in movements)) for stream in probed}
    measured = sum(census.samples for census in censuses)
    seconds = round(time.perf_counter() - start, 3)
    lacking = [f"{what} (no `{name}`)" for name, what in NEEDED.items() if not has(family, name)]
    return Report(config, total, verdicts, moved, seconds, measured, lacking)


def _decided(total: Census, family: Family, examples: Examples, start: int, world: World) -> Census:
    """Count the labels of more micro-batches, as many again each time, until they tell; no model is needed for it."""
    while total.undecided() and total.samples < COUNTED:
        share = world.on_all_ranks(partial(_own_census, family, examples, start, 2 * start))
        assert share is not None
        more = reduce(add, world.gather(share))
        if not more.samples:
            break
        total, start = total + more, 2 * start
    return total


def _own_census(family: Family, examples: Examples, start: int, stop: int) -> Census:
    groups = examples(start, stop)
    return take_census(family, chain.from_iterable(groups), [family.collate(list(group)) for group in groups])


def _own_share(
    family: Family, module: LossModule, examples: Examples, number: int, autocast: Autocast
) -> tuple[Census, dict[str, Reading], dict[str, Movement]]:
    groups = examples(0, number)
    batches = [family.collate(list(group)) for group in groups]
    census = take_census(family, chain.from_iterable(groups), batches)
    device = next(module.parameters()).device
    readings = read_losses(family, module, [batch.to(device) for batch in batches], autocast, groups)
    if not has(family, *PROBED):
        return census, readings, {}
    twice = family.collate([groups[0][0]] * len(family.streams))  # a row for each stream's turn
    return census, readings, probe(family, module.model, twice.to(device), autocast)
