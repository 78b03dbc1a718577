"""What the tracer says of a step that is not finite: whose fault, where, which sample, and what to do."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawloop.dist import World
from rawloop.seed import capture_rng
from rawloop.watch.findings import Finding
from rawloop.watch.pass_tracer import PassTracer
from rawloop.watch.subject import Pass, StepRecord, Subject
from rawloop.watch.tracer import trace

Forward = Callable[[Any, dict[str, Tensor]], Tensor]
IDS = ("a", "b", "c", "d")


class Do(nn.Module):
    """A module that does one thing."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change(hidden)


class Net(nn.Module):
    """Features, (batch, time, 2), to the logits of 3 classes."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.tail, self.head = nn.Linear(2, 4), Do(change), nn.Linear(4, 3)

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.tail(self.body(features))))


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"features": torch.randn(4, 5, 2), "targets": torch.arange(20).reshape(4, 5) % 3}


def cross_entropy(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(net(inputs["features"]).flatten(0, 1).float(), inputs["targets"].flatten())


def subject(net: nn.Module, scaler: Any = None, world: World | None = None) -> Subject:
    return Subject(net, [], scaler, lambda: list(net.named_parameters()), world or World())


def a_pass(net: nn.Module, forward: Forward, inputs: dict[str, Tensor], scale: float, ids: Sequence[str]) -> Pass:
    return Pass(inputs, lambda given: forward(net, given) * scale, capture_rng(), tuple(ids), scale)


def found(
    net: nn.Module,
    forward: Forward = cross_entropy,
    inputs: dict[str, Tensor] | None = None,
    *,
    scale: float = 1.0,
    scaler: Any = None,
    ids: Sequence[str] = IDS,
    loss: float | None = None,
) -> Finding:
    """The finding about a step with one pass."""
    one = a_pass(net, forward, inputs or batch(), scale, ids)
    record = StepRecord(3, ids=tuple(ids), passes=[one], scale=scale, loss=loss)
    (finding,) = trace(subject(net, scaler), record)
    return finding


def test_a_weight_that_is_damaged() -> None:
    net = Net()
    net.head.weight.data[1, 2] = math.inf
    finding = found(net)
    assert finding.kind == "not_finite"
    assert (finding.cause.whose, finding.cause.place.parameter) == ("optimizer", "head.weight")
    assert finding.cause.evidence == {"not finite": "1 of 12", "first index": "[1, 2]"}


def test_an_input_that_is_nan() -> None:
    inputs = batch()
    inputs["features"][2, 3, 1] = math.nan
    cause = found(Net(), inputs=inputs).cause
    place = cause.place
    assert (cause.whose, place.tensor, place.sample, place.row, place.position) == ("data", "features", "c", 2, 3)
    assert cause.evidence == {"not finite": "1 of 40", "samples": 1}


def test_the_logarithm_of_silence_in_an_input() -> None:
    inputs = batch()
    inputs["features"][1] = -math.inf
    cause = found(Net(), inputs=inputs).cause
    assert (cause.whose, cause.place.tensor, cause.place.sample) == ("data", "features", "b")


def test_a_module_whose_sample_does_it_alone() -> None:
    inputs = batch()
    inputs["features"][1, 4] = 50
    net = Net(lambda hidden: (100 - hidden.sum(-1, keepdim=True)).clamp(min=0).log() + hidden)
    nn.init.ones_(net.body.weight)
    finding = found(net, inputs=inputs)
    cause, place = finding.cause, finding.cause.place
    assert finding.what == "the loss is not finite"
    assert (cause.whose, place.phase, place.module) == ("model", "forward", "tail")
    assert (place.sample, place.row, place.position) == ("b", 1, 4)
    assert "log of 0; the sample b alone causes it" in cause.what
    assert "clamp" in cause.advice.lower()


def test_a_line_of_the_loss() -> None:
    def forward(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        chances = (1e4 * net(inputs["features"])).softmax(-1)
        return -torch.log(chances).mean()

    cause = found(Net(), forward).cause
    assert (cause.whose, cause.place.module, cause.place.row) == ("loss", "", None)
    assert cause.place.expression.startswith("test_tracer.py:")
    assert cause.place.expression.endswith(": return -torch.log(chances).mean()")
    assert "every sample causes it alone" in cause.what


def test_a_row_that_a_mask_blocks_whole() -> None:
    inputs = {**batch(), "mask": torch.ones(4, 5)}
    inputs["mask"][3] = 0

    def forward(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        hidden = net(inputs["features"])
        seen = torch.zeros(4, 1, 5).masked_fill(inputs["mask"][:, None] == 0, -math.inf)
        return ((hidden @ hidden.mT + seen).softmax(-1) @ hidden).square().mean()

    cause = found(Net(), forward, inputs).cause
    assert (cause.whose, cause.place.sample, cause.place.row, cause.place.position) == ("data", "d", 3, 0)
    assert "a mask blocks every position of a row" in cause.what


def test_a_batch_without_targets() -> None:
    def forward(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        losses = F.cross_entropy(net(inputs["features"]).flatten(0, 1), inputs["targets"].flatten(), reduction="none")
        mask = torch.zeros_like(losses)
        return (losses * mask).sum() / mask.sum()

    cause = found(Net(), forward).cause
    assert cause.whose == "data"
    assert "nothing was counted" in cause.what
    assert cause.place.expression.endswith("return (losses * mask).sum() / mask.sum()")


def test_samples_that_do_it_only_together() -> None:
    def forward(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        means = net(inputs["features"]).mean((1, 2)).tolist()
        return cross_entropy(net, inputs) / (4 - len(set(means)))

    cause = found(Net(), forward).cause
    assert "no sample alone causes it, only together" in cause.what
    assert cause.place.row is None


def test_a_sample_far_outside_and_a_dtype_too_small_for_it() -> None:
    inputs = batch()
    inputs["features"][2, 1] = 1e6

    def forward(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return cross_entropy(net, inputs)

    data, precision = found(Net(), forward, inputs).causes
    assert (data.whose, data.place.tensor, data.place.sample) == ("data", "features", "c")
    assert data.evidence["largest"] == 1e6
    assert (precision.whose, precision.place.module, precision.place.sample) == ("precision", "body", "c")
    assert precision.place.position == 1
    assert precision.evidence["limit"] == 65504


def test_a_number_that_float16_flushes_to_zero() -> None:
    net = Net(lambda hidden: (hidden.half() * 0 + 1e-5).mul(1e-4).log().float())
    precision, model = found(net).causes
    assert (precision.whose, model.whose) == ("precision", "model")
    assert "in float32 the same pass is finite" in precision.what


def half(hidden: Tensor) -> Tensor:
    return hidden.half().mul(16).float()


class Scaler:
    """A loss scaler, as torch's."""

    def get_scale(self) -> float:
        return 2.0**20


