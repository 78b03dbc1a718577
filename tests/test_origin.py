"""The first place whose result or gradient is not finite: found in the forward and the backward pass, and undone."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.origin import current_line, damaged, find_origin, guilty_rows, is_finite, is_finite_in, reason
from rawloop.origin.spots import Origin

Change = Callable[[Tensor], Tensor]


class Do(nn.Module):
    """A module that does one thing."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change(hidden)


def model(change: Change = lambda hidden: hidden) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(Do(change), nn.Linear(6, 3)))


def weight_of(net: nn.Module, name: str) -> Tensor:
    return net.get_parameter(name).data


INPUTS = torch.linspace(-2, 2, 16).reshape(4, 4)
TARGETS = torch.tensor([0, 1, 2, 1])


def loss_of(net: nn.Module, inputs: Tensor = INPUTS) -> Tensor:
    return F.cross_entropy(net(inputs), TARGETS)


def origin_in(change: Change) -> Origin:
    """The origin in a model with this change in the module `1.0`."""
    net = model(change)
    found = find_origin(lambda: loss_of(net), net)
    assert found is not None
    return found


def origin_of(run: Callable[[], Tensor], net: nn.Module | None = None) -> Origin:
    found = find_origin(run, net or model())
    assert found is not None
    return found


def line_of(text: str) -> str:
    """The line of this file that contains a text, as a finding shows it."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if text in line and "line_of" not in line)
    return f"{Path(__file__).name}:{number}: {lines[number - 1].strip()}"


def test_nothing_is_found_where_all_is_finite() -> None:
    net = model()
    assert find_origin(lambda: loss_of(net), net) is None
    assert is_finite(lambda: loss_of(net), net)


# Forward


def test_an_infinity_that_vanishes_is_no_origin() -> None:
    net = model(lambda hidden: hidden.relu().log().exp().softmax(-1))
    assert find_origin(lambda: loss_of(net), net) is None


def test_an_overflow_behind_the_zero_of_a_division() -> None:
    def softmax(hidden: Tensor) -> Tensor:
        weights = (hidden * 0 + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 500.0])).exp()
        shares = weights[:, :5] / weights.sum(1, keepdim=True)
        return F.pad((shares * 1).log(), (0, 1))

    found = origin_in(softmax)
    why = reason(found)
    assert (found.phase, found.operation, found.later) == ("forward", "torch.Tensor.exp", "torch.Tensor.log")
    assert why.what.startswith("exp of 500, which is too large for float32; a division by the infinity gives 0")
    assert why.advice.startswith("Subtract the maximum")
    assert why.evidence["largest before"] == 500


def test_a_zero_of_its_own_after_an_infinity_that_is_handled() -> None:
    def change(hidden: Tensor) -> Tensor:
        handled = torch.where(hidden > 1e9, hidden, 1 / (hidden * 500).exp().exp().clamp(max=1.0))
        return (handled * 0).log()

    found = origin_in(change)
    assert (found.operation, found.later) == ("torch.Tensor.log", "")


def test_the_logarithm_is_named_and_not_what_makes_nan_of_it() -> None:
    found = origin_in(lambda hidden: hidden * hidden.relu().log() * 0)
    assert (found.operation, found.spot.module, found.kind) == ("torch.Tensor.log", "1.0", "inf")
    why = reason(found)
    assert (why.blamed, why.what) == ("code", "log of 0")
    assert "log_softmax" in why.advice


def test_the_line_of_a_loss_outside_modules() -> None:
    net = model()

    def run() -> Tensor:
        sharp = (1e4 * net(INPUTS)).softmax(-1)
        return -torch.log(sharp).mean()

    found = origin_of(run, net)
    assert (found.operation, found.spot.inside, found.spot.line) == (
        "torch.log",
        False,
        line_of("return -torch.log(sharp)"),
    )


def test_the_line_that_replaying_code_names() -> None:
    net = model()

    def run() -> Tensor:
        token = current_line.set("train.py:41: loss = torch.log(p).mean()")
        try:
            return torch.log(net(INPUTS).relu()).mean()
        finally:
            current_line.reset(token)

    assert origin_of(run, net).spot.line == "train.py:41: loss = torch.log(p).mean()"


def masked_softmax(seen: Tensor) -> Change:
    return lambda hidden: hidden.masked_fill(~seen, -math.inf).softmax(-1)


def test_an_additive_mask_is_no_origin() -> None:
    seen = torch.ones(4, 6, dtype=torch.bool).tril(2)
    found = origin_in(lambda hidden: masked_softmax(seen)(hidden).log() * 0)
    assert found.operation == "torch.Tensor.log"


def test_a_row_that_a_mask_blocks_whole() -> None:
    seen = torch.ones(4, 6, dtype=torch.bool)
    seen[2] = False
    found = origin_in(masked_softmax(seen))
    why = reason(found)
    assert (found.operation, found.blocked, why.blamed, why.index[0]) == ("torch.Tensor.softmax", True, "data", 2)
    assert "blocks every position of a row" in why.what


def test_a_mask_that_is_given_and_sliced() -> None:
    mask = torch.full((9, 9), -math.inf).triu(1)
    mask[3] = -math.inf
    net = model()
    found = find_origin(lambda: (net[0](INPUTS) + mask[:4, :6]).softmax(-1).sum(), net, {"the input 'mask'": mask})
    assert found is not None
    assert (found.operation, found.blocked) == ("torch.Tensor.softmax", True)


def test_a_target_whose_class_is_masked() -> None:
    net = model()
    blocked = torch.tensor([True, False, False])
    found = origin_of(lambda: F.cross_entropy(net(INPUTS).masked_fill(blocked, -math.inf), TARGETS), net)
    why = reason(found)
    assert found.operation == "torch.nn.functional.cross_entropy"
    assert "scores a target whose class a mask blocks" in why.what


def test_an_input_with_infinities_is_no_mask() -> None:
    silence = INPUTS.clone()
    silence[1] = -math.inf
    net = model()
    found = find_origin(lambda: loss_of(net, silence), net, {"the input 'x'": silence})
    assert found is not None
    assert found.given == "the input 'x'"


def test_writing_in_place() -> None:
    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[1].mul_(2).div_(0)
        return hidden

    assert origin_in(change).operation == "torch.Tensor.div_"


def test_numbers_that_are_written_over_are_no_origin() -> None:
    def change(hidden: Tensor) -> Tensor:
        logs = hidden.detach().relu().log()
        logs[logs == -math.inf] = 0.0
        return hidden / (hidden.detach() - hidden.detach()) + logs

    assert origin_in(change).operation == "torch.Tensor.div"


def test_a_mean_without_targets() -> None:
    net = model()

    def run() -> Tensor:
        losses, mask = F.cross_entropy(net(INPUTS), TARGETS, reduction="none"), torch.zeros(4)
        return (losses * mask).sum() / mask.sum()

    why = reason(origin_of(run, net))
    assert why.blamed == "data"
    assert why.what.startswith("0 is divided by 0: nothing was counted")


def test_a_cross_entropy_without_targets() -> None:
    net = model()
    why = reason(origin_of(lambda: F.cross_entropy(net(INPUTS), torch.full((4,), -100)), net))
    assert (why.blamed, why.what) == ("data", "cross_entropy has no target: each one is ignored")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda hidden: (hidden * 1e4).exp(), "exp of "),
        (lambda hidden: (hidden - 100).sqrt(), "sqrt of -"),
        (lambda hidden: hidden / (hidden - hidden.detach()), " is divided by 0"),
        (lambda hidden: 1 / (hidden - hidden.detach()), "1 is divided by 0"),
        (lambda hidden: hidden[:0].mean() + hidden, "mean of no number"),
        (lambda hidden: hidden[:1, 0].std() + hidden, "std of a single number"),
    ],
)
def test_why_in_words(change: Change, what: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "std.*degrees of freedom")
        why = reason(origin_in(change))
    assert what in why.what
    assert why.advice


# Range


def test_a_dtype_with_too_little_range() -> None:
    net = model()
    weight_of(net, "0.weight").mul_(1e5)
    with torch.autocast("cpu", dtype=torch.float16):  # as a loop that traces inside its own context
        found = origin_of(lambda: loss_of(net), net)
        assert torch.is_autocast_enabled("cpu")
        why = reason(found)
    assert (found.operation, found.spot.module, found.dtype) == (
        "torch.nn.functional.linear",
        "0",
        torch.float16,
    )
    assert why.blamed == "precision"
    assert float(why.evidence["in float32"]) > 65504
    assert why.evidence["limit"] == 65504
    assert why.parameter == "0.weight"


def test_head_room_in_bits() -> None:
    net = model(lambda hidden: hidden.new_full((4, 6), 2.0**15, dtype=torch.float16).mul(4) + hidden)
    why = reason(origin_of(lambda: loss_of(net), net))
    assert why.evidence["head room in bits"] == pytest.approx(1.0, abs=0.01)


def test_the_pass_in_a_wider_dtype() -> None:
    """A number that float16 flushes to zero is one in float32."""
    net = model(lambda hidden: (hidden.half() * 0 + 1e-6).mul(1e-4).log().float())
    assert origin_of(lambda: loss_of(net), net).operation == "torch.Tensor.log"
    assert is_finite_in(lambda: loss_of(net), net, torch.float32)
    assert not is_finite_in(lambda: loss_of(model(lambda hidden: (hidden * 0).log())), net, torch.float32)


def test_weights_that_are_absurd_are_named() -> None:
    net = model()
    weight_of(net, "1.1.weight").mul_(1e38)
    why = reason(origin_of(lambda: loss_of(net, INPUTS * 100), net))
    assert (why.blamed, why.parameter) == ("code", "1.1.weight")


# Backward


class Divides(torch.autograd.Function):
    """The identity, whose backward pass divides by zero."""

    @staticmethod
    def forward(ctx: object, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] / 0


def zeros(hidden: Tensor) -> Tensor:
    return hidden - hidden.detach()


@pytest.mark.parametrize(
    ("change", "operation", "value"),
    [
        (lambda hidden: zeros(hidden).abs().sqrt(), "sqrt", 0),
        (lambda hidden: hidden + (hidden * 0).abs().sqrt(), "sqrt", 0),
        (lambda hidden: zeros(hidden).pow(0.5), "pow", 0),
        (lambda hidden: hidden / zeros(hidden).norm(dim=-1, keepdim=True).clamp(min=1e-12), "", None),
        (lambda hidden: torch.where(zeros(hidden) > 0, zeros(hidden).log(), hidden), "log", 0),
        (lambda hidden: torch.acos(zeros(hidden) + 1), "acos", 1),
        (lambda hidden: (hidden * 0).std(-1, keepdim=True) + hidden, "", None),
        (Divides.apply, "DividesBackward", None),
    ],
)
def test_the_operation_whose_backward_pass_it_is(change: Change, operation: str, value: float | None) -> None:
    net = model(change)
    found = find_origin(lambda: loss_of(net), net)
    if not operation:  # torch defines these derivatives as zero
        assert found is None
        return
    assert found is not None
    assert (found.phase, found.operation, found.spot.module) == ("backward", operation, "1.0")
    why = reason(found)
    assert why.advice
    assert value is None or why.evidence["input"] == value


def test_anomaly_mode_names_the_operation_after_it() -> None:
    """The square root makes infinity; anomaly mode looks for NaN only, which the next node makes of it."""
    net = model(lambda hidden: hidden + (hidden * 0).abs().sqrt())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            loss = loss_of(net)
            with pytest.raises(RuntimeError, match="AbsBackward0"):
                torch.autograd.backward(loss)
    assert origin_of(lambda: loss_of(net), net).operation == "sqrt"


def test_the_line_of_a_gradient_outside_modules() -> None:
    net = model()

    def run() -> Tensor:
        distance = zeros(net(INPUTS)).square().sum().sqrt()
        return distance

    found = origin_of(run, net)
    assert (found.operation, found.spot.line) == ("sqrt", line_of("distance = zeros("))


def test_a_gradient_that_is_too_large_for_its_dtype() -> None:
    net = model(lambda hidden: hidden.half().mul(16).float())

    def run() -> Tensor:
        return loss_of(net) * 2.0**16

    found = origin_of(run, net)
    why = reason(found)
    assert (found.phase, found.spot.module, found.dtype) == ("backward", "1.0", torch.float16)
    assert why.blamed == "precision"
    assert is_finite(run, net, scale=2.0**-16)


def test_gradients_whose_sum_is_not_finite() -> None:
    """Each use of a tied weight has a finite gradient."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    net = nn.ParameterList([weight])
    found = origin_of(lambda: torch.stack([(weight * 60000).float().mean() for _ in range(3)]).sum(), net)
    assert (found.phase, found.parameter) == ("backward", "0")
    assert reason(found).blamed == "precision"


