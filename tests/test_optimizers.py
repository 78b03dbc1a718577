"""Every optimizer: resumed bit for bit in a run, beside masters and loss scalers, and what does not go together."""

import copy
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from rawloop import optim
from rawloop.adapters.config import AdapterConfig
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.diagnose.config import ChecksConfig
from rawloop.dist import World
from rawloop.errors import UserError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.loop import Run, TrainConfig, train
from rawloop.optim import (
    KINDS,
    MuonWithAdamW,
    OptimConfig,
    build_optimizer,
    check_optimizer,
    is_hidden,
    state_bytes,
    use_average,
    use_trained,
)
from rawloop.optim_state import NamedOptimizerState
from rawloop.pack import pack, unpack
from rawloop.precision.advice import lost_updates
from rawloop.precision.config import LossScaleConfig, PrecisionConfig
from rawloop.precision.masters import TrainedWeights
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import TIMES, read_events, read_metrics

CPU = torch.device("cpu")
STEPS, STOP = 6, 3
NAMES = list(KINDS)
# schedule_free does not go with the masters of native_fp16
QUICK = {name: "amp_fp16" if name == "schedule_free" else "native_fp16" for name in NAMES}


def options(name: str, device: str = "cpu", **more: Any) -> OptimConfig:
    """The optimizer of a name, or a skip with the reason."""
    kind = KINDS[name]
    if kind.package and importlib.util.find_spec(kind.package) is None:
        pytest.skip(f"{name} needs {kind.package}")
    if device not in kind.devices:
        pytest.skip(f"{name} needs {' or '.join(kind.devices)}")
    return OptimConfig(name=name, schedule="constant", weight_decay=0.1, **more)  # type: ignore[arg-type]


@pytest.fixture
def config(text_checkpoint: Path, text_data: Path, tmp_path: Path) -> RunConfig:
    """A run of all weights, of which embeddings, heads and MLPs are large enough for 8-bit state."""
    return RunConfig(
        output=str(tmp_path / "straight"),
        device="cpu",
        model=ModelConfig(path=str(text_checkpoint)),
        adapter=AdapterConfig(mode="full"),
        data=DataConfig(train=str(text_data / "train.jsonl"), eval=str(text_data / "eval.jsonl")),
        train=TrainConfig(batch_size=1, max_steps=STEPS, log_every=1),
        checks=ChecksConfig(enabled=False),
        evaluation=EvaluationConfig(every=2, batch_size=5),
        checkpoint=CheckpointConfig(save_every=1, keep_last=0),
    )


def with_mode(config: RunConfig, mode: str) -> RunConfig:
    if mode == "stochastic":
        return replace(config, precision=PrecisionConfig("bf16", trainable_dtype="bf16", masters="stochastic"))
    scale = {"loss_scale": LossScaleConfig(init=2.0**10, growth_interval=2)} if mode.endswith("fp16") else {}
    return replace(config, precision=PrecisionConfig(mode=mode, **scale))  # type: ignore[arg-type]


def run(config: RunConfig, change: Callable[[Run], None] = lambda run: None) -> None:
    built = build_run(config, World(), lambda line: None)
    try:
        change(built)
        train(built)
    finally:
        built.close()


def content(config: RunConfig, step: int) -> dict[str, bytes]:
    slot = Path(config.output) / "checkpoints" / f"step-{step:08d}"
    return {path.relative_to(slot).as_posix(): path.read_bytes() for path in slot.rglob("*") if path.is_file()}


def numbers(config: RunConfig) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key not in TIMES} for line in read_metrics(Path(config.output))]


def stopped_and_resumed(config: RunConfig) -> RunConfig:
    """A copy of a run of which only the first steps are left, trained again to the end."""
    again = replace(config, output=f"{config.output}-resumed", resume="latest")
    shutil.copytree(config.output, again.output, symlinks=True)
    for step in range(STOP + 1, STEPS + 1):
        shutil.rmtree(Path(again.output) / "checkpoints" / f"step-{step:08d}")
    (Path(again.output) / "best").unlink()
    run(again)
    return again


def check_resume(config: RunConfig) -> None:
    run(config)
    again = stopped_and_resumed(config)
    expected = content(config, STEPS)
    assert expected.keys() >= {"state/optimizer.json", "state/optimizer.safetensors", "MANIFEST.json"}
    assert content(again, STEPS) == expected
    assert numbers(again) == numbers(config)
    warnings = [event for event in read_events(Path(config.output)) if event["kind"] in ("finding", "warning")]
    assert [event for event in warnings if event["kind"] == "finding"] == []


