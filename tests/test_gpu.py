"""On a CUDA device training takes the CPU's path, and keeps the promises that only a device can break.

A check is a function of a device. The CPU runs it too: it must pass there, and must fail once it is made to measure a
run that does not train or a promise that is broken. Without that, a tolerance says nothing.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch has no types for parts of torch.cuda and its modes)

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from rawloop.adapters.config import AdapterConfig
from rawloop.adapters.files import ModelFiles
from rawloop.adapters.lora import add_adapter
from rawloop.build import build_run
from rawloop.checkpoint.config import CheckpointConfig
from rawloop.config import RunConfig, to_yaml
from rawloop.contracts import Batch, Labels
from rawloop.data import DataConfig
from rawloop.dist import open_world
from rawloop.errors import RawloopError
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig
from rawloop.loop import TrainConfig, train
from rawloop.optim import OptimConfig
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.records import read_metrics
from rawloop.seed import RngState, seed_all

gpu = pytest.mark.gpu
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MODES = ["fp32", "bf16", "amp_fp16", "native_fp16"]
# Largest distance from fp32 on the CPU: of the trained weights, as a part of the way that training moves them, and of
# the losses, as a part of their fall. On the CPU the modes are at 0, 0.040, 0.010 and 0.007 of the way.
OF_THE_WAY = {"fp32": 0.01, "bf16": 0.12, "amp_fp16": 0.03, "native_fp16": 0.03}
OF_THE_FALL = {"fp32": 1e-3, "bf16": 1e-2, "amp_fp16": 1e-2, "native_fp16": 1e-2}
STEPS, HALF = 6, 3


class Trained(NamedTuple):
    """The losses of a run, step by step, and its trained weights before and after, float32 on the CPU."""

    losses: list[float]
    eval_losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def way_to(self, after: dict[str, Tensor]) -> Tensor:
        return torch.cat([(after[name] - self.before[name]).flatten() for name in self.before])


def speech_config(checkpoint: Path, data: Path, output: Path, **keys: Any) -> RunConfig:
    sources = DataConfig(train=str(data / "train"), eval=str(data / "eval"), codes=str(data / "codes"))
    config = RunConfig(model=ModelConfig(path=str(checkpoint / "model")), data=sources, output=str(output))
    return replace(
        config,
        train=TrainConfig(batch_size=2, accumulation=2, max_steps=STEPS, log_every=1),
        evaluation=EvaluationConfig(every=HALF),
        optim=OptimConfig(lr=3e-3, schedule="constant"),
        **keys,
    )


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}


def go(config: RunConfig, steps: int, prepared: Callable[[Any], None] = lambda run: None) -> Trained:
    with open_world(config.device) as world:
        run = build_run(config, world, lambda line: None)
        run.total_steps = steps
        before = trained_weights(run.module)
        try:
            prepared(run)
            train(run)
        finally:
            run.close()
    lines = read_metrics(Path(config.output))
    losses, evals = ([float(line[key] or 0) for line in lines if key in line] for key in ("loss", "eval_loss"))
    return Trained(losses, evals, before, trained_weights(run.module))


def check_training(reference: Trained, found: Trained, mode: str) -> None:
    """`found` has taken the way of `reference`, step by step: each loss and every weight."""
    for wanted, losses in ((reference.losses, found.losses), (reference.eval_losses, found.eval_losses)):
        fall = max(wanted) - min(wanted)
        assert fall > 0.5, "the reference did not train"
        assert losses == pytest.approx(wanted, abs=OF_THE_FALL[mode] * fall)
    way = reference.way_to(reference.after)
    distance = reference.way_to(found.after) - way
    assert float(distance.norm() / way.norm()) < OF_THE_WAY[mode]


def check_resumed(straight: Trained, resumed: Trained, device: torch.device) -> None:
    """Stopping and resuming changes nothing; on a device kernels may add in another order."""
    way = straight.way_to(straight.after)
    assert float(way.norm()) > 0.1, "the straight run did not train"
    distance = straight.way_to(resumed.after) - way
    assert float(distance.norm() / way.norm()) <= (0.0 if device == CPU else 1e-3)
    assert resumed.losses == pytest.approx(straight.losses, rel=0.0 if device == CPU else 1e-4)
    assert resumed.eval_losses == pytest.approx(straight.eval_losses, rel=0.0 if device == CPU else 1e-4)


@pytest.fixture(scope="session")
def reference(demo_checkpoint: Path, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """FP32 on the CPU."""
    output = tmp_path_factory.mktemp("reference") / "run"
    precision = PrecisionConfig("fp32")
    return go(speech_config(demo_checkpoint, demo_data, output, device="cpu", precision=precision), STEPS)


@gpu
@pytest.mark.parametrize("mode", MODES)
def test_cuda_trains_as_the_cpu_does_and_resumes(
    reference: Trained, demo_checkpoint: Path, demo_data: Path, tmp_path: Path, mode: Any
) -> None:
    keys: dict[str, Any] = {"device": "cuda", "precision": PrecisionConfig(mode)}
    straight = go(speech_config(demo_checkpoint, demo_data, tmp_path / "straight", **keys), STEPS)
    check_training(reference, straight, mode)
    stopped = speech_config(demo_checkpoint, demo_data, tmp_path / "stopped", **keys)
    go(stopped, HALF)
    check_resumed(straight, go(replace(stopped, resume="latest"), STEPS), CUDA)


@pytest.mark.parametrize("mode", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_same_checks_pass_on_the_cpu(
    reference: Trained, demo_checkpoint: Path, demo_data: Path, tmp_path: Path, mode: Any
) -> None:
    keys: dict[str, Any] = {"device": "cpu", "precision": PrecisionConfig(mode)}
    straight = go(speech_config(demo_checkpoint, demo_data, tmp_path / "straight", **keys), STEPS)
    check_training(reference, straight, mode)
    stopped = speech_config(demo_checkpoint, demo_data, tmp_path / "stopped", **keys)
    half = go(stopped, HALF)
    check_resumed(straight, go(replace(stopped, resume="latest"), STEPS), CPU)
    with pytest.raises(AssertionError):  # a resume that goes no further
        check_resumed(straight, half, CUDA)


@pytest.mark.parametrize("factor", [0.0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_the_checks_fail_where_nothing_or_too_little_is_trained(
    reference: Trained, demo_checkpoint: Path, demo_data: Path, tmp_path: Path, factor: float
) -> None:
    def slow(run: Any) -> None:
        run.lr = lambda step: 3e-3 * factor

    idle = go(speech_config(demo_checkpoint, demo_data, tmp_path, device="cpu"), STEPS, slow)
    for mode in MODES:
        for found in (
            idle,
            idle._replace(losses=reference.losses, eval_losses=reference.eval_losses),
            idle._replace(after=reference.after),
        ):
            with pytest.raises(AssertionError):
                check_training(reference, found, mode)
    if not factor:
        with pytest.raises(AssertionError, match="did not train"):
            check_training(idle, idle, "bf16")
        with pytest.raises(AssertionError, match="did not train"):
            check_resumed(idle, idle, CUDA)


@gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_rounds_to_tf32_only_where_asked(tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        PrecisionPolicy(PrecisionConfig("fp32", tf32=tf32), CUDA).prepare(nn.Linear(2, 2))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
        one = 1.0 + 2.0**-12  # TF32 keeps 10 bits of it
        product = torch.full((64, 64), one, device="cuda") @ torch.eye(64, device="cuda")
        assert tf32 or bool((product == one).all())
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# Memory


class Peak(TorchDispatchMode):
    """The most bytes held at once of tensors that were made on the CPU since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata in given:  # a view
                    continue
                self.made[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


def peak_of(action: Callable[[], object], device: torch.device) -> int:
    """The most bytes that an action holds on the device at once, beyond those of before."""
    gc.collect()
    if device.type == "cpu":
        with Peak() as memory:
            action()
        return int(memory.peak)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


LAYERS, WIDTH = 8, 512


class Frozen(nn.Module):
    """Frozen layers with a trained vector after each, so that backward goes through all of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS))
        self.layers.requires_grad_(False)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = layer(x * scale)
        return x.float().square().mean()


def check_frozen_weights_are_cast_once(mode: Any, stored: torch.dtype, device: torch.device) -> None:
    """A pass holds no second copy of the frozen weights: autocast would keep one until backward."""
    policy = PrecisionPolicy(PrecisionConfig(mode), device)
    model = policy.prepare(Frozen(stored))
    x = torch.ones(2, WIDTH, device=device)

    def step() -> None:
        with policy.autocast():
            loss = model(x)
        policy.backward(loss)

    step()  # libraries take their workspace at the first
    held = peak_of(step, device)
    frozen = 2 * LAYERS * WIDTH * WIDTH
    assert held < 0.3 * frozen, f"{held:,} bytes are held, {frozen:,} are those of the frozen weights"


@gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bf16", "amp_fp16", "native_fp16"])
def test_cuda_casts_frozen_weights_once(mode: str, stored: torch.dtype) -> None:
    check_frozen_weights_are_cast_once(mode, stored, CUDA)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_frozen_weights_are_cast_once_and_a_cast_in_each_pass_is_seen(
    stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_frozen_weights_are_cast_once("amp_fp16", stored, CPU)
    monkeypatch.setattr(PrecisionPolicy, "prepare", lambda self, model: spoilt(self, model, stored))
    with pytest.raises(AssertionError, match="bytes are held"):
        check_frozen_weights_are_cast_once("amp_fp16", stored, CPU)


PREPARE = PrecisionPolicy.prepare


def spoilt(policy: PrecisionPolicy, model: nn.Module, stored: torch.dtype) -> nn.Module:
    """A model whose frozen weights have their stored dtype again, after `prepare`."""
    model = PREPARE(policy, model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(stored)
    return model


def whole_model() -> LlamaForCausalLM:
    """25 MB in float32."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def check_saving_needs_no_room_on_the_device(
    save: Callable[[nn.Module, Path], object], folder: Path, device: torch.device
) -> None:
    model = whole_model().to(device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    held = peak_of(lambda: save(model, folder), device)
    assert held < 0.1 * size, f"{held:,} bytes are held on the device, the model has {size:,}"


def save_whole(model: nn.Module, folder: Path) -> None:
    ModelFiles(model, lambda path: model).snapshot(copy=True)(folder)


@gpu
def test_saving_a_model_needs_no_room_on_the_device(tmp_path: Path) -> None:
    check_saving_needs_no_room_on_the_device(save_whole, tmp_path, CUDA)


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=gpu)])
def test_a_copy_on_the_device_is_seen(tmp_path: Path, device: torch.device) -> None:
    with pytest.raises(AssertionError, match="bytes are held on the device"):
        check_saving_needs_no_room_on_the_device(lambda model, _: copy.deepcopy(model), tmp_path, device)


