"""What the loss reaches: parts without a gradient, dead heads, losses that hang on nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rawloop.watch.findings import Finding
from rawloop.watch.reach import Reach, dead_block, without_graph
from rawloop.watch.subject import StepRecord, Subject
from rawloop.watch.unreached import whole_group
from rawloop.watch.watch import Watch
from tests.watch.loops import WORDS, Model, looking, mean_loss, watched


def found_in(model: nn.Module, **options: Any) -> list[Finding]:
    return watched(model, looking(Reach), **options)


class Towers(nn.Module):
    """Features and words, whose sum is scored. `join` is what the model does with the features."""

    def __init__(self, join: Callable[["Towers", Tensor], Tensor | int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.join = join
        self.audio = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16))
        self.embed, self.middle, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Linear(16, WORDS)

    def forward(self, ids: Tensor) -> Any:
        joined = self.join(self, torch.rand(*ids.shape, 4))
        return self.head(self.middle(self.embed(ids) + joined).tanh())


def under_no_grad(model: Towers, features: Tensor) -> Any:
    with torch.no_grad():
        return model.audio(features)


@pytest.mark.parametrize(
    ("join", "module", "words"),
    [
        (under_no_grad, "audio.0", "called under no_grad"),
        (lambda model, features: model.audio(features).detach(), "audio.2", "is detached"),
        (lambda model, features: model.audio(features) is None, "audio.2", "is detached, or nothing"),
        (lambda model, features: model.audio[2](model.audio[1](model.audio[0](features)).detach()), "audio.0", "cut"),
    ],
)
def test_a_part_without_gradients_names_where_the_graph_ends(join: Any, module: str, words: str) -> None:
    (found,) = found_in(Towers(join))
    assert (found.kind, found.ordinary, found.cause.whose) == ("no_gradient", False, "model")
    assert found.cause.place.module == module
    assert words in found.cause.what


def test_a_graph_that_is_cut_between_two_modules_names_both() -> None:
    model = Model()
    model.layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    (found,) = found_in(model)
    assert found.kind == "no_gradient"
    assert "between 'layers.0.down' and 'layers.1.norm'" in found.cause.what


def test_a_group_of_an_optimizer_without_gradients_is_named() -> None:
    model = Towers(under_no_grad)
    optimizer = torch.optim.SGD([{"params": model.head.parameters()}, {"params": model.audio.parameters()}], lr=0.1)
    names = [name for name, _ in model.named_parameters() if name.startswith("audio")]
    subject = Subject(model, [optimizer], None, model.named_parameters)
    assert whole_group(subject, names) == "SGD, parameter group 1"
    assert whole_group(subject, names[1:]) == ""


def test_an_output_times_zero_is_told_apart_from_a_detached_one() -> None:
    (found,) = found_in(Towers(lambda model, features: model.audio(features) * 0))
    assert (found.kind, found.cause.place.module) == ("gradient_zero", "audio.2")
    assert "multiplies its output by zero" in found.cause.what


@pytest.mark.parametrize(("relu", "module"), [(nn.ReLU(), "relu"), (F.relu, "audio.2")])
def test_outputs_that_a_relu_turns_into_zeros_name_what_is_dead(relu: Any, module: str) -> None:
    model = Towers(lambda model, features: model.middle(relu(model.audio(features))))
    if isinstance(relu, nn.Module):
        model.add_module("relu", relu)
    with torch.no_grad():
        model.get_parameter("audio.2.bias").fill_(-40.0)
    (found,) = found_in(model)
    assert (found.kind, found.cause.whose, found.cause.place.module) == ("gradient_zero", "model", module)
    assert "'audio.2' gives" in found.cause.what
    assert "'audio.2'" in found.cause.advice


def test_a_dead_head_is_named_by_its_rows() -> None:
    model = Model()
    model.layers[1].gates[2] = 0
    (found,) = found_in(model)
    assert (found.kind, found.cause.place.parameter, found.cause.place.row) == ("dead_block", "layers.1.qkv.weight", 8)
    assert found.cause.evidence["rows without a gradient"] == 12  # queries, keys and values of four channels


def test_blocks_are_told_from_scattered_rows_and_from_a_padded_vocabulary() -> None:
    def rows(dead: set[int], count: int = 16) -> list[bool]:
        return [place not in dead for place in range(count)]

    assert dead_block(rows({4, 5, 6, 7})) == 4
    assert dead_block(rows({8, *range(9, 16)})) == 8
    assert dead_block(rows({1, 5, 6, 11})) == 0
    assert dead_block(rows({12, 13, 14, 15})) == 4
    assert dead_block(rows({12, 13, 14, 15}), padded=True) == 0
    assert dead_block(rows(set())) == dead_block(rows(set(range(16)))) == 0


def times_zero(model: Any, ids: Tensor, step: int) -> Tensor:
    return mean_loss(model, ids, step) * 0


def clamped(model: Any, ids: Tensor, step: int) -> Tensor:
    return mean_loss(model, ids, step).clamp(max=0.5)


@pytest.mark.parametrize(("loss", "whose"), [(times_zero, "data"), (clamped, "loss")])
def test_a_gradient_of_exactly_zero_is_told_at_the_second_step(loss: Any, whose: str) -> None:
    (found,) = found_in(Model(), loss=loss)
    assert (found.kind, found.cause.whose, found.step) == ("no_gradient_at_all", whose, 1)


def test_a_loss_without_a_graph_names_the_line_of_backward() -> None:
    model = Model()
    watch = Watch(model, detectors=[], say=lambda text: None)
    with pytest.raises(RuntimeError), watch, watch.step():
        mean_loss(model, torch.ones(1, 3, dtype=torch.long), 0).detach().backward()  # type: ignore[no-untyped-call]
    (found,) = watch.findings
    assert (found.kind, found.cause.whose) == ("loss_without_graph", "loss")
    assert "test_reach.py" in found.cause.place.expression
    assert ".detach().backward()" in found.cause.place.expression
    assert without_graph(RuntimeError("out of memory"), watch.subject, StepRecord(3), "") is None


class Experts(nn.Module):
    """Words that only the first of four experts sees, and a pooler that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.pooler = nn.Embedding(WORDS, 64), nn.Linear(64, WORDS), nn.Linear(64, 1)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        self.pooler(x)
        return self.head(x + self.experts[0](x).relu())


