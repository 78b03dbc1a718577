"""Every setting of the installed HF Trainer and PEFT has a row, with its default; and what the rows say is true."""

import dataclasses
import re
from typing import Any, get_args, get_type_hints

import pytest
from peft import LoraConfig
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from rawloop.config import RunConfig, known_keys
from rawloop.errors import UserError
from rawloop.translation.axolotl import AXOLOTL
from rawloop.translation.higgs import FROZEN, HIGGS
from rawloop.translation.llama_factory import LLAMA_FACTORY
from rawloop.translation.lora import LORA
from rawloop.translation.rules import Given, Table
from rawloop.translation.swift import SWIFT
from rawloop.translation.telling import our_defaults
from rawloop.translation.trainer import TRAINER
from rawloop.translation.trainer_more import MORE_TRAINER
from rawloop.translation.translate import translate
from rawloop.translation.trl import SFT, TRL
from tests.translation import page

KEYS = known_keys()
PREFERENCES = {"beta", "max_prompt_length", "num_generations", "reward_funcs", "reward_model_path"}
REFUSED = PREFERENCES | {"rl", "stage", "rlhf_type", "task_type", "resume_from_checkpoint"}
TABLES = [TRAINER, MORE_TRAINER, LORA, SFT, TRL, AXOLOTL, LLAMA_FACTORY, SWIFT, HIGGS]
titles = pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.title))


def defaults_of(owner: Any) -> dict[str, Any]:
    """The default of every field of a config dataclass of another library."""
    found = {}
    for item in dataclasses.fields(owner):
        made = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        found[item.name] = dataclasses.asdict(made) if dataclasses.is_dataclass(made) else made  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("owner", "table"), [(TrainingArguments, TRAINER), (Seq2SeqTrainingArguments, MORE_TRAINER), (LoraConfig, LORA)]
)
def test_every_field_has_a_row_with_its_default(owner: Any, table: Table) -> None:
    theirs = defaults_of(owner)
    assert len(theirs) > 40
    assert not theirs.keys() - table.rules.keys()
    assert {name: table.rules[name].default for name in theirs} == theirs


def test_no_row_of_the_main_tables_is_out_of_date() -> None:
    assert TRAINER.rules.keys() == defaults_of(TrainingArguments).keys()
    assert LORA.rules.keys() == defaults_of(LoraConfig).keys()


@titles
def test_keys_and_words_name_keys_that_exist(table: Table) -> None:
    for rule in table.rules.values():
        assert {*rule.keys, *re.findall(r"'([\w.]+)'", rule.words)} <= KEYS, rule
        assert rule.words or rule.renamed, f"{rule.name} says neither what is different nor why there is no counterpart"
    for words in table.prefixes.values():
        assert {*re.findall(r"'([\w.]+)'", words)} <= KEYS


@titles
def test_a_row_sets_its_own_keys_only(table: Table) -> None:
    """Values of all kinds: what a convert makes of them are its row's keys, and it knows every kind."""
    tried: dict[str, list[Any]] = {
        "flag": [True, False],
        "number": [0, 1, 3, 0.5],
        "text": ["x", ""],
        "list": [["x"], "x", None],
    }
    refused = set()
    for rule in table.rules.values():
        for value in [rule.default, *tried.get(rule.kind, [None])]:
            values = Given({name: one.default for name, one in table.rules.items()})
            values[rule.name], values.named = value, frozenset({rule.name})
            try:
                found = rule.convert(value, values)
            except UserError:
                refused.add(rule.name)
                continue
            assert found.settings.keys() <= {*rule.keys}, f"{rule.name} {value!r}"
            assert {*re.findall(r"'([\w.]+)'", found.words)} <= KEYS, found.words
            assert not (found.missing and found.settings)
    assert refused <= REFUSED


def plain_hints() -> dict[str, Any]:
    """The type of each key."""
    found: dict[str, Any] = {}

    def walk(owner: Any, prefix: str) -> None:
        for name, hint in get_type_hints(owner).items():
            if dataclasses.is_dataclass(hint):
                walk(hint, f"{prefix}{name}.")
            else:
                found[prefix + name] = hint

    walk(RunConfig, "")
    return found


@titles
def test_a_renamed_setting_has_the_type_of_its_key(table: Table) -> None:
    hints = plain_hints()
    for rule in table.rules.values():
        if rule.renamed:
            hint = hints[rule.keys[0]]
            kinds = {bool: "flag", int: "number", float: "number", str: "text", list[str]: "list"}
            allowed = {kinds[one] for one in (*get_args(hint), hint) if one in kinds}
            assert rule.kind in allowed or (rule.kind == "any" and rule.name == "gradient_checkpointing"), rule.name


@titles
def test_without_settings_the_defaults_are_translated(table: Table) -> None:
    """The defaults of each program give settings that rawloop accepts, and are all told."""
    done = translate(table, {}, our_defaults())
    assert {key for line in done.lines for key in line.settings} == done.settings.keys()
    assert all(line.status == "assumed" for line in done.lines)
    assert all(done.settings[key] != our_defaults()[key] for key in done.settings)


def test_the_defaults_of_hf_trainer_that_are_not_ours() -> None:
    assert translate(TRAINER, {}, our_defaults()).settings == {
        "train.batch_size": 8,
        "train.epochs": 3.0,
        "optim.lr": 5e-5,
        "optim.schedule": "linear",
        "train.log_every": 500,
        "evaluation.enabled": False,
        "evaluation.batch_size": 8,
        "checkpoint.keep_last": 0,
        "seed": 42,
    }


def test_what_freeze_llm_freezes_is_the_text_half_of_the_model(demo_checkpoint: Any) -> None:
    from fnmatch import fnmatchcase

    from safetensors import safe_open

    (file,) = (demo_checkpoint / "model").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
    frozen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in FROZEN["freeze_llm"])}
    trained = {re.sub(r"\d+", "N", name) for name in names - frozen}
    assert trained == {
        "audio_lm_head.weight",
        "text_lm_head.weight",
        "model.embed_audio_tokens.embed_audio_tokens.weight",
        *(f"model.layers.N.audio_mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        "model.layers.N.audio_input_layernorm.weight",
        "model.layers.N.audio_post_attention_layernorm.weight",
    }


def test_the_page_has_the_tables_of_the_code() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert {at[1] for at in page.FENCE.finditer(text)} == page.BLOCKS.keys()
    assert page.rendered(text) == text, "run `python -m tests.translation.page`"
