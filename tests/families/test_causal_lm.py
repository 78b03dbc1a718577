"""Causal LMs: true losses, padded and packed, of all that may be loaded. Gradients: tests/benchmarks."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.contracts import IGNORE, Batch, Labels, Sample, Special, Text, Turn
from rawloop.diagnose.causality import probe
from rawloop.diagnose.mismatch import find_mismatches
from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family
from rawloop.families.causal_lm import CausalLM, Example
from rawloop.families.shared import documents, target_logits
from rawloop.losses import weighted_mean


def load(folder: Path, packing: bool = False, **options: Any) -> CausalLM:
    family = load_family(ModelConfig(path=str(folder), **options))
    assert isinstance(family, CausalLM)
    family.packing = packing
    return family


@pytest.fixture(scope="module")
def family(text_checkpoint: Path) -> CausalLM:
    return load(text_checkpoint)


@pytest.fixture(scope="module")
def packed(text_checkpoint: Path) -> CausalLM:
    return load(text_checkpoint, packing=True)


@pytest.fixture(scope="module")
def model(family: CausalLM) -> nn.Module:
    return family.load_model().double()


@pytest.fixture
def change(text_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Give `change({key: value})`, a copy of the checkpoint with another config."""

    def write(config: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(text_checkpoint, folder, dirs_exist_ok=True)
        values = json.loads((text_checkpoint / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | (config or {})))
        return folder

    return write


def text(words: str, name: str = "t") -> Sample:
    return Sample(name, (Turn("text", (Text(words),), trained=True),), source="x.jsonl line 3")


def chat(*turns: str, trained: tuple[int, ...] = (-1,)) -> Sample:
    """`chat("user: Hi", "assistant: Ho")`, of which the turns with these numbers are trained."""
    pairs = [turn.split(": ", 1) for turn in turns]
    numbers = {number % len(pairs) for number in trained}
    made = tuple(Turn(role, (Text(words),), index in numbers) for index, (role, words) in enumerate(pairs))
    return Sample("c", made, source="x.jsonl line 3")


SAMPLES = [
    text("a"),
    chat("system: Be brief.", "user: Count.", "assistant: One, two."),
    text("A longer text than the others, with more to learn.", "long"),
    chat("user: Hi", "assistant: Ho", "user: Who?", "assistant: Me\n\nand you.", "user: Bye", trained=(1, 3)),
    chat("user: A question that is long", "assistant: no"),
    text("\n\nla la"),
    chat("user: x", "assistant: a much longer answer than its question"),
    text("Seven."),
]


# -- examples, for people ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, ids=range(8))
def test_pieces_are_the_whole_example_in_order(family: CausalLM, sample: Sample) -> None:
    example = family.example(sample)
    pieces = family.pieces(example)
    assert sum(piece.positions for piece in pieces) == len(example.input_ids)
    assert sum(piece.targets for piece in pieces) == family.collate([example]).targets["text"]
    assert "".join(piece.text for piece in pieces) == family.tokenizer.decode(example.input_ids)
    for piece in pieces:
        learnt = piece.positions - (piece.role == "text")
        assert piece.targets == (learnt if piece.role in ("text", "assistant") else 0)


def test_pieces_say_who_speaks(family: CausalLM) -> None:
    roles = [[piece.role for piece in family.pieces(family.example(sample))] for sample in SAMPLES[:4]]
    assert roles[0] == ["text"]
    assert roles[1] == ["system+user", "assistant", "template"]
    assert roles[3] == ["user", "assistant", "user", "assistant", "template"]


def test_losses_are_the_cross_entropy_of_the_logits(family: CausalLM, packed: CausalLM, model: nn.Module) -> None:
    for one in (family, packed):
        batch = one.collate([one.example(sample) for sample in SAMPLES])
        with torch.no_grad():
            assert find_mismatches(one.losses(model, batch), one.logits(model, batch), batch, 0.0) == {}


def test_the_tokens_that_end_texts_and_turns_must_be_learnt_where_there_are_any(text_checkpoint: Path) -> None:
    seen = load(text_checkpoint)
    eos, end = (seen.tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>"))
    assert seen.special_targets() == [Special("text", "</s>", eos, False)]
    turn = Special("text", "<|im_end|>", end, True, ("assistant",))
    seen.check(SAMPLES[1])
    assert seen.special_targets() == [Special("text", "</s>", eos, False), turn]
    seen.check(SAMPLES[0])
    assert seen.special_targets() == [Special("text", "</s>", eos, True, ("text",)), turn]
    targets = seen.collate([seen.example(sample) for sample in SAMPLES]).labels["text"].targets
    assert (targets == eos).sum() == 4
    assert (targets == end).sum() == 5


# -- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_losses_equal_the_models_own(family: CausalLM, packed: CausalLM, model: Any, packing: bool) -> None:
    family = packed if packing else family
    examples = [family.example(sample) for sample in SAMPLES]
    batch = family.collate(examples)
    plain, naive = 0.0, 0.0
    with torch.no_grad():
        ours = family.losses(model, batch)["text"]
        for example in examples:
            ids, labels = example.input_ids[None], example.labels[None]
            made = model(input_ids=ids, labels=labels, num_items_in_batch=1)
            plain += float(made.loss)
            naive += float(F.cross_entropy(made.logits[0, :-1], labels[0, 1:], reduction="sum"))
    assert float(ours.total) == pytest.approx(plain, rel=1e-6)  # transformers scores in float32
    assert float(ours.total) == pytest.approx(naive, rel=1e-12)
    assert ours.targets == batch.targets["text"] == sum(int((e.labels != IGNORE).sum()) for e in examples)


def gradients(family: CausalLM, model: nn.Module, sizes: int) -> Tensor:
    """The gradient of one window of all samples in micro-batches of so many, as the loop adds it up."""
    model.zero_grad()
    batches = [
        family.collate([family.example(sample) for sample in SAMPLES[start : start + sizes]])
        for start in range(0, len(SAMPLES), sizes)
    ]
    targets = {"text": sum(batch.targets["text"] for batch in batches)}
    for batch in batches:
        loss: Any = weighted_mean(family.losses(model, batch), family.stream_weights, targets, 1)
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(text_checkpoint: Path, attention: str) -> None:
    family = load(text_checkpoint, packing=True, attention=attention)
    model = family.load_model()
    examples = [family.example(sample) for sample in SAMPLES]
    lengths = [int((example.labels != IGNORE).sum()) for example in examples]
    before = torch.split(target_rows(family, model, examples), lengths)
    for changed, example in enumerate(examples):
        ids = (example.input_ids + 1) % 256
        other = Example(example.id, ids, example.labels, example.runs)
        rows = target_rows(family, model, [*examples[:changed], other, *examples[changed + 1 :]])
        after = torch.split(rows, lengths)
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
            index == changed for index in range(len(examples))
        ]


def target_rows(family: CausalLM, model: nn.Module, examples: list[Example]) -> Tensor:
    with torch.no_grad():
        return family.logits(model, family.collate(examples))["text"]


def test_a_packed_row_has_no_padding_and_positions_of_each_document(packed: CausalLM) -> None:
    examples = [packed.example(sample) for sample in SAMPLES[:2]]
    batch = packed.collate(examples)
    lengths = [len(example.input_ids) for example in examples]
    assert batch.inputs["input_ids"].shape == (1, sum(lengths))
    assert batch.inputs["position_ids"][0].tolist() == [*range(lengths[0]), *range(lengths[1])]
    first = batch.labels["text"].positions[: lengths[0]].tolist()
    assert lengths[0] - 1 not in first  # the last token of a document predicts nothing of the next


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_changed_is_not_noticed_by_earlier_predictions(
    family: CausalLM, packed: CausalLM, model: nn.Module, packing: bool
) -> None:
    family = packed if packing else family
    batch = family.collate([family.example(sample) for sample in SAMPLES])
    changed, earlier, _ = family.perturb(batch)
    before, after = (family.logits(model, each)["text"] for each in (batch, changed))
    noticed = (before != after).any(1)
    assert torch.equal(noticed, ~earlier["text"])
    counts = [int((family.example(sample).labels != IGNORE).sum()) for sample in SAMPLES]
    assert [int(part.sum()) for part in torch.split(earlier["text"], counts)] == [(count + 1) // 2 for count in counts]


def test_perturbing_finds_a_model_that_sees_the_future(family: CausalLM) -> None:
    """The other half of the last test: with the causal mask gone, the very same comparison fails."""
    seeing: Any = family.load_model()
    seeing.config.is_causal = False
    for layer in seeing.model.layers:
        layer.self_attn.is_causal = False
    batch = family.collate([family.example(sample) for sample in SAMPLES])
    changed, earlier, _ = family.perturb(batch)
    moved = (family.logits(seeing, batch)["text"] != family.logits(seeing, changed)["text"]).any(1)
    assert moved[earlier["text"]].any()


def moved_on(batch: Batch, further: int) -> Batch:
    """The batch with labels that are predicted from so much further right; those that leave their document are gone."""
    positions, targets = batch.labels["text"]
    document, moved = documents(batch), positions + further
    inside = (moved >= 0) & (moved < len(document))
    inside &= document[moved.clamp(0, len(document) - 1)] == document[positions]
    return Batch(batch.inputs, {"text": Labels(moved[inside], targets[inside])}, {"text": int(inside.sum())}, batch.ids)


def outcome(family: CausalLM, model: nn.Module, batch: Batch) -> str:
    return probe(family, model, batch, nullcontext)["text"].outcome()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("further", "expected"),
    [(0, "PASS"), (1, "LEAK"), (2, "LEAK"), (-1, "PASS")],
    ids=["right", "un", "wrong", "twice"],
)
def test_labels_of_another_shift(
    family: CausalLM, packed: CausalLM, model: nn.Module, packing: bool, further: int, expected: str
) -> None:
    """Not shifted, or to the wrong side, a prediction sees its own target; shifted twice it sees even less."""
    family = packed if packing else family
    batch = family.collate([family.example(sample) for sample in SAMPLES])
    assert outcome(family, model, moved_on(batch, further)) == expected


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_that_repeat_are_no_leak(family: CausalLM, packed: CausalLM, model: nn.Module, packing: bool) -> None:
    """Every token is like its neighbours: where a target's own stands cannot be seen, and is taken to be right."""
    family = packed if packing else family
    ids = torch.full((12,), 65)
    example = Example("same", ids, torch.where(torch.arange(12) == 0, IGNORE, ids), ())
    assert outcome(family, model, family.collate([example])) == "PASS"
    assert outcome(family, model, family.collate([example, family.example(SAMPLES[0]), example])) == "PASS"


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_without_attention_is_blind(family: CausalLM, packed: CausalLM, packing: bool) -> None:
    family = packed if packing else family
    blind: Any = family.load_model()
    batch = family.collate([family.example(sample) for sample in SAMPLES])
    with torch.no_grad():
        blind.model.layers[0].self_attn.o_proj.weight.zero_()
        assert outcome(family, blind, batch) == "PASS"  # the other layer attends
        blind.model.layers[1].self_attn.o_proj.weight.zero_()
    moved = probe(family, blind, batch, nullcontext)["text"]
    assert moved.outcome() == "BLIND"
    assert moved.later["tokens"][1] == 0.0


@pytest.mark.parametrize("length", [2, 3])
def test_a_context_of_no_token_shows_nothing_and_one_of_one_token_does(
    family: CausalLM, model: nn.Module, length: int
) -> None:
    ids = torch.arange(length) + 65
    example = Example("short", ids, torch.where(ids == 65, IGNORE, ids), ())
    moved = probe(family, model, family.collate([example]), nullcontext)["text"]
    assert moved.outcome() == {2: "UNSEEN", 3: "PASS"}[length]
    assert moved.later["tokens"][0] == length - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite", "Cohere", "Mistral", "GPTNeoX", "Mamba", "Lfm2"])
def test_random_weights_of_all_kinds_pass(family: CausalLM, kind: str, dtype: torch.dtype) -> None:
    options = KINDS.get(kind) or PACKING_FAILS.get(kind, ({}, ""))[0]
    options = {**options, "initializer_range": 0.02}
    batch = family.collate([family.example(SAMPLES[2])] * 2)
    assert outcome(family, build(kind, **options).to(dtype), batch) == "PASS"


def test_chance_is_that_of_the_vocabulary(family: CausalLM) -> None:
    assert family.chance() == {"text": math.log(261)}


# -- models ------------------------------------------------------------------------------------------------------


TINY: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Mistral": {"sliding_window": 4},
    "GPTNeoX": {},
}
PACKING_FAILS: dict[str, tuple[dict[str, Any], str]] = {
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "see later words or other documents of their row"),
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "see later words or other documents of their row"),
    "Mamba": ({}, "MambaForCausalLM takes no position_ids: set data.packing to false"),
}


