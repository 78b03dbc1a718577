"""The evaluator against sums made by hand, on the demo checkpoint and real speech, alone and on several ranks."""

import math
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import call
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rawloop.checkpoint.best import BestTracker
from rawloop.contracts import Batch, Family, Sample, StreamLoss
from rawloop.data.batches import EvalBatches, Loader, MicroBatches
from rawloop.data.codes import CodeCache
from rawloop.data.samples import read_samples
from rawloop.dist import World
from rawloop.errors import OutOfMemory, RawloopError, UserError
from rawloop.evaluate import Evaluation, EvaluationConfig, Evaluator
from rawloop.families import ModelConfig, load_family
from rawloop.losses import LossModule, Meter
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.seed import capture_rng

CPU = torch.device("cpu")
CODEBOOKS = 8


class Scene(NamedTuple):
    """All that an evaluation needs."""

    family: Any
    model: nn.Module
    cache: CodeCache
    samples: list[Sample]


def open_scene(checkpoint: Path, data: Path, weights: dict[str, float] | None = None) -> Scene:
    family = load_family(ModelConfig(path=str(checkpoint / "model"), stream_weights=weights or {}))
    return Scene(family, family.load_model().train(), CodeCache(data / "codes"), read_samples(data / "eval"))


@pytest.fixture(scope="module")
def scene(demo_checkpoint: Path, demo_data: Path) -> Scene:
    return open_scene(demo_checkpoint, demo_data)


def evaluator(scene: Scene, batches: Iterable[Batch], world: World | None = None, mode: Any = "fp32") -> Evaluator:
    family: Family = scene.family
    module = LossModule(scene.model, family.losses).train()
    policy = PrecisionPolicy(PrecisionConfig(mode=mode), CPU)
    return Evaluator(call, batches, model=module, policy=policy, world=world or World(), weights=family.stream_weights)


def batches_of(scene: Scene, size: int = 2, samples: list[Sample] | None = None, world: World | None = None) -> Any:
    chosen, world = scene.samples if samples is None else samples, world or World()
    micro = MicroBatches(chosen, lambda sample: scene.family.example(sample, scene.cache), scene.family.collate)
    return EvalBatches(Loader(micro), len(chosen), size, rank=world.rank, world_size=world.size)


def evaluate(
    scene: Scene, size: int = 2, samples: list[Sample] | None = None, world: World | None = None
) -> Evaluation:
    return evaluator(scene, batches_of(scene, size, samples, world), world).run()


@torch.no_grad()
def by_hand(scene: Scene, samples: list[Sample]) -> dict[str, tuple[float, int]]:
    """Sum and count of the nats of every stream and codebook, one sample and one target at a time, in float64."""
    sums = dict.fromkeys(["text", *(f"audio/{k}" for k in range(CODEBOOKS))], 0.0)
    counts = dict.fromkeys(sums, 0)
    settings, model = scene.family.settings, scene.model.eval()
    for sample in samples:
        example = scene.family.example(sample, scene.cache)
        ones = torch.ones(1, len(example.audio_input_ids), dtype=torch.bool)
        inputs: dict[str, Tensor] = {"input_ids": example.input_ids[None], "audio_input_ids_mask": ones}
        inputs["audio_input_ids"] = example.audio_input_ids[None]
        audio = model(**inputs).logits[0].double().view(len(example.input_ids), CODEBOOKS, -1).log_softmax(-1)
        hidden = model.get_submodule("model")(**inputs).last_hidden_state[0]
        text = model.get_submodule("text_lm_head")(hidden).double().log_softmax(-1)
        places = [
            place
            for place, token in enumerate(example.input_ids.tolist())
            if token in (settings.audio_token_id, settings.audio_delay_token_id)
        ]
        for place, row in zip(places, example.audio_labels.tolist(), strict=True):
            for k, code in enumerate(row):
                if code != -100:
                    sums[f"audio/{k}"] -= audio[place - 1, k, code].item()
                    counts[f"audio/{k}"] += 1
        for place, token in enumerate(example.labels.tolist()):
            if token != -100:
                sums["text"] -= text[place - 1, token].item()
                counts["text"] += 1
    total = sum(sums[f"audio/{k}"] for k in range(CODEBOOKS)), sum(counts[f"audio/{k}"] for k in range(CODEBOOKS))
    return {name: (sums[name], counts[name]) for name in sums} | {"audio": total}


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


