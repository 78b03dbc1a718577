"""The loss in chunks: that of the full logits, with its gradients, in a fraction of the memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.contracts import IGNORE, Batch, Labels
from rawloop.dist import World
from rawloop.families import ModelConfig, head
from rawloop.families.shared import TextFamily
from rawloop.losses import LossModule
from rawloop.settings import DDPConfig
from rawloop.sharding import shard, whole
from rawloop.watch.look import ModuleHooks
from rawloop.watch.measure import Readings

TINY: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0, "tie_word_embeddings": False},
    "Cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "GPTNeoX": {},
}
MODES = {"fp32": None, "bf16": torch.bfloat16, "fp16": None}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config)


def text_family() -> TextFamily:
    family = TextFamily(ModelConfig())
    family.vocabulary = TINY["vocab_size"]
    return family


def random_batch(rows: int = 4, length: int = 100) -> Batch:
    ids = torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :7] = IGNORE
    shifted = Labels.shifted(labels)
    return Batch({"input_ids": ids}, {"text": shifted}, {"text": len(shifted.targets)}, ["r"] * rows)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 50 targets at least, however small the vocabulary is."""
    monkeypatch.setattr(head, "WHOLE", 0)
    monkeypatch.setattr(head, "FEWEST", 50)


def gradients(family: TextFamily, model: nn.Module, batch: Batch, mode: str, scale: float = 1.0) -> dict[str, Tensor]:
    """Return the loss of a batch, and the gradient of each trained weight."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=MODES[mode], enabled=MODES[mode] is not None):
        loss = family.losses(model, batch)["text"]
    (loss.total * (scale / loss.targets)).backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.double() / scale for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.total.detach().double(), **found}


def in_full(family: TextFamily, *rest: Any) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "WHOLE", 2**40)
        return gradients(family, *rest)


def distance(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp(min=1e-30))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("trained", ["full", "lora", "saved"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_loss_and_gradients_are_those_of_the_full_logits(kind: str, trained: str) -> None:
    """Soft capping, scales and tied heads; all weights, LoRA on the head too, or a copy of the head."""
    model, family, batch = build(kind), text_family(), random_batch()
    if trained != "full":
        name = next(n for n, module in model.named_modules() if module is model.get_output_embeddings())
        if model.config.tie_word_embeddings:
            pytest.skip("a tied head has no adapter of its own")
        layer = "query_key_value" if kind == "GPTNeoX" else "q_proj"
        beside = ([name], []) if trained == "lora" else ([], [name])
        model = add_adapter(model, AdapterConfig(target_modules=[layer, *beside[0]], modules_to_save=beside[1]), [])
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    model.eval().double()  # without dropout
    chunked, full = gradients(family, model, batch, "fp32"), in_full(family, model, batch, "fp32")
    assert chunked.keys() == full.keys()
    assert len(full) > 2
    for name, right in full.items():
        assert distance(chunked[name], right) < 1e-10, name


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("mode", list(MODES))
def test_gradients_in_every_precision_are_as_exact_as_in_full(mode: str) -> None:
    """Against float64. FP16 has a loss scale; without one, small gradients would be lost on either way."""
    family, batch = text_family(), random_batch()
    right = in_full(family, build("Gemma2").double(), batch, "fp32")
    model, scale = build("Gemma2"), 1.0
    if mode == "fp16":
        model, scale = model.half(), 1024.0
    chunked, full = gradients(family, model, batch, mode, scale), in_full(family, model, batch, mode, scale)
    assert distance(chunked["loss"], full["loss"]) < 1e-6
    for name, exact in right.items():
        assert distance(chunked[name], exact) < 1.25 * distance(full[name], exact) + 1e-6, name


def gradient_of_head(kind: torch.dtype, cast: torch.dtype | None, chunks: int, scale: float = 1.0) -> Tensor:
    """The gradient of a head's weight in a mean over 4,096 targets, half of them of five words."""
    generator = torch.Generator().manual_seed(0)
    rows, targets = torch.randn(4096, 32, generator=generator), torch.randint(500, (4096,), generator=generator)
    targets[::2] %= 5
    layer = nn.Linear(32, 500, bias=False)
    nn.init.normal_(layer.weight, std=0.1, generator=generator)
    layer, rows = layer.to(kind), rows.to(kind).requires_grad_()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=cast, enabled=cast is not None):
        patch.setattr(head, "WHOLE", 0 if chunks > 1 else 2**40)
        patch.setattr(head, "FEWEST", 4096 // chunks)
        patch.setattr(head, "CHUNKS", chunks)
        loss = head.cross_entropy(layer, head.unchanged, rows, targets, 500).sum()
    (loss * (scale / 4096)).backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == kind
    return layer.weight.grad.double() / scale


@pytest.mark.parametrize(
    ("kind", "cast"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, None), (torch.float16, None)],
)
def test_a_sum_over_many_chunks_is_as_exact_as_one_product(kind: torch.dtype, cast: torch.dtype | None) -> None:
    right = gradient_of_head(torch.float64, None, 1)
    chunked, full = (distance(gradient_of_head(kind, cast, chunks, 1024.0), right) for chunks in (64, 1))
    assert chunked < 1.25 * full