def test_a_scale_that_is_too_high_is_ordinary_for_a_scaler() -> None:
    finding = found(Net(half), scale=2.0**20, scaler=Scaler())
    best = float(finding.cause.evidence["largest finite scale"])
    assert (finding.what, finding.cause.whose, finding.ordinary) == ("the gradients are not finite", "precision", True)
    assert (finding.cause.place.phase, finding.cause.place.module) == ("backward", "tail")
    for scale, finite in ((best, True), (2 * best, False)):
        net = Net(half)
        torch.autograd.backward(cross_entropy(net, batch()) * scale)
        assert finite == all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_a_scale_that_nobody_lowers_is_an_alarm() -> None:
    finding = found(Net(half), scale=2.0**20)
    assert not finding.ordinary
    assert "the loss scale 1.04858e+06 is too high" in finding.cause.what


def test_a_loss_in_float16_that_its_scale_overflows() -> None:
    finding = found(Net(), lambda net, inputs: cross_entropy(net, inputs).half(), scale=2.0**17, scaler=Scaler())
    assert (finding.cause.whose, finding.ordinary) == ("precision", True)
    assert finding.cause.evidence["largest finite scale"] == 2.0**15


def test_a_gradient_that_no_scale_mends_is_no_matter_of_scale() -> None:
    finding = found(Net(lambda hidden: hidden + (hidden * 0).abs().sqrt()), scale=2.0**16, scaler=Scaler())
    cause = finding.cause
    assert (cause.whose, cause.place.phase, cause.place.module, finding.ordinary) == (
        "model",
        "backward",
        "tail",
        False,
    )
    assert cause.evidence["input"] == 0
    assert "derivative of a square root at 0" in cause.advice


def test_a_backward_pass_whose_sample_does_it_alone() -> None:
    inputs = batch()
    inputs["features"][1, 2] = 0
    net = Net(lambda hidden: hidden + hidden.square().sum(-1, keepdim=True).sqrt())
    nn.init.zeros_(net.body.bias)
    place = found(net, inputs=inputs).cause.place
    assert (place.phase, place.module, place.sample, place.position) == ("backward", "tail", "b", 2)


def test_the_pass_of_a_window() -> None:
    net, bad = Net(), batch()
    bad["features"][0, 0, 0] = math.nan
    passes = [a_pass(net, cross_entropy, one, 1.0, IDS) for one in (batch(), bad, batch())]
    (finding,) = trace(subject(net), StepRecord(3, passes=passes))
    assert finding.cause.evidence["pass"] == "2 of 3"