# -- the number --------------------------------------------------------------------------------------------------


def test_eval_loss_is_the_sum_over_the_count_per_stream_and_codebook(scene: Scene) -> None:
    wanted = by_hand(scene, scene.samples)
    evaluation = evaluate(scene)
    means = {f"eval_loss/{name}": total / count for name, (total, count) in wanted.items()}
    losses = {name: value for name, value in evaluation.metrics.items() if name.startswith("eval_loss/")}
    assert losses.keys() == means.keys()
    assert all(close(losses[name], mean) for name, mean in means.items()), (losses, means)
    assert close(evaluation.metrics["eval_loss"], means["eval_loss/audio"] + means["eval_loss/text"])
    assert evaluation.metrics["eval_targets/audio"] == wanted["audio"][1]
    assert evaluation.metrics["eval_targets/text"] == wanted["text"][1] == 2 * len(scene.samples)
    assert evaluation.metrics["eval_seconds"] > 0
    assert evaluation[1:] == (True, [])
    # a mean over samples of their means is another number, which the test must be able to tell apart
    each = [by_hand(scene, [sample])["audio"] for sample in scene.samples]
    assert not close(sum(total / count for total, count in each) / len(each), means["eval_loss/audio"])


def test_weights_of_streams_weigh_their_means(scene: Scene, demo_checkpoint: Path, demo_data: Path) -> None:
    whole = evaluate(scene).metrics
    half = evaluate(open_scene(demo_checkpoint, demo_data, {"text": 0.25})).metrics
    audio = evaluate(open_scene(demo_checkpoint, demo_data, {"text": 0.0})).metrics
    assert close(half["eval_loss"], whole["eval_loss/audio"] + 0.25 * whole["eval_loss/text"])
    assert close(audio["eval_loss"], whole["eval_loss/audio"])
    assert "eval_loss/text" not in audio


@pytest.mark.parametrize("size", [1, 3, 5, 64])
def test_batch_size_and_order_do_not_change_it(scene: Scene, size: int) -> None:
    whole = evaluate(scene).metrics
    for samples in (scene.samples, scene.samples[::-1]):
        again = evaluate(scene, size, samples).metrics
        assert all(close(again[name], value) for name, value in whole.items() if name != "eval_seconds")


def test_it_is_scored_under_the_precision_of_training(scene: Scene) -> None:
    fp32 = evaluate(scene).metrics["eval_loss"]
    bf16 = evaluator(scene, batches_of(scene), mode="bf16").run().metrics["eval_loss"]
    assert 1e-7 < abs(bf16 - fp32) / fp32 < 1e-2


# -- several ranks -----------------------------------------------------------------------------------------------


class Broken:
    """A share of which one sample cannot be read on one rank."""

    def __init__(self, batches: Iterable[Batch], broken: bool) -> None:
        self.batches, self.broken = batches, broken

    def __iter__(self) -> Any:
        yield from self.batches
        if self.broken:
            raise RawloopError("the codes of clip.wav are not what was written")


def on_ranks(world: World, checkpoint: Path, data: Path) -> list[Any]:
    scene = open_scene(checkpoint, data)
    results: list[Any] = [evaluate(scene, 2, scene.samples[:number], world) for number in (5, 2, 1)]
    others = [evaluate(scene, size, samples, world) for size in (1, 3, 8) for samples in orders(scene)]
    try:
        evaluator(scene, Broken(batches_of(scene, world=world), world.rank == 1), world).run()
    except RawloopError as error:
        results.append(str(error))
    return [*results, others]


