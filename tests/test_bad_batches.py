"""Windows that differ between ranks: one ends, one is shorter, one has a stream without targets. Two ranks equal one.

What real commands say of bad batches, and how they exit, is in `tests/cli/test_bad_batches.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.contracts import Batch
from rawloop.data import DataConfig
from rawloop.data.codes import CodeCache
from rawloop.data.limits import Limits
from rawloop.data.samples import read_samples
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import RawloopError, UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig, load_family
from rawloop.loop import TrainConfig, train
from rawloop.losses import LossModule
from rawloop.optim import OptimConfig
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import read_metrics
from rawloop.settings import DDPConfig

HEAD = "base_model.model.text_lm_head.modules_to_save.default.weight"
Spoil = Callable[[World, list[Batch], int], list[Batch]]  # (world, a window's micro-batches, its number)


@pytest.fixture(scope="module")
def base(demo_checkpoint: Path, demo_data: Path) -> RunConfig:
    """A run of 3 steps, 4 samples each, that trains the heads of both streams."""
    train_set, held_out, codes = (str(demo_data / name) for name in ("train", "eval", "codes"))
    return RunConfig(
        device="cpu",
        model=ModelConfig(path=str(demo_checkpoint / "model")),
        adapter=AdapterConfig(rank=4, modules_to_save=["text_lm_head", "audio_lm_head"]),
        data=DataConfig(train=train_set, eval=held_out, codes=codes),
        train=TrainConfig(batch_size=1, accumulation=4, max_steps=3, log_every=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=0),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(enabled=False),
        checkpoint=CheckpointConfig(save_every=0),
    )


def silent(batch: Batch) -> Batch:
    """The batch without targets in its text."""
    text = batch.labels["text"]
    labels = {**batch.labels, "text": text._replace(positions=text.positions[:0], targets=text.targets[:0])}
    return replace(batch, labels=labels, targets={**batch.targets, "text": 0})


def halves(world: World) -> slice:
    """Which of a window's four micro-batches are this rank's: two, or all of them."""
    return slice(2 * world.rank, 2 * world.rank + 2) if world.size == 2 else slice(0, 4)


def as_it_is(world: World, window: list[Batch], number: int) -> list[Batch]:
    return window[halves(world)]


def silent_on_one_rank(world: World, window: list[Batch], number: int) -> list[Batch]:
    """From the second window on rank 1 has no text to learn."""
    whole = [*window[:2], *(silent(batch) for batch in window[2:])] if number else window
    return whole[halves(world)]


def silent_everywhere(world: World, window: list[Batch], number: int) -> list[Batch]:
    """In the second window nobody has text to learn."""
    whole = [silent(batch) for batch in window] if number == 1 else window
    return whole[halves(world)]


def shorter(world: World, window: list[Batch], number: int) -> list[Batch]:
    """The last window has a micro-batch less, which is rank 1's."""
    return (window[:3] if number == 2 else window)[halves(world)]


def ending(world: World, window: list[Batch], number: int) -> list[Batch]:
    """Rank 1, or the only one, runs out of data after two windows."""
    if number == 2 and world.rank == world.size - 1:
        raise EOFError
    return window[halves(world)]


CASES: dict[str, Spoil] = {
    function.__name__: function for function in (as_it_is, silent_on_one_rank, silent_everywhere, shorter, ending)
}


class Windows:
    """All four micro-batches of a window are made on every rank, and `spoil` says which of them it gets."""

    def __init__(self, inner: Any, world: World, spoil: Spoil) -> None:
        self.inner, self.world, self.spoil = inner, world, spoil

    def __call__(self, window: int) -> Iterator[list[Batch]]:
        for number, batches in enumerate(self.inner(window), start=window):
            try:
                yield self.spoil(self.world, batches, number)
            except EOFError:
                return


def train_all(world: World, base: RunConfig, folder: Path) -> dict[str, Any]:
    """Per case the trained weights, or what was said."""
    results: dict[str, Any] = {}
    for case, spoil in CASES.items():
        config = replace(base, output=str(folder / case), ddp=DDPConfig(find_unused_parameters=False))
        run = build_run(config, world, lambda line: None)
        inner = whole_windows(run)
        run.windows = Windows(inner, world, spoil)
        try:
            train(run)
            results[case] = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
        except RawloopError as error:
            results[case] = type(error), str(error), error.is_reporter, run.state.step
        finally:
            run.records.close()
    return results


def whole_windows(run: Any) -> Any:
    """The stream of a single process over the same data, from which each rank takes its half."""
    windows = run.windows
    windows.plan = replace(windows.plan, world_size=1, rank=0, accumulation=4)
    return windows


