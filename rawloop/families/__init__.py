"""Families: everything that rawloop knows of particular models. `load_family` picks one by the checkpoint.

A user's own family is imported by its path. Digests identify everything that changes how a family encodes samples.
"""

import hashlib
import importlib
import json
import os
import re
import sys
import traceback
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rawloop.errors import RawloopError, UserError, nearest
from rawloop.families.config import ModelConfig as ModelConfig
from rawloop.families.unknown import no_family, other_format
from rawloop.files import sha256_file, sha256_files

if TYPE_CHECKING:
    from rawloop.contracts import Family

FAMILIES = {
    "higgs_audio_v2": "rawloop.families.higgs_audio_v2:HiggsAudioV2",
    "causal_lm": "rawloop.families.causal_lm:CausalLM",
    "audio_chat": "rawloop.families.audio_chat:AudioChat",
    "qwen2_audio": "rawloop.families.audio_chat:AudioChat",
    "phi4_multimodal": "rawloop.families.phi4_multimodal:Phi4Multimodal",
}
HEARING = ("qwen2_audio", "phi4_multimodal")  # types that audio_chat stands for; it may know others
ADAPTER = "adapter_config.json"
REQUIRED = ("load_model", "check", "example", "collate", "losses")
UNRELATED = ("truncation", "padding")  # a tokenizer keeps them from its last call
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_family(config: ModelConfig) -> "Family":
    """Return the family of a model: by name, by import path, or by the checkpoint's config.json.

    `auto` takes the family of that `model_type`; or causal_lm if the checkpoint's class is the one that transformers
    has for causal language models of its type (LlamaForCausalLM for llama).
    """
    name = config.family
    if ":" in name:
        return _own_family(name, config)  # model.path is the family's to interpret
    check_path(config.path, "model.path")
    if name not in (*FAMILIES, "auto"):
        raise UserError(
            f"model.family is '{name}'{nearest(name, FAMILIES)}: it must be auto, {', '.join(FAMILIES)}, or your own "
            "as package.module:Class (docs/families.md)"
        )
    settings = read_json(local_folder(config.path, config.revision, ["config.json"]) / "config.json")
    if error := other_format(config.path, settings):
        raise error
    kind = str(settings.get("model_type", "unknown"))
    if name == "auto":
        is_text = kind not in FAMILIES and _is_causal_lm(kind, settings.get("architectures") or [])
        name = "causal_lm" if is_text else kind
    name = kind if name == "audio_chat" and kind in HEARING else name
    if name not in FAMILIES:
        raise no_family(config.path, settings, FAMILIES)
    from rawloop.families.loading import library_errors

    module_name, _, class_name = FAMILIES[name].partition(":")
    owner = getattr(importlib.import_module(module_name), class_name)
    with library_errors(config.path, "config.json, tokenizer or chat template"):
        family = cast("Family", owner(config))
        family.probe()  # fails here if tokenizer and config do not fit each other
    return family


def _own_family(path: str, config: ModelConfig) -> "Family":
    """Import `package.module:Class`, call it with the model's config, and check that the result is a family.

    An error in the user's code becomes one line with its place, since every process of a run raises it.
    """
    from rawloop.contracts import Family, has

    asked = f"model.family is '{path}', which"
    found = imported(path, "model.family")
    module_name = path.partition(":")[0]
    try:
        family = found(config)
    except RawloopError:
        raise
    except Exception as error:
        raise UserError(f"{asked} cannot be made from model's config: {_in_one_line(error, module_name)}") from error
    lacking = [name for name in Family.__annotations__ if not hasattr(family, name)]
    lacking += [name for name in REQUIRED if not has(family, name)]
    if lacking:
        raise UserError(f"{asked} lacks {', '.join(lacking)}: see rawloop.contracts.Family and docs/families.md")
    return cast(Family, family)


def imported(path: str, key: str) -> Any:
    """Import what `package.module:name` names.

    Raises:
        UserError: it cannot be imported, or the module has no such name; `key` says where the path was given.
    """
    module_name, _, class_name = path.partition(":")
    asked = f"{key} is '{path}', which"
    # `python -m` and torchrun search the working folder; an installed script such as `rawloop` does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = _in_one_line(error, module_name)
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            reason = (
                f"there is no module {error.name} in {os.getcwd()} or among the installed packages; start from its "
                "folder, or install it"
            )
        raise UserError(f"{asked} cannot be imported: {reason}") from error
    if not hasattr(module, class_name):
        near = nearest(class_name, vars(module))
        raise UserError(f"{key} is '{path}', and {module.__file__} has no {class_name}{near}")
    return getattr(module, class_name)


