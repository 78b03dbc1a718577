"""Bad data by name: the tensor, the sample, the position and the value."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from rawloop.contracts import Batch, Labels
from rawloop.dist import World
from rawloop.watch.batches import Batches
from rawloop.watch.findings import Finding
from rawloop.watch.repeats import RankBatches
from rawloop.watch.watch import Watch

NAMES = ("a", "b", "c", "d")


def seen(batch: Any, ids: Sequence[str] = NAMES, model: nn.Module | None = None) -> dict[str, Finding]:
    """The findings about a batch, without a forward pass."""
    with Watch(model or nn.Linear(2, 2), detectors=[Batches()]) as watch, watch.step(batch, ids):
        pass
    return {finding.kind: finding for finding in watch.findings}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def texts(rows: int = 4, length: int = 10) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def test_a_row_that_hides_all() -> None:
    batch = texts()
    batch["attention_mask"][2] = 0
    found = seen(batch)["row_masked"]
    assert (found.cause.place.tensor, found.cause.place.sample, found.cause.place.row) == ("attention_mask", "c", 2)
    assert found.cause.whose == "data"
    assert not found.ordinary
    batch["attention_mask"].zero_()
    assert "batch_masked" in seen(batch)


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min])
def test_additive_masks(value: float) -> None:
    causal = torch.full((6, 6), value).triu(1).expand(4, 1, 6, 6).clone()
    assert seen({"attention_mask": causal}) == {}
    causal[1] = value
    assert seen({"attention_mask": causal})["row_masked"].cause.place.sample == "b"


def test_torchs_padding_mask_is_true_where_it_hides() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    assert seen({"src_key_padding_mask": mask}) == {}
    mask[0] = True
    assert "row_masked" in seen({"src_key_padding_mask": mask})


def test_rows_and_batches_without_targets() -> None:
    batch = texts()
    batch["labels"][3] = -100
    assert seen(batch)["row_without_targets"].cause.place.sample == "d"
    batch["audio_labels"] = torch.ones(4, 10, 2, dtype=torch.long)  # the row has targets there
    assert seen(batch) == {}
    batch = texts()
    batch["labels"].fill_(-100)
    assert "batch_without_targets" in seen(batch)


def test_a_row_that_fills_up_a_batch_is_ordinary_and_hides_no_other() -> None:
    batch = texts()
    batch["attention_mask"][3], batch["labels"][3] = 0, -100
    assert {one.kind: one.ordinary for one in seen(batch).values()} == {"row_masked": True, "row_without_targets": True}
    batch["labels"][1] = -100
    found = seen(batch)
    assert (found["row_without_targets"].ordinary, found["row_without_targets"].cause.place.sample) == (False, "b")
    batch["labels"][3, 2] = 7
    assert not seen(batch)["row_masked"].ordinary


def test_a_filler_row_of_a_step_that_is_not_finite_is_an_alarm() -> None:
    batch = texts() | {"x": torch.randn(4, 2)}
    batch["attention_mask"][3], batch["labels"][3] = 0, -100
    model = nn.Linear(2, 2)
    with Watch(model, torch.optim.SGD(model.parameters()), detectors=[Batches()]) as watch:  # noqa: SIM117
        with watch.step(batch, NAMES):
            (model(batch["x"]).sum() + math.inf).backward()
            watch.subject.optimizers[0].step()
    assert {"row_masked", "row_without_targets"} <= {one.kind for one in watch.findings.alarms}


def test_one_of_two_microbatches_without_targets() -> None:
    first, second = texts(), texts()
    second["labels"].fill_(-100)
    found = seen([first, second], [*NAMES, "e", "f", "g", "h"])
    assert found["batch_without_targets"].cause.place.tensor == "1/labels"


def test_our_own_microbatches_count_targets_over_the_window() -> None:
    none = torch.zeros(0, dtype=torch.long)
    ids = torch.randint(0, 9, (2, 5))
    full = Batch({"input_ids": ids}, {"text": Labels(torch.arange(3), torch.arange(3))}, {"text": 3}, ["x", "y"])
    empty = Batch({"input_ids": ids}, {"text": Labels(none, none)}, {"text": 0}, ["x", "y"])
    assert seen([full, empty], ()) == {}
    assert "batch_without_targets" in seen([empty, empty], ())
    broken = Batch({"features": torch.full((2, 3), math.nan)}, full.labels, {"text": 3}, ["x", "y"])
    place = seen([full, broken], ())["features_not_finite"].cause.place
    assert (place.tensor, place.sample) == ("1/inputs/features", "x")


def test_ids_outside_the_embedding_before_torch_fails() -> None:
    model, batch = llama(), texts()
    batch["input_ids"][1, 7] = 64
    batch["labels"][2, 3] = -1
    with pytest.raises(IndexError), Watch(model, detectors=[Batches()]) as watch:  # noqa: SIM117
        with watch.step(batch, NAMES):
            model(**batch)
    found = {finding.kind: finding for finding in watch.findings}
    place = found["id_outside_embedding"].cause.place
    assert (place.tensor, place.sample, place.position) == ("input_ids", "b", 7)
    assert place.module == "model.embed_tokens"
    assert found["id_outside_embedding"].cause.evidence["id"] == 64
    place = found["label_outside_head"].cause.place
    assert (place.tensor, place.sample, place.position) == ("labels", "c", 3)


def test_ids_are_known_before_the_forward_pass_of_later_steps() -> None:
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4))
    with Watch(model, detectors=[Batches()]) as watch:
        for step in range(6):
            tokens = torch.randint(0, 20, (4, 6))
            if step == 5:
                tokens[0, 2] = -3
            with watch.step({"tokens": tokens}, NAMES):
                if step < 5:
                    model(tokens)
                assert not watch.findings.alarms or step == 5
    (found,) = watch.findings.alarms
    assert (found.cause.place.tensor, found.cause.place.module, found.cause.place.position) == ("tokens", "0", 2)


def test_embeddings_that_only_count_ids_have_no_rows_for_them() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=90, d_model=16, max_position_embeddings=12, **sizes)
    model = BartForConditionalGeneration(config)
    batch = {"input_ids": torch.randint(3, 90, (4, 10)), "decoder_input_ids": torch.randint(3, 90, (4, 10))}
    with Watch(model, detectors=[Batches()]) as watch, watch.step(batch, NAMES):
        model(**batch)
    assert not watch.findings.alarms, watch.findings
    batch["input_ids"][1, 7] = 90
    with pytest.raises(IndexError), Watch(model, detectors=[Batches()]) as watch:  # noqa: SIM117
        with watch.step(batch, NAMES):
            model(**batch)
    (found,) = watch.findings.alarms
    assert (found.cause.place.module, found.cause.evidence["valid ids"]) == ("model.encoder.embed_tokens", 90)


class Codes(nn.Module):
    """Sums the embeddings of codebooks: one joint table with offsets, or a table for each."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint = nn.Embedding(4 * 8, 3) if joint else None
        self.tables = nn.ModuleList([] if joint else [nn.Embedding(8, 3) for _ in range(4)])

    def forward(self, codes: Tensor) -> Tensor:
        """Take (batch, frames, codebooks)."""
        if self.joint is not None:
            return torch.as_tensor(self.joint(codes + torch.arange(4) * 8).sum(2))
        return torch.stack([table(codes[..., n]) for n, table in enumerate(self.tables)]).sum(0)