def test_a_hook_that_spoils_a_finite_gradient() -> None:
    net = model()
    weight = net.get_parameter("0.weight")
    weight.register_hook(lambda gradient: gradient / 0)  # type: ignore[no-untyped-call]
    found = origin_of(lambda: loss_of(net), net)
    why = reason(found)
    assert (found.phase, found.parameter, why.blamed) == ("backward", "0.weight", "optimizer")
    assert "test_origin.py" in why.what
    assert "lambda" in why.what


def test_a_hook_on_a_tensor_within_the_pass() -> None:
    def spoil(hidden: Tensor) -> Tensor:
        between = hidden * 1
        between.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
        return between

    found = origin_in(spoil)
    assert (found.phase, found.spot.module, reason(found).blamed) == ("backward", "1.0", "optimizer")


def test_an_overflow_that_a_division_hides_until_backward() -> None:
    """The square of a number too large for float32, under a root whose inverse is 0, as in an RMS norm."""

    def norm(hidden: Tensor) -> Tensor:
        large = hidden * 0 + 2e38
        return large * large.pow(2).mean(-1, keepdim=True).rsqrt()

    found = origin_in(norm)
    why = reason(found)
    assert (found.phase, found.operation) == ("backward", "torch.Tensor.pow") or found.operation == "pow"
    assert "too large for float32" in why.what
    assert why.advice.startswith("Scale its input down")
    assert "below 1 at 0" in reason(origin_in(lambda hidden: zeros(hidden).pow(0.5))).advice


