"""The LoRA adapter is missing from the checkpoints: no adapter_model.safetensors, no adapter_config.json.

Can't find 'adapter_config.json', PEFT, wrapper module, model.safetensors with lora_A inside, save_pretrained, callback.

HF Trainer saves an adapter if the model that it was given is PEFT's. In a wrapper (for a loss of one's own, for other
batch keys) it is a plain module, and its whole state dict is written under names that no loader knows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from rawloop.families import ModelConfig, load_family


class OwnBatchKeys(nn.Module):
    """A wrapper as training scripts have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.model(input_ids=input_ids, labels=labels)


def test_trainer_writes_no_adapter_of_a_wrapped_model(
    llama: Callable[..., Any],
    with_lora: Callable[..., Any],
    open_adapter: Callable[..., Any],
    rows: Any,
    arguments: Callable[..., Any],
    tmp_path: Path,
) -> None:
    args = arguments(save_strategy="steps", save_steps=2)
    trainer = Trainer(model=OwnBatchKeys(with_lora(llama())), args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (Path(args.output_dir) / "checkpoint-2", Path(args.output_dir) / "checkpoint-4", tmp_path / "final"):
        assert list(folder.glob("adapter*")) == []
        stored = load_file(folder / "model.safetensors")
        assert len(stored) > 12  # the frozen base as well, so the file is large and looks right
        assert all(name.startswith("model.base_model.model.") for name in stored)
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at"):
            open_adapter(llama(), folder)


def test_trainer_writes_the_adapter_where_it_is_given_peft_s_model_itself(
    llama: Callable[..., Any], with_lora: Callable[..., Any], rows: Any, arguments: Callable[..., Any]
) -> None:
    args = arguments(save_strategy="steps", save_steps=2)
    Trainer(model=with_lora(llama()), args=args, train_dataset=rows).train()
    assert (Path(args.output_dir) / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_rawloop_writes_the_adapter_into_every_checkpoint(
    demo_run: Callable[..., Any], open_adapter: Callable[..., Any], demo_checkpoint: Path, tmp_path: Path
) -> None:
    run = demo_run()
    assert not isinstance(run.module, PeftModel)  # here, too, the model is inside a wrapper
    family: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model")))
    batch = family.probe()
    with torch.no_grad():
        trained = family.logits(run.module.model.eval(), batch)["audio"]
        untrained = family.logits(family.load_model().eval(), batch)["audio"]
    distances = []
    for name in ("checkpoints/step-00000002", "checkpoints/step-00000004", "best"):
        folder = tmp_path / "rawloop" / name / "adapter"
        stored = load_file(folder / "adapter_model.safetensors")
        trained_b = [bool(tensor.any()) for weight, tensor in stored.items() if "lora_B" in weight]
        assert trained_b == [True] * len([weight for weight in stored if "lora_A" in weight])
        with torch.no_grad():
            logits = family.logits(open_adapter(family.load_model(), folder).eval(), batch)["audio"]
        distances.append([float((logits - other).abs().max()) for other in (trained, untrained)])
    assert distances[0][0] > 0.01  # step 2 is not yet step 4
    assert distances[1][0] < 1e-5  # the last one is the model in memory
    assert all(from_base > 0.1 for _, from_base in distances)
