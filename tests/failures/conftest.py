"""What the gallery's tests share: a tiny language model, its data, HF Trainer's arguments, and rawloop doing its job.

Every page of the gallery has two sides. The other side is the real tool, in its installed version; the reference of
both is plain PyTorch in float32, which is written here and uses nothing of rawloop.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

VOCABULARY = 32


@contextmanager
def deprecations_allowed() -> Iterator[None]:
    """PEFT and accelerate ask transformers and torch for names that these are about to give up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(scope="session")
def llama() -> Callable[..., Any]:
    """Give `llama(dtype=torch.float32, **config)`, a LlamaForCausalLM of 3,632 weights, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(dtype: torch.dtype = torch.float32, model_class: Any = LlamaForCausalLM, **changes: Any) -> Any:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        torch.manual_seed(0)
        config = LlamaConfig(**{"vocab_size": VOCABULARY, "num_hidden_layers": 1, **sizes, **changes})
        return model_class(config).to(dtype)

    return build


@pytest.fixture(scope="session")
def with_lora() -> Callable[..., Any]:
    """Give `with_lora(model, **config)`: PEFT's own wrapper; options of `get_peft_model` stand in `peft_options`."""
    from peft import LoraConfig, get_peft_model

    def wrap(model: nn.Module, peft_options: dict[str, Any] | None = None, **config: Any) -> Any:
        torch.manual_seed(0)
        with deprecations_allowed():
            lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **config})
            return get_peft_model(model, lora, **(peft_options or {}))

    return wrap


@pytest.fixture(scope="session")
def open_adapter() -> Callable[[nn.Module, Path], Any]:
    """Give `open_adapter(base, folder)`: PEFT's own loader."""
    from peft import PeftModel

    def load(base: nn.Module, folder: Path) -> Any:
        with deprecations_allowed():
            return PeftModel.from_pretrained(base, folder)

    return load


@pytest.fixture(scope="session")
def loss_of() -> Callable[[nn.Module], Tensor]:
    """Give `loss_of(model)`: the model's own loss on two rows of 16 tokens, always the same."""
    ids = (torch.arange(32).view(2, 16) * 7) % VOCABULARY

    def loss(model: nn.Module) -> Tensor:
        result: Tensor = model(input_ids=ids, labels=ids).loss
        return result

    return loss


@pytest.fixture(scope="session")
def rows() -> list[dict[str, list[int]]]:
    """A data set for Trainer: 16 rows of 16 tokens that count up in steps of 7."""
    texts = [[(7 * place + first) % VOCABULARY for place in range(16)] for first in range(16)]
    return [{"input_ids": text, "labels": text} for text in texts]


@pytest.fixture(scope="session")
def reference(loss_of: Callable[[nn.Module], Tensor]) -> Callable[..., list[float]]:
    """Give `reference(model, steps=30, lr=3e-3)`: losses before every step and after the last, in plain float32."""

    def run(model: nn.Module, steps: int = 30, lr: float = 3e-3) -> list[float]:
        model.float()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamW(weights, lr=lr)
        losses = []
        for _ in range(steps):
            loss = loss_of(model)
            losses.append(loss.item())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        return [*losses, loss_of(model).item()]

    return run


@pytest.fixture(scope="session")
def by_rawloop(loss_of: Callable[[nn.Module], Tensor]) -> Callable[..., Any]:
    """Give `by_rawloop(model, mode, steps=30, lr=3e-3)`, the loop of `reference` with rawloop's precision policy.

    Returns `model`, `policy`, `optimizer`, `losses` as of `reference`, and the `results` of the steps.
    """
    from rawloop import PrecisionConfig, PrecisionPolicy

    def run(
        model: nn.Module, mode: Any, steps: int = 30, lr: float = 3e-3, grad_scaler: Any = None, **config: Any
    ) -> Any:
        policy = PrecisionPolicy(PrecisionConfig(mode=mode, **config), torch.device("cpu"), grad_scaler=grad_scaler)
        model = policy.prepare(model)
        optimizer = AdamW([parameter for _, parameter in policy.named_parameters()], lr=lr)
        losses, results = [], []
        for _ in range(steps):
            with policy.autocast():
                loss = loss_of(model)
            losses.append(loss.item())
            policy.backward(loss)
            results.append(policy.step(optimizer, 1.0))
        with torch.no_grad(), policy.autocast():
            losses.append(loss_of(model).item())
        return SimpleNamespace(model=model, policy=policy, optimizer=optimizer, losses=losses, results=results)

    return run


