"""Each mistake in the calls of a loop is named, with the line; a loop without mistakes gives none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rawloop import Finding, Watch
from rawloop.watch import misuse
from rawloop.watch.misuse import Misuse

F: Any = torch.nn.functional


class Bench:
    """A model, its optimizer and scaler, and three steps under watch."""

    def __init__(self, *, scaled: bool = False, scale: float = 2.0**8) -> None:
        self.model: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.scaler: Any = torch.amp.GradScaler("cpu", init_scale=scale) if scaled else None

    def loss(self) -> Any:
        return F.cross_entropy(self.model(torch.randn(3, 4)), torch.tensor([0, 1, 0]))

    def watched(self, body: Callable[["Bench"], None], steps: int = 3) -> list[Finding]:
        self.said: list[str] = []
        with Watch(self.model, self.optimizer, self.scaler, detectors=[Misuse()], say=self.said.append) as watch:
            for _ in range(steps):
                with watch.step(torch.zeros(3)):
                    body(self)
        return list(watch.findings)


def sound(bench: Bench) -> None:
    bench.loss().backward()
    bench.optimizer.step()
    bench.optimizer.zero_grad(set_to_none=False)


def sound_scaled(bench: Bench) -> None:
    bench.optimizer.zero_grad()
    bench.scaler.scale(bench.loss()).backward()
    bench.scaler.unscale_(bench.optimizer)
    nn.utils.clip_grad_norm_(bench.model.parameters(), 1.0)
    bench.scaler.step(bench.optimizer)
    bench.scaler.update()


def sound_accumulation(bench: Bench) -> None:
    for _ in range(3):
        (bench.loss() / 3).backward()
    bench.optimizer.step()
    bench.model.zero_grad()


class Adversaries(Bench):
    """A generator and a critic: the generator's backward pass leaves gradients on the critic."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.critic = nn.Linear(2, 1)
        self.parts: Any = nn.ModuleList([self.model, self.critic])
        self.own = torch.optim.Adam(self.model.parameters())
        self.other = torch.optim.Adam(self.critic.parameters())
        self.optimizer: Any = [self.own, self.other] if both else self.own
        self.model = self.parts if both else self.model

    def fake(self) -> Any:
        return self.parts[0](torch.randn(3, 4))


def adversarial(bench: Any, to_none: bool) -> None:
    bench.other.zero_grad(set_to_none=to_none)
    (bench.critic(torch.ones(3, 2)) - bench.critic(bench.fake().detach())).mean().backward()
    bench.other.step()
    bench.own.zero_grad(set_to_none=to_none)
    bench.critic(bench.fake()).mean().backward()
    bench.own.step()


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_gradients_that_another_loss_leaves_are_no_mistake_if_they_are_zeroed(both: bool, to_none: bool) -> None:
    assert Adversaries(both).watched(lambda bench: adversarial(bench, to_none), steps=4) == []


def test_of_several_optimizers_the_one_that_is_never_zeroed_is_named() -> None:
    bench = Adversaries(both=True)
    bench.own.zero_grad = lambda **kwargs: None  # type: ignore[method-assign]
    found = [one for one in bench.watched(lambda bench: adversarial(bench, True)) if one.kind == "gradients_not_zeroed"]
    assert [one.cause.place.optimizer for one in found] == ["Adam (1)"]


@pytest.mark.parametrize("body", [sound, sound_scaled, sound_accumulation], ids=lambda body: body.__name__)
def test_a_loop_without_mistakes_gives_no_finding(body: Any) -> None:
    assert Bench(scaled=body is sound_scaled).watched(body) == []


def scaled_update(bench: Bench) -> None:
    bench.scaler.scale(bench.loss()).backward()
    bench.optimizer.step()
    bench.optimizer.zero_grad()


def clipped_while_scaled(bench: Bench) -> None:
    bench.scaler.scale(bench.loss()).backward()
    nn.utils.clip_grad_norm_(bench.model.parameters(), 1.0)
    bench.scaler.step(bench.optimizer)
    bench.scaler.update()
    bench.optimizer.zero_grad()


def gradients_not_zeroed(bench: Bench) -> None:
    bench.loss().backward()
    bench.optimizer.step()


def zeroed_before_update(bench: Bench) -> None:
    bench.loss().backward()
    bench.optimizer.zero_grad()
    bench.optimizer.step()


def update_without_backward(bench: Bench) -> None:
    bench.loss()
    bench.optimizer.step()


def trained_in_eval_mode(bench: Bench) -> None:
    bench.model.eval()
    sound(bench)