@pytest.mark.parametrize(("name", "mode"), [*QUICK.items(), ("adamw_8bit", "stochastic")], ids=lambda value: str(value))
def test_a_resumed_run_is_the_same_to_the_byte(config: RunConfig, name: str, mode: str) -> None:
    check_resume(with_mode(replace(config, optim=options(name, lr=1e-3)), mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16", "stochastic"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_in_all_modes(config: RunConfig, name: str, adapter: Any, mode: str) -> None:
    config = with_mode(replace(config, optim=options(name, lr=1e-3), adapter=AdapterConfig(mode=adapter)), mode)
    if name == "schedule_free" and ((adapter, mode) == ("full", "native_fp16") or mode == "stochastic"):
        with pytest.raises(UserError, match="AdamWScheduleFree averages the weights that it holds"):
            run(config)
        return
    check_resume(config)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_lora_beside_a_quantised_base_is_rounded_stochastically(config: RunConfig, quantization: Any) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    lora = AdapterConfig(mode="lora", modules_to_save=["lm_head"])
    config = with_mode(replace(config, optim=options("adamw", lr=1e-3), adapter=lora), "stochastic")
    config = replace(config, model=replace(config.model, quantization=quantization))
    check_resume(config)
    losses = [line["eval_loss"] for line in numbers(config) if "eval_loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", NAMES)
def test_stored_state_goes_on_bit_for_bit(name: str, device: str) -> None:
    config = options(name, device, lr=1e-2)

    def made() -> tuple[nn.Linear, Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(512, 512).to(device)  # large enough to be paged
        return net, build_optimizer(net.named_parameters(), config)

    def go_on(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            use_trained(optimizer)
            for weight in net.parameters():
                generator = torch.Generator().manual_seed(step)
                weight.grad = torch.randn(weight.shape, generator=generator).to(device)
            optimizer.step()

    net, optimizer = made()
    go_on(net, optimizer, range(3))
    use_average(optimizer)
    stored = NamedOptimizerState(optimizer, net.named_parameters, restore_options=False).state_dict()
    state = copy.deepcopy(unpack(pack(stored)))
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    go_on(net, optimizer, range(3, 6))
    other, resumed = made()
    other.load_state_dict(weights)
    NamedOptimizerState(resumed, other.named_parameters, restore_options=False).load_state_dict(state)
    if getattr(resumed, "is_paged", False):
        paged = [value for value in resumed.state[other.weight].values() if getattr(value, "is_paged", False)]
        assert len(paged) == 2
    go_on(other, resumed, range(3, 6))
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def train_in(world: World, config: RunConfig) -> list[float]:
    """The losses of the evaluations of a run in one of several processes."""
    built = build_run(config, world, lambda line: None)
    try:
        train(built)
    finally:
        built.close()
    return [float(line["eval_loss"] or 0) for line in read_metrics(Path(config.output)) if "eval_loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(
    config: RunConfig, name: str, quantization: Any, run_ranks: Callable[..., list[Any]]
) -> None:
    lora = AdapterConfig(mode="lora", modules_to_save=["lm_head"]) if quantization else config.adapter
    config = with_mode(replace(config, optim=options(name, lr=1e-3), adapter=lora), "fp32")
    config = replace(config, model=replace(config.model, quantization=quantization))
    one = replace(config, train=replace(config.train, accumulation=2))
    run(one)
    expected = [line["eval_loss"] for line in numbers(one) if "eval_loss" in line]
    for losses in run_ranks(train_in, replace(config, output=f"{config.output}-two"), timeout=240):
        assert losses == pytest.approx(expected, rel=2e-3)
    findings = [e for e in read_events(Path(f"{config.output}-two")) if e["kind"] == "finding"]
    assert findings == []


# -- schedule-free ---------------------------------------------------------------------------------------------------


def test_the_evaluator_and_the_checkpoint_have_the_average_and_training_goes_on_without_it(config: RunConfig) -> None:
    config = with_mode(replace(config, optim=options("schedule_free", lr=1e-2)), "fp32")
    evaluated: list[dict[str, torch.Tensor]] = []

    def change(run: Run) -> None:
        assert run.evaluator is not None
        model, evaluate = run.evaluator.model, run.evaluator.run

        def keep(*args: Any) -> Any:
            evaluated.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
            return evaluate(*args)

        run.evaluator.run = keep  # type: ignore[assignment, method-assign]

    run(config, change)
    never = replace(
        config,
        output=f"{config.output}-never",
        evaluation=EvaluationConfig(every=100, batch_size=5),
        checkpoint=CheckpointConfig(save_every=100),
    )
    run(never)
    # 3 evaluations and 6 saves more, and every number of training is the same
    losses = [[line["loss"] for line in numbers(each) if "loss" in line] for each in (config, never)]
    assert losses[0] == losses[1]
    assert content(never, STEPS)["state/optimizer.safetensors"] == content(config, STEPS)["state/optimizer.safetensors"]
    from safetensors.torch import load_file

    slot = Path(config.output) / "checkpoints" / f"step-{STEPS:08d}"
    saved, state = load_file(slot / "model" / "model.safetensors"), load_file(slot / "state" / "optimizer.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    key = f"/state/{name}/"
    assert torch.equal(saved[name], evaluated[-1]["model." + name if "model." + name in evaluated[-1] else name])
    # y = x + (1 - beta1) (z - x), where y trains, x is the average and z the iterate of the update
    trained, base = state[key + "trained"], state[key + "z"]
    assert torch.allclose(trained, saved[name].lerp(base, 1 - config.optim.beta1), atol=1e-6)
    assert not torch.equal(trained, saved[name])


def test_weights_that_train_come_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 64)
    optimizer = build_optimizer(net.named_parameters(), options("schedule_free", lr=0.1))
    for _ in range(3):
        use_trained(optimizer)
        net(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = net.weight.detach().clone()
    use_average(optimizer)
    average = net.weight.detach().clone()
    use_average(optimizer)
    assert torch.equal(net.weight, average)
    assert not torch.equal(average, before)
    use_trained(optimizer)
    assert torch.equal(net.weight, before)


def test_a_schedule_beside_averaging_is_refused() -> None:
    with pytest.raises(UserError, match=r"'schedule_free' and optim.schedule is 'cosine'.* set optim.schedule to cons"):
        OptimConfig(name="schedule_free")


# -- groups ------------------------------------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_hidden_layers_alone() -> None:
    names = {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "model.layers.0.conv.weight": (2, 2, 2),
        "model.norm.weight": (4,),
        "audio_lm_head.modules_to_save.default.weight": (8, 4),
        "model.layers.0.q_proj.lora_A.default.weight": (2, 4),
    }
    weights = {name: nn.Parameter(torch.ones(shape)) for name, shape in names.items()}
    optimizer = build_optimizer(weights.items(), OptimConfig(name="muon", lr=0.1, weight_decay=0.2))
    assert isinstance(optimizer, MuonWithAdamW)
    hidden, matrices, vectors = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    ids = {id(weight): name for name, weight in weights.items()}
    assert [ids[p] for p in hidden] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.q_proj.lora_A.default.weight",
    ]
    assert [ids[p] for p in vectors] == ["model.norm.weight"]
    assert len(matrices) == 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    assert is_hidden("transformer.h.0.attn.weight", nn.Parameter(torch.ones(2, 2)))
    assert not is_hidden("transformer.wte.weight", nn.Parameter(torch.ones(2, 2)))


def test_muon_with_adamw_updates_as_the_two_do_alone() -> None:
    def weights() -> list[nn.Parameter]:
        torch.manual_seed(0)
        made = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
        for weight in made:
            weight.grad = torch.randn_like(weight)
        return made

    matrix, vector = weights()
    both = build_optimizer([("a.weight", matrix), ("a.bias", vector)], OptimConfig(name="muon", lr=0.1))
    alone = weights()
    muon = torch.optim.Muon(alone[:1], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(alone[1:], lr=0.1, weight_decay=0.0, fused=True)
    for _ in range(3):
        both.step()
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    assert torch.equal(matrix, alone[0])
    assert torch.equal(vector, alone[1])
    assert set(both.state) == {matrix, vector}


def test_muon_without_a_matrix_of_a_hidden_layer_is_refused() -> None:
    with pytest.raises(UserError, match="'muon', and no matrix of a hidden layer is trained: take adamw"):
        build_optimizer([("lm_head.weight", nn.Parameter(torch.ones(2, 2)))], OptimConfig(name="muon"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_takes_as_much_memory_as_the_rehearsal_reserves(name: str, dtype: torch.dtype) -> None:
    config = options(name)
    for key in ("a.weight", "lm_head.weight"):
        named = {"b.weight": nn.Parameter(torch.ones(4, 4)), key: nn.Parameter(torch.randn(512, 512).to(dtype))}
        for each in named.values():
            each.grad = torch.ones_like(each)
        optimizer = build_optimizer(named.items(), config)
        use_trained(optimizer)
        optimizer.step()
        weight = named[key]
        took = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
        assert state_bytes(config, key, weight) == pytest.approx(took, rel=0.01, abs=0.005 * weight.nbytes)


# -- updates that rounding loses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "schedule_free"])
def test_the_predicted_share_of_lost_updates_is_what_happens(name: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64).bfloat16() * 0.02)
    trained = TrainedWeights([("a.weight", weight)], torch.bfloat16, CPU, masters=False)
    lr = {"adafactor": 1e-3, "muon": 1e-4}.get(name, 2e-5)
    optimizer = build_optimizer([("a.weight", weight)], replace(options(name, lr=lr), weight_decay=0.0))
    said = lost_updates(trained, optimizer)
    before = weight.detach().clone()
    weight.grad = torch.randn(64, 64).sign().bfloat16()  # every number gets an update of the usual size
    optimizer.step()
    happened = float((weight == before).float().mean())
    predicted = float(said.partition("about ")[2].partition("%")[0]) / 100
    assert predicted == pytest.approx(happened, abs=0.1)
    assert 0.2 < happened < 0.99


def test_an_average_of_16_bit_weights_is_refused_in_anybodys_loop() -> None:
    net = nn.Linear(64, 64)
    policy = PrecisionPolicy(PrecisionConfig(mode="bf16", trainable_dtype="bf16"), device=CPU)
    policy.prepare(net)
    optimizer = build_optimizer(policy.named_parameters(), options("schedule_free"))
    with pytest.raises(UserError, match=r"averages the weights .* torch.bfloat16: .* or take adamw"):
        policy.adopt(optimizer)


# -- refused before the model is loaded --------------------------------------------------------------------------------


def test_a_missing_package_is_told_with_the_line_that_installs_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    nothing = replace(config, optim=OptimConfig(name="adamw_8bit"), model=ModelConfig(path="no/model"))
    with pytest.raises(
        UserError, match=r"needs bitsandbytes, .* `pip install 'rawloop\[bitsandbytes\]'`, or take adafa"
    ):
        run(nothing)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"'paged_adamw_8bit', which works on cuda, and the device is cpu: take adamw_8bi"
    ):
        run(replace(nothing, optim=OptimConfig(name="paged_adamw_8bit")))


def test_an_update_that_fails_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, closure: Any = None) -> None:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(torch.optim.Adafactor, "step", fails)
    with pytest.raises(
        UserError, match=r"'adafactor', and its update fails on this cpu \(NotImplementedError: no kern"
    ):
        check_optimizer(OptimConfig(name="adafactor"), CPU)
    monkeypatch.setattr(torch.optim.Adafactor, "step", lambda self, closure=None: None)
    with pytest.raises(UserError, match="'adafactor', and its update changes no weight on this cpu"):
        check_optimizer(OptimConfig(name="adafactor"), CPU)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"name": "adam"}, "optim.name is 'adam': it must be one of adamw, adamw_8bit"),
        ({"name": "adafactor", "beta2": 0.95}, r"optim.beta2 is 0.95 and optim.name is 'adafactor', which does not re"),
        ({"name": "lion", "eps": 1e-6}, "optim.eps is 1e-06 and optim.name is 'lion'"),
    ],
)
def test_options_that_an_optimizer_does_not_read_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        OptimConfig(**wrong)


