"""A listener in a loop of one's own: any object that generates, without a config, a policy or a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop import Ears, Listener, Prompt, Sample
from rawloop.contracts import Text, Turn
from rawloop.family_protocols import Generated
from rawloop.listen.config import ListenConfig
from rawloop.listen.files import write_heard

RATE = 8000


class Counts:
    """Says as many frames as the prompt has words, from a model whose norm notices training mode and draws."""

    def generate(
        self, model: nn.Module, samples: Sequence[Sample], codes: Any, limits: Sequence[int], sampling: Any
    ) -> list[Generated]:
        assert not model.training
        assert not torch.is_grad_enabled()
        model(torch.rand(4, 2))
        found = []
        for sample, limit in zip(samples, limits, strict=True):
            frames = len(sample.turns[0].words.split())
            said = torch.arange(min(frames, limit))[:, None].expand(-1, 2) // 2
            found.append(Generated(sample.id, frames <= limit, len(said), codes=said))
        return found


def decode(codes: Tensor) -> Tensor:
    """A tenth of a second for each frame; frames of an even code are silent."""
    return (
        torch.cat([torch.full((RATE // 10,), float(code % 2)) for code in codes[:, 0]])
        if len(codes)
        else codes[:, 0].float()
    )


def prompt(name: str, words: str, **more: Any) -> Prompt:
    return Prompt(
        Sample(name, (Turn("user", (Text(words),)), Turn("assistant", (), trained=True))), 6, words=words, **more
    )


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()


@pytest.fixture
def listener(model: nn.Module) -> Callable[..., Listener]:
    def build(*prompts: Prompt, **ears: Any) -> Listener:
        found = Ears(decode, RATE, 10.0, **ears)
        return Listener(
            Counts(), model, prompts, lambda path: torch.empty(0), ears=found, config=ListenConfig(), every=5
        )

    return build


def test_it_measures_what_it_hears_and_leaves_the_model_as_it_was(
    listener: Callable[..., Listener], model: nn.Module, tmp_path: Path
) -> None:
    voice = torch.zeros(4, 2, dtype=torch.int64)
    prompts = [prompt("a b/c", "One two three, four!", expected=2, voice=voice), prompt("long", "la " * 9, expected=3)]
    heard_by = listener(
        *prompts, recognise=lambda sound, rate: "one too three four", compare=lambda sound, own, rate: len(own) / rate
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    metrics, heard = heard_by.listen()
    assert torch.equal(torch.rand(3), drawn)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    seconds = metrics.pop("listen/seconds")
    assert seconds > 0
    assert set(metrics) == set(heard_by.metrics)
    assert metrics["listen/stopped"] == 0.5
    assert metrics["listen/length_ratio"] == (4 / 2 + 6 / 3) / 2
    assert metrics["listen/silence"] == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert metrics["listen/repetition"] == pytest.approx((2 / 3 + 3 / 5) / 2)
    assert metrics["listen/similarity"] == pytest.approx(0.4)
    assert metrics["listen/error_rate"] > 0
    write_heard(tmp_path, 5, heard)
    write_heard(tmp_path, 5, heard[:1])  # again, as after a resume: nothing of the first is left
    assert sorted(path.name for path in (tmp_path / "listen" / "step-00000005").iterdir()) == [
        "01-a-b-c.png",
        "01-a-b-c.wav",
        "heard.json",
    ]


def test_case_punctuation_and_speaker_tags_are_no_errors(listener: Callable[..., Listener]) -> None:
    said = prompt("a", "[SPEAKER0] One TWO, three!")
    metrics, _ = listener(said, recognise=lambda sound, rate: "one too   three.").listen()
    assert metrics["listen/error_rate"] == 1 / len("one two three")


def test_it_is_due_at_every_nth_evaluation_and_at_the_last(listener: Callable[..., Listener]) -> None:
    found = listener(prompt("a", "x"))
    found.config.every = 2
    assert [step for step in range(0, 25, 5) if found.due(step)] == [0, 10, 20]
    assert found.due(5, last=True)
