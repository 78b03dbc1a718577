"""`train.max_frames` in a whole run, the lengths that it is planned by, and the rehearsal of the costliest batch."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rawloop import planning
from rawloop.build import build_run
from rawloop.cards import CUDA, RESERVE
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.components import build_family, read_data
from rawloop.config import RunConfig
from rawloop.contracts import Batch, StreamLoss
from rawloop.data import DataConfig
from rawloop.data.batches import MicroBatches
from rawloop.data.digests import Digests
from rawloop.data.lengths import Lengths
from rawloop.data.splits import no_codes
from rawloop.dist import World, unwrap_ddp
from rawloop.errors import OutOfMemory, UserError
from rawloop.families import ModelConfig
from rawloop.families.causal_lm import CausalLM
from rawloop.loop import train
from rawloop.losses import LossModule
from rawloop.records import read_metrics
from rawloop.settings import EvaluationConfig, TrainConfig
from rawloop.sizing import size_run, what_would_fit
from tests.kept_runs import go, trained

Ranks = Callable[..., list[Any]]
BY_FRAMES = TrainConfig(batch_size=1, accumulation=2, epochs=2, log_every=1, max_frames=100)


@pytest.fixture
def by_frames(text_run: RunConfig, tmp_path: Path) -> RunConfig:
    """Eight samples of 11 to 73 positions in micro-batches of at most 100; the longest is not in the first one."""
    return replace(text_run, seed=2, output=str(tmp_path / "run"), train=BY_FRAMES)


def lengths_and_examples(config: RunConfig) -> Iterator[tuple[int, int]]:
    data = read_data(config, build_family(config), "train")
    measure = planning.measurer(config, data, "data.train")
    example = partial(data.family.example, codes=data.cache or no_codes)
    for index, sample in enumerate(data.samples["data.train"]):
        yield measure(index), len(example(sample).input_ids)


def test_lengths_are_those_of_the_examples(by_frames: RunConfig, demo_checkpoint: Path, demo_data: Path) -> None:
    sources = DataConfig(train=str(demo_data / "train"), eval=str(demo_data / "eval"), codes=str(demo_data / "codes"))
    speech = RunConfig(model=ModelConfig(path=str(demo_checkpoint / "model")), data=sources)
    for config in (by_frames, speech):
        pairs = list(lengths_and_examples(config))
        assert len({length for length, _ in pairs}) > 3
        assert all(length == true for length, true in pairs)


def test_a_family_that_does_not_count_is_measured_by_its_examples(by_frames: RunConfig) -> None:
    data = read_data(by_frames, build_family(by_frames), "train")

    class Uncounted:
        """A family without `length`."""

        collate, example = data.family.collate, data.family.example

    batches = MicroBatches(data.samples["data.train"], partial(data.family.example, codes=no_codes), Uncounted.collate)
    own = Lengths(Uncounted(), batches, no_codes)  # type: ignore[arg-type]
    assert own.of(range(8)).tolist() == planning.measurer(by_frames, data, "data.train").of(range(8)).tolist()
    batches.collate = lambda examples: Batch({"x": torch.ones(3)}, {}, {}, [])  # without ids (batch, positions)
    with pytest.raises(UserError, match=r"give the family a method `length`, or set train.max_frames to 0"):
        own(0)
    assert len(own.longest(3)) == 3  # a rehearsal needs no lengths


def test_lengths_of_many_samples_are_measured_once(
    text_run: RunConfig, text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MANY", 8)
    config = replace(text_run, data=replace(text_run.data, codes=str(tmp_path / "codes")), train=BY_FRAMES)
    data = read_data(config, build_family(config), "train")
    contents = data.contents()
    first = planning.all_lengths(config, data, contents, "data.train")
    (file,) = (tmp_path / "codes").glob("lengths-*")
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "length", None)
        assert planning.all_lengths(config, data, contents, "data.train").tolist() == first.tolist()
    contents.digests = {"data.train": Digests.of(["another digest..", *contents.digests["data.train"][1:]])}
    planning.all_lengths(config, data, contents, "data.train")
    assert len(list((tmp_path / "codes").glob("lengths-*"))) == 2
    file.write_bytes(file.read_bytes()[:-3])
    again = planning.all_lengths(config, data, data.contents(), "data.train")
    assert again.tolist() == first.tolist()
    (line,) = data.notices
    assert line.startswith(f"{file} cannot be used, and the lengths are measured again: ")


def test_a_run_takes_every_sample_once_an_epoch_and_says_so(by_frames: RunConfig) -> None:
    lines: list[str] = []
    ids: list[str] = []
    by_frames.evaluation = EvaluationConfig(batch_size=1)
    run = build_run(by_frames, World(), lines.append)
    module: Any = run.module
    losses = module.losses

    def spy(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        assert batch.inputs["input_ids"].numel() <= 100 or len(batch.ids) == 1
        if torch.is_grad_enabled():
            ids.extend(batch.ids)
        found: dict[str, StreamLoss] = losses(model, batch)
        return found

    module.losses = spy
    try:
        state = train(run)
    finally:
        run.close()
    (said,) = [line for line in lines if line.startswith("train.max_frames")]
    steps = run.total_steps
    assert f"{steps // 2} steps an epoch" in said
    assert "padding" in said
    assert (state.step, state.samples) == (steps, 16)
    assert sorted(ids[:8]) == sorted(ids[8:]) == sorted(set(ids))
    found = read_metrics(Path(by_frames.output))
    assert max(float(line.get("epoch") or 0.0) for line in found) == 2.0
    by_size = replace(by_frames, output=f"{by_frames.output}-2", train=replace(BY_FRAMES, max_frames=0))
    whole = build_run(by_size, World(), lines.append)
    try:
        assert whole.evaluator is not None
        assert whole.evaluator.run().metrics["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-6)
    finally:
        whole.close()


def test_a_resumed_run_is_the_uninterrupted_one(by_frames: RunConfig) -> None:
    straight = go(by_frames)
    halves = replace(by_frames, output=f"{by_frames.output}-2", checkpoint=CheckpointConfig(save_every=2))
    first = build_run(halves, World(), print)
    first.total_steps = 2
    try:
        train(first)
    finally:
        first.close()
    second = go(replace(halves, resume="latest"))
    assert second.state.samples == straight.state.samples
    assert all(torch.equal(weight, trained(second)[name]) for name, weight in trained(straight).items())
    other = replace(halves, resume="latest", train=replace(BY_FRAMES, max_frames=120))
    with pytest.raises(UserError, match=r"in another data order: set train.max_frames to 100, or start another run"):
        go(other)


def test_longer_samples_are_refused_by_name_or_left_out(by_frames: RunConfig) -> None:
    by_frames.train = replace(BY_FRAMES, max_frames=70, batch_size=3)
    with pytest.raises(
        UserError, match=r"of 8 samples of data.train take more .*\(70\): sample '.*' \(.*\) takes \d\d.*"
    ):
        go(by_frames)
    by_frames.data = replace(by_frames.data, on_bad_sample="skip")
    lines: list[str] = []
    run = build_run(by_frames, World(), lines.append)
    run.close()
    assert 0 < run.num_samples < 8
    assert any("they are left out, since data.on_bad_sample is skip" in line for line in lines)
    assert "train.max_frames is 70 and train.batch_size 3: max_frames decides, batch_size has no effect" in lines


def losses_of(world: World, config: RunConfig) -> list[tuple[float, float]]:
    """The loss and the epoch of each line on rank 0, and the samples that were counted."""
    samples = float(go(config, world).state.samples)
    lines = read_metrics(Path(config.output)) if world.is_main else []
    return [*((float(line["loss"] or 0), float(line["epoch"] or 0)) for line in lines), (0.0, samples)]


@pytest.mark.slow
def test_two_ranks_train_as_one(by_frames: RunConfig, run_ranks: Ranks) -> None:
    by_frames.adapter = replace(by_frames.adapter, dropout=0.0)
    one = losses_of(World(), by_frames)
    split = replace(by_frames, output=f"{by_frames.output}-2", train=replace(BY_FRAMES, accumulation=1))
    first, second = run_ranks(losses_of, split)
    assert second == [(0.0, 16.0)] == one[-1:] == first[-1:]
    assert [epoch for _, epoch in first] == [epoch for _, epoch in one]
    assert [loss for loss, _ in first] == pytest.approx([loss for loss, _ in one], rel=1e-5)


# -- the rehearsal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100])
def test_a_rehearsal_leaves_no_trace(text_run: RunConfig, tmp_path: Path, size: int) -> None:
    """LoRA with dropout: a drawn number, a gradient or a weight that is left behind changes what is trained."""
    found = []
    for rehearse in (True, False):
        settings = replace(text_run.train, max_frames=size, rehearse=rehearse)
        found.append(trained(go(replace(text_run, output=str(tmp_path / str(rehearse)), train=settings))))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


class Alive(TorchDispatchMode):
    """Knows the storages that operations inside have returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.storages.update(leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def test_a_rehearsal_runs_beside_optimizer_state_and_gradients(
    text_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, found = Alive(), list[int]()

    def look(*_: Any) -> None:
        found.append(sum(storage.nbytes() for storage in alive.storages))

    plain = replace(text_run, output=str(tmp_path / "run"), train=replace(text_run.train, rehearse=False))
    with closing(build_run(plain, World(), print)) as run:
        batch, module = next(iter(run.windows(0)))[0], cast(LossModule, run.module)
        monkeypatch.setattr(planning, "preflight", look)
        for accumulation in (1, 2):
            config = replace(plain, train=replace(plain.train, accumulation=accumulation))
            with alive:
                planning._run_once(batch, module, run.policy, config)
        numbers = sum(weight.numel() for weight in run.policy.trained.weights.values())
    assert found == [(4 + 8) * numbers, (4 + 8 + 4) * numbers]  # the weights themselves are seen, too


def seen_batches(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    seen: list[list[str]] = []
    losses = CausalLM.losses

    def spy(self: CausalLM, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        seen.append(batch.ids)
        return losses(self, model, batch)

    monkeypatch.setattr(CausalLM, "losses", spy)
    build_run(config, World(), print).close()
    return seen


def test_the_longest_samples_are_rehearsed_together(
    text_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(text_run, output=str(tmp_path / "run"))
    data = read_data(config, build_family(config), "train")
    lengths = planning.measurer(config, data, "data.train").of(range(8))
    longest = [data.samples["data.train"][index].id for index in (-lengths).argsort(kind="stable")[:2]]
    assert seen_batches(config, monkeypatch)[-1] == longest


def greedy(self: CausalLM, model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
    """Ask for more memory than there is, for long samples, in a run and not in its plan."""
    if not isinstance(next(model.parameters()), FakeTensor) and batch.inputs["input_ids"].shape[1] > 70:
        torch.empty(1 << 60, dtype=torch.uint8)
    return ORIGINAL(self, model, batch)


ORIGINAL = CausalLM.losses


def told_of_memory(world: World, config: RunConfig, only: int = 0) -> str:
    """What a run says whose memory does not suffice on one rank."""
    if world.rank == only:
        CausalLM.losses = greedy  # type: ignore[method-assign, assignment]
    try:
        run = build_run(config, world, lambda line: None)
    except UserError as error:
        return f"{world.rank} {error.is_reporter} {error}"
    finally:
        CausalLM.losses = ORIGINAL  # type: ignore[method-assign]
    run.close()
    return "trained"


def test_full_memory_is_one_line_that_says_what_to_change(by_frames: RunConfig) -> None:
    told = told_of_memory(World(), by_frames)
    assert "0 True the memory does not suffice (" in told
    assert "can't allocate memory: you tried to allocate 1152921504606846976 bytes" in told
    assert ": the costliest micro-batch has input_ids (" in told
    assert "of the samples train.jsonl" in told
    assert "lower train.max_frames (100) and raise train.accumulation by the same factor" in told
    assert "set model.activation_checkpointing, leave out the longest samples (data.max_seconds), or train less" in told
    assert told.endswith("; `rawloop plan` with the same settings says what each change saves")
    assert re.search(r": a step takes [\d.e-]+ GB at its peak by `rawloop plan` \((\w[\w ]* [\d.e-]+(, )?)+\): ", told)
    by_frames.train = replace(BY_FRAMES, rehearse=False)
    assert told_of_memory(World(), by_frames) == "trained"  # the folder is no run yet: the command can be given again


def test_full_memory_in_a_later_step_names_the_batch_and_the_numbers_of_the_plan(
    by_frames: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_frames.train = replace(BY_FRAMES, rehearse=False)
    monkeypatch.setattr(CausalLM, "losses", greedy)
    with closing(build_run(by_frames, World(), lambda line: None)) as run, pytest.raises(OutOfMemory) as caught:
        train(run)
    told = str(caught.value)
    assert re.search(
        r"\(at step \d, on rank 0, in the micro-batch of the samples train.jsonl line \d\): its inputs", told
    )
    assert re.search(r"have the shapes input_ids \(.*; a step takes [\d.e-]+ GB at its peak by `rawloop plan` \(", told)
    assert "lower train.max_frames (100) and raise train.accumulation by the same factor" in told


@pytest.mark.slow
def test_on_a_card_the_change_that_would_fit_is_named(by_frames: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a small model; the card is made up, as CUDA is needed for a real one."""
    memory = (0.8 * size_run(by_frames).own.total + CUDA) / (1 - RESERVE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    told = what_would_fit(by_frames, replace(World(), device=torch.device("cuda", 0)))
    assert re.search(r"and the device has 0\.6 GB: it would fit with .*\([\d.e-]+ GB\); or lower train.max", told)
    broken = replace(by_frames, data=replace(by_frames.data, train="nowhere"))
    assert re.search(r"\(there is no plan: UserError: .*nowhere.*\)$", what_would_fit(broken, World()))


@pytest.mark.slow
def test_full_memory_on_one_rank_ends_all(by_frames: RunConfig, run_ranks: Ranks) -> None:
    by_frames.train = replace(BY_FRAMES, accumulation=1)
    told = run_ranks(told_of_memory, by_frames, 1)
    assert [line[:7] for line in told] == ["0 True ", "1 False"]
    assert all("the memory of rank 1 does not suffice" in line for line in told)
    assert all(re.search(r"a step takes [\d.e-]+ GB at its peak by `rawloop plan` \(", line) for line in told)


@pytest.mark.slow
def test_a_rank_plans_by_itself_though_there_are_others(by_frames: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    told = what_would_fit(by_frames, World(1, 2, 1))
    assert re.match(r"a step takes [\d.e-]+ GB at its peak by `rawloop plan` \(.*\): lower train.max_frames", told)


def told_in_a_step(world: World, config: RunConfig) -> str:
    """What a rank says whose memory does not suffice in a step, beside one that waits for it."""
    run = build_run(config, world, lambda line: None)
    if world.rank == 1:
        module: Any = unwrap_ddp(run.module)
        module.losses = lambda model, batch: torch.empty(1 << 60, dtype=torch.uint8)
    with closing(run):
        train(run)
    return "trained"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_full_memory_on_one_rank_in_a_step_ends_all(
    parallel: Literal["ddp", "fsdp"], by_frames: RunConfig, run_ranks: Ranks
) -> None:
    by_frames.train = replace(BY_FRAMES, accumulation=1, rehearse=False)
    told = (
        r"\(at step \d, on rank 1, in the micro-batch of .*; a step takes [\d.e-]+ GB at its peak by `rawloop plan` \("
    )
    with pytest.raises(OutOfMemory, match=told):
        run_ranks(told_in_a_step, replace(by_frames, parallel=parallel))


def test_only_full_memory_is_told_as_such() -> None:
    with pytest.raises(UserError, match=r"^the memory does not suffice \(CUDA out of memory\): a batch: do less$"):
        planning.within_memory(
            partial(throw, torch.OutOfMemoryError("CUDA out of memory\nmore")), World(), "a batch", lambda: "do less"
        )
    with pytest.raises(RuntimeError, match="other"):
        planning.within_memory(partial(throw, RuntimeError("other")), World(), "a batch", lambda: "do less")
    assert planning.within_memory(lambda: 3, World(), "a batch", lambda: "do less") == 3


def throw(error: Exception) -> None:
    raise error
