"""The loss verdict at its edges, and the causality probe's outcomes from what it measured."""

import math
from typing import Any

import pytest

from rawloop.diagnose import Movement, Reading, judge
from rawloop.diagnose.verdict import CHANCE_FROM, LEAK_BELOW, VARIETY

CHANCE = math.log(1026)


def reading(loss: float, **values: Any) -> Reading:
    """100 targets as varied as chance."""
    return Reading(**{"nats": 100 * loss, "targets": 100, "entropy": 100 * CHANCE, **values})


@pytest.mark.parametrize(
    ("measured", "kind", "why"),
    [
        (reading(CHANCE), "CHANCE", "no better than guessing"),
        (reading(CHANCE_FROM * CHANCE + 1e-6), "CHANCE", "no better than guessing"),
        (reading(CHANCE_FROM * CHANCE - 1e-6), "OK", ""),
        (reading(CHANCE / CHANCE_FROM + 1e-6), "CHANCE", "worse than guessing"),
        (reading(LEAK_BELOW * CHANCE + 1e-6), "OK", ""),
        (reading(LEAK_BELOW * CHANCE - 1e-6), "LEAK", ""),
        (reading(0.0028), "LEAK", ""),  # a published run with labels that were not shifted
        (reading(0.0, entropy=100 * (VARIETY - 1e-6)), "OK", ""),  # an end of turn is rightly known beforehand
        (reading(0.0, entropy=100 * (VARIETY + 1e-6)), "LEAK", ""),
        (reading(3.0, connected=False), "DEAD", "no trained weight gets a gradient"),
        (reading(3.0, varied=False), "DEAD", "logits are the same at every position"),
        (reading(math.nan), "DEAD", "not finite"),
        (Reading(), "DEAD", "it has no target"),
    ],
)
def test_verdicts(measured: Reading, kind: str, why: str) -> None:
    verdict = judge("audio", measured, CHANCE)
    assert verdict.kind == kind
    assert why in verdict.why
    assert (verdict.why == "") == (kind == "OK")


def test_readings_of_ranks_add_up() -> None:
    both = reading(2.0, connected=False) + reading(4.0) + Reading()
    assert (both.nats, both.targets, both.connected) == (600.0, 200, True)
    assert (reading(2.0, varied=False) + Reading()).varied is False


@pytest.mark.parametrize(
    ("movement", "outcome"),
    [
        (Movement(5, 5, 0.0, 0.3, 1e-6), "PASS"),
        (Movement(5, 5, 1e-6, 0.3, 1e-6), "PASS"),
        (Movement(5, 5, 2e-6, 0.3, 1e-6), "LEAK"),
        (Movement(5, 5, 0.0, 1e-6, 1e-6), "BLIND"),
        (Movement(0, 5, 0.0, 0.3, 1e-6), "UNSEEN"),
        (Movement(5, 0, 0.0, 0.0, 1e-6), "UNSEEN"),
    ],
)
def test_outcomes_of_the_probe(movement: Movement, outcome: str) -> None:
    assert movement.outcome() == outcome
    assert movement.join(Movement(0, 0, 0.0, 0.0, 0.0)).outcome() == outcome