def test_gradients_that_are_discarded_are_no_origin() -> None:
    net = model(lambda hidden: hidden + zeros(hidden).abs().sqrt().nan_to_num().detach())
    assert find_origin(lambda: loss_of(net), net) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_modules(reentrant: bool) -> None:
    def change(hidden: Tensor) -> Tensor:
        found = checkpoint(inner, hidden, use_reentrant=reentrant)
        assert isinstance(found, Tensor)
        return found

    inner = Do(lambda hidden: hidden + (hidden * 0).abs().sqrt())
    net = model(change)
    net.get_submodule("1.0").add_module("inner", inner)
    found = origin_of(lambda: loss_of(net), net)
    assert (found.phase, found.operation, found.spot.module) == ("backward", "sqrt", "1.0.inner")
    assert all(weight.grad is None for weight in net.parameters())


# Models


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_transformer_with_padding_is_finite_and_an_overflow_is_named(attention: str) -> None:
    net = llama()
    net.set_attn_implementation(attention)
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = net(input_ids=ids, attention_mask=mask, labels=ids).loss
        assert isinstance(loss, Tensor)
        return loss

    assert find_origin(run, net) is None
    net.model.layers[1].mlp.down_proj.weight.data.mul_(1e9)
    found = origin_of(run, net)
    assert (found.phase, found.operation, found.spot.module) == (
        "forward",
        "torch.nn.functional.linear",
        "model.layers.1.mlp.down_proj",
    )