@gpu
def test_a_save_in_the_background_copies_to_pinned_memory(
    demo_checkpoint: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy from the device into pageable memory waits for the device, tensor by tensor."""
    pageable: list[tuple[int, ...]] = []
    copies = Tensor.copy_

    def look(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if source.is_cuda and self.device.type == "cpu" and self.ndim and not (self.is_pinned() and non_blocking):
            pageable.append(tuple(self.shape))
        return copies(self, source, non_blocking)

    config = speech_config(demo_checkpoint, demo_data, tmp_path, device="cuda")
    config = replace(config, checkpoint=CheckpointConfig(save_every=2), evaluation=EvaluationConfig(enabled=False))
    monkeypatch.setattr(Tensor, "copy_", look)
    go(config, 4)
    assert not pageable


# What waits for the device, and what it must not compute


def a_batch() -> Batch:
    ids = torch.arange(2**20).view(2, -1)
    return Batch({"input_ids": ids}, {"text": Labels(ids.flatten(), ids.flatten())}, {"text": ids.numel()}, ["a", "b"])


@gpu
def test_a_pinned_batch_is_moved_without_a_wait_and_a_pageable_one_with_one() -> None:
    pinned, pageable = a_batch().pin_memory(), a_batch()
    pinned.to(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to(CUDA)
        with pytest.raises(RuntimeError, match="synchronizing"):
            pageable.to(CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.inputs["input_ids"].cpu(), pageable.inputs["input_ids"])


@gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_window_waits_for_the_device_once_however_many_micro_batches_it_has(
    demo_checkpoint: Path, demo_data: Path, tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rawloop.loop

    forward, passes = rawloop.loop.forward_backward, 0

    def without_waits(run: Any, batch: Batch, *more: Any, **keys: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > 2:  # libraries set themselves up in the first window
            torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(run, batch.pin_memory(), *more, **keys)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(rawloop.loop, "forward_backward", without_waits)
    config = speech_config(demo_checkpoint, demo_data, tmp_path, device="cuda", precision=PrecisionConfig(mode))
    go(replace(config, evaluation=EvaluationConfig(enabled=False)), 3)
    assert passes == 6


class NoFloat64(TorchDispatchMode):
    """Refuses float64 anywhere but on the CPU: MPS has none, and on most GPUs it is very slow."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.device.type != "cpu":
                raise AssertionError(f"{func} makes float64 on {tensor.device}")
        return result


@gpu
def test_training_with_its_checks_and_evaluation_computes_no_float64_on_the_device(
    demo_checkpoint: Path, demo_data: Path, tmp_path: Path
) -> None:
    with NoFloat64():
        found = go(speech_config(demo_checkpoint, demo_data, tmp_path, device="cuda"), STEPS)
    assert len(found.losses) == STEPS


def test_float64_off_the_cpu_is_seen() -> None:
    with NoFloat64(), pytest.raises(AssertionError, match="makes float64 on meta"):
        torch.ones(2, device="meta").double()
    with NoFloat64():
        torch.ones(2).double()


# Random streams


@gpu
def test_a_rank_stores_and_restores_the_stream_of_its_own_device_alone() -> None:
    torch.cuda.set_device(0)
    state = RngState(0, 0)
    torch.rand(1, device="cuda")
    stored = state.state_dict()
    expected = torch.rand(3, device="cuda").tolist()
    seed_all(1, 0)
    others = [torch.cuda.get_rng_state(index) for index in range(1, torch.cuda.device_count())]
    state.load_state_dict(stored)
    assert torch.rand(3, device="cuda").tolist() == expected
    untouched = [torch.cuda.get_rng_state(index) for index in range(1, torch.cuda.device_count())]
    assert all(torch.equal(*pair) for pair in zip(others, untouched, strict=True))
    streams = stored["cuda"]
    assert isinstance(streams, Tensor) or len(streams) == 1


# Errors


@gpu
def test_out_of_memory_names_samples_shapes_and_settings(
    demo_checkpoint: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rawloop.loop

    forward, passes = rawloop.loop.forward_backward, 0

    def too_large(run: Any, batch: Batch, *more: Any, **keys: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes < 2:
            return forward(run, batch, *more, **keys)
        hog = torch.empty(int(0.999 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
        torch.cuda.set_per_process_memory_fraction(1e-6)  # the allocator may take nothing more
        try:
            return forward(run, batch, *more, **keys)
        finally:
            del hog
            torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(rawloop.loop, "forward_backward", too_large)
    torch.cuda.empty_cache()
    with pytest.raises(RawloopError, match=r"(?s)out of memory.*sample.*\(2, .*batch_size"):
        go(speech_config(demo_checkpoint, demo_data, tmp_path, device="cuda"), 2)
    gc.collect()
    torch.cuda.empty_cache()


ASYNCHRONOUS = """
import sys, torch, rawloop.loop
from rawloop.cli import main
forward = rawloop.loop.forward_backward
def broken(run, *more, **keys):
    torch.zeros(2, device="cuda")[torch.full((1,), 5, device="cuda")]  # the device finds out later
    return forward(run, *more, **keys)
rawloop.loop.forward_backward = broken
raise SystemExit(main(["train", "--config", sys.argv[1]]))
"""


@gpu
def test_an_error_that_the_device_reports_later_names_the_samples_of_the_window(
    demo_checkpoint: Path, demo_data: Path, tmp_path: Path
) -> None:
    """In a process of its own: after such an error no CUDA call works any more."""
    config = speech_config(demo_checkpoint, demo_data, tmp_path / "run", device="cuda")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", ASYNCHRONOUS, str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    names = [sample for sample in ("en-", "vi-", "ar-", "zh-", "sample") if sample in done.stderr]
    assert names, done.stderr[-2000:]


@gpu
@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs one GPU for two processes")
def test_two_processes_on_one_gpu_are_told_so(demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> None:
    done = torchrun(speech_config(demo_checkpoint, demo_data, tmp_path / "run", device="cuda"), tmp_path)
    assert done.returncode != 0
    assert "rawloop train: " in done.stderr
    assert "GPU" in done.stderr or "device" in done.stderr
    assert "Traceback" not in done.stderr


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_that_fails_is_heard_before_nccl_ends(demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> None:
    config = speech_config(demo_checkpoint, demo_data, tmp_path / "run", device="cuda")
    done = torchrun(config, tmp_path, FAILS_ON_RANK_1)
    assert done.returncode != 0
    assert "broken on purpose" in done.stderr


FAILS_ON_RANK_1 = """
import os, sys, rawloop.loop
from rawloop.cli import main
from rawloop.errors import TrainingError
forward, passes = rawloop.loop.forward_backward, 0
def broken(*arguments, **keys):
    global passes
    passes += 1
    if passes == 3 and os.environ["RANK"] == "1":
        raise TrainingError("broken on purpose")
    return forward(*arguments, **keys)
rawloop.loop.forward_backward = broken
raise SystemExit(main(sys.argv[1:]))
"""


def torchrun(config: RunConfig, folder: Path, script: str = "") -> "subprocess.CompletedProcess[str]":
    """Train in two processes, which must end within two minutes."""
    (folder / "config.yaml").write_text(to_yaml(config))
    program = ["-m", "rawloop"]
    if script:
        (folder / "script.py").write_text(script)
        program = [str(folder / "script.py")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
    command = [*launch, "train", "--config", str(folder / "config.yaml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@gpu
def test_a_lora_run_on_a_bfloat16_base_fits_into_little_more_than_the_base() -> None:
    """Weights, one pass and an update of LoRA over a whole model: no part is held twice."""
    with torch.device("meta"):
        size = sum(p.numel() for p in whole_model().parameters())
    policy = PrecisionPolicy(PrecisionConfig("bf16"), CUDA)
    model = add_adapter(whole_model().to(torch.bfloat16), AdapterConfig(rank=4), [])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = policy.prepare(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(1, 16, dtype=torch.long, device=CUDA)

    def step() -> None:
        with policy.autocast():
            loss = model(input_ids=ids, labels=ids).loss
        policy.backward(loss)
        policy.step(optimizer)

    step()
    resident = torch.cuda.memory_allocated() - before
    assert resident < 1.1 * (2 * size + 12 * trained) + 2**25  # and the workspace of cuBLAS
    assert peak_of(step, CUDA) < 0.2 * 2 * size + 12 * trained