def test_unused_experts_and_outputs_are_noted_only() -> None:
    found = found_in(Experts())
    assert [(finding.kind, finding.ordinary) for finding in found] == [("no_gradient", True)] * 2
    assert "were not called" in found[0].cause.what


def lora() -> Any:
    return get_peft_model(Model(), LoraConfig(r=2, target_modules=["up", "down"]))


def tied() -> nn.Module:
    model = Model()
    model.head.weight = model.embed.weight
    return model


def frozen() -> nn.Module:
    model = Model()
    model.layers[0].requires_grad_(False)
    return model


class Convolutions(nn.Module):
    """Batch norm whose last scale starts at zero on a residual path, ReLU in place, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv1d(1, 8, 3, padding=1), nn.Conv1d(8, WORDS, 1)
        self.branch = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.last, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.1)
        nn.init.zeros_(self.last.weight)

    def forward(self, ids: Tensor) -> Any:
        x = self.first(ids[:, None].float())
        return self.head(self.drop(x + self.last(self.branch(x)))).transpose(1, 2)


@pytest.mark.parametrize("make", [Model, lora, tied, frozen, Convolutions])
def test_a_healthy_loop_is_quiet(make: Callable[[], nn.Module]) -> None:
    assert found_in(make(), steps=6, every=1) == []
    assert found_in(make(), steps=1) == []


def test_a_masked_loss_of_one_step_is_quiet() -> None:
    def once(model: Any, ids: Tensor, step: int) -> Tensor:
        return F.relu(mean_loss(model, ids, step) - (100 if step == 2 else 0))

    assert found_in(Model(), loss=once, steps=6) == []