def build(kind: str, **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_are_the_models_own_whatever_it_does_to_them(
    family: CausalLM, packed: CausalLM, kind: str, adapted: bool
) -> None:
    """Soft capping, scales, tied and wrapped heads; packed as padded, in layers with a sliding window too."""
    model = build(kind, **KINDS[kind])
    if adapted:
        head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
        tied = bool(KINDS[kind].get("tie_word_embeddings")) or model.config.tie_word_embeddings
        config = AdapterConfig(target_modules=["all-linear"], modules_to_save=[] if tied else head)
        model = add_adapter(model, config, []).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model = model.double()
    examples = [family.example(sample) for sample in SAMPLES]
    batch = family.collate(examples)
    with torch.no_grad():
        own = model(batch.inputs["input_ids"], use_cache=False).logits.flatten(0, 1)
        ours, in_a_row = target_rows(family, model, examples), target_rows(packed, model, examples)
    torch.testing.assert_close(ours, own[batch.labels["text"].positions], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(in_a_row, ours, rtol=1e-5, atol=1e-5)  # norms and rotary tables are in float32


def test_logits_of_16_bits_are_scored_in_float32(family: CausalLM) -> None:
    model = build("Gemma2", **KINDS["Gemma2"]).bfloat16()
    rows = target_rows(family, model, [family.example(SAMPLES[0])])
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, rows.bfloat16().float())  # capped after it was widened


@pytest.fixture
def stored(text_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Give `stored(kind, **options)`: a tiny model of a kind in a folder with the tokenizer."""

    def write(kind: str, **options: Any) -> Path:
        build(kind, **options).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(text_checkpoint).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("kind", list(PACKING_FAILS))
def test_models_that_would_mix_packed_documents_are_refused(stored: Callable[..., Path], kind: str) -> None:
    options, message = PACKING_FAILS[kind]
    folder = stored(kind, **options)
    load(folder, attention="eager").load_model()
    with pytest.raises(UserError, match=message):
        load(folder, packing=True, attention="eager").load_model()


def test_a_model_that_is_not_causal_is_refused(stored: Callable[..., Path]) -> None:
    folder = stored("Bert")
    with pytest.raises(UserError, match=r"predictions of BertLMHeadModel see later words, which.*is_decoder"):
        load(folder).load_model()
    config = json.loads((folder / "config.json").read_text()) | {"is_decoder": True}
    (folder / "config.json").write_text(json.dumps(config))
    load(folder).load_model()


def test_attention_that_a_model_does_not_have_is_named_by_its_key(stored: Callable[..., Path]) -> None:
    with pytest.raises(
        UserError, match=r"cannot be loaded: MambaForCausalLM .* \(model.attention is 'sdpa': set it to eager\)"
    ):
        load(stored("Mamba")).load_model()


def test_packing_is_refused_with_attention_that_it_is_not_proven_for(text_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"model.attention is 'flex_attention'.*sdpa and eager only"):
        load(text_checkpoint, packing=True, attention="flex_attention").load_model()


def test_a_model_that_makes_its_logits_otherwise_is_refused() -> None:
    model = build("Llama")
    own = model.forward

    def twice(**inputs: Any) -> Any:
        made = own(**inputs)
        made.logits = made.logits.repeat(1, 2, 1)
        return made

    model.forward = twice
    with pytest.raises(UserError, match=r"logits of shape \(1, 4, 261\) for 2 targets"):
        target_logits(model, {"input_ids": torch.ones(1, 5, dtype=torch.int64)}, torch.tensor([1, 2]))
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_a_batch_key_that_the_model_would_swallow_is_refused(family: CausalLM, model: nn.Module) -> None:
    batch = family.collate([family.example(SAMPLES[0])])
    wrong = Batch({"inputs_ids": batch.inputs["input_ids"]}, batch.labels, batch.targets, batch.ids)
    with pytest.raises(UserError, match=r"'inputs_ids', which LlamaForCausalLM.forward does not take.*input_ids"):
        family.losses(model, wrong)


def test_activation_checkpointing_changes_no_gradient(text_checkpoint: Path) -> None:
    found, calls = [], []
    for recompute in (False, True):
        family = load(text_checkpoint, activation_checkpointing=recompute)
        model: Any = family.load_model().double().train()
        calls.append(0)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        found.append(gradients(family, model, 4))
    assert calls == [2, 4]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_auto_takes_what_is_a_causal_lm_and_guesses_at_nothing_else(change: Callable[..., Path]) -> None:
    assert load(change()).config.family == "auto"
    for other in ({"architectures": ["LlamaModel"]}, {"model_type": "lama"}, {"architectures": None}):
        with pytest.raises(
            UserError, match=r"no family for models of type 'l.?ama'.* and the causal language models of transformers"
        ):
            load_family(ModelConfig(path=str(change(other))))
    assert isinstance(load_family(ModelConfig(path=str(change({"model_type": "llama"})), family="causal_lm")), CausalLM)


def test_a_model_that_also_takes_images_is_not_guessed_at(change: Callable[..., Path]) -> None:
    folder = change({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]})
    with pytest.raises(UserError, match="no family for models of type 'gemma3'"):
        load_family(ModelConfig(path=str(folder)))


def test_checkpoints_that_cannot_be_trained_are_refused(change: Callable[..., Path]) -> None:
    folder = change({"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"lacks 9 weights, first model.layers.2"):
        load(folder).load_model()
    with pytest.raises(UserError, match=r"is stored as \(261, 32\), its config.json makes it \(261, 48\)"):
        load(change({"hidden_size": 48})).load_model()
    weights = folder / "model.safetensors"
    change()
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"whose model\.safetensors is damaged \(.*incomplete metadata.*\): fetch it again"
    ):
        load(folder).load_model()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(
        UserError, match=r"whose tokenizer\.json is damaged \(Expecting property name.*\): fetch it again"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("weights", "message"), [({"audio": 1.0}, r"\['audio'\]: this model has the streams text"), ({"text": 0.0}, "to 0")]
)
def test_weights_of_streams_that_make_no_sense_are_refused(
    text_checkpoint: Path, weights: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(text_checkpoint, stream_weights=weights)