def orders(scene: Scene) -> list[list[Sample]]:
    return [scene.samples, scene.samples[3:] + scene.samples[:3]]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_the_set_and_agree_on_the_number(
    run_ranks: Callable[..., list[Any]], scene: Scene, demo_checkpoint: Path, demo_data: Path, size: int
) -> None:
    """Uneven shares, and sets smaller than the world, of which some ranks have nothing."""
    results = run_ranks(on_ranks, demo_checkpoint, demo_data, world_size=size)
    for number, place in ((5, 0), (2, 1), (1, 2)):
        wanted = evaluate(scene, 2, scene.samples[:number]).metrics
        for result in results:
            evaluation = result[place]
            assert evaluation.valid
            assert evaluation.metrics.keys() == wanted.keys()
            assert all(close(evaluation.metrics[name], wanted[name]) for name in wanted if name != "eval_seconds")
        everywhere = [{**result[place].metrics, "eval_seconds": 0} for result in results]
        assert all(metrics == everywhere[0] for metrics in everywhere)  # to the last bit: ranks decide by it
    problem = "the codes of clip.wav are not what was written"
    alone = evaluate(scene).metrics["eval_loss"]
    assert all(close(other.metrics["eval_loss"], alone) for result in results for other in result[4])
    assert [result[3] for result in results] == [f"rank 1: {problem}", problem, f"rank 1: {problem}"][:size]


# -- what it leaves alone ----------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


