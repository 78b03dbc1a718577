"""`model.compile`: the numbers of training without it, with LoRA, checkpointing and DDP; refused where it cannot be.

The backend is aot_eager: it traces forward and backward as inductor does, and generates no code, which takes a minute.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend, register_backend
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.lora import add_adapter
from rawloop.compiling import compile_blocks
from rawloop.config import RunConfig
from rawloop.contracts import Batch, Labels
from rawloop.data import DataConfig
from rawloop.data.splits import prepare_codes
from rawloop.demo import SPEECH
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig, load_family
from rawloop.families.loading import enable_activation_checkpointing
from rawloop.families.shared import TextFamily
from rawloop.listen.config import ListenConfig
from rawloop.losses import LossModule
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import RecordsConfig, read_metrics
from rawloop.settings import DDPConfig, TrainConfig
from rawloop.sharding import find_blocks, shard, whole
from tests.kept_runs import config_of, go

VOCABULARY = 64
CONFIG = RunConfig(model=ModelConfig(compile=True, compile_backend="aot_eager"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Let no compiled code and no limit reach another test."""
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    yield
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = limit


def llama(adapter: bool = True, recompute: bool = False) -> LossModule:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config)
    if recompute:
        enable_activation_checkpointing(model)
    if adapter:
        model = add_adapter(model, AdapterConfig(rank=4, target_modules=["all-linear"]), [])
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    family = TextFamily(ModelConfig())
    family.vocabulary = VOCABULARY
    return LossModule(model.train(), family.losses)


def batch_of(rows: int = 2, length: int = 12) -> Batch:
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    labels = ids.clone()
    labels[:, 0] = -100
    shifted = Labels.shifted(labels)
    return Batch({"input_ids": ids}, {"text": shifted}, {"text": len(shifted.targets)}, ["r"] * rows)


def compiled(module: LossModule, say: Callable[[str], None] = lambda line: None, batch: Batch | None = None) -> Any:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"))
    module.model = policy.prepare(module.model)
    compile_blocks(CONFIG, module, lambda: batch or batch_of(), policy, say)
    return module


def gradients(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the loss of a batch, and the gradient of each trained weight."""
    module.zero_grad()
    total = torch.stack([loss.total for loss in module(batch).values()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    found = {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}
    return {"loss": total.detach(), **{name.removeprefix("module."): value for name, value in found.items()}}


def assert_near(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_loss_and_gradients_are_those_without(recompute: bool) -> None:
    """With LoRA and activation checkpointing; without, also for another shape than that of the start."""
    said: list[str] = []
    module = compiled(llama(recompute=recompute), said.append)
    assert said[0].startswith("model.compile: 2 blocks (LlamaDecoderLayer) compiled by aot_eager in ")
    assert said[0].endswith(" s; another shape, and the first evaluation, take as long again")
    assert all(weight.grad is None for weight in module.parameters())
    blocks = find_blocks(module.model)
    assert [block._compiled_call_impl is None for block in blocks] == [False] * 2
    for batch in (batch_of(), *([] if recompute else [batch_of(3, 20)])):  # each shape is compiled
        assert_near(gradients(module, batch), gradients(llama(recompute=recompute), batch))


def gradients_of_ranks(world: World, kind: str, adapter: bool, breaks: bool) -> dict[str, Tensor]:
    """Return the gradients of both ranks' batches, with LoRA also under activation checkpointing."""
    module, policy = llama(adapter, recompute=adapter), PrecisionPolicy(PrecisionConfig(mode="fp32"), world=world)
    if breaks:
        breaking(module, "")
    policy.prepare(module.model, shard(module, world.device) if kind == "fsdp" else None)
    said: list[str] = []
    compile_blocks(CONFIG, module, batch_of, policy, said.append)
    parts = "LlamaAttention, LlamaMLP, LlamaRMSNorm), by parts, as" if breaks else "LlamaDecoderLayer) compiled by aot_"
    assert said[0].startswith(f"model.compile: 2 blocks ({parts}")
    assert not [name for name, weight in module.named_parameters() if weight.grad is not None]
    found = gradients(world.wrap(module, DDPConfig(find_unused_parameters=True)), batch_of(2 + world.rank))
    return {name: whole(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("kind", "adapter", "breaks"),
    [
        pytest.param("ddp", True, False, marks=pytest.mark.slow),
        pytest.param("ddp", False, False, marks=pytest.mark.slow),
        pytest.param("ddp", False, True, marks=pytest.mark.slow),
        pytest.param("fsdp", True, False, marks=pytest.mark.slow),
        pytest.param("fsdp", False, False, marks=pytest.mark.slow),
        ("fsdp", False, True),
    ],
)
def test_gradients_of_two_processes_are_those_without(
    run_ranks: Callable[..., list[Any]], kind: str, adapter: bool, breaks: bool
) -> None:
    first, second = run_ranks(gradients_of_ranks, kind, adapter, breaks)
    alone = [gradients(llama(adapter), batch_of(rows)) for rows in (2, 3)]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0] if name != "loss"}
    for found in (first, second) if kind == "ddp" else (first,):
        found.pop("loss")
        assert_near(found, mean)


def test_higgs_audio_is_compiled_by_parts_as_its_blocks_choose_positions_by_a_mask(demo_checkpoint: Path) -> None:
    family = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    batch, said = family.probe(), list[str]()
    plain = LossModule(family.load_model().train(), family.losses)
    module = compiled(LossModule(family.load_model().train(), family.losses), said.append, batch)
    assert "blocks (HiggsAudioV2Attention, HiggsAudioV2MLP, HiggsAudioV2RMSNorm), by parts, as" in said[0]
    assert_near(gradients(module, batch), gradients(plain, batch))