@pytest.mark.parametrize(("kind", "cast"), [(torch.float32, torch.float16), (torch.float16, None)])
def test_an_overflow_in_chunks_shows(kind: torch.dtype, cast: torch.dtype | None) -> None:
    assert gradient_of_head(kind, cast, 8, 2.0**16).isfinite().all()
    assert not gradient_of_head(kind, cast, 8, 2.0**24).isfinite().all()


@pytest.mark.parametrize("factor", [None, 2.0])
def test_a_head_with_a_hook_is_chunked_too(monkeypatch: pytest.MonkeyPatch, factor: float | None) -> None:
    """With fewer targets than hidden units, as on steps on which a watch looks; the hook may change the logits."""
    monkeypatch.setattr(head, "FEWEST", 8)
    torch.manual_seed(0)
    layer, targets = nn.Linear(64, 50, bias=False, dtype=torch.float64), torch.arange(32)
    rows = torch.randn(32, 64, dtype=torch.float64)
    seen, found = [], []

    def look(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        seen.append((given[0].shape, output.shape))
        return output * factor if factor else None

    layer.register_forward_hook(look)
    for whole_up_to in (2**22, 0):
        monkeypatch.setattr(head, "WHOLE", whole_up_to)
        layer.zero_grad()
        head.cross_entropy(layer, head.unchanged, rows, targets, 50).sum().backward()  # type: ignore[no-untyped-call]
        assert layer.weight.grad is not None
        found.append(layer.weight.grad)
    assert seen == [((32, 64), (32, 50))] + [((8, 64), (8, 50))] * 8  # forward and backward
    assert distance(found[1], found[0]) < 1e-12
    assert "forward" not in vars(layer)


@pytest.mark.usefixtures("always")
def test_a_watch_sees_the_head_in_chunks() -> None:
    model, family, batch = build("GPTNeoX").double(), text_family(), random_batch()
    right, hooks = gradients(family, model, batch, "fp32"), ModuleHooks(model, Readings()).install()
    found = gradients(family, model, batch, "fp32")
    hooks.remove()
    assert all(torch.equal(found[name], gradient) for name, gradient in right.items())
    name = next(n for n, module in model.named_modules() if module is model.get_output_embeddings())
    assert hooks.calls[name].with_grad
    assert {("forward", name), ("backward", name)} <= hooks.readings.read().keys()


def gradients_of_ranks(world: World) -> dict[str, Tensor]:
    """In chunks, under DDP that looks for unused weights, with activation checkpointing."""
    head.WHOLE, head.FEWEST = 0, 50
    model = build("Gemma2").double().train()
    model.activation_checkpointing_enable()
    module = world.wrap(LossModule(model, text_family().losses), DDPConfig(find_unused_parameters=True))
    module(random_batch(rows=3 + world.rank))["text"].total.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_gradients_under_ddp_and_activation_checkpointing(run_ranks: Callable[..., list[Any]]) -> None:
    one, other = run_ranks(gradients_of_ranks)
    model, family = build("Gemma2").double(), text_family()
    for rows in (3, 4):
        family.losses(model, random_batch(rows))["text"].total.backward()  # type: ignore[no-untyped-call]
    for name, weight in model.named_parameters():
        assert torch.equal(one[name], other[name])
        assert distance(2 * one[name], weight.grad) < 1e-10, name


def gradients_of_shards(world: World) -> dict[str, Tensor]:
    """In chunks, with sharded weights, and recomputed activations."""
    head.WHOLE, head.FEWEST = 0, 50
    model = build("Gemma2").double().train()
    model.activation_checkpointing_enable()
    module = LossModule(model, text_family().losses)
    shard(module, torch.device("cpu"))
    module(random_batch(rows=3 + world.rank))["text"].total.backward()
    return {name: whole(weight.grad) for name, weight in model.named_parameters()}


@pytest.mark.slow
def test_gradients_with_sharded_weights(run_ranks: Callable[..., list[Any]]) -> None:
    one, _ = run_ranks(gradients_of_shards)
    model, family = build("Gemma2").double(), text_family()
    for rows in (3, 4):
        family.losses(model, random_batch(rows))["text"].total.backward()  # type: ignore[no-untyped-call]
    for name, weight in model.named_parameters():
        assert distance(2 * one[name], weight.grad) < 1e-10, name


@pytest.mark.usefixtures("always")
def test_the_first_batch_draws_as_every_other() -> None:
    """A resumed run tests its head again, and goes on as an uninterrupted one: with dropout on the head, too."""
    adapter = AdapterConfig(target_modules=["q_proj", "lm_head"], dropout=0.5)
    model, family, batch = add_adapter(build("Llama"), adapter, []), text_family(), random_batch()
    nn.init.normal_(model.get_parameter("base_model.model.lm_head.lora_B.default.weight"))
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append((float(family.losses(model.train(), batch)["text"].total.detach()), torch.get_rng_state()))
    (first, state), (second, state_again) = found
    assert first == second
    assert torch.equal(state, state_again)


@pytest.mark.usefixtures("always")
def test_a_batch_without_targets_gives_gradients_of_zero() -> None:
    rows, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    nats = head.cross_entropy(
        lambda some: some @ weight.T, lambda made: made, rows, torch.zeros(0, dtype=torch.int64), 5
    )
    nats.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert float(nats.detach().sum()) == float(weight.grad.abs().sum()) == 0.0


@pytest.mark.usefixtures("always")
def test_a_model_whose_logits_cannot_be_made_in_chunks_gets_them_all_and_says_so() -> None:
    model, family, batch = build("Llama"), text_family(), random_batch()
    right = in_full(family, model, batch, "fp32")
    own = model.forward

    def fixed(input_ids: Tensor, **inputs: Any) -> Any:
        made = own(input_ids, **inputs)
        made.logits = made.logits.view(1, made.logits.shape[1], TINY["vocab_size"]).clone()
        return made

    model.forward = fixed
    with pytest.warns(UserWarning, match=r"cannot be done to two.*: its logits are computed all at once"):
        assert distance(gradients(family, model, batch, "fp32")["loss"], right["loss"]) < 1e-6
    gradients(family, model, batch, "fp32")  # is said once


@pytest.mark.usefixtures("always")
def test_logits_that_are_changed_in_place_are_changed_in_every_chunk() -> None:
    model, family, batch = build("Llama").double(), text_family(), random_batch()
    own, hidden = model.forward, torch.tensor([3, 5, 8])

    def masked(input_ids: Tensor, **inputs: Any) -> Any:
        made = own(input_ids, **inputs)
        made.logits[..., hidden] = -4.0
        made.logits /= 2
        return made

    model.forward = masked
    chunked, full = gradients(family, model, batch, "fp32"), in_full(family, model, batch, "fp32")
    for name, right in full.items():
        assert distance(chunked[name], right) < 1e-10, name
