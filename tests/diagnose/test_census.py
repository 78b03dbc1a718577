"""The census counts what is learnt, and misses no stop token that is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.contracts import Special
from rawloop.diagnose.census import Census, take_census
from rawloop.diagnose.checks import Report
from rawloop.diagnose.config import ChecksConfig
from rawloop.families import ModelConfig, load_family
from rawloop.families.higgs_audio_v2 import HiggsAudioV2

Mask = Callable[[Any], Any]


def census_of(family: Any, examples: list[Any]) -> Census:
    return take_census(family, examples, [family.collate(examples[:3]), family.collate(examples[3:])])


def counts(census: Census) -> dict[str, list[int]]:
    return {special.name: found for special, found in census.specials.items()}


def test_what_is_learnt_of_whom(family: HiggsAudioV2, examples: list[Any]) -> None:
    census = census_of(family, examples)
    frames = sum(int((example.audio_labels != -100).sum()) for example in examples)
    learnt = {key: targets for key, (_, targets) in census.roles.items()}
    assert learnt.pop(("assistant", "audio")) == frames
    assert learnt.pop(("assistant", "text")) == 2 * 8
    assert set(learnt) == {("system", "text"), ("scene", "text"), ("user", "text")}
    assert not any(learnt.values())
    assert sum(positions for positions, _ in census.roles.values()) == sum(len(e.input_ids) for e in examples)
    assert counts(census) == {
        "EOS": [8] * 8,
        "BOS": [0] * 8,
        "<|audio_eos|>": [8],
        "<|eot_id|>": [8],
        "<|reserved_special_token_6|>": [0],
    }
    assert census.missing() == []
    lines = census.lines()
    assert lines[0] == "label census of 8 samples"
    (begin,) = census.instructions
    assert begin.split("<|scene_desc_start|>")[0].strip().endswith("Generate audio following instruction.")
    assert any(line.startswith("8 of 8 samples begin with: <|begin_of_text|>") and "↵" in line for line in lines)
    assert [line.split() for line in lines if line.startswith("EOS")] == [
        ["EOS", "audio", "1025", "8", "in", "each", "of", "8", "required"]
    ]
    assert any(line.split()[:2] == ["user", "text"] and line.endswith("0  100.0%") for line in lines)


def test_labels_without_the_stop_token_are_named(
    family: HiggsAudioV2, examples: list[Any], mask_the_stop_token: Mask
) -> None:
    census = census_of(family, [mask_the_stop_token(example) for example in examples])
    assert census.missing() == ["'EOS' (id 1025 of the stream 'audio') in any codebook"]
    (line,) = (line for line in census.lines() if line.startswith("EOS"))
    assert line.endswith("0 in each of 8  required, MISSING")


def test_a_stop_token_that_is_missing_in_some_codebooks_only(family: HiggsAudioV2, examples: list[Any]) -> None:
    for example in examples:
        labels = example.audio_labels[:, [2, 5]]
        example.audio_labels[:, [2, 5]] = labels.masked_fill(labels == 1025, -100)
    census = census_of(family, examples)
    assert census.missing() == ["'EOS' (id 1025 of the stream 'audio') in codebook 2, 5"]
    (line,) = (line for line in census.lines() if line.startswith("EOS"))
    assert "8 8 0 8 8 0 8 8" in line


@pytest.mark.parametrize("name", ["<|audio_eos|>", "<|eot_id|>"])
def test_a_stop_token_of_the_text_that_is_missing(family: HiggsAudioV2, examples: list[Any], name: str) -> None:
    number = family.tokenizer.convert_tokens_to_ids(name)
    for example in examples:
        example.labels[example.labels == number] = -100
    assert census_of(family, examples).missing() == [f"'{name}' (id {number} of the stream 'text')"]


def test_without_text_stream_its_tokens_are_not_required(
    demo_checkpoint: Path, trained_samples: list[Any], cache: Any
) -> None:
    audio_only = load_family(ModelConfig(path=str(demo_checkpoint / "model"), stream_weights={"text": 0.0}))
    census = census_of(audio_only, [audio_only.example(sample, cache) for sample in trained_samples])
    assert census.missing() == []
    assert set(counts(census)) == {"EOS", "BOS"}
    assert census.roles["assistant", "text"][1] == 0


def test_the_censuses_of_two_ranks_add_up_to_that_of_one(
    family: HiggsAudioV2, examples: list[Any], mask_the_stop_token: Mask
) -> None:
    halves = [take_census(family, half, [family.collate(half)]) for half in (examples[:3], examples[3:])]
    assert halves[0] + halves[1] == census_of(family, examples)
    masked = [mask_the_stop_token(example) for example in examples[3:]]
    mixed = halves[0] + take_census(family, masked, [family.collate(masked)])
    assert mixed.missing() == []
    assert counts(mixed)["EOS"] == [3] * 8


def test_what_stands_in_census_json(family: HiggsAudioV2, examples: list[Any]) -> None:
    content = json.loads(json.dumps(census_of(family, examples).as_json()))
    assert content["samples"] == 8
    assert content["codebooks"] == {"audio": 8, "text": 1}
    special = Special("audio", "EOS", 1025, required=True, roles=("assistant",))
    assert {**special._asdict(), "roles": ["assistant"], "targets": [8] * 8} in content["specials"]
    frames = sum(len(example.audio_input_ids) for example in examples)
    (audio,) = (role for role in content["roles"] if role["stream"] == "audio")
    assert (audio["role"], audio["positions"]) == ("assistant", frames)


def report_of(census: Census) -> Report:
    return Report(ChecksConfig(expect_chance=True), census, [], {}, 0.0, census.samples)


def test_samples_without_targets_are_named(family: HiggsAudioV2, examples: list[Any]) -> None:
    for example in (examples[1], examples[6]):
        example.labels.fill_(-100)
        example.audio_labels.fill_(-100)
    census = census_of(family, examples)
    assert census.silent == [examples[1].id, examples[6].id]
    names = f"{examples[1].id}, {examples[6].id}"
    assert f"no target in any stream: {names}" in census.lines()
    assert census.as_json()["without_targets"] == census.silent
    assert report_of(census).warnings() == [
        f"2 of 8 samples have no target in any stream, so nothing is learnt from them: {names}; correct their "
        "labels, or leave them out"
    ]
    examples[1].audio_labels[3, 0] = 7  # one target is enough
    assert census_of(family, examples).silent == [examples[6].id]


def test_prompts_that_are_learnt_are_a_warning(family: HiggsAudioV2, examples: list[Any]) -> None:
    assert census_of(family, examples).prompts() == {}
    assert report_of(census_of(family, examples)).warnings() == []
    for example in examples:
        example.labels.copy_(example.input_ids)
    census = census_of(family, examples)
    assert list(census.prompts()) == ["system", "scene", "user"]
    assert census.prompts()["user"] == census.roles["user", "text"][0]
    (said,) = report_of(census).warnings()
    assert said.startswith(
        "prompts are learnt: there are targets in turns that the model does not say (320 in system turns, "
    )
    several = Census(1, {("system+user", "text"): (9, 2), ("assistant", "text"): (5, 5), ("text", "text"): (5, 4)})
    assert several.prompts() == {"system+user": 2}