@pytest.fixture(scope="module")
def alone(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """All cases in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return train_all(World(), base, folder), folder


def values(folder: Path, case: str, key: str) -> list[Any]:
    return [line[key] for line in read_metrics(folder / case) if key in line]


def test_two_ranks_equal_one_whatever_their_windows_lack(
    base: RunConfig, alone: tuple[dict[str, Any], Path], tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    """With `find_unused_parameters` off: a stream that nobody has in a window still gives its head a gradient."""
    two = replace(base, train=replace(base.train, accumulation=2))
    first, second = run_ranks(train_all, two, tmp_path, timeout=240)
    whole, folder = alone
    for case in list(CASES)[:-1]:
        for key in ("loss", "grad_norm"):
            assert values(tmp_path, case, key) == pytest.approx(values(folder, case, key), rel=1e-5), case
        for name, weight in whole[case].items():
            assert torch.equal(first[case][name], second[case][name]), (case, name)
            assert (first[case][name] - weight).abs().max() < 1e-4, (case, name)
    said = "the training data ended before window 2, and the run has 3 steps: `windows` must never end"
    assert whole["ending"][0] is first["ending"][0] is second["ending"][0] is UserError
    assert whole["ending"][1].startswith(said)
    assert first["ending"][1].startswith(f"rank 1: {said}")
    assert second["ending"][1].startswith(said)
    assert [result["ending"][2:] for result in (whole, first, second)] == [(True, 2), (True, 2), (False, 2)]


def test_what_a_window_lacks_is_in_its_losses(alone: tuple[dict[str, Any], Path]) -> None:
    _, folder = alone
    text = {case: values(folder, case, "loss/text") for case in CASES}
    assert text["silent_on_one_rank"][0] == text["as_it_is"][0]
    assert text["silent_on_one_rank"][1] != text["as_it_is"][1]
    lines = read_metrics(folder / "silent_everywhere")
    assert ["loss/text" in line for line in lines] == [True, False, True]  # there is none: nothing stands in its place
    assert lines[1]["loss"] == lines[1]["loss/audio"]


def test_a_head_without_targets_in_a_window_gets_gradients_of_zero(alone: tuple[dict[str, Any], Path]) -> None:
    whole, _ = alone
    heads: list[Tensor] = [whole[case][HEAD] for case in ("as_it_is", "silent_everywhere")]
    assert not torch.equal(*heads)
    assert all(torch.isfinite(head).all() for head in heads)


# -- what a model can take ----------------------------------------------------------------------------------------


def test_limits_are_those_of_the_loaded_model(demo_checkpoint: Path, text_checkpoint: Path) -> None:
    for path, classes in ((demo_checkpoint / "model", ["audio", "text"]), (text_checkpoint, ["text"])):
        family = load_family(ModelConfig(path=str(path)))
        model: Any = family.load_model()
        limits = Limits.of(family, model)
        assert list(limits.classes) == classes
        assert limits.classes["text"] == limits.ids["input_ids"] == model.get_input_embeddings().num_embeddings
        assert limits.classes.get("audio", 1026) == 1026
        assert limits.fault(family.probe()) is None


class OwnEmbedding(nn.Module):
    """A model that does not say where its embedding is."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_a_model_without_a_known_embedding_takes_any_token(text_checkpoint: Path) -> None:
    family = load_family(ModelConfig(path=str(text_checkpoint)))
    assert "input_ids" not in Limits.of(family, OwnEmbedding()).ids
    assert "input_ids" not in Limits.of(family, nn.Linear(2, 2)).ids


def test_a_token_of_the_familys_own_probe_is_let_pass_without_an_embedding(text_checkpoint: Path) -> None:
    """Some models put audio in the place of a token that they have no row for."""

    class Small(nn.Module):
        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(3, 2)

    family = load_family(ModelConfig(path=str(text_checkpoint)))
    highest = int(family.probe().inputs["input_ids"].max())
    assert highest > 3
    assert Limits.of(family, Small()).ids["input_ids"] == highest + 1


def learned(family: Any, model: Any) -> dict[str, int]:
    """What is known of a model's inputs when its probe has run."""
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), torch.device("cpu"))
    limits = Limits.of(family, policy.prepare(model))
    limits.learn(family, LossModule(model, family.losses), policy.device, policy.autocast)
    return limits.ids


def test_a_code_beyond_its_codebook_is_found(demo_checkpoint: Path, demo_data: Path) -> None:
    """The model adds the codebook's number times its size: an id of 1026 is another codebook's, and no error."""
    family = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    limits = Limits.of(family, family.load_model())
    sample = read_samples(str(demo_data / "train"), DataConfig())[0]
    example = family.example(sample, CodeCache(demo_data / "codes"))
    assert limits.fault(family.collate([example])) is None
    example.audio_input_ids[5, 3] = 1026
    said = "its 'audio_input_ids' has the id 1026 in codebook 3 at frame 5, and the model knows 0 to 1025 there"
    assert str(limits.fault(family.collate([example]))).startswith(said)
    example.audio_labels[5, 3] = 1026
    example.audio_input_ids[5, 3] = 0
    place = int(torch.nonzero(example.input_ids == family.settings.audio_token_id)[0]) + 5  # type: ignore[attr-defined]
    said = f"a target of the stream 'audio' of codebook 3 at position {place} is 1026, and"
    assert str(limits.fault(family.collate([example]))).startswith(said)


def test_positions_that_are_looked_up_are_ids_too(text_checkpoint: Path) -> None:
    family = load_family(ModelConfig(path=str(text_checkpoint)))
    family.packing = True  # type: ignore[attr-defined]
    config = transformers.GPT2Config(vocab_size=261, n_positions=90, n_embd=16, n_layer=1, n_head=2)
    assert learned(family, transformers.GPT2LMHeadModel(config)) == {"input_ids": 261, "position_ids": 90}
    assert learned(family, family.load_model()) == {"input_ids": 261}  # rotary positions have no table


def test_a_loss_for_a_stream_without_targets_may_be_left_out() -> None:
    batch = Batch({}, {}, {"a": 0}, ["x"])
    assert LossModule(nn.Identity(), lambda model, batch: {})(batch) == {}
    broken: Any = lambda model, batch: torch.zeros(())  # noqa: E731
    with pytest.raises(UserError, match=r"no loss for the 3 targets of the stream 'a': .* gave a Tensor; it must"):
        LossModule(nn.Identity(), broken)(replace(batch, targets={"a": 3}))