@pytest.mark.slow
def test_a_run_is_compiled_and_what_it_listens_to_is_not(demo_checkpoint: Path, tmp_path: Path) -> None:
    """The losses are those of the run without; listening to a clip compiles nothing more."""
    from torch._dynamo.utils import counters

    data = DataConfig(train=str(SPEECH / "train"), eval=str(SPEECH / "eval"), codes=str(tmp_path / "codes"))
    model = ModelConfig(path=str(demo_checkpoint / "model"))
    prepare_codes(data, load_family(model))
    plain = RunConfig(
        device="cpu",
        model=model,
        adapter=AdapterConfig(rank=4),
        data=data,
        train=TrainConfig(batch_size=2, max_steps=2, log_every=1),
        precision=PrecisionConfig(mode="fp32"),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=2),
        records=RecordsConfig(progress=False),
    )
    compiles = replace(plain, model=replace(plain.model, compile=True, compile_backend="aot_eager"))
    graphs: list[int] = []
    for name, config in {
        "plain": plain,
        "compiled": compiles,
        "heard": replace(compiles, listen=ListenConfig(samples=1, max_seconds=0.4)),
    }.items():
        torch.compiler.reset()
        counters.clear()
        go(replace(config, output=str(tmp_path / name)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 0 < graphs[1] == graphs[2]
    assert list((tmp_path / "heard" / "listen").glob("step-*/*.wav"))
    for key in ("loss", "eval_loss", "grad_norm"):
        right, found = (
            [line[key] for line in read_metrics(tmp_path / n) if key in line] for n in ("plain", "compiled")
        )
        assert found == pytest.approx(right, rel=1e-5)


CALLS: list[str] = []


def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
    """Compile as aot_eager does, and count the calls of each graph."""
    code = lookup_backend("aot_eager")(graph, inputs)

    def run(*arguments: Any) -> Any:
        CALLS.append("call")
        return code(*arguments)

    return run


def calls_of(world: World, config: RunConfig) -> int:
    """Train; return how often compiled code was called."""
    if "counting" not in torch.compiler.list_backends(exclude_tags=()):
        register_backend(counting, name="counting")
    CALLS.clear()
    assert config.train.rehearse
    go(config, world)
    return len(CALLS)


def test_each_micro_batch_runs_compiled_code_also_after_a_rehearsal(
    text_checkpoint: Path, text_data: Path, tmp_path: Path
) -> None:
    config = replace(config_of(text_checkpoint, text_data), adapter=AdapterConfig(mode="full"), output=str(tmp_path))
    model = replace(config.model, compile=True, compile_backend="counting")
    assert calls_of(World(), replace(config, model=model)) == 2 * (1 + 3 * 2)  # blocks x (start, micro-batches)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_runs_of_two_processes_run_compiled_code_with_equal_losses(
    text_checkpoint: Path,
    text_data: Path,
    tmp_path: Path,
    run_ranks: Callable[..., list[Any]],
    parallel: Any,
    adapter: Any,
) -> None:
    config = config_of(text_checkpoint, text_data)
    config = replace(
        config, parallel=parallel, adapter=AdapterConfig(mode=adapter), train=replace(config.train, batch_size=1)
    )
    counts = []
    for name, compiles in (("plain", False), ("compiled", True)):
        model = replace(config.model, compile=compiles, compile_backend="counting")
        counts.append(run_ranks(calls_of, replace(config, model=model, output=str(tmp_path / name))))
    assert counts == [[0, 0], [2 * (1 + 3 * 2)] * 2]
    for key in ("loss", "grad_norm"):
        right, found = ([line[key] for line in read_metrics(tmp_path / name)] for name in ("plain", "compiled"))
        assert len(found) == 3
        assert found == pytest.approx(right, rel=1e-5)


def breaking(module: LossModule, part: str) -> LossModule:
    """Let a part of each layer do what no graph can hold."""
    for layer in find_blocks(module.model):
        broken: Any = layer.get_submodule(part)
        own = broken.forward

        def forward(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            torch._dynamo.graph_break()
            return own(*args, **kwargs)

        broken.forward = forward
    return module


def test_blocks_that_break_graphs_are_compiled_in_parts_or_refused_with_the_reason() -> None:
    said: list[str] = []
    module = compiled(breaking(llama(adapter=False), ""), said.append)
    assert re.search(
        r"LlamaAttention, LlamaMLP, .*by parts, .* \(LlamaDecoderLayer: .*graph_break.*\), compiled", said[0]
    )
    assert_near(gradients(module, batch_of()), gradients(llama(adapter=False), batch_of()))
    with pytest.raises(
        UserError, match=r"neither by blocks nor by their parts.*graph_break.*set model.compile to false"
    ):
        compiled(module := breaking(llama(adapter=False), "mlp"))
    assert all(block._compiled_call_impl is None for block in module.modules())


def test_a_model_without_blocks_and_an_unknown_backend_are_refused() -> None:
    policy = PrecisionPolicy(PrecisionConfig(mode="fp32"))
    with pytest.raises(UserError, match="Linear has no list of blocks"):
        compile_blocks(CONFIG, LossModule(nn.Linear(2, 2), dict), batch_of, policy, print)  # type: ignore[arg-type]
    unknown = replace(CONFIG, model=replace(CONFIG.model, compile_backend="inducto"))
    with pytest.raises(UserError, match=r"model.compile_backend is 'inducto': torch has .*inductor"):
        compile_blocks(unknown, llama(), batch_of, policy, print)
