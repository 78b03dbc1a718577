"""Generation: prompts are those of training, clips leave the delay pattern whole, and a learnt turn comes back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data import DataConfig
from rawloop.data.samples import read_samples
from rawloop.demo import SPEECH
from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family
from rawloop.families.causal_lm import CausalLM
from rawloop.families.generating import generation_config
from rawloop.families.higgs_audio_v2 import HiggsAudioV2
from rawloop.families.higgs_audio_v2.speaking import DEFAULTS, undelayed
from rawloop.settings import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, ras_window=0)
EOS, BOS = 1025, 1024


@pytest.fixture(scope="module")
def family(demo_checkpoint: Path) -> HiggsAudioV2:
    loaded = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    assert isinstance(loaded, HiggsAudioV2)
    return loaded


@pytest.fixture(scope="module")
def text_family(text_checkpoint: Path) -> CausalLM:
    loaded = load_family(ModelConfig(path=str(text_checkpoint)))
    assert isinstance(loaded, CausalLM)
    return loaded


def clip(frames: int) -> Callable[[Path], Tensor]:
    """Give every clip its own codes, of so many frames."""

    def codes(path: Path) -> Tensor:
        generator = torch.Generator().manual_seed(len(path.name))
        return torch.randint(BOS, (frames, 8), generator=generator)

    return codes


def spoken(name: str, words: str, reference: bool = False) -> Sample:
    turns = [Turn("user", (Text(words),)), Turn("assistant", (Audio(Path("learnt")),), trained=True)]
    if reference:
        turns = [Turn("user", (Text("A voice."),)), Turn("assistant", (Audio(Path("voice")),)), *turns]
    return Sample(name, tuple(turns))


def learn(family: Any, model: Any, samples: list[Sample], codes: Any, steps: int, lr: float) -> None:
    """Train all weights on the samples."""
    batch = family.collate([family.example(sample, codes) for sample in samples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        losses = family.losses(model, batch)
        sum(loss.total / loss.targets for loss in losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("refs_in_scene", [False, True])
def test_a_prompt_has_the_tokens_of_training(family: HiggsAudioV2, refs_in_scene: bool) -> None:
    samples = read_samples(SPEECH / "eval", DataConfig(refs_in_scene=refs_in_scene))
    assert {sample.task for sample in samples} > {"zero_shot_voice_cloning", "multi_speaker_voice_cloning"}
    for sample in samples:
        whole, prompt = family.example(sample, clip(5)), family.encoder.prompt(sample, clip(5))
        start = len(prompt.input_ids)
        assert torch.equal(whole.input_ids[:start], prompt.input_ids)
        assert family.tokenizer.decode(prompt.input_ids[-1]) == "<|audio_out_bos|>"
        assert whole.input_ids[start] == family.settings.audio_token_id
        frames = len(prompt.audio_input_ids)
        assert torch.equal(whole.audio_input_ids[:frames], prompt.audio_input_ids)
        assert (whole.audio_labels[frames:] != -100).any()
        assert (whole.audio_labels[:frames] == -100).all()  # only the last clip is to be said


@pytest.mark.parametrize("late", [0, 1])
def test_a_clip_ends_before_its_first_marker(family: HiggsAudioV2, late: int) -> None:
    """transformers forces the stop codes of later codebooks one frame late, and its processor decodes them as 1023."""
    codes = clip(6)(Path("a"))
    frames = family.encoder.delayed(codes, trained=False)[0]
    if late:
        frames = torch.cat([frames, frames[-1:]])
        for book in range(1, 8):
            frames[book + 7, book] = 7  # where its stop code should be
    found, stopped = undelayed(frames, family.settings)
    assert stopped
    assert torch.equal(found, codes)
    cut, stopped = undelayed(frames[:-9], family.settings)  # the limit came first
    assert not stopped
    assert torch.equal(cut, codes[: len(cut)])
    frames[4, 2] = BOS
    found, stopped = undelayed(frames, family.settings)
    assert (len(found), stopped) == (1, False)
    assert undelayed(frames[:3], family.settings)[0].shape == (0, 8)


def test_what_was_learnt_is_said_again_and_the_stop_too(family: HiggsAudioV2) -> None:
    """The whole way: labels of training -> weights -> prompt -> codes, in a batch with and without a reference."""
    samples = [spoken("plain", "One two."), spoken("cloned", "Three four five.", reference=True)]
    model, codes = family.load_model(), clip(12)
    learn(family, model, samples, codes, steps=60, lr=4e-3)
    found = family.generate(model.eval(), samples, codes, [20, 20], GREEDY)
    for one in found:
        assert (one.length, one.stopped) == (12, True)
        assert one.codes is not None
        assert torch.equal(one.codes, codes(Path("learnt")))
    (limited,) = family.generate(model, samples[:1], codes, [5], GREEDY)
    assert (limited.length, limited.stopped) == (5, False)


def test_a_batch_says_what_single_prompts_say(family: HiggsAudioV2) -> None:
    model: Any = add_adapter(family.load_model(), AdapterConfig(rank=2), []).eval()
    samples = [spoken("a", "One."), spoken("b", "Two three four five six.", reference=True), spoken("c", "Seven 8.")]
    together = family.generate(model, samples, clip(5), [9, 9, 9], GREEDY)
    for sample, one in zip(samples, together, strict=True):
        (alone,) = family.generate(model, [sample], clip(5), [9], GREEDY)
        assert one.codes is not None
        assert alone.codes is not None
        assert torch.equal(alone.codes, one.codes)


def test_the_decoder_gives_every_frame_its_samples(family: HiggsAudioV2) -> None:
    codec, decode = family.load_decoder(torch.device("cpu"))
    assert decode(clip(7)(Path("a"))).shape == (round(7 * codec.sample_rate / codec.frame_rate),)
    assert decode(torch.zeros(0, 8, dtype=torch.int64)).shape == (0,)


def test_settings_come_from_the_user_then_the_model_then_its_authors(family: HiggsAudioV2) -> None:
    model: Any = family.load_model()
    model.generation_config.top_k = 20
    found = generation_config(model, SamplingConfig(top_p=0.5, ras_window=3), DEFAULTS, [EOS])
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 1.0, 20, 0.5)
    assert (found.ras_win_len, found.ras_win_max_num_repeat) == (3, 2)
    assert found.eos_token_id == sorted({EOS, model.config.eos_token_id})
    greedy = generation_config(model, GREEDY, DEFAULTS, [])
    assert not greedy.do_sample
    assert greedy.ras_win_len < greedy.ras_win_max_num_repeat  # nothing is drawn again
    assert model.generation_config.top_k == 20  # the model's own is unchanged


def test_a_prompt_without_room_is_refused(family: HiggsAudioV2) -> None:
    model = family.load_model().eval()
    long = spoken("long", "One.", reference=True)
    with pytest.raises(UserError, match=r"sample 'long' .* the prompt takes \d+ positions, the model has 2048"):
        family.generate(model, [long], clip(2030), [9], GREEDY)


def test_an_answer_that_was_learnt_is_written_again(text_family: CausalLM) -> None:
    asked = Turn("user", (Text("Say it."),))
    sample = Sample("a", (asked, Turn("assistant", (Text("One, two."),), trained=True)))
    plain = Sample("b", (Turn("text", (Text("A text."),), trained=True),))
    model = text_family.load_model()
    learn(text_family, model, [sample], None, steps=60, lr=1e-2)
    again = replace(sample, turns=(asked, Turn("assistant", (Text("."),), trained=True)))  # the answer is not looked at
    found = text_family.generate(model.eval(), [again, plain], clip(1), [20, 3], GREEDY)
    assert (found[0].text, found[0].stopped, found[0].length) == ("One, two.", True, 9)
    assert found[1].length <= 3
    assert text_family.encoder.prompt(plain) == text_family.tokenizer("A text.")["input_ids"]
