"""References for voice cloning: another clip of the speaker in each epoch, and never the one that is to be learnt."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rawloop.components import build_family, read_data
from rawloop.config import RunConfig
from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data import DataConfig
from rawloop.data.batches import Draw
from rawloop.data.buckets import FramePlan
from rawloop.data.references import GROUP, References, Voices, overlap, with_reference
from rawloop.data.samples import read_samples
from rawloop.errors import BadSample, UserError
from rawloop.families import ModelConfig
from rawloop.planning import measurer

DRAWN = DataConfig(references="drawn")


def sample(name: str, speaker: str | None = "ann", clip: str | None = None, words: str = "Words.") -> Sample:
    turns = (Turn("user", (Text(words),)), Turn("assistant", (Audio(Path(f"/{clip or name}.wav")),), trained=True))
    return Sample(name, turns, "single_speaker_smart_voice", extra={} if speaker is None else {"speaker": speaker})


def drawn(
    samples: Sequence[Sample],
    frames: dict[str, int] | None = None,
    same: dict[str, str] | None = None,
    longest: int = 375,
    check: Callable[[Sample], None] = lambda sample: None,
    seed: int = 0,
) -> tuple[References, str]:
    """References of samples, by the frames and contents of their clips' names."""
    voices = Voices(
        "train",
        DRAWN,
        lambda path: (frames or {}).get(path.stem, 100),
        lambda path: (same or {}).get(path.stem, str(path)),
        longest,
    )
    for row, one in enumerate(samples):
        voices.add(row, one)
    arrays, line = voices.choose(samples.__getitem__, check)
    return References(samples, samples, arrays, DRAWN, seed), line


def clips(sample: Sample) -> list[str]:
    return [path.stem for path in sample.audio_paths()]


def test_another_clip_of_the_speaker_in_each_epoch() -> None:
    samples = [sample(f"{who}{number}", who) for number in range(30) for who in ("ann", "bob")]
    references, line = drawn(samples)
    heard: dict[str, Counter[str]] = defaultdict(Counter)
    for epoch in range(40):
        for index, own in enumerate(samples):
            reference, target = clips(references(Draw(index, epoch)))
            assert target == own.id
            assert reference != own.id
            assert reference[:3] == own.id[:3]
            heard[own.id][reference] += 1
    assert line == "data.train: references are drawn for 60 of 60 samples in each epoch, among 60 clips of 2 speaker(s)"
    for counts in heard.values():
        assert GROUP - 2 <= len(counts) <= GROUP + 1
        assert max(counts.values()) < 20  # of 40 draws among about seven
    assert len({name for counts in heard.values() for name in counts}) == 60  # every clip is a reference of some sample


def test_the_draw_depends_on_seed_epoch_and_sample_alone() -> None:
    samples = [sample(f"s{number}") for number in range(12)]
    draws = [Draw(index, epoch) for epoch in range(4) for index in range(12)]
    references = drawn(samples)[0]
    forwards = [clips(references(draw)) for draw in draws]
    assert [clips(references(draw)) for draw in reversed(draws)] == forwards[::-1]
    assert [clips(drawn(samples, seed=1)[0](draw)) for draw in draws] != forwards


def test_the_sample_is_the_one_of_a_record_that_names_the_clip(metadata: Callable[..., Path]) -> None:
    first = {"id": "a", "audio_file": "a.wav", "transcript": "The words of a.", "speakers": {"SPEAKER0": "feminine"}}
    second = {"id": "b", "audio_file": "b.wav", "transcript": "Good morning.", "scene": "noisy_street"}
    named = first | {"ref_audio_file": "b.wav", "ref_transcript": "Good morning."}
    for in_scene in (False, True):
        for scene in ("In a hall.", None):
            config = DataConfig(refs_in_scene=in_scene, default_scene=scene)
            one, other = read_samples(metadata(first, second), config, check_files=False)
            (expected,) = read_samples(metadata(named), config, check_files=False)
            made = with_reference(one, other, config)
            assert made.turns == expected.turns
            assert made.task == expected.task
            assert made.source == "metadata.json samples[0], reference 'b'"


