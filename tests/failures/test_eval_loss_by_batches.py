"""eval_loss changes with per_device_eval_batch_size.

eval_loss depends on batch size, eval_loss 979, eval_loss too large, mean of means, num_items_in_batch, audio_labels,
Higgs Audio v2.

HF Trainer averages one number per batch. For Higgs Audio v2 that number is the sum over audio and text divided by the
batch's text targets alone; without text labels it is a mean over the batch's own targets.
"""

from collections.abc import Callable
from operator import call
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from rawloop.contracts import Audio, Batch, Sample, Text, Turn
from rawloop.evaluate import Evaluator
from rawloop.families import ModelConfig, load_family
from rawloop.losses import LossModule
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy

FRAMES = {"One.": 4, "One two three four five six seven.": 12, "Two three.": 60}


@pytest.fixture(scope="module")
def higgs(demo_checkpoint: Path) -> Any:
    return load_family(ModelConfig(path=str(demo_checkpoint / "model")))


@pytest.fixture(scope="module")
def examples(higgs: Any) -> list[Any]:
    """Three conversations with clips of 4, 12 and 60 frames."""
    found = []
    for text, frames in FRAMES.items():
        codes = torch.randint(1024, (frames, 8), generator=torch.Generator().manual_seed(frames))
        turns = (Turn("user", (Text(text),)), Turn("assistant", (Audio(Path("clip")),), trained=True))
        found.append(higgs.example(Sample(text, turns), lambda _, codes=codes: codes))
    return found


@pytest.fixture
def by_trainer(higgs: Any, examples: list[Any], arguments: Callable[..., Any]) -> Callable[..., float]:
    """Give `by_trainer(size, change, **arguments)`: Trainer's eval_loss; `change` gets each padded batch."""
    model = higgs.load_model()

    def evaluate(size: int, change: Callable[[dict[str, Tensor]], Any] = lambda batch: None, **changes: Any) -> float:
        def collate(chosen: list[int]) -> dict[str, Tensor]:
            batch: dict[str, Tensor] = higgs.encoder.pad([examples[number] for number in chosen])
            change(batch)
            return batch

        args = arguments(remove_unused_columns=False, per_device_eval_batch_size=size, **changes)
        trainer = Trainer(model=model, args=args, eval_dataset=[0, 1, 2], data_collator=collate)
        return float(trainer.evaluate()["eval_loss"])

    return evaluate


@pytest.fixture(scope="module")
def true_sums(higgs: Any, examples: list[Any]) -> dict[str, tuple[float, int]]:
    """Nats and targets of each stream, over all samples."""
    with torch.no_grad():
        losses = higgs.losses(higgs.load_model().eval(), higgs.collate(examples))
    return {stream: (float(loss.total), loss.targets) for stream, loss in losses.items()}


def test_trainer_divides_the_audio_by_the_text_targets(
    by_trainer: Callable[..., float], true_sums: dict[str, tuple[float, int]]
) -> None:
    (audio, audio_targets), (text, text_targets) = true_sums["audio"], true_sums["text"]
    assert (audio_targets, text_targets) == (8 * (5 + 13 + 61), 6)
    eval_loss = by_trainer(3)
    assert eval_loss == pytest.approx((audio + text) / text_targets, rel=1e-5)
    assert eval_loss > 50 * (audio / audio_targets + text / text_targets)  # where chance is 13.6


def test_trainers_number_changes_with_the_batch_size_where_texts_differ_in_length(
    higgs: Any, by_trainer: Callable[..., float]
) -> None:
    def train_the_prompt(batch: dict[str, Tensor]) -> None:
        """As the processor's own labels do."""
        audio = [higgs.settings.audio_token_id, higgs.settings.audio_delay_token_id]
        learnt = (batch["attention_mask"] == 1) & ~torch.isin(batch["input_ids"], torch.tensor(audio))
        batch["labels"] = torch.where(learnt, batch["input_ids"], -100)

    first, second, third = (by_trainer(size, train_the_prompt) for size in (1, 2, 3))
    assert abs(second / first - 1) > 5e-3
    assert abs(third / first - 1) > 5e-3


def test_trainers_mean_of_means_changes_with_the_batch_size(by_trainer: Callable[..., float]) -> None:
    def audio_alone(batch: dict[str, Tensor]) -> None:
        del batch["labels"]

    first, second, third = (by_trainer(size, audio_alone, label_names=["audio_labels"]) for size in (1, 2, 3))
    assert abs(second / first - 1) > 1e-5  # little, of random weights: all samples are nearly at chance
    assert abs(third / first - 1) > 1e-5


def test_rawloops_does_not(higgs: Any, examples: list[Any], true_sums: dict[str, tuple[float, int]]) -> None:
    module = LossModule(higgs.load_model(), higgs.losses)
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), torch.device("cpu"))
    mean = sum(total / count for total, count in true_sums.values())
    for size in (1, 2, 3):
        batches: list[Batch] = [higgs.collate(examples[k : k + size]) for k in range(0, 3, size)]
        evaluator = Evaluator(call, batches, model=module, policy=policy, weights=higgs.stream_weights)
        assert evaluator.run().metrics["eval_loss"] == pytest.approx(mean, rel=1e-6)