class Drawing:
    """Batches whose making draws random numbers, as a user's own family may do. Notes whether gradients are kept."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.grad_enabled: set[bool] = set()

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.grad_enabled.add(torch.is_grad_enabled())
            torch.rand(3)
            random.random()
            yield batch


def test_random_streams_modes_and_gradients_are_untouched(scene: Scene) -> None:
    drawing = Drawing(batches_of(scene))
    ready = evaluator(scene, drawing)
    frozen = scene.model.get_submodule("text_lm_head").eval()  # deliberately not in its parent's mode
    weight = scene.model.get_parameter("audio_lm_head.weight")
    weight.grad = torch.ones_like(weight)
    before = capture_rng()
    first, second = ready.run(), ready.run()
    assert same(capture_rng(), before)
    assert ready.model.training
    assert scene.model.get_submodule("model").training
    assert not frozen.training
    assert torch.is_grad_enabled()
    assert drawing.grad_enabled == {False}
    assert torch.equal(weight.grad, torch.ones_like(weight))
    weight.grad = None
    assert {**first.metrics, "eval_seconds": 0} == {**second.metrics, "eval_seconds": 0}


def test_full_memory_names_the_batch_and_what_takes_less(scene: Scene) -> None:
    def greedy(model: nn.Module, batch: Batch) -> Any:
        return torch.empty(1 << 60, dtype=torch.uint8)

    measured = Evaluator(greedy, batches_of(scene), model=scene.model, world=World())
    with pytest.raises(
        OutOfMemory, match=r"\(in the evaluation, on rank 0, in the batch of .*: make its batches small"
    ):
        measured.run()


def test_dropout_is_off_and_the_mode_comes_back_even_after_an_error(scene: Scene) -> None:
    wanted = evaluate(scene).metrics["eval_loss"]
    head = scene.model.get_submodule("audio_lm_head")
    handle = head.register_forward_hook(lambda module, _, output: torch.dropout(output, 0.5, module.training))
    try:
        assert close(evaluate(scene).metrics["eval_loss"], wanted)
        ready = evaluator(scene, Broken(batches_of(scene), broken=True))
        with pytest.raises(RawloopError, match=r"^the codes of clip\.wav"):
            ready.run()
        assert ready.model.training
    finally:
        handle.remove()


# -- what cannot be measured -------------------------------------------------------------------------------------


def only_of(scene: Scene, chosen: Sample) -> int:
    """A token that stands in this sample's prompt and in no other's."""
    tokens = {s.id: set(scene.family.example(s, scene.cache).input_ids.tolist()) for s in scene.samples}
    others = {token for name, ids in tokens.items() if name != chosen.id for token in ids}
    return int(min(tokens[chosen.id] - others))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_and_never_best(scene: Scene, poison: float) -> None:
    """An embedding row that has run away hits one sample alone, as in a real divergence."""
    chosen = scene.samples[2]
    table = scene.model.get_parameter("model.embed_tokens.weight")
    row = only_of(scene, chosen)
    saved = table.detach()[row].clone()
    with torch.no_grad():
        table[row] = poison
    try:
        alone, paired = evaluate(scene, size=1), evaluate(scene, size=2)
    finally:
        with torch.no_grad():
            table[row] = saved
    assert (alone.valid, alone.bad_ids) == (False, [chosen.id])
    assert (paired.valid, paired.bad_ids) == (False, sorted(s.id for s in scene.samples[2:4]))
    assert math.isnan(alone.metrics["eval_loss"])  # reported as it is, with no batch left out
    assert alone.metrics["eval_targets/audio"] == evaluate(scene).metrics["eval_targets/audio"]
    best = BestTracker()
    assert not best.consider(0, alone.metrics["eval_loss"], alone.valid)
    assert not best.consider(1, 0.1, alone.valid)
    assert best.consider(2, 5.0, evaluate(scene).valid)
    assert evaluate(scene).valid


def test_a_stream_without_targets_has_no_loss(scene: Scene) -> None:
    class Silent:
        """Batches whose text is all masked."""

        def __iter__(self) -> Any:
            for batch in batches_of(scene):
                text = batch.labels["text"]
                labels = {**batch.labels, "text": text._replace(positions=text.positions[:0], targets=text.targets[:0])}
                yield Batch(batch.inputs, labels, {**batch.targets, "text": 0}, batch.ids)

    with pytest.raises(UserError, match="evaluation set has no target in the stream 'text'"):
        evaluator(scene, Silent()).run()
    with pytest.raises(UserError, match="the evaluation set is empty"):
        batches_of(scene, samples=[])


# -- sums are joined by name ---------------------------------------------------------------------------------------


Measured = dict[str, tuple[float, int] | tuple[float, int, list[float], tuple[int, ...]]]


class Measuring:
    """Stands for a model and its batches: each batch is its streams' sums and targets, and those of their parts."""

    def __init__(self, *batches: Measured) -> None:
        self.batches = batches
        self.module = LossModule(nn.Identity(), lambda model, batch: self.losses(int(batch.ids[0])))

    def losses(self, number: int) -> dict[str, StreamLoss]:
        found = {}
        for stream, (total, targets, *parts) in self.batches[number].items():
            more: list[Any] = [torch.tensor(parts[0]), parts[1]] if parts else []
            found[stream] = StreamLoss(torch.tensor(total), targets, *more)
        return found

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            yield Batch({}, {}, {stream: entry[1] for stream, entry in batch.items()}, [str(number)])

    def evaluator(self, weights: dict[str, float], world: World | None = None) -> Evaluator:
        policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
        return Evaluator(call, self, model=self.module, policy=policy, world=world or World(), weights=weights)

    def means(self, **weights: float) -> dict[str, float]:
        found = self.evaluator(weights).run()
        assert found.valid
        return {name: value for name, value in found.metrics.items() if name != "eval_seconds"}


def test_streams_in_another_order_keep_their_names() -> None:
    batches = Measuring({"a": (10.0, 1), "b": (2.0, 2)}, {"b": (4.0, 1), "a": (10.0, 1)})
    wanted = {"eval_loss/a": 10.0, "eval_loss/b": 2.0, "eval_targets/a": 2.0, "eval_targets/b": 3.0}
    assert batches.means(a=1.0, b=0.5) == {"eval_loss": 11.0, **wanted}