def optimizer_holds_stale_weights(bench: Bench) -> None:
    bench.model[2].weight = nn.Parameter(bench.model[2].weight.detach().clone())
    bench.loss().backward()
    bench.optimizer.step()
    bench.model.zero_grad()


def scale_moved_in_window(bench: Bench) -> None:
    for _ in range(2):
        bench.scaler.scale(bench.loss()).backward()
        bench.scaler.update(2.0**6)
    bench.scaler.step(bench.optimizer)
    bench.scaler.update()
    bench.optimizer.zero_grad()


MISTAKES = {
    scaled_update: "bench.optimizer.step()",
    clipped_while_scaled: "nn.utils.clip_grad_norm_",
    gradients_not_zeroed: "bench.optimizer.step()",
    zeroed_before_update: "bench.optimizer.zero_grad()",
    update_without_backward: "bench.optimizer.step()",
    trained_in_eval_mode: "",
    optimizer_holds_stale_weights: "",
    scale_moved_in_window: "bench.scaler.update(2.0**6)",
}


def test_every_mistake_is_in_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text(encoding="utf-8")
    assert [kind for kind in misuse.MISTAKES if f"| `{kind}` |" not in page] == []


@pytest.mark.parametrize("body", MISTAKES, ids=lambda body: body.__name__)
def test_a_mistake_is_named_with_its_line(body: Any) -> None:
    scaled = body in (scaled_update, clipped_while_scaled, scale_moved_in_window)
    found = [finding for finding in Bench(scaled=scaled).watched(body) if not finding.ordinary]
    assert [finding.kind for finding in found] == [body.__name__]
    assert MISTAKES[body] in found[0].cause.place.expression
    assert found[0].cause.advice


def test_weights_that_no_optimizer_holds_are_named() -> None:
    bench = Bench()
    bench.optimizer = torch.optim.SGD(bench.model[0].parameters(), 0.1)

    def body(bench: Bench) -> None:
        bench.loss().backward()
        bench.optimizer.step()
        bench.model.zero_grad()

    (finding,) = bench.watched(body)
    assert finding.kind == "weights_without_optimizer"
    assert finding.cause.place.parameter == "2.weight"


def the_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def a_shape() -> None:
    torch.ones(3, 4) @ torch.ones(3, 4)


def an_index() -> None:
    torch.ones(3)[4]


def a_word() -> None:
    F.embedding(torch.tensor([7]), torch.ones(3, 2))


def a_bug() -> None:
    raise KeyError("missing")


@pytest.mark.parametrize(
    ("fail", "advice"),
    [
        (the_memory, "Make the micro-batches smaller"),
        (a_shape, "Compare the shapes"),
        (an_index, "Compare the ids and labels"),
        (a_word, "Compare the ids and labels"),
        (a_bug, "Read the traceback"),
    ],
)
def test_an_exception_is_a_finding_with_advice_and_passes_on(fail: Any, advice: str) -> None:
    bench = Bench()
    with pytest.raises(Exception) as caught:
        bench.watched(lambda bench: fail())
    (said,) = bench.said
    assert said.startswith(f"step 0: {caught.type.__name__} ended the step.")
    assert f"test_misuse.py:{fail.__code__.co_firstlineno + 1}" in said
    assert advice in " ".join(said.split())


def test_a_block_that_leaves_before_backward_is_traced() -> None:
    bench = Bench()

    def body(bench: Bench) -> None:
        loss = bench.loss() + torch.log(torch.zeros(()))
        if torch.isfinite(loss):
            loss.backward()

    found = {finding.kind: finding for finding in bench.watched(body, steps=1)}
    assert set(found) == {"no_backward", "not_finite"}
    assert not found["no_backward"].ordinary
    assert "torch.log" in found["not_finite"].cause.place.expression


def test_updates_inside_a_backward_pass_are_told_once_and_not_looked_at() -> None:
    bench = Bench()
    for weight in bench.model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: bench.optimizer.step())
    (finding,) = bench.watched(lambda bench: bench.loss().backward())
    assert (finding.kind, finding.ordinary, finding.times) == ("update_inside_backward", True, 3)


def test_hooks_are_gone_afterwards() -> None:
    bench = Bench(scaled=True)
    bench.watched(sound_scaled)
    assert not {"zero_grad", "step"} & set(vars(bench.optimizer))
    assert not {"scale", "unscale_", "step", "update"} & set(vars(bench.scaler))
    assert not bench.optimizer._optimizer_step_pre_hooks
    assert not bench.model._forward_hooks
    assert not hasattr(torch.Tensor.backward, "listeners")