def test_messages_get_a_reference_after_system_and_scene(jsonl: Callable[..., Path]) -> None:
    def record(name: str, *before: Any) -> dict[str, Any]:
        answer = {"role": "assistant", "content": [{"type": "audio", "path": f"{name}.wav"}]}
        return {"messages": [*before, {"role": "user", "content": f"I am {name}."}, answer]}

    system = {"role": "system", "content": "Speak."}
    path = jsonl(record("a", system), record("b"))
    one, other = read_samples(path, DRAWN, check_files=False)
    assert [(turn.role, turn.words, turn.trained) for turn in with_reference(one, other, DRAWN).turns] == [
        ("system", "Speak.", False),
        ("user", "I am b.", False),
        ("assistant", "", False),
        ("user", "I am a.", False),
        ("assistant", "", True),
    ]
    in_scene = with_reference(one, other, replace(DRAWN, refs_in_scene=True)).turns
    assert [turn.role for turn in in_scene] == ["system", "scene", "user", "assistant"]
    assert in_scene[1].words == "Audio is recorded from a quiet room.SPEAKER0:"


def test_a_copy_of_the_clip_is_never_its_reference() -> None:
    samples = [sample("a"), sample("copy"), sample("again", "bob", clip="a"), sample("c"), sample("d", "bob")]
    references, _ = drawn(samples, same={"copy": "/a.wav"})
    for epoch in range(20):
        assert clips(references(Draw(0, epoch))) == ["c", "a"]
        assert clips(references(Draw(1, epoch))) == ["c", "copy"]
        assert clips(references(Draw(2, epoch))) == ["d", "a"]


def test_a_part_of_the_clip_is_never_its_reference() -> None:
    cuts = ["talk.wav#t=0,4", "talk.wav#t=3,6", "talk.wav#t=6,9", "talk.wav"]
    samples = [
        Sample(
            cut,
            (Turn("user", (Text("W."),)), Turn("assistant", (Audio(Path(f"/{cut}")),), True)),
            extra={"speaker": "a"},
        )
        for cut in cuts
    ]
    references, line = drawn(samples)
    heard = [{references(Draw(index, epoch)).audio_paths()[0].name for epoch in range(30)} for index in range(4)]
    assert heard == [{cuts[2]}, {cuts[2]}, {cuts[0], cuts[1]}, {cuts[3]}]
    assert "1 have no other clip of their speaker that fits, and are used without a reference: talk.wav" in line
    assert overlap(Path("/a.wav#t=1,2"), Path("/a.wav#t=1.5"))
    assert not overlap(Path("/a.wav#t=1,2"), Path("/a.wav#t=2"))
    assert not overlap(Path("/a.wav"), Path("/b.wav"))


def test_samples_that_get_no_reference_are_counted() -> None:
    own = sample("own", "ann")
    own = replace(own, turns=(Turn("user", (Text("W."),)), Turn("assistant", (Audio(Path("/ref.wav")),)), *own.turns))
    dialogue = sample("dialogue", words="[SPEAKER0] Tea?\n[SPEAKER1] Please.")
    samples = [sample("a"), sample("b"), sample("lonely", "bob"), sample("nobody", None), own, dialogue]
    references, line = drawn(samples)
    assert line == (
        "data.train: references are drawn for 2 of 6 samples in each epoch, among 4 clips of 2 speaker(s); 1 have no "
        "other clip of their speaker that fits, and are used without a reference: lonely; 1 name no speaker, and are "
        "used without a reference; 1 keep the references of their records; 1 are not one clip of one voice, and stay "
        "as they are"
    )
    assert [references(Draw(index, 0)) == samples[index] for index in range(6)] == [False, False, *[True] * 4]
    heard = {clips(references(Draw(0, epoch)))[0] for epoch in range(30)}
    assert heard == {"b", "own"}
    with pytest.raises(UserError, match=r"no sample of data\.train can have one: its record must name the speaker"):
        drawn([sample("a"), sample("b", "bob"), sample("c", None)])