def test_batches_may_have_different_streams() -> None:
    batches = Measuring({"a": (10.0, 1)}, {"b": (2.0, 2)}, {"b": (4.0, 1), "a": (6.0, 1)}, {"c": (7.0, 7)})
    found = batches.means(a=1.0, b=1.0, c=0.0)
    assert (found["eval_loss"], found["eval_loss/a"], found["eval_loss/b"], found["eval_loss/c"]) == (
        10.0,
        8.0,
        2.0,
        1.0,
    )


def test_parts_may_differ_from_batch_to_batch() -> None:
    batches = Measuring(
        {"a": (6.0, 3, [2.0, 4.0], (1, 2))}, {"a": (9.0, 3)}, {"a": (9.0, 3, [1.0, 2.0, 6.0], (1, 1, 1))}
    )
    found = batches.means(a=1.0)
    assert [found["eval_loss/a"], *(found[f"eval_loss/a/{part}"] for part in range(3))] == [24 / 9, 1.5, 2.0, 6.0]
    assert_metered_alike(batches, found)


def assert_metered_alike(batches: Measuring, found: dict[str, float]) -> None:
    """The sums of training, which the log lines show."""
    meter = Meter()
    for batch in batches:
        meter.add(batches.module(batch))
    assert meter.take(World()) == {name.removeprefix("eval_"): found[name] for name in found if "_loss/" in name}


def test_log_lines_are_joined_by_name_too() -> None:
    batches = Measuring({"a": (10.0, 1), "b": (2.0, 2)}, {"b": (4.0, 1), "a": (10.0, 1)}, {"b": (1.0, 1)})
    assert_metered_alike(batches, batches.means(a=1.0, b=1.0))


def names_on_ranks(world: World) -> tuple[dict[str, float], dict[str, float]]:
    """Rank 1 meets the streams in another order, and one that rank 0 does not meet."""
    one: Measured = {"a": (10.0, 1), "b": (2.0, 2)}
    other: Measured = {"c": (3.0, 1), "b": (4.0, 1), "a": (10.0, 1, [10.0], (1,))}
    batches = Measuring(other if world.rank else one)
    meter = Meter()
    for batch in batches:
        meter.add(batches.module(batch))
    return batches.evaluator({"a": 1.0, "b": 1.0, "c": 1.0}, world).run().metrics, meter.take(world)