@pytest.mark.parametrize("joint", [True, False])
def test_a_code_outside_its_codebook(joint: bool) -> None:
    model = Codes(joint)
    with Watch(model, detectors=[Batches()]) as watch:
        for step in range(3):
            codes = torch.randint(0, 8, (4, 5, 4))
            if step == 2:
                codes[3, 1, 2] = 9
            with watch.step({"codes": codes}, NAMES):
                if joint or step < 2:
                    model(codes)  # a joint table has a row for it, which is another codebook's
    (found,) = watch.findings.alarms
    place = found.cause.place
    assert (found.kind, place.sample, place.row, place.position) == ("id_outside_embedding", "d", 3, 1)
    assert place.module == ("joint" if joint else "tables.2")
    assert (found.cause.evidence["codebook"], found.cause.evidence["valid ids"]) == (2, 8)


def test_an_error_in_a_hook_does_not_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rawloop.watch.ids._tells", lambda *_: 1 / 0)
    model = nn.Embedding(20, 4)
    with Watch(model, detectors=[Batches()]) as watch:
        for _ in range(2):
            with watch.step({"tokens": (tokens := torch.randint(0, 20, (4, 6)))}):
                assert model(tokens).shape == (4, 6, 4)
    assert [finding.kind for finding in watch.findings.alarms] == ["watch_failed"]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_lack_most_operations_are_left_out(dtype: torch.dtype) -> None:
    assert "no_tensors" in seen({"x": torch.ones(4, 2).to(dtype)})
    assert seen({"x": torch.ones(4, 2).to(dtype), "codes": torch.randint(0, 9, (4, 6))}) == {}


