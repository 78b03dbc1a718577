"""A pass of somebody's loop runs again from its tape, bit for bit."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.buffers import untouched
from rawloop.errors import RawloopError
from rawloop.pack import pack, read_state, write_packed
from rawloop.seed import restore_rng
from rawloop.watch.tape_state import tape_from_state, tape_state
from rawloop.watch.watch import Watch

F: Any = torch.nn.functional
VOCAB, ROWS, LENGTH = 13, 4, 6
Loop = Callable[[Any, "Tiny", Any], None]


class Tiny(nn.Module):
    """Embedding, dropout, batch norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(VOCAB, 8), nn.Dropout(0.3)
        self.norm, self.inner, self.head = nn.BatchNorm1d(LENGTH), nn.Linear(8, 8), nn.Linear(8, VOCAB)
        self.register_buffer("bias", torch.ones(8))

    def forward(self, ids: Tensor, again: bool = False) -> Any:
        hidden = self.norm(self.drop(self.embed(ids))) + self.bias
        hidden = checkpoint(self.inner, hidden, use_reentrant=False) if again else self.inner(hidden)
        return self.head(self.drop(hidden))


def batch() -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    return {"ids": ids, "labels": ids.clone(), "weights": torch.rand(ROWS, LENGTH)}


def cross_entropy(watch: Any, model: Any, b: Any) -> None:
    nn.CrossEntropyLoss(label_smoothing=0.1)(model(b["ids"]).flatten(0, 1), b["labels"].flatten()).backward()


def views_and_masks(watch: Any, model: Any, b: Any) -> None:
    logits = model(b["ids"])
    nats = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), b["labels"][:, 1:].reshape(-1), reduction="none")
    mask = (b["labels"][:, 1:] != 3).view(ROWS * (LENGTH - 1)).float()
    ((nats * mask * b["weights"][:, 1:].flatten()).sum() / mask.sum().clamp(min=1)).backward()


def a_formula(watch: Any, model: Any, b: Any) -> None:
    p = model(b["ids"]).softmax(-1)
    chosen = p[torch.arange(ROWS)[:, None], torch.arange(LENGTH), b["labels"]]
    noise = torch.randn(ROWS, LENGTH)
    loss = -(torch.log(chosen + 1e-6) * (1 + 0.1 * noise)).mean() + 0.01 * sum(
        w.square().sum() for w in model.parameters()
    )
    loss.backward()


def in_place(watch: Any, model: Any, b: Any) -> None:
    b["labels"][b["ids"] == 2] = -100
    logits = model(b["ids"])
    logits[:, 0] = 0.0
    logits *= 0.5
    logits.clamp_(-3, 3)
    loss = F.cross_entropy(logits.view(-1, VOCAB), b["labels"].view(-1))
    loss += 0.1
    with torch.no_grad():
        factor = F.dropout(torch.ones(3), 0.5).mean() + 1
    (loss * factor * factor.item()).backward()


