"""Families: everything that rawloop knows of particular models. `load_family` picks one by the checkpoint."""

import importlib
import json
import re
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rawloop.errors import LibraryError, UserError, nearest
from rawloop.families.config import ModelConfig as ModelConfig

if TYPE_CHECKING:
    from rawloop.contracts import Family

FAMILIES = {
    "higgs_audio_v2": "rawloop.families.higgs_audio_v2:HiggsAudioV2",
    "causal_lm": "rawloop.families.causal_lm:CausalLM",
    "audio_chat": "rawloop.families.audio_chat:AudioChat",
    "qwen2_audio": "rawloop.families.audio_chat:AudioChat",
}
ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_family(config: ModelConfig) -> "Family":
    """Return the family of a model: by name, by import path, or by the checkpoint's config.json.

    `auto` takes the family of that `model_type`; or causal_lm if the checkpoint's class is the one that transformers
    has for causal language models of its type (LlamaForCausalLM for llama).
    """
    name = config.family
    if ":" in name:
        from rawloop.families.own import own_family

        return own_family(name, config)  # model.path is the family's to interpret
    check_path(config.path, "model.path")
    if name == "auto":
        name, architectures = _architecture(config)
        if name not in FAMILIES and _is_causal_lm(name, architectures):
            name = "causal_lm"
    if name == "higgs_audio_v2_tokenizer":
        raise UserError(f"model.path is '{config.path}', the folder of an audio codec: it belongs in model.codec")
    if name not in FAMILIES:
        raise UserError(
            f"no family for models of type '{name}'{nearest(name, FAMILIES)}: rawloop has {', '.join(FAMILIES)}; "
            "your own goes into model.family as package.module:Class (docs/families.md)"
        )
    from rawloop.families.loading import library_errors

    module_name, _, class_name = FAMILIES[name].partition(":")
    owner = getattr(importlib.import_module(module_name), class_name)
    with library_errors(config.path, "config.json, tokenizer or chat template"):
        family = cast("Family", owner(config))
        family.probe()  # fails here if tokenizer and config do not fit each other
    return family


def check_path(path: str, key: str) -> None:
    """Refuse a model path that is neither a folder with config.json nor a possible hub id."""
    if not path:
        raise UserError(f"{key} is empty: give the folder or the hub id of the model")
    folder = Path(expanduser(path))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            fix = "give a folder that save_pretrained wrote"
            if (folder / ADAPTER).is_file():
                fix = "it holds an adapter: give its base model, or merge them by `rawloop merge`"
            raise UserError(f"{key} is '{path}', a folder without config.json: {fix}")
        if (folder / ADAPTER).exists():
            raise UserError(
                f"{key} is '{path}', which has {ADAPTER} beside config.json: transformers would load that adapter into "
                "the model; move it elsewhere"
            )
    elif folder.exists():
        raise UserError(f"{key} is '{path}', a file: give the folder that holds the model")
    elif not HUB_ID.fullmatch(path):
        raise UserError(f"{key} is '{path}': no such folder, and not a hub id (owner/name) either")


def _architecture(config: ModelConfig) -> tuple[str, list[str]]:
    """Return the model's type and the classes that saved its weights."""
    from transformers import AutoConfig

    from rawloop.families.loading import library_errors

    folder = Path(config.path)
    if folder.is_dir():
        content = read_json(folder / "config.json")
        return str(content.get("model_type", "unknown")), content.get("architectures") or []
    try:
        with library_errors(config.path, "config.json"):
            loaded = AutoConfig.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except LibraryError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise _not_given("model.path", config.path, error.__cause__) from error
    return str(loaded.model_type), loaded.architectures or []


def _is_causal_lm(model_type: str, architectures: list[str]) -> bool:
    """Whether these are the weights of a plain causal LM, which takes no images or audio."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return known in architectures and not str(known).endswith("ForConditionalGeneration")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's folder."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): the checkpoint is damaged, fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not an object: the checkpoint is damaged")
    return content


def local_folder(path: str, revision: str | None, patterns: list[str], key: str = "model.path") -> Path:
    """Return a checkpoint's folder on this machine. For a hub id, fetch the files that match `patterns`."""
    folder = Path(expanduser(path))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except OSError as error:
        raise _not_given(key, path, error) from error


def _not_given(key: str, path: str, error: OSError) -> UserError:
    """Return the error for a model that the hub did not give, with the first line of its library's message."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{key} is '{path}': no such folder, and the hub gave no such model ({reason}): mend the name, or fetch it "
        f"where there is a network, `hf download {path}`, and set {key} to its folder"
    )
