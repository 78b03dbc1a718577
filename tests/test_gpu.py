"""The whole way on a CUDA device: what is measured there agrees with the CPU, and a run can be stopped and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rawloop.build import build_run, prepare_codes
from rawloop.config import RunConfig
from rawloop.data import DataConfig
from rawloop.demo import SPEECH
from rawloop.dist import open_world
from rawloop.evaluate import EvaluationConfig
from rawloop.families import ModelConfig, load_family
from rawloop.loop import TrainConfig, train
from rawloop.precision import PrecisionConfig, PrecisionPolicy
from rawloop.records import read_metrics

pytestmark = pytest.mark.gpu


def go(config: RunConfig, steps: int) -> list[dict[str, Any]]:
    with open_world(config.device) as world:
        run = build_run(config, world, lambda line: None)
        run.total_steps = steps
        try:
            train(run)
        finally:
            run.close()
    return read_metrics(Path(config.output))


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_rounds_to_tf32_only_where_asked(tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        PrecisionPolicy(PrecisionConfig("fp32", tf32=tf32), torch.device("cuda")).prepare(torch.nn.Linear(2, 2))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
        one = 1.0 + 2.0**-12  # TF32 keeps 10 bits of it
        product = torch.full((64, 64), one, device="cuda") @ torch.eye(64, device="cuda")
        assert tf32 or bool((product == one).all())
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("mode", ["fp32", "bf16", "amp_fp16", "native_fp16"])
def test_cuda_agrees_with_the_cpu_and_resumes(demo_checkpoint: Path, tmp_path: Path, mode: Any) -> None:
    data = DataConfig(train=str(SPEECH / "train"), eval=str(SPEECH / "eval"), codes=str(tmp_path / "codes"))
    model = ModelConfig(path=str(demo_checkpoint / "model"))
    prepare_codes(data, load_family(model), torch.device("cuda"))
    config = RunConfig(model=model, data=data, precision=PrecisionConfig(mode=mode))
    config = replace(config, train=TrainConfig(2, 2, max_steps=6, log_every=1), evaluation=EvaluationConfig(every=3))
    on_cpu = go(replace(config, device="cpu", precision=PrecisionConfig("fp32"), output=str(tmp_path / "cpu")), 6)
    straight = go(replace(config, device="cuda", output=str(tmp_path / "straight")), 6)
    stopped = replace(config, device="cuda", output=str(tmp_path / "stopped"))
    go(stopped, 3)
    resumed = go(replace(stopped, resume="latest"), 6)
    tolerance = 1e-3 if mode == "fp32" else 2e-2
    for key in ("loss", "eval_loss"):
        values = {
            name: [line[key] for line in run if key in line]
            for name, run in {"cpu": on_cpu, "straight": straight, "resumed": resumed}.items()
        }
        assert values["straight"] == pytest.approx(values["cpu"], rel=tolerance)
        assert values["resumed"] == pytest.approx(values["straight"], rel=tolerance)
