"""IndexError: index out of range in self.

On a GPU: CUDA error: device-side assert triggered; Assertion `srcIndex < srcSelectDimSize` failed; CUDA kernel errors
might be asynchronously reported. Tokenizer and model that do not fit, resized vocabulary, codes of another codec.

A token or code that the model has no row for. The error names no sample, and with codes there may be none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family
from rawloop.families.higgs_audio_v2 import HiggsAudioV2

CODEBOOK, FRAME = 3, 5


def test_trainer_names_no_sample(llama: Callable[..., Any], rows: Any, arguments: Callable[..., Any]) -> None:
    bad = [dict(row) for row in rows]
    bad[5]["input_ids"] = [32, *bad[5]["input_ids"][1:]]  # the vocabulary ends at 31
    trainer = Trainer(model=llama(), args=arguments(max_steps=8), train_dataset=bad)
    with pytest.raises(IndexError) as caught:
        trainer.train()
    assert str(caught.value) == "index out of range in self"
    assert not hasattr(caught.value, "__notes__")


def spoilt(example: Any) -> Any:
    """Give an example a code that its codebook, of 1026, does not have."""
    example.audio_input_ids[FRAME, CODEBOOK] = 1026
    return example


def test_a_code_beyond_its_codebook_is_read_as_the_next_ones_without_any_error(demo_checkpoint: Path) -> None:
    model: Any = load_family(ModelConfig(path=str(demo_checkpoint / "model"))).load_model()
    table = model.model.embed_audio_tokens
    wrong, other = torch.zeros(1, 1, 8, dtype=torch.int64), torch.zeros(1, 1, 8, dtype=torch.int64)
    wrong[..., CODEBOOK] = 1026
    assert not torch.equal(table(wrong), table(other))
    of_next = table.embed_audio_tokens.weight[(CODEBOOK + 1) * 1026] - table.embed_audio_tokens.weight[CODEBOOK * 1026]
    assert torch.allclose(table(wrong), table(other) + of_next, atol=1e-6)


def test_rawloop_names_sample_codebook_frame_and_id(
    demo_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HiggsAudioV2.example

    def example(self: HiggsAudioV2, sample: Any, *arguments: Any, **named: Any) -> Any:
        made = honest(self, sample, *arguments, **named)
        return spoilt(made) if sample.id == "train-en-01" else made

    monkeypatch.setattr(HiggsAudioV2, "example", example)
    said = (
        r"^sample 'train-en-01' \(metadata.json samples\[0\]\): its 'audio_input_ids' has the id 1026 in codebook 3 at "
        r"frame 5, and the model knows 0 to 1025 there: use the tokenizer and codec that belong to the model$"
    )
    with pytest.raises(UserError, match=said):
        demo_run()