def autocast(watch: Any, model: Any, b: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(b["ids"])
        with torch.autocast("cpu", enabled=False):
            first = F.cross_entropy(logits.float().flatten(0, 1), b["labels"].flatten())
        second = (logits[:, 0] @ logits[:, 1].T).mean()
    with torch.autocast("cpu", torch.bfloat16):
        third = model(b["ids"].flip(0)).mean()
    (first + second.float() + third.float()).backward()


def two_calls(watch: Any, model: Any, b: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        one, two = model(b["ids"]).mean(1), model(b["ids"].flip(1)).mean(1)
    scores = F.normalize(one.float()) @ F.normalize(two.float()).T
    F.cross_entropy(scores / 0.07, torch.arange(ROWS)).backward()


def accumulation(watch: Any, model: Any, b: Any) -> None:
    for half in (slice(0, 2), slice(2, 4)):
        loss = F.cross_entropy(model(b["ids"][half]).flatten(0, 1), b["labels"][half].flatten()) / 2
        random.random()
        loss.backward()


def retained(watch: Any, model: Any, b: Any) -> None:
    logits = model(b["ids"])
    logits.mean().backward(retain_graph=True)
    logits.square().mean().backward()


def checkpointing(watch: Any, model: Any, b: Any) -> None:
    F.cross_entropy(model(b["ids"], again=True).flatten(0, 1), b["labels"].flatten()).backward()


def parts(watch: Any, model: Any, b: Any) -> None:
    hidden = model.drop(model.embed(b["ids"]))
    torch.autograd.backward([model.head(hidden)], [torch.full((ROWS, LENGTH, VOCAB), 0.1)])


def validated(watch: Any, model: Any, b: Any) -> None:
    chosen = torch.distributions.Categorical(logits=model(b["ids"]), validate_args=True)
    chosen.log_prob(b["labels"].clamp(min=0)).mean().neg().backward()  # type: ignore[no-untyped-call]


def evaluation_between(watch: Any, model: Any, b: Any) -> None:
    model.norm = nn.Identity()  # the running means of BatchNorm have moved when the pass runs again
    model.eval()
    with torch.no_grad():
        teacher = model(b["ids"]).softmax(-1)
    model.train()
    F.kl_div(model(b["ids"]).log_softmax(-1), teacher, reduction="batchmean").backward()


def hooked(watch: Any, model: Any, b: Any) -> None:
    logits = model(b["ids"])
    logits.register_hook(lambda grad: grad * 0.5)
    logits.mean().backward()


LOOPS = [
    cross_entropy,
    views_and_masks,
    a_formula,
    in_place,
    autocast,
    two_calls,
    accumulation,
    retained,
    checkpointing,
    parts,
    validated,
    evaluation_between,
    hooked,
]


def run(model: nn.Module, loop: Any, b: Any, scaler: Any = None) -> tuple[list[Tensor], list[Tensor], Any]:
    """Run a loop's step under watch. Return its gradients, and the gradients after each pass ran again, added up."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, scaler, detectors=[]) as watch:
        with watch.step(b):
            loop(watch, model, b)
            scale = scaler.get_scale() if scaler else 1.0
            grads = [w.grad.clone() for w in model.parameters() if w.grad is not None]
            watch._before()
        record = watch.record
        assert record.why_no_passes == ""
        with untouched(model):
            for one in record.passes:
                restore_rng(one.rng)
                torch.autograd.backward(one.forward(one.inputs))
            again = [w.grad for w in model.parameters() if w.grad is not None]
        assert all(one.scale == scale for one in record.passes)
        watch.record.applied = None
    return grads, again, record


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_passes_run_again_bit_for_bit(loop: Any) -> None:
    grads, again, record = run(Tiny(), loop, batch())
    assert len(record.passes) == (2 if loop in (accumulation, retained) else 1)
    assert equal(grads, again)


@pytest.mark.parametrize("loop", [*LOOPS[:-1]], ids=lambda loop: loop.__name__)
def test_a_stored_tape_gives_the_same_gradients(loop: Any, tmp_path: Path) -> None:
    model = Tiny()
    grads, _, record = run(model, loop, batch())
    tape = record.passes[0].forward.tape
    write_packed(pack(tape_state(tape)), tmp_path, "tape")
    again = tape_from_state(read_state(tmp_path, "tape"), model)
    with untouched(model):
        for replay in again.replays:
            restore_rng(replay.rng)
            torch.autograd.backward(replay(replay.inputs))
        found = [w.grad for w in model.parameters() if w.grad is not None]
    assert equal(grads, found)
    assert str(again.replays[0].line) == str(tape.replays[0].line)


def test_what_cannot_be_stored_is_refused_with_its_line() -> None:
    _, _, record = run(Tiny(), hooked, batch())
    with pytest.raises(
        RawloopError, match=r"register_hook\(lambda grad: grad \* 0.5\) has an argument of type function"
    ):
        tape_state(record.passes[0].forward.tape)


def test_no_other_function_is_looked_up() -> None:
    _, _, record = run(Tiny(), two_calls, batch())
    state = tape_state(record.passes[0].forward.tape)
    for name in ("os.system", "torch._from_blob", "torch.from_file", "torch._index_put_impl_", "torch.__class__"):
        state["entries"][-1]["function"] = name
        with pytest.raises(RawloopError, match=f"calls '{name}', which this torch"):
            tape_from_state(state, Tiny())


def language_model(lora: bool) -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=0.1,
    )
    model = LlamaForCausalLM(config).train()
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj"])) if lora else model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT, with transformers 5
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_transformers_model_with_its_own_loss_runs_again(lora: bool, scaled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7) if scaled else None

    def loop(watch: Any, model: Any, b: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
            loss = model(input_ids=b["ids"], labels=b["labels"]).loss
        (scaler.scale(loss) if scaler else loss).backward()

    grads, again, record = run(language_model(lora), loop, batch(), scaler)
    assert equal(grads, again)
    assert "model(input_ids=" in str(record.passes[0].forward.line) or scaled


def unseen_code(watch: Any, model: Any, b: Any) -> None:
    logits = model(b["ids"])
    with torch._C.DisableTorchFunction():
        twice = logits * 2
    twice.mean().backward()


def changed_input(watch: Any, model: Any, b: Any) -> None:
    model(b["ids"]).mean().backward()
    b["ids"] += 1


def changed_weight(watch: Any, model: Any, b: Any) -> None:
    loss = model(b["ids"]).mean()
    with torch.no_grad():
        model.head.bias += 1
    loss.backward()


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (unseen_code, "comes from code that is not seen|has got another gradient"),
        (changed_input, "the tensor 'ids' was changed in place after it was used"),
        (changed_weight, r"model.head.bias \+= 1 writes to the weight head.bias"),
    ],
)
def test_a_pass_that_cannot_run_again_says_why(loop: Any, reason: str) -> None:
    model, b = Tiny(), batch()
    with Watch(model, torch.optim.SGD(model.parameters(), 0.1), detectors=[]) as watch, watch.step(b):
        loop(watch, model, b)
        watch._before()
        assert watch.record.passes == []
        assert re.search(reason, watch.record.why_no_passes)