def test_another_optimizer_is_refused_on_a_resume(config: RunConfig) -> None:
    config = with_mode(replace(config, train=TrainConfig(batch_size=1, max_steps=1)), "fp32")
    run(config)
    with pytest.raises(UserError, match=r"optim\.name adamw -> adafactor"):
        run(replace(config, optim=OptimConfig(name="adafactor"), resume="latest"))


def test_muon_goes_on_with_the_groups_of_a_state_that_torch_has_loaded() -> None:
    weights = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    optimizer = build_optimizer([("hidden.weight", weights[0]), ("hidden.bias", weights[1])], OptimConfig(name="muon"))
    for weight in weights:
        weight.grad = torch.eye(4) if weight.ndim == 2 else torch.ones(4)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    before = [weight.clone() for weight in weights]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(map(torch.equal, before, weights))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_small_learning_rate_is_no_optimizer_that_fails(name: Any) -> None:
    check_optimizer(OptimConfig(name=name, lr=1e-9), torch.device("cpu"))


def test_muon_alone_refuses_what_it_does_not_read() -> None:
    matrix = [("hidden.weight", nn.Parameter(torch.ones(4, 4)))]
    with pytest.raises(UserError, match=r"muon does not read optim.beta1, optim.beta2 and optim.eps: leave them out"):
        build_optimizer(matrix, OptimConfig(name="muon", beta1=0.8))
    assert build_optimizer(matrix, OptimConfig(name="muon"))
