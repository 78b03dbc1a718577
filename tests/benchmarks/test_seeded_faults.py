"""The list of seeded faults fits the code that it spoils, its tests exist, and a few faults are really noticed."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def faults() -> Any:
    spec = importlib.util.spec_from_file_location("seeded_faults", Path(__file__).with_name("seeded_faults.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fault_fits_the_code_once_and_names_tests_that_exist(faults: Any) -> None:
    assert faults.outdated(faults.FAULTS, faults.ROOT / "rawloop") == []
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS) >= 15
    for fault in faults.FAULTS:
        assert fault.tests, fault.name
        for test in fault.tests:
            file, function = test.split("::")
            assert f"def {function}(" in (faults.ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_a_fault_that_no_longer_fits_ends_the_script(
    faults: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = faults.FAULTS[0]._replace(name="late", old="no such line")
    twice = faults.FAULTS[0]._replace(name="twice", old="return")
    monkeypatch.setattr(faults, "FAULTS", (late, twice))
    assert faults.main([]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert re.search(
        r"out of date: late: its old text stands 0 times in .*; twice: its old text stands \d+ t", said.err
    )


def test_the_page_has_a_row_for_every_fault(faults: Any) -> None:
    page = (faults.ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    for fault in faults.FAULTS:
        (row,) = re.findall(rf"^\| {re.escape(fault.name)} \|.*$", page, re.MULTILINE)
        assert all(f"`{test}`" in row for test in fault.tests), row


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_few_faults_are_noticed_and_one_that_changes_nothing_is_not(
    faults: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [
        fault for fault in faults.FAULTS if fault.name.startswith(("last batch", "stop token of text", "evaluation l"))
    ]
    assert len(few) == 3
    harmless = faults.Fault("nothing", "loop.py", "state = run.state\n", "state = run.state  # \n", few[0].tests[:1])
    monkeypatch.setattr(faults, "outdated", lambda *_: [])  # the last one's text stands more than once
    monkeypatch.setattr(faults, "FAULTS", (*few, harmless))
    assert faults.main([]) == 1
    said = capsys.readouterr()
    _, _, *rows = said.out.splitlines()
    assert [row.count("`") for row in rows] == [*(2 * len(fault.tests) for fault in few), 0]
    assert said.err == f"not noticed: nothing: {harmless.tests[0]}\n"
