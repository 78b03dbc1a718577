"""Templates that ask for the time are told one date, whatever day it is; what reads the clock otherwise is refused."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rawloop.cli import main
from rawloop.contracts import Audio, Batch, Labels, Sample, Text, Turn
from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family, sample_checks
from rawloop.families.chat_template import DIRECTIVES, clock_notice, stop_clock
from rawloop.families.sample_checks import check_repeatable

DATED = "{% if strftime_now is defined %}Today is {{ strftime_now('%A, %d %b %Y') }}.{% endif %}"
DATES = ("2024-07-26", "1999-01-02T03:04:05")
later = sample_checks._later


def rendered(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    return text


@pytest.mark.parametrize("date", DATES)
def test_a_template_is_told_the_date(text_checkpoint: Path, date: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint)
    formats = [f"%{d}" for d in DIRECTIVES] + ["%d %b %Y", "%H:%M, %A %%"]
    body = "\n a{% for m in messages %}{{ m['content'] }}{% endfor %}"
    macro = "{% macro today(f) %}{{ strftime_now(f) }}{% endmacro %}"
    template = body + macro + "".join(f"|{{{{ today({f!r}) }}}}" for f in formats)
    assert rendered(tokenizer, template).startswith("\n aHi|")
    stop_clock(tokenizer, date)
    stop_clock(tokenizer, "2000-01-01")  # it is stopped already
    moment = datetime.fromisoformat(date)
    wanted = "|".join(moment.strftime(f) for f in formats)
    assert rendered(tokenizer, tokenizer.chat_template) == f"\n aHi|{wanted}"


def test_templates_without_the_time_stay_as_they_are(text_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint)
    before = tokenizer.chat_template
    stop_clock(tokenizer, DATES[0])
    assert tokenizer.chat_template == before
    tokenizer.chat_template = {"default": before, "tools": DATED}
    stop_clock(tokenizer, DATES[0])
    assert tokenizer.chat_template["default"] == before
    assert "it always gets 2024-07-26 (model.template_date)" in clock_notice(type("Own", (), {"tokenizer": tokenizer}))
    stop_clock(object(), DATES[0])  # a processor that has none


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_templates_that_draw_are_refused(text_checkpoint: Path, draw: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint)
    tokenizer.chat_template += draw
    with pytest.raises(UserError, match="the chat template draws at random"):
        stop_clock(tokenizer, DATES[0])


def test_the_date_is_a_date() -> None:
    with pytest.raises(UserError, match=r"model.template_date is 'today': it must be a date such as 2024-07-26"):
        ModelConfig(template_date="today")


# -- families ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dated(tmp_path: Path) -> Callable[[Path], str]:
    """Give `dated(folder)`: a copy of a checkpoint whose template begins with the date."""

    def copy(folder: Path) -> str:
        shutil.copytree(folder, tmp_path / "dated")
        file = tmp_path / "dated" / "chat_template.jinja"
        file.write_text(DATED + file.read_text())
        return str(tmp_path / "dated")

    return copy


SAID = Turn("assistant", (Text("One."),), trained=True)
SPOKEN = Turn("assistant", (Audio(Path("clip")),), trained=True)


@pytest.mark.parametrize(("kind", "answer"), [("text", SAID), ("higgs", SPOKEN)])
def test_a_sample_is_the_same_on_all_days(
    request: pytest.FixtureRequest, dated: Callable[[Path], str], kind: str, answer: Turn
) -> None:
    name = {"text": "text_checkpoint", "higgs": "demo_checkpoint"}[kind]
    base = request.getfixturevalue(name)
    path = dated(base / "model" if kind == "higgs" else base)
    sample = Sample("s", (Turn("user", (Text("Count."),)), answer))
    family: Any = load_family(ModelConfig(path=path))
    books = getattr(family.settings, "num_codebooks", 1) if kind == "higgs" else 1

    def make(by: Any) -> Batch:
        made: Batch = by.collate([by.example(sample, lambda _: torch.ones(5, books, dtype=torch.int64))])
        return made

    check_repeatable(lambda: make(family))
    assert "Today is Friday, 26 Jul 2024." in family.tokenizer.decode(make(family).inputs["input_ids"][0])
    assert "it always gets 2024-07-26" in clock_notice(family)
    assert clock_notice(load_family(ModelConfig(path=str(base / "model" if kind == "higgs" else base)))) == ""
    family.tokenizer.chat_template = Path(path, "chat_template.jinja").read_text()  # as a family of one's own may have
    with pytest.raises(UserError, match="the samples s become other numbers each time they are made"):
        check_repeatable(lambda: make(family))


def batch(*numbers: float, **labels: int) -> Batch:
    made = {stream: Labels(torch.zeros(1), torch.tensor([target])) for stream, target in labels.items()}
    return Batch({"x": torch.tensor(numbers)}, made, dict.fromkeys(labels, 1), ["a", "b"])


def test_what_draws_without_a_seed_is_refused() -> None:
    check_repeatable(lambda: batch(1.0, text=3))
    numbers = iter(range(1, 99))
    for make in (
        lambda: batch(random.random()),
        lambda: batch(*[1.0] * next(numbers)),
        lambda: batch(1.0, text=next(numbers)),
        lambda: batch(1.0, **{f"text{next(numbers)}": 1}),
    ):
        with pytest.raises(UserError, match="the samples a, b become other numbers"):
            check_repeatable(make)


# -- commands ----------------------------------------------------------------------------------------------------


def test_eval_loss_does_not_depend_on_the_day(
    dated: Callable[[Path], str], text_checkpoint: Path, text_data: Path, tmp_path: Path, capfd: Any
) -> None:
    model = dated(text_checkpoint)
    options = [f"--model.path={model}", f"--data.train={text_data}/train.jsonl", f"--data.eval={text_data}/eval.jsonl"]
    options += [f"--output={tmp_path}/run", "--device=cpu", "--checks.enabled=false", "--records.progress=false"]
    told = (
        "the chat template asks for the time: it always gets 2024-07-26 (model.template_date), in training and in eva"
    )
    assert main(["train", *options, "--train.max_steps=1"]) == 0
    assert told in capfd.readouterr().out
    losses = []
    for day in (None, later):
        with day() if day else nothing():
            assert main(["evaluate", f"{tmp_path}/run/config.yaml", "--checkpoint=latest"]) == 0
            assert main(["train", *options, "--train.max_steps=1", "--resume=latest"]) == 0
        said = capfd.readouterr()
        losses.append(json.loads(said.out[: said.out.index("}") + 1])["eval_loss"])
        assert told in said.err
    assert losses[0] == losses[1]
    assert main(["train", *options, "--resume=latest", "--model.template_date=2025-01-01"]) == 2
    assert "model.template_date 2024-07-26 -> 2025-01-01: set them back" in capfd.readouterr().err


@contextmanager
def nothing() -> Iterator[None]:
    yield
