"""The samples that are kept for the evaluation."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rawloop.contracts import Sample
from rawloop.data import DataConfig
from rawloop.data.eval_share import choose, share_of
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

Pairs = list[tuple[str, str | None]]


def speakers(*counts: int) -> Pairs:
    """As many samples of each speaker."""
    return [(f"{speaker}-{number}", f"s{speaker}") for speaker, count in enumerate(counts) for number in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_whole_speakers_are_kept(seed: int) -> None:
    samples = speakers(*[5] * 20)
    choice = choose(samples, 0.1, seed=seed)
    kept = [samples[index][1] for index in choice.chosen]
    assert (choice.by, len(kept), len(set(kept))) == ("speaker", 10, 2)
    assert choice.advice(100, 0.1, "--split") is None


def test_the_choice_depends_on_ids_speakers_and_seed_alone() -> None:
    samples = speakers(*[5] * 20)

    def kept(pairs: Pairs, seed: int = 0) -> set[str]:
        return {pairs[index][0] for index in choose(pairs, 0.1, seed=seed).chosen}

    assert kept(samples) == kept(samples[::-1])
    assert len({frozenset(kept(samples, seed)) for seed in range(5)}) > 1


def test_single_samples_of_one_speaker_or_of_none() -> None:
    for samples in (speakers(100), [(name, None) for name, _ in speakers(100)]):
        choice = choose(samples, 0.05)
        assert (choice.by, len(choice.chosen)) == ("sample", 5)
    assert len(choose(speakers(2), 0.01).chosen) == len(choose(speakers(2), 0.99).chosen) == 1


def test_few_speakers_give_the_smallest_and_a_line() -> None:
    samples = speakers(40, 30, 30)
    choice = choose(samples, 0.05)
    assert len({samples[index][1] for index in choice.chosen}) == 1
    assert len(choice.chosen) == 30
    assert choice.advice(100, 0.05, "--split") == (
        "the evaluation has 30% of the samples instead of 5%, since no speaker has so few: --split sample takes single "
        "samples of all speakers"
    )
    assert (choose(samples, 0.05, "sample").by, len(choose(samples, 0.05, "sample").chosen)) == ("sample", 5)


def test_one_sample_cannot_be_divided() -> None:
    with pytest.raises(UserError, match=r"1 sample\(s\) cannot be divided"):
        choose([("a", None)], 0.5)


@pytest.mark.parametrize("key", ["speaker_id", "speaker", "client_id"])
def test_a_run_trains_on_what_it_does_not_evaluate(tmp_path: Path, jsonl: Callable[..., Path], key: str) -> None:
    records = [{"audio_file": f"{n}.wav", "transcript": "Words.", key: f"s{n % 4}"} for n in range(12)]
    config = DataConfig(train=str(jsonl(*records)), eval_share=0.25)
    samples = read_samples(str(config.train), config, check_files=False)
    said: list[str] = []
    train, held = (
        [samples[index] for index in share_of(samples, config, split, said.append)] for split in ("train", "eval")
    )

    def voices(part: list[Sample]) -> set[object]:
        return {sample.extra[key] for sample in part}

    assert (len(train), len(held), said) == (9, 3, [])
    assert not voices(train) & voices(held)
    assert sorted(sample.id for sample in [*train, *held]) == sorted(sample.id for sample in samples)


def test_a_share_beside_an_evaluation_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.eval_share is 0.05 and data.eval is 'b': set one of them"):
        DataConfig(train="a", eval="b", eval_share=0.05)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"data.eval_share is .*: it must lie between 0 and 1"):
            DataConfig(train="a", eval_share=share)


def test_segments_without_a_speaker_stay_with_their_recording(jsonl: Callable[..., Path]) -> None:
    records = [
        {"audio_file": f"{n % 4}.wav", "transcript": "W.", "id": str(n), "offset": n, "duration": 1} for n in range(12)
    ]
    config = DataConfig(train=str(jsonl(*records)), eval_share=0.25)
    samples = read_samples(str(config.train), config, check_files=False)
    held = share_of(samples, config, "eval", lambda line: None)
    assert len(held) == 3
    assert len({records[index]["audio_file"] for index in held}) == 1
    single = share_of(samples, DataConfig(train=config.train, eval_share=0.25, eval_by="sample"), "eval", print)
    assert len({records[index]["audio_file"] for index in single}) > 1