def test_a_compiled_model_is_traced_without_its_graph() -> None:
    net = model(lambda hidden: hidden.relu().log())
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(INPUTS)
    assert origin_of(lambda: loss_of(compiled), net).spot.module == "1.0"  # type: ignore[arg-type]


# Undone


def test_nothing_changes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Do(lambda h: h + (h * 0).abs().sqrt()))
    net[2].eval()
    outside = nn.Parameter(torch.ones(()))
    for weight in (*net.parameters(), outside):
        weight.grad = torch.ones_like(weight)
    kept = [(weight.grad, weight.grad.clone()) for weight in (*net.parameters(), outside) if weight.grad is not None]
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()]
    modes, stream = [m.training for m in net.modules()], torch.get_rng_state()
    assert origin_of(lambda: (net(INPUTS) * outside).sum(), net).operation == "sqrt"
    assert all(
        weight.grad is grad and torch.equal(grad, value)
        for weight, (grad, value) in zip((*net.parameters(), outside), kept, strict=True)
    )
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.named_buffers())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()]
    assert modes == [m.training for m in net.modules()]
    assert torch.equal(stream, torch.get_rng_state())


def test_asking_why_draws_no_random_numbers() -> None:
    net, inputs = nn.Sequential(nn.Dropout(0.5)), torch.full((64,), 60000.0, dtype=torch.float16)
    before = torch.get_rng_state()
    origin = find_origin(lambda: net(inputs).sum(), net)
    assert origin is not None
    assert "dropout" in origin.operation
    assert reason(origin).blamed == "precision"  # it was run again in float32
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_go_when_the_pass_raises() -> None:
    def change(hidden: Tensor) -> Tensor:
        raise KeyError("lost")

    net = model(change)
    with pytest.raises(KeyError, match="lost"):
        find_origin(lambda: loss_of(net), net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# Weights and rows


def test_damaged_weights_and_masks_in_buffers() -> None:
    net = model()
    net.register_buffer("mask", torch.full((3,), -math.inf))
    assert damaged(net) is None
    weight_of(net, "1.1.weight")[2, 3] = math.nan
    found = damaged(net)
    assert found is not None
    assert (found.kind, found.name, found.wrong, found.first) == ("weight", "1.1.weight", 1, (2, 3))
    weight_of(net, "1.1.weight")[2, 3] = 0
    net.register_buffer("scale", torch.tensor([1.0, math.inf]))
    found = damaged(net)
    assert found is not None
    assert (found.kind, found.name, found.first) == ("buffer", "scale", (1,))


def rows_of(guilty: set[int], size: int, together: int = 0) -> tuple[object, ...]:
    """What is found if these rows are guilty, or as many different ones together."""

    def finite(rows: Sequence[int]) -> bool:
        assert len(rows) == size
        return not (guilty & set(rows)) and len(set(rows)) != together

    found = guilty_rows(size, finite)
    return found.guilty, found.complete, found.runs


def test_rows_by_halves() -> None:
    assert rows_of({5}, 8) == ([5], True, 6)
    assert rows_of({1, 6}, 8)[:2] == ([1, 6], True)
    assert rows_of(set(), 8, together=8) == ([], True, 2)
    assert rows_of(set(range(64)), 64) == (list(range(8)), False, 17)
    assert rows_of({0}, 1) == ([], False, 0)
    assert rows_of(set(range(0, 128, 2)), 128)[2] == 64