def test_long_clips_are_not_drawn_and_long_samples_get_shorter_references() -> None:
    samples = [sample(f"s{number:02}") for number in range(32)]
    frames = {one.id: 10 * (number + 1) for number, one in enumerate(samples)}

    def check(made: Sample) -> None:
        if sum(frames[name] for name in clips(made)) > 350:
            raise BadSample("too long")

    references, line = drawn(samples, frames, longest=250, check=check)
    for index, own in enumerate(samples):
        for epoch in range(20):
            made = clips(references(Draw(index, epoch)))
            assert max(frames[name] for name in made[:-1] or [own.id]) <= (250 if made[:-1] else 320)
            assert sum(frames[name] for name in made) <= 350
    assert "for 29 of 32" in line
    assert "are used without a reference: s29, s30, s31" in line


@pytest.fixture
def speech(demo_checkpoint: Path, demo_data: Path) -> RunConfig:
    sources = DataConfig(train=str(demo_data / "train"), eval=str(demo_data / "eval"), codes=str(demo_data / "codes"))
    return RunConfig(model=ModelConfig(path=str(demo_checkpoint / "model")), data=replace(sources, references="drawn"))


def test_lengths_are_those_with_the_longest_reference(speech: RunConfig) -> None:
    data = read_data(speech, build_family(speech), "train", "eval")
    samples, told = data.samples["data.train"], [line for line in data.notices if "references are drawn" in line]
    references = samples.references(speech.data, speech.seed)
    assert references is not None
    assert data.cache is not None
    assert len(told) == 2
    measure = measurer(speech, data, "data.train")
    for index in range(len(samples)):
        made = [references(Draw(index, epoch)) for epoch in range(40)]
        lengths = {len(data.family.example(one, codes=data.cache).input_ids) for one in made}
        assert measure(index) == max(lengths)
        assert all(one.turns[-1] == samples[index].turns[-1] for one in made)


def test_the_index_of_another_limit_is_another_one(speech: RunConfig) -> None:
    family, longest = build_family(speech), []
    for seconds in (15.0, 1.8):
        config = replace(speech, data=replace(speech.data, reference_seconds=seconds))
        data = read_data(config, family, "train")
        references = data.samples["data.train"].references(config.data, 0)
        assert references is not None
        assert data.cache is not None
        made = [references(Draw(index, epoch)) for index in range(len(references.samples)) for epoch in range(20)]
        longest.append(max(data.cache.frames(one.audio_paths()[0]) for one in made if len(one.audio_paths()) > 1))
    assert longest[1] <= 45 < longest[0]


def test_a_model_of_text_learns_no_voices(text_run: RunConfig) -> None:
    config = replace(text_run, data=replace(text_run.data, references="drawn"))
    with pytest.raises(UserError, match=r"data\.references is drawn, and the family CausalLM learns no voices"):
        read_data(config, build_family(config), "train")


def test_a_task_of_cloning_needs_no_reference_of_its_own(metadata: Callable[..., Path]) -> None:
    record = {"id": "a", "audio_file": "a.wav", "transcript": "W.", "task": "zero_shot_voice_cloning"}
    with pytest.raises(UserError, match="voice cloning needs the reference clip"):
        read_samples(metadata(record), DataConfig(), check_files=False)
    (made,) = read_samples(metadata(record), DRAWN, check_files=False)
    assert clips(made) == ["a"]


def test_batches_by_positions_stay_full() -> None:
    """What the model gets is at most what was planned, and little less: 50 speakers with log-normal lengths."""
    random = np.random.default_rng(0)
    own = np.clip(random.lognormal(np.log(110), 0.5, 5000), 20, 750).astype(int)
    samples = [sample(f"s{number}", f"v{number % 50}") for number in range(len(own))]
    frames = {one.id: int(length) for one, length in zip(samples, own, strict=True)}

    def length(made: Sample) -> int:
        return sum(frames[name] for name in clips(made))

    references, _ = drawn(samples, frames)
    planned = np.array([length(references.costliest(index, length)) for index in range(len(own))])
    plan, padded, true = FramePlan(planned, 16_384, seed=1), 0, 0
    for window in range(plan.windows_per_epoch, 2 * plan.windows_per_epoch):
        (draws,) = plan.micro_batches(window)
        lengths = [length(references(draw)) for draw in draws]
        assert len(draws) * max(lengths) <= 16_384
        padded += len(draws) * max(lengths)
        true += sum(lengths)
    assert 1 - true / padded < 0.05