@pytest.fixture(scope="session")
def evaluator() -> Callable[..., Any]:
    """Give `evaluator(model, rows, policy)`: rawloop's evaluator over the rows of a data set, one row in a batch."""
    from rawloop.contracts import IGNORE, Batch, Labels, StreamLoss
    from rawloop.evaluate import Evaluator

    def batch(number: int, row: dict[str, list[int]]) -> Batch:
        labels = torch.tensor(row["labels"])
        places = torch.ne(labels, IGNORE).nonzero().squeeze(1)
        places = places[places > 0]  # the first token is predicted by nothing
        targets = {"text": len(places)}
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        return Batch(inputs, {"text": Labels(places - 1, labels[places])}, targets, [f"row {number}"])

    def losses(model: nn.Module, batch: Batch) -> dict[str, StreamLoss]:
        positions, targets = batch.labels["text"]
        logits = model(**batch.inputs).logits.flatten(0, 1)[positions].float()
        total = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return {"text": StreamLoss(total, batch.targets["text"])}

    def build(model: nn.Module, rows: list[dict[str, list[int]]], policy: Any) -> Any:
        batches = [batch(number, row) for number, row in enumerate(rows)]
        return Evaluator(losses, batches, model=model, policy=policy)

    return build


@pytest.fixture
def arguments(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Give `arguments(**changes)`: TrainingArguments of 4 steps on the CPU, without progress bars and reports.

    Accelerate keeps its state in singletons and in environment variables; both are put back afterwards.
    """
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainingArguments

    def build(**changes: Any) -> Any:
        plain = {
            "output_dir": str(tmp_path / "trainer"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 1,
            "dataloader_pin_memory": False,  # else torch warns that there is no accelerator
        }
        return TrainingArguments(**{**plain, **changes})

    before = dict(os.environ)
    yield build
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in before]:
        del os.environ[name]


@pytest.fixture
def demo_run(demo_checkpoint: Path, demo_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """Give `demo_run(change=None, **parts)`: a whole run of rawloop on the demo Higgs Audio v2, trained to its end.

    Four steps with LoRA, evaluated and saved every second one; `parts` replace parts of its `RunConfig`, and `change`
    gets the `Run` before it is trained. Returns the run; its folder is `tmp_path / "rawloop"`.
    """
    from rawloop.adapters.config import AdapterConfig
    from rawloop.build import build_run
    from rawloop.checkpoint.config import CheckpointConfig
    from rawloop.config import RunConfig
    from rawloop.data import DataConfig
    from rawloop.dist import World
    from rawloop.evaluate import EvaluationConfig
    from rawloop.families import ModelConfig
    from rawloop.loop import Run, TrainConfig, train
    from rawloop.optim import OptimConfig
    from rawloop.precision.config import PrecisionConfig

    base = RunConfig(
        device="cpu",
        output=str(tmp_path / "rawloop"),
        model=ModelConfig(path=str(demo_checkpoint / "model")),
        adapter=AdapterConfig(rank=4, modules_to_save=["audio_lm_head"]),
        data=DataConfig(train=str(demo_data / "train"), eval=str(demo_data / "eval"), codes=str(demo_data / "codes")),
        train=TrainConfig(batch_size=4, max_steps=4, log_every=1),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        precision=PrecisionConfig(mode="fp32"),
        evaluation=EvaluationConfig(every=2),
        checkpoint=CheckpointConfig(save_every=2, keep_last=0),
    )

    def go(change: Callable[[Run], None] | None = None, **parts: Any) -> Run:
        run = build_run(replace(base, **parts), World(), lambda line: None)
        try:
            if change:
                change(run)
            train(run)
        finally:
            run.close()
        return run

    return go
