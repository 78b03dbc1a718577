"""`rawloop.call`: any batch to any model, by the names of its forward, through wrappers; nothing is swallowed."""

import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, WhisperConfig, WhisperForConditionalGeneration

import rawloop
from rawloop import Batch, Labels, UserError, World, call
from rawloop.inputs import arguments_for, check_inputs

IDS = torch.arange(12).view(2, 6)


@dataclass
class Data:
    input_ids: Tensor
    label_ids: Tensor
    attention_mask: Tensor | None = None


class ExtendedBatch:
    """As the original Higgs Audio code has it: attributes, `keys()` and a length."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def keys(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


Pair = namedtuple("Pair", ("input_ids", "labels"))


def tiny(kind: Any = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return kind(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))


class Original(nn.Module):
    """Has the names of the original Higgs Audio code, and no `**kwargs`."""

    def __init__(self, model: Any = None) -> None:
        super().__init__()
        self.model = model or tiny()
        self.config = self.model.config
        self.prepare_inputs_for_generation = None  # PEFT reads it

    def forward(self, input_ids: Tensor, label_ids: Tensor | None = None, label_audio_ids: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, labels=label_ids if label_ids is not None else label_audio_ids)


class PassesOn(nn.Module):
    """A wrapper that names nothing, with a loss beside its model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped, self.criterion = model, nn.CrossEntropyLoss()

    def forward(self, **kwargs: Any) -> Any:
        return self.wrapped(**kwargs)


class Renames(PassesOn):
    """A wrapper that takes a part by name and passes the rest on."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, label_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        return self.wrapped(input_ids=input_ids, labels=label_ids, **kwargs)


def lora(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "labels": IDS},
        {"input_ids": IDS, "label_ids": IDS, "position_ids": None},
        UserDict(input_ids=IDS, labels=IDS),
        SimpleNamespace(input_ids=IDS, label_ids=IDS),
        ExtendedBatch(input_ids=IDS, label_ids=IDS, attention_mask=None),
        Data(IDS, IDS),
        Pair(IDS, IDS),
        Batch({"input_ids": IDS, "labels": IDS}, {"text": Labels(IDS, IDS)}, {"text": 12}, ["a", "b"]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_all_kinds_of_batches_give_the_same_loss(batch: Any) -> None:
    model = tiny()
    assert torch.equal(call(model, batch).loss, model(input_ids=IDS, labels=IDS).loss)
    assert rawloop.call is call


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: model,
    "names of its own": Original,
    "kwargs alone": PassesOn,
    "names and kwargs": Renames,
    "wrapped twice": lambda model: PassesOn(Renames(model)),
    "peft": lora,
    "peft with a task": lambda model: lora(model, task_type="CAUSAL_LM"),
    "peft over names of its own": lambda model: lora(Original(model)),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled peft": lambda model: torch.compile(lora(model, task_type="CAUSAL_LM"), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap: Callable[[Any], Any]) -> None:
    expected = tiny()(input_ids=IDS, labels=IDS).loss
    model = wrap(tiny())
    for key in ("labels", "label_ids"):
        assert torch.equal(call(model, {"input_ids": IDS, key: IDS}).loss, expected)
    with pytest.raises(UserError, match=r"the batch has 'input_idz', which .* \(did you mean 'input_ids'"):
        call(model, {"input_idz": IDS, "labels": IDS})


def ddp_loss(world: World, wrap: Callable[[Any], Any]) -> tuple[float, str]:
    model = DistributedDataParallel(wrap(tiny()))
    loss = call(model, {"input_ids": IDS, "label_ids": IDS}).loss
    loss.backward()
    with pytest.raises(UserError) as refused:
        call(model, {"input_ids": IDS, "lables": IDS})
    return loss.item(), str(refused.value)


@pytest.mark.parametrize("wrap", [Original, lora], ids=["own names", "peft"])
def test_ddp_is_looked_through(run_ranks: Callable[..., list[Any]], wrap: Callable[[Any], Any]) -> None:
    expected = tiny()(input_ids=IDS, labels=IDS).loss.item()
    for loss, refused in run_ranks(ddp_loss, wrap, world_size=2, timeout=300):
        assert loss == expected
        assert "the batch has 'lables', which" in refused
        assert "did you mean 'label" in refused


def test_a_speech_model_takes_its_own_names() -> None:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    config = WhisperConfig(vocab_size=32, max_source_positions=50, pad_token_id=0, decoder_start_token_id=1, **sizes)
    config.bos_token_id = config.eos_token_id = 2
    model = WhisperForConditionalGeneration(config)
    features = torch.randn(2, 80, 100)
    assert torch.equal(
        call(model, {"input_features": features, "label_ids": IDS}, use_cache=False).loss,
        model(input_features=features, labels=IDS).loss,
    )
    with pytest.raises(UserError, match=r"WhisperForConditionalGeneration\.forward does not take \(did you mean 'inp"):
        call(model, {"input_feature": features, "labels": IDS})


def test_what_would_be_swallowed_is_refused_before_the_model_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tiny()(input_ids=IDS, lables=IDS).loss is None  # no error: it is swallowed
    with pytest.raises(UserError, match=r"the batch has 'labels', which LlamaModel\.forward does not take"):
        call(tiny(LlamaModel), {"input_ids": IDS, "labels": IDS})
    with pytest.raises(UserError, match=r"'audio_out_ids', .* rename the key, or remove it from the batch"):
        call(tiny(), {"input_ids": IDS, "audio_out_ids": IDS})
    check_inputs(tiny(), ["input_ids", "labels"])
    with pytest.raises(UserError, match=r"has 'label_ids', which LlamaForCausalLM.* \(did you mean 'labels'"):
        check_inputs(tiny(), ["input_ids", "label_ids"])


def test_two_keys_for_one_parameter_are_refused() -> None:
    with pytest.raises(UserError, match=r"both 'labels' and 'label_ids' for the parameter 'labels' of Llama"):
        call(tiny(), {"input_ids": IDS, "labels": IDS, "label_ids": IDS})


def test_peft_that_passes_labels_to_a_model_without_them_is_refused_with_the_way_out() -> None:
    model = lora(Original(), task_type="CAUSAL_LM")
    for key in ("labels", "label_ids"):
        with pytest.raises(
            UserError, match=r"PeftModelForCausalLM of PEFT passes inputs_embeds, labels to Original.*task_type=None"
        ):
            call(model, {"input_ids": IDS, key: IDS})


def test_audio_labels_go_by_both_names() -> None:
    assert list(arguments_for(Original(), {"input_ids": IDS, "audio_labels": IDS})) == ["input_ids", "label_audio_ids"]


class NoLoss(nn.Module):
    """Takes labels, and returns whatever it is told."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.output