def _in_one_line(error: Exception, module_name: str) -> str:
    """Return an error in one line, with its place in the user's file, else in the file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if frame.filename.removesuffix(".py").endswith(module_name.replace(".", os.sep))]
    place = (users or frames)[-1]
    file, line = place.filename, place.lineno
    if isinstance(error, SyntaxError):  # it has no frame of the file
        file, line = error.filename or file, error.lineno
    return f"{' '.join(traceback.format_exception_only(error)[-1].split())} ({file}, line {line})"


def check_path(path: str, key: str) -> None:
    """Refuse a model path that is neither a folder with config.json nor a possible hub id."""
    if not path:
        raise UserError(f"{key} is empty: give the folder or the hub id of the model")
    folder = Path(expanduser(path))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            fix = "give a folder that save_pretrained wrote"
            if (folder / ADAPTER).is_file():
                fix = "it has an adapter: give its base model, or merge them by `rawloop merge`"
            raise UserError(f"{key} is '{path}', a folder without config.json: {fix}")
        if (folder / ADAPTER).exists():
            raise UserError(
                f"{key} is '{path}', which has {ADAPTER} beside config.json: transformers would load that adapter into "
                "the model; move it elsewhere"
            )
    elif folder.exists():
        raise UserError(f"{key} is '{path}', a file: give the folder of the model")
    elif not HUB_ID.fullmatch(path):
        raise UserError(f"{key} is '{path}': no such folder, and not a hub id (owner/name) either")


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
        raise UserError(f"{file} has a {type(content).__name__} instead of an object: the checkpoint is damaged")
    return content


def local_folder(path: str, revision: str | None, patterns: list[str], key: str = "model.path") -> Path:
    """Return a checkpoint's folder on this machine. For a hub id, fetch the files that match `patterns`."""
    folder = Path(expanduser(path))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    from rawloop.families.loading import PASSED

    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except PASSED:
        raise
    except Exception as error:  # the hub's library raises ValueError for an invalid id, and errors of its HTTP client
        raise _not_given(key, path, error) from error
    if "config.json" in patterns and not (folder / "config.json").is_file():
        raise UserError(
            f"{key} is '{path}', which has no config.json on the hub: give a model that save_pretrained wrote; for an "
            "adapter, give its base model"
        )
    return folder


def _not_given(key: str, path: str, error: Exception) -> UserError:
    """Return the error for a model that the hub did not give, with the first line of its library's message."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{key} is '{path}': no such folder, and the hub gave no such model ({reason}): mend the name, or fetch it "
        f"where there is a network, `hf download {path}`, and set {key} to its folder"
    )


def config_digest(config: ModelConfig) -> str | None:
    """Return a digest of a checkpoint's config.json, in its folder or in the hub's cache; None without one."""
    file: Any = Path(expanduser(config.path)) / "config.json"
    if not file.is_file() and HUB_ID.fullmatch(config.path):
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    return sha256_file(Path(file)) if isinstance(file, str | Path) and Path(file).is_file() else None


def reading_of(family: "Family") -> dict[str, str]:
    """Return digests of a family's tokenizer, chat template and feature extractor, by name.

    They are found through the attributes `tokenizer` and `processor`, which must be those of transformers.
    """
    processor: Any = getattr(family, "processor", None)
    tokenizer = getattr(family, "tokenizer", None) or getattr(processor, "tokenizer", None)
    found = {}
    if tokenizer is not None:
        found["tokenizer"] = _digest(_vocabulary(tokenizer))
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if template is not None:
        found["chat template"] = _digest(template)
    if hasattr(processor, "feature_extractor"):
        found["feature extractor"] = _digest(processor.feature_extractor.to_dict())
    return found


def source_of(family: type) -> str:
    """Return a digest of the imported source files of the package of a family's class."""
    package = family.__module__.partition(".")[0]
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == package]
    files = {Path(str(m.__file__)) for m in modules if getattr(m, "__file__", None)}
    return sha256_files(file for file in files if file.suffix == ".py" and file.is_file())


def _vocabulary(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = tokenizer.get_vocab()
    else:
        content = {name: part for name, part in json.loads(backend.to_str()).items() if name not in UNRELATED}
    return [type(tokenizer).__name__, content, tokenizer.special_tokens_map]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
