"""Checkpoints that no family trains: the error says what to take instead, whether the family was named or not."""

import json
from pathlib import Path
from typing import Any

import pytest

from rawloop.errors import UserError
from rawloop.families import ModelConfig, load_family


def refusal(folder: Path, settings: dict[str, Any], family: str) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        load_family(ModelConfig(path=str(folder), family=family))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["auto", "audio_chat", "higgs_audio_v2"])
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("phi4mm", "Python code of its own, which rawloop does not run.* set model.revision to refs/pr/70"),
        ("higgs_audio", "which the hub had until April 2026.*: leave model.revision out, or pin a commit after that"),
        ("higgs_multimodal_qwen3", "a Higgs TTS 3, the successor of Higgs Audio v2, which rawloop does not train"),
        ("higgs_audio_v2_tokenizer", "the folder of an audio codec: it belongs in model.codec"),
    ],
)
def test_another_format_is_told_with_the_one_to_take(tmp_path: Path, kind: str, line: str, family: str) -> None:
    said = refusal(tmp_path, {"model_type": kind}, family)
    assert said.startswith(f"model.path is '{tmp_path}', ")
    assert line.partition(".*")[0] in said
    assert line.rpartition(".*")[2] in said


def test_another_kind_of_model_is_told_with_what_is_trained(tmp_path: Path) -> None:
    whisper = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    assert refusal(tmp_path, whisper, "auto") == (
        f"model.path is '{tmp_path}': no family for models of type 'whisper' (WhisperForConditionalGeneration). "
        "rawloop trains Higgs Audio v2 (type higgs_audio_v2), models that hear and answer in text (qwen2_audio, "
        "phi4_multimodal), and the causal language models of transformers; for another kind, write a family: one "
        "class, named in model.family as package.module:Class (docs/families.md)"
    )
    hearing = {"model_type": "voxtral", "audio_config": {}}
    assert "; it hears, and transformers has it as a language model: try model.family audio_chat; for" in refusal(
        tmp_path, hearing, "auto"
    )
    assert "(did you mean 'qwen2_audio'?)" in refusal(tmp_path, {"model_type": "qwen3_audio"}, "auto")


def test_a_family_of_another_name_is_told_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    said = refusal(tmp_path, {}, "higgs_audio")
    assert said.startswith("model.family is 'higgs_audio' (did you mean 'higgs_audio_v2'?): it must be auto, higgs_aud")