def test_learned_positions_beyond_the_model() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.wpe = nn.Embedding(64, 4), nn.Embedding(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.as_tensor(self.words(ids) + self.wpe(torch.arange(ids.shape[1])))

    model = Learned()
    with pytest.raises(IndexError), Watch(model, detectors=[Batches()]) as watch:  # noqa: SIM117
        with watch.step({"ids": (ids := torch.randint(0, 64, (4, 17)))}):
            model(ids)
    (found,) = watch.findings.alarms
    assert (found.cause.place.module, found.cause.evidence["id"]) == ("wpe", 16)


def test_a_class_that_the_head_lacks_explains_the_failure() -> None:
    model = nn.Linear(6, 5)
    x, y = torch.randn(4, 6), torch.tensor([0, 5, 1, 2])
    with pytest.raises(IndexError), Watch(model, detectors=[Batches()]) as watch:  # noqa: SIM117
        with watch.step((x, y), NAMES):
            F.cross_entropy(model(x), y)
    (found,) = watch.findings.alarms
    assert (found.kind, found.cause.place.tensor, found.cause.place.sample) == ("label_outside_head", "1", "b")


BAD: dict[str, tuple[Callable[[Tensor], Any], str, int]] = {
    "nan": (lambda x: x[2, 3].fill_(math.nan), "features_not_finite", 2),
    "infinite": (lambda x: x[1, 0].fill_(-math.inf), "features_not_finite", 1),
    "absurd": (lambda x: x[3, 5].fill_(4e4), "features_absurd", 3),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_features(name: str) -> None:
    spoil, kind, row = BAD[name]
    x = torch.randn(4, 40)
    assert seen({"features": x}) == {}
    spoil(x)
    found = seen({"features": x})[kind]
    assert (found.cause.place.tensor, found.cause.place.row, found.ordinary) == ("features", row, False)


def test_absurd_features_by_their_own_history() -> None:
    with Watch(nn.Linear(2, 2), detectors=[Batches()]) as watch:
        for step in range(9):
            with watch.step({"x": torch.randn(2, 8) * (1e5 if step == 8 else 1)}):
                pass
    assert [finding.kind for finding in watch.findings] == ["features_absurd"]


def test_large_features_of_a_failed_step_are_looked_at_in_full() -> None:
    model = nn.Linear(70, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Watch(model, optimizer, detectors=[Batches()]) as watch:
        for step in range(5):
            x = torch.randn(1000, 70)
            if step == 4:
                x[123, 7] = math.nan
            with watch.step({"x": x}):
                torch.autograd.backward(model(x).square().mean())
                optimizer.step()
    assert {finding.kind for finding in watch.findings} == {"not_finite", "features_not_finite"}
    for found in watch.findings:
        assert (found.cause.place.row, found.cause.place.position, found.step) == (123, 7, 4)


def test_a_loader_that_stands_still() -> None:
    data = torch.randint(0, 9, (8, 6))
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Watch(model, optimizer, detectors=[Batches()]) as watch:
        for step in range(8):
            with watch.step({"ids": (data if step > 1 else data + step + 1).clone()}):
                optimizer.step()
    (found,) = watch.findings.alarms
    assert (found.kind, found.since, found.step, found.ordinary) == ("batch_repeated", 2, 6, False)


class Broken(dict[str, Tensor]):
    """A batch that cannot be looked at."""

    def items(self) -> Any:
        """Fail."""
        raise ValueError("no batch")


def same_on_ranks(world: World) -> list[list[str]]:
    kinds = []
    for case in ("alike", "different", "broken on one rank"):
        torch.manual_seed(world.rank if case == "different" else 0)
        with Watch(nn.Linear(2, 2), detectors=[RankBatches()]) as watch:
            for _ in range(2):
                batch = {"x": torch.randn(4, 6)}
                with watch.step(Broken(batch) if case[:6] == "broken" and world.rank else batch):
                    pass
        kinds.append([finding.kind for finding in watch.findings])
    return kinds


def test_ranks_with_the_same_data(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(same_on_ranks) == [[["ranks_same_batch"], [], ["watch_failed"]]] * 2


@pytest.mark.parametrize(
    ("batch", "words"),
    [({"text": ["a"], "id": 3}, "keys text, id"), (["a"], "of type str"), (numpy.ones(3), "a ndarray")],
)
def test_no_tensors(batch: Any, words: str) -> None:
    found = seen(batch)["no_tensors"]
    assert words in found.what
    assert seen(None) == {}


@pytest.mark.parametrize("padding", ["stop", "other"])
def test_stop_tokens_that_are_never_a_target(padding: str) -> None:
    model = llama()
    with Watch(model, detectors=[Batches()]) as watch:
        for _ in range(20):
            batch = texts()
            batch["input_ids"][:, 7:] = 2 if padding == "stop" else 0
            batch["attention_mask"][:, 8:] = 0
            batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] < 3, -100)
            with watch.step(batch):
                pass
    (found,) = watch.findings
    assert (found.kind, found.ordinary) == ("stop_never_target", padding == "other")
    assert ("padding token" in found.text()) == (padding == "stop")
