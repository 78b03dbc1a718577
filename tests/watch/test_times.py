"""A loader that becomes slow is an alarm; one long wait, or waits of microseconds, are not."""

from torch import nn

from rawloop.watch.findings import Finding
from rawloop.watch.subject import StepRecord, Subject
from rawloop.watch.times import Times


def followed(waits: list[float], seconds: float = 0.05) -> list[Finding]:
    watch, subject = Times(), Subject(nn.Linear(1, 1), [], None, list)
    records = [StepRecord(step, seconds=seconds, data_seconds=wait) for step, wait in enumerate(waits)]
    return [finding for record in records for finding in watch.find(subject, record)]


def test_waits_that_grow_and_dominate_are_an_alarm_with_the_first_step() -> None:
    (found,) = followed([0.001] * 14 + [0.2] * 6)
    assert (found.kind, found.ordinary, found.step, found.since) == ("data_slow", False, 16, 14)
    assert [cause.whose for cause in found.causes] == ["data", "hardware"]


def test_single_long_waits_small_ones_and_those_that_the_step_outweighs_are_quiet() -> None:
    assert followed([5.0] + [0.001] * 14 + [5.0, 5.0] + [0.001] * 10) == []
    assert followed([0.00001] * 20 + [0.001] * 6, seconds=0.0001) == []
    assert followed([0.001] * 20 + [0.2] * 6, seconds=0.5) == []
    assert followed([0.0001] * 20 + [0.0365] * 6, seconds=0.001) == []
    assert [finding.ordinary for finding in followed([0.2] * 30)] == [True]  # the loader was always slow