@pytest.mark.parametrize("output", [SimpleNamespace(loss=None, logits=IDS), {"loss": None}])
def test_labels_without_a_loss_are_refused(output: Any) -> None:
    with pytest.raises(UserError, match=r"NoLoss\.forward was given labels and returned a loss of None: .* of labels"):
        call(NoLoss(output), {"input_ids": IDS, "label_ids": IDS})
    assert call(NoLoss(output), {"input_ids": IDS}) is output  # nobody asked for a loss


@pytest.mark.parametrize("output", [IDS, (IDS,), {"logits": IDS}, SimpleNamespace(logits=IDS)])
def test_an_output_of_another_kind_is_returned_as_it_is(output: Any) -> None:
    assert call(NoLoss(output), {"input_ids": IDS, "labels": IDS}) is output


class TakesMany(nn.Module):
    """A model on another device than its batches; it returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, ids: Tensor, features: list[Tensor], cache: dict[str, Tensor], name: str) -> Any:
        return ids, features, cache, name


def test_tensors_are_moved_to_the_device_of_the_model_wherever_they_are() -> None:
    batch = {"ids": IDS, "features": [IDS, (IDS, 3)], "cache": {"a": IDS}, "name": "x"}
    ids, features, cache, name = call(TakesMany(), batch)
    assert {t.device.type for t in (ids, features[0], features[1][0], cache["a"])} == {"meta"}
    assert (features[1][1], name) == (3, "x")


def test_only_pinned_tensors_are_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    to = Tensor.to

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["non_blocking"])
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", recorded)
    arguments_for(TakesMany(), {"ids": IDS, "features": [], "cache": {}, "name": "x"})
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    arguments_for(TakesMany(), {"ids": IDS, "features": [], "cache": {}, "name": "x"})
    assert seen == [False, True]


def test_a_wrapper_that_says_nothing_of_its_inputs_is_refused() -> None:
    class Two(PassesOn):
        """Which of its modules gets the inputs cannot be known."""

        def __init__(self) -> None:
            super().__init__(tiny())
            self.other = nn.Linear(2, 2)

    class Weight(PassesOn):
        """It has no module that could say it."""

        def __init__(self) -> None:
            super().__init__(nn.Identity())

    for model in (Two(), Weight()):
        with pytest.raises(UserError, match=r"\.forward names no parameter, .* write its inputs into its signature"):
            call(model, {"input_ids": IDS})


@pytest.mark.parametrize("wrong", [IDS.tolist(), 3, "text", None, IDS])
def test_what_is_no_batch_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"the batch is a .*: it must be a mapping, or an object with the inputs as"):
        call(tiny(), wrong)


def test_accelerates_forward_on_the_instance_is_read() -> None:
    model = tiny()
    original = model.forward
    model.forward = lambda input_ids, labels=None: original(input_ids=input_ids, labels=labels)
    with pytest.raises(UserError, match="'attention_mask', which LlamaForCausalLM"):
        call(model, {"input_ids": IDS, "attention_mask": IDS})
    assert call(model, {"input_ids": IDS, "label_ids": IDS}).loss is not None