def test_ranks_join_their_streams_by_name(run_ranks: Callable[..., list[Any]]) -> None:
    wanted = {"a": 10.0, "b": 2.0, "c": 3.0, "a/0": 10.0}
    for metrics, line in run_ranks(names_on_ranks):
        assert {name: metrics[f"eval_loss/{name}"] for name in wanted} == wanted
        assert metrics["eval_loss"] == 15.0
        assert line == {f"loss/{name}": value for name, value in wanted.items()}


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": 1.0, "b": math.nan}, {"a": math.inf}])
def test_weights_that_weigh_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"^the evaluation's weights are \{.*at least one above 0$"):
        Measuring({"a": (1.0, 1)}).evaluator(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"text": 1.0, "audoi": 1.0},
            r"'audoi', which no batch measures \(did you mean 'audio'\?\).*measured are audio, text",
        ),
        (
            {"text": 1.0},
            r"measures the stream 'audio', which has no weight \(weights are for text\): .* 0 reports its mean",
        ),
        ({"text": 1.0, "audio": 1.0}, r"no target in the stream 'audio'"),
    ],
)
def test_streams_and_weights_that_do_not_meet_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Measuring({"audio": (0.0, 0), "text": (1.0, 1)}).evaluator(weights).run()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": (1.0, 1, [1.0, 2.0], (1,))}, r"2 parts and 1 part_targets for the stream 'a'"),
        ({"a": (1.0, 1), "a/0": (1.0, 1)}, r"a stream is called 'a/0'"),
    ],
)
def test_losses_whose_names_would_be_guessed_are_refused(batch: Measured, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Measuring(batch).means(a=1.0)


def test_it_is_due_at_the_start_at_every_multiple_and_at_the_end() -> None:
    ready = Evaluator(call, [], model=nn.Identity(), world=World(), every=20)
    assert [step for step in range(70) if ready.due(step, last=step == 69)] == [0, 20, 40, 60, 69]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": -1}, {"batch_size": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"evaluation.{next(iter(wrong))}"):
        EvaluationConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor(1.0), r"gave a Tensor, not a StreamLoss\(total, targets\), .*of_mean.* for the stream 'a'"),
        (StreamLoss(torch.ones(2), 2), r"gave a total of shape \(2,\), where one number is needed, for"),
        (StreamLoss(torch.tensor(1.0), -2), r"gave the target counts \[-2\], which must be Python ints of 0 or more"),
        (StreamLoss(torch.tensor(1.0), torch.tensor(2)), r"target counts \[tensor\(2\)\], which must be Python ints"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_loss_of_a_stream_is_named(given: Any, message: str) -> None:
    module = LossModule(nn.Identity(), lambda model, batch: {"a": given})
    with pytest.raises(UserError, match=message):
        module(Batch({}, {}, {"a": 2}, ["x"]))


# -- any loss function, any batches --------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Rows:
    """A batch object with attributes, as many collators return."""

    x: Tensor
    y: Tensor


def numbers(size: int) -> tuple[Tensor, Tensor]:
    x = torch.arange(float(size))
    return x, 3 * x + 1


def linear() -> nn.Module:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    nn.init.constant_(model.bias, 0.0)
    return model


def squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    errors: Tensor = model(x[:, None])[:, 0] - y
    return errors.square()


READERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "list": (lambda x, y: [x, y], lambda batch: (batch[0], batch[1])),
    "tuple": (lambda x, y: (x, y), lambda batch: (batch[0], batch[1])),
    "named tuple": (Pair, lambda batch: (batch.x, batch.y)),
    "dict": (lambda x, y: {"x": x, "more": {"y": [y]}}, lambda batch: (batch["x"], batch["more"]["y"][0])),
    "object": (Rows, lambda batch: (batch.x, batch.y)),
    "tensor": (lambda x, y: torch.stack([x, y]), lambda batch: (batch[0], batch[1])),
}
RESULTS: dict[str, Callable[[Tensor], Any]] = {
    "sum and count": lambda errors: (errors.sum(), len(errors)),
    "mean with count": lambda errors: StreamLoss.of_mean(errors.mean(), len(errors)),
    "by name": lambda errors: {"loss": (errors.sum(), len(errors))},
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("result", RESULTS)
def test_any_batch_and_any_loss_give_the_true_mean(kind: str, result: str) -> None:
    make, read = READERS[kind]
    batches = [make(*numbers(size)) for size in (1, 5, 2)]
    evaluator = Evaluator(lambda model, batch: RESULTS[result](squares(model, *read(batch))), batches, model=linear())
    errors = [(x + 1) ** 2 for size in (1, 5, 2) for x in range(size)]
    for _ in range(2):
        metrics = evaluator.run().metrics
        assert metrics["eval_loss"] == metrics["eval_loss/loss"] == sum(errors) / len(errors)
        assert metrics["eval_targets/loss"] == 8


def test_batches_go_to_the_device_of_the_model() -> None:
    model, seen = linear().to("meta"), []

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        seen.append(
            [batch["x"].device.type, *(item.device.type for item in batch["more"]), batch["rows"].y.device.type]
        )
        return torch.tensor(1.0), 1

    rows = Rows(*numbers(2))
    Evaluator(loss, [{"x": torch.ones(1), "more": (torch.ones(1),), "rows": rows}], model=model).run()
    assert seen == [["meta"] * 3]
    assert rows.x.device.type == "cpu"  # the caller's own batch stays as it is


class Once:
    """Batches that can be iterated once, and do not look it."""

    def __init__(self) -> None:
        self.left = iter([numbers(2)])

    def __iter__(self) -> Any:
        return self.left


def error_sum(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return squares(model, *batch).sum(), len(batch[0])


def test_batches_that_are_empty_the_second_time_are_refused() -> None:
    again = "pass a list, a DataLoader, or a function that returns new batches"
    with pytest.raises(UserError, match=f"batches are a generator, which is empty the second time: {again}"):
        Evaluator(error_sum, (numbers(size) for size in (1, 2)), model=linear())
    evaluator = Evaluator(error_sum, Once(), model=linear())
    evaluator.run()
    with pytest.raises(UserError, match=f"has no batches now, and had 1 the last time; {again}"):
        evaluator.run()
    anew = Evaluator(error_sum, lambda: (numbers(size) for size in (1, 2)), model=linear())
    assert anew.run().metrics["eval_loss"] == anew.run().metrics["eval_loss"] == 2.0


@pytest.mark.parametrize(
    ("loss", "batches", "message"),
    [
        (error_sum, [], "the evaluation set is empty: no rank has a batch"),
        (lambda model, batch: {}, [numbers(1)], "loss function has returned no loss: it must return"),
        (
            lambda model, batch: torch.tensor(1.0),
            [numbers(1)],
            r"gave a Tensor.*on rank 0, in batch 0",
        ),
        (lambda model, batch: (error_sum(model, batch), {"eval_x": (1, 1)}), [numbers(1)], "metric is called 'eval_x'"),
        (
            lambda model, batch: (error_sum(model, batch), {"auc": batch[0]}),
            [numbers(1)],
            "metric 'auc' is a Tensor",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(loss: Any, batches: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Evaluator(loss, batches, model=linear()).run()


def test_an_evaluator_without_a_model_is_refused() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"), CPU)
    with pytest.raises(UserError, match=r"the evaluator's model is None: pass model=\.\.\., or a policy after"):
        Evaluator(error_sum, [numbers(1)], policy=policy)
    model = policy.prepare(linear())
    assert Evaluator(error_sum, [numbers(1)], policy=policy).model is model


def test_a_batch_without_ids_is_named_by_its_number() -> None:
    batches = [numbers(1), (torch.tensor([math.inf]), torch.zeros(1)), numbers(2)]
    found = Evaluator(error_sum, batches, model=linear()).run()
    assert (found.valid, found.bad_ids) == (False, ["batch 1 of rank 0"])


# -- metrics of one's own ------------------------------------------------------------------------------------------


def with_metrics(model: nn.Module, batch: Any) -> Any:
    """The loss, a metric that is averaged by its own count (as a character error rate), and values to be gathered."""
    x, y = batch
    errors = squares(model, x, y)
    hits = (errors < 5).sum()
    return (errors.sum(), len(x)), {"accuracy": (hits, len(x)), "letters": (1.5, 3), "error": errors, "name": ["a"]}


def median(values: dict[str, list[Any]]) -> dict[str, float]:
    return {"median": statistics.median(values["error"]), "names": len(values["name"])}


def test_metrics_are_averaged_by_count_or_computed_from_all_values() -> None:
    evaluator = Evaluator(with_metrics, [numbers(3), numbers(1)], model=linear(), metrics=median)
    metrics = evaluator.run().metrics
    assert (metrics["accuracy"], metrics["letters"]) == (3 / 4, 0.5)
    assert (metrics["median"], metrics["names"]) == (2.5, 2)
    assert metrics["eval_loss"] == (1 + 4 + 9 + 1) / 4


def metrics_on_ranks(world: World) -> dict[str, float]:
    """DDP hangs on shares that are not even: the raw model is scored. Rank 1 has one batch, rank 0 has two."""
    model = world.wrap(linear())
    share = [numbers(1)] if world.rank else [numbers(3), numbers(2)]
    return Evaluator(with_metrics, share, model=model, metrics=median).run().metrics


def test_ranks_evaluate_their_own_batches_and_agree_on_all_metrics(run_ranks: Callable[..., list[Any]]) -> None:
    one, other = run_ranks(metrics_on_ranks)
    assert one == other
    assert (one["eval_loss"], one["accuracy"], one["median"]) == ((14 + 5 + 1) / 6, 5 / 6, 2.5)
    assert one["names"] == 3
