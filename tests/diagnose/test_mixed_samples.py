"""A set of chats and texts, of which the first batches may hold one kind alone: the census counts on until it knows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rawloop.adapters.config import AdapterConfig
from rawloop.build import check_run
from rawloop.config import RunConfig
from rawloop.contracts import IGNORE
from rawloop.data import DataConfig
from rawloop.diagnose import checks
from rawloop.diagnose.checks import Report
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.families.causal_lm import CausalLM
from rawloop.loop import TrainConfig
from rawloop.precision.config import PrecisionConfig

Check = Callable[[int], Report]
END_OF_TEXT, END_OF_TURN = "'</s>' (id ", "'<|im_end|>' (id "


@pytest.fixture
def check(text_checkpoint: Path, tmp_path: Path) -> Check:
    """Give `check(seed)`: what is found in the first four samples of 40, of which 30 are texts and 10 chats."""
    asked = {"role": "user", "content": "Say it."}
    chats = [{"messages": [asked, {"role": "assistant", "content": "It. " * k}]} for k in range(1, 11)]
    records: list[dict[str, Any]] = [*chats, *({"text": "la " * k} for k in range(1, 31))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = RunConfig(
        output=str(tmp_path / "run"),
        device="cpu",
        model=ModelConfig(path=str(text_checkpoint)),
        adapter=AdapterConfig(rank=4),
        data=DataConfig(train=str(tmp_path / "train.jsonl")),
        train=TrainConfig(batch_size=1, max_steps=1),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(batches=4, expect_chance=True),
        evaluation=EvaluationConfig(enabled=False),
    )
    return lambda seed: check_run(replace(config, seed=seed), World())


@pytest.mark.slow
def test_no_seed_refuses_chats_mixed_with_texts(check: Check) -> None:
    reports = [check(seed) for seed in range(20)]
    assert [report.problems() + report.warnings() for report in reports] == [[]] * 20
    looked_at = [report.census.samples for report in reports]
    assert min(looked_at) == 4
    assert 4 < max(looked_at) <= 40
    assert {report.samples for report in reports} == {4}  # the model has seen no more than it was asked to


@pytest.mark.parametrize(("kind", "name"), [("text", END_OF_TEXT), ("assistant", END_OF_TURN)])
def test_every_seed_refuses_a_kind_whose_end_is_masked(
    check: Check, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    honest = CausalLM.example

    def example(self: CausalLM, *arguments: Any, **named: Any) -> Any:
        made = honest(self, *arguments, **named)
        end = {"text": self.tokenizer.eos_token_id, "assistant": self.encoder.template.end_of_turn}[kind]
        return replace(made, labels=made.labels.masked_fill(made.labels == end, IGNORE))

    monkeypatch.setattr(CausalLM, "example", example)
    for seed in range(6):
        (problem,) = check(seed).problems()
        assert problem.startswith(name)
        assert "never a target in" in problem


def test_a_kind_that_no_sample_shows_is_said_and_not_judged(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "COUNTED", 5)
    reports = [check(seed) for seed in range(6)]
    assert not any(report.problems() or report.warnings() for report in reports)
    unseen = [report for report in reports if report.census.unseen()]
    assert unseen
    for report in unseen:
        said = report.labels().summary
        assert "of 8 samples: not checked, as no sample needs it: '<|im_end|>'" in said
        assert "of the stream 'text'), which ends the role assistant" in said
        assert any(line.endswith("required, not seen") for line in report.text().splitlines())