def test_gradients_of_passes_whose_sum_overflows() -> None:
    net = Net().half()

    def forward(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        return net(inputs["features"].half()).float()[..., 0].sum() * 1500

    passes = [a_pass(net, forward, batch(), 1.0, IDS) for _ in range(3)]
    (finding,) = trace(subject(net), StepRecord(3, passes=passes))
    assert (finding.cause.whose, finding.cause.place.parameter) == ("precision", "head.bias")
    assert "over 3 passes is not" in finding.cause.what
    assert finding.cause.evidence["largest of one pass"] == 30000


def test_numbers_from_another_rank() -> None:
    net = Net()
    net.body.weight.grad = torch.full_like(net.body.weight, math.nan)
    record = StepRecord(3, passes=[a_pass(net, cross_entropy, batch(), 1.0, IDS)], loss=1.0)
    (finding,) = trace(subject(net, world=World(1, 4)), record)
    assert (finding.cause.whose, finding.cause.place.rank, finding.rank) == ("distributed", 1, 1)
    assert "come from another rank" in finding.cause.what


def test_what_does_not_happen_again_has_no_invented_cause() -> None:
    finding = found(Net(), loss=math.nan)
    assert finding.cause.whose == "not known"
    assert "finite when it runs again" in finding.cause.what


def test_a_gradient_that_is_changed_after_backward() -> None:
    net = Net()
    net.head.bias.grad = torch.full_like(net.head.bias, math.nan)
    finding = found(net, loss=1.0)
    assert (finding.cause.whose, finding.cause.place.parameter) == ("not known", "head.bias")
    assert "it was changed afterwards" in finding.cause.what
    assert "were zeroed" in finding.cause.advice
    finding = found(net, lambda net, inputs: cross_entropy(net, inputs) * 0, loss=1.0)
    assert finding.cause.whose == "optimizer"
    assert finding.cause.what.endswith("and it is zero before, as in a division by its norm")
    net.head.bias.register_post_accumulate_grad_hook(lambda weight: None)  # type: ignore[no-untyped-call]
    assert "by a hook that runs after accumulation" in found(net, loss=1.0).cause.what


def test_finite_gradients_whose_norm_overflows() -> None:
    net = Net()
    net.head.bias.grad = torch.full_like(net.head.bias, 1e25)
    finding = found(net, loss=1.0)
    assert finding.what == "the norm of the gradients is not finite"
    assert (finding.cause.whose, finding.cause.place.parameter) == ("loss", "head.bias")
    assert "squares of numbers like 1e+25 overflow float32" in finding.cause.what


def test_random_streams_are_those_of_the_pass() -> None:
    torch.manual_seed(5)
    stream = capture_rng()
    rare = torch.rand(20, 4)
    torch.manual_seed(7)

    def change(hidden: Tensor) -> Tensor:
        return hidden / (torch.rand(20, 4) - rare).reshape(4, 5, 4)

    net = Net(change)
    one = Pass(batch(), lambda inputs: cross_entropy(net, inputs), stream, IDS)
    (finding,) = trace(subject(net), StepRecord(0, passes=[one]))
    assert finding.cause.place.module == "tail"


def test_a_pass_that_cannot_run_again() -> None:
    def forward(net: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        raise KeyError("the file is gone")

    inputs = batch()
    finding = found(Net(), forward, inputs)
    assert finding.cause.whose == "not known"
    assert "pass 1 cannot run again: KeyError: 'the file is gone'" in finding.cause.what
    inputs["features"][2, 1] = math.nan
    data, unknown = found(Net(), forward, inputs).causes
    assert (data.whose, data.place.sample, unknown.whose) == ("data", "c", "not known")


def test_a_step_without_passes() -> None:
    (finding,) = trace(subject(Net()), StepRecord(0))
    assert finding.cause.whose == "not known"


def test_samples_without_names_and_flat_targets() -> None:
    inputs = batch()
    inputs = {"features": inputs["features"], "targets": inputs["targets"].flatten()}
    inputs["features"][3, 0] = 1e30
    net = Net(lambda hidden: hidden.pow(2))
    data, model = found(net, inputs=inputs, ids=()).causes
    assert (data.place.row, data.place.sample) == (3, "")
    assert (model.whose, model.place.module, model.place.row) == ("model", "tail", 3)


def test_nothing_changes() -> None:
    net = Net(lambda hidden: hidden.relu().log())
    drop = nn.Dropout(0.5)
    norm = nn.BatchNorm1d(5)
    net.tail = nn.Sequential(norm, drop, net.tail)  # type: ignore[assignment]
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    inputs, grads = batch(), [weight.grad for weight in net.parameters()]
    stream = torch.get_rng_state()
    found(net, inputs=inputs)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(stream, torch.get_rng_state())
    assert all(weight.grad is grad for weight, grad in zip(net.parameters(), grads, strict=True))
    assert all(bool((weight.grad == 1).all()) for weight in net.parameters() if weight.grad is not None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(module.training for module in net.modules())


def test_the_samples_are_those_of_the_batch_and_not_the_rows_of_a_table() -> None:
    net = Net()
    inputs = batch()
    rows = len(next(iter(inputs.values())))
    record = StepRecord(0, inputs)
    tables = {name: torch.zeros(rows + 2) for name in "abc"}
    one = Pass({**inputs, **tables}, lambda given: cross_entropy(net, given), {})
    assert PassTracer(subject(net), record, 0, one).size == rows
