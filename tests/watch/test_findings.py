"""Findings: told once and counted, and readable as a paragraph."""

from rawloop.watch.findings import Cause, Finding, Findings, Place


def nan_in(module: str, step: int = 3) -> Finding:
    cause = Cause("model", "log of zero", Place("forward", module=module), {"largest": 1.5}, "clamp it")
    return Finding("not_finite", "the loss is NaN", (cause,), step)


def test_an_equal_finding_is_counted_and_not_repeated() -> None:
    findings = Findings()
    new = findings.extend([nan_in("head"), nan_in("head", 5), nan_in("body")])
    assert [finding.cause.place.module for finding in new] == ["head", "body"]
    assert len(findings) == 2
    first = next(iter(findings))
    assert (first.step, first.last, first.times) == (3, 5, 2)


def test_a_paragraph_has_symptom_cause_place_numbers_and_advice() -> None:
    text = nan_in("head").text()
    assert text == (
        "step 3: the loss is NaN. [model] log of zero (in forward, module 'head'). Evidence: largest 1.5. Clamp it."
    )


def test_the_rank_is_told_if_there_are_several() -> None:
    finding = nan_in("head")
    finding.world_size = 2
    assert finding.text().startswith("step 3, rank 0: the loss is NaN.")


def test_a_text_says_nothing_twice() -> None:
    cause = Cause("data", "a row is empty", Place("data", tensor="1/labels", rank=2), {}, "drop it")
    found = Finding("empty", "a row is empty", (cause,), 3, 2)
    assert found.text() == "step 3, rank 2: a row is empty. [data] (tensor 'batch[1]/labels'). Drop it."
    assert found.reason() == "a row is empty. [data] (tensor 'batch[1]/labels'). Drop it."
    assert "rank 2" in Finding("empty", "a row is empty", (cause,), 3, 0).text()


def test_ordinary_findings_are_no_alarms_and_come_last() -> None:
    findings = Findings()
    findings.add(
        Finding("skip", "the scaler finds its scale", (Cause("precision", "it starts high"),), 0, ordinary=True)
    )
    findings.add(nan_in("head"))
    assert [finding.kind for finding in findings.alarms] == ["not_finite"]
    assert str(findings).index("NaN") < str(findings).index("ordinary")
