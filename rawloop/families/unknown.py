"""What to say of a checkpoint that no family trains: another format, a part of a model, or another kind of model."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from rawloop.errors import UserError, nearest

# `model_type` of a checkpoint -> what it is, and what to take instead.
OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "higgs_audio": "a Higgs Audio v2 in the format of its authors' own code, which the hub had until April 2026. "
        "rawloop trains the format of transformers (type higgs_audio_v2): leave model.revision out, or pin a commit "
        "after that date; a folder must be fetched again, or converted (docs/families.md)",
        "phi4mm": "a Phi-4-multimodal with Python code of its own, which rawloop does not run. rawloop trains the "
        "format of transformers (type phi4_multimodal): for microsoft/Phi-4-multimodal-instruct set model.revision to "
        "refs/pr/70 (docs/families.md)",
        "higgs_multimodal_qwen3": "a Higgs TTS 3, the successor of Higgs Audio v2, which rawloop does not train: take "
        "bosonai/higgs-audio-v2-generation-3B-base, or write a family (docs/families.md)",
        "higgs_audio_v2_tokenizer": "the folder of an audio codec: it belongs in model.codec",
    }
)
TRAINED = (
    "rawloop trains Higgs Audio v2 (type higgs_audio_v2), models that hear and answer in text (qwen2_audio, "
    "phi4_multimodal), and the causal language models of transformers"
)
WRITE = "for another kind, write a family: one class, named in model.family as package.module:Class (docs/families.md)"


def other_format(path: str, settings: Mapping[str, Any]) -> UserError | None:
    """Return the error for a checkpoint that is known and cannot be trained as it is, by its config.json."""
    kind = str(settings.get("model_type"))
    return UserError(f"model.path is '{path}', {OTHERS[kind]}") if kind in OTHERS else None


def no_family(path: str, settings: Mapping[str, Any], families: Iterable[str]) -> UserError:
    """Return the error for a kind of model that no family trains."""
    kind, classes = str(settings.get("model_type", "unknown")), settings.get("architectures") or []
    named = f"'{kind}'{nearest(kind, families)}" + (f" ({', '.join(map(str, classes))})" if classes else "")
    hears = _hears(kind, settings)
    advice = "it hears, and transformers has it as a language model: try model.family audio_chat; " if hears else ""
    return UserError(f"model.path is '{path}': no family for models of type {named}. {TRAINED}; {advice}{WRITE}")


def _hears(kind: str, settings: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and any(name.startswith("audio") for name in settings)
