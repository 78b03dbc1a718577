"""Loads from a checkpoint's folder. Any error of a library becomes one line that names folder, file and cause.

Libraries raise errors of all types for damaged files: KeyError, PanicException, bare Exception.
"""

import json
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rawloop.errors import LibraryError, RawloopError, UserError
from rawloop.families.config import ModelConfig

PASSED = (RawloopError, MemoryError, torch.OutOfMemoryError, Warning)
POINTER = b"version https://git-lfs"
LONGEST = 300  # characters of a library's message
READ = re.compile(
    r".*(config|token|processor|index|vocab|special).*\.json|.*\.(jinja|safetensors|bin|model)|merges\.txt"
)
LAYERS = re.compile(r"(layers|_layer|depth|quantizers)$")  # with $, as Gemma has vocab_size_per_layer_input


@contextmanager
def library_errors(path: str, file: str, key: str = "model.path") -> Iterator[None]:
    """Turn an error of a library into a `LibraryError`. Errors in `PASSED` are left unchanged.

    Args:
        path: folder or hub id of the checkpoint.
        file: the file that is read, such as config.json. The message names it unless another file is visibly damaged.
        key: the setting that names the folder.
    """
    try:
        yield
    except PASSED:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        found = damage(Path(path), file)
        if found is None and isinstance(error, UnpicklingError):
            raise UserError(
                f"{key} is '{path}', whose .bin file is damaged, or holds more than tensors: as opening it could run "
                "code, it is not opened; fetch it again, from a source that you trust, as safetensors if it has them"
            ) from error
        reason = f"{found}: fetch it again" if found else f"{file} cannot be loaded: {cause(error)}"
        raise library_error(f"{key} is '{path}', whose {reason}", error) from error


def library_error(line: str, error: BaseException) -> LibraryError:
    """Return a LibraryError with the traceback of `error`."""
    wrapped = LibraryError(line)
    wrapped.trace = "".join(traceback.format_exception(error))
    return wrapped


def cause(error: BaseException) -> str:
    """Return a library's error in one line, with its type if the text alone does not say enough."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    plain = (
        isinstance(error, OSError | ValueError | RuntimeError | ImportError | TemplateError) or type(error) is Exception
    )
    return text if plain and text else f"{type(error).__name__} {text}".strip()


def damage(folder: Path, reading: str) -> str | None:
    """Return the first damaged file of a folder, with the reason. Files that `reading` names are tested first."""
    files = sorted(folder.iterdir(), key=lambda file: (file.name not in reading, file.name)) if folder.is_dir() else []
    problems = ((file.name, _problem(file)) for file in files)
    return next((f"{name} {problem}" for name, problem in problems if problem), None)


def _problem(file: Path) -> str | None:
    if not READ.fullmatch(file.name):
        return None
    try:
        if not file.is_file():
            return "is no file"
        with file.open("rb") as opened:
            head = opened.read(len(POINTER))
        if head == POINTER:
            return "is a Git LFS pointer and not the file (`git lfs pull` gets it)"
        if not head:
            return "is empty"
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        if file.suffix == ".bin" and head[:1] != b"\x80" and not is_zipfile(file):
            return "is damaged (no file that PyTorch has written)"
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return f"is damaged ({cause(error)})"
    return None


def load_weights(
    model_class: Any, config: ModelConfig, path: str | None, hints: Mapping[str, str] | None = None, **options: Any
) -> nn.Module:
    """Load a model in its stored dtype on the CPU, with activation checkpointing if the config says so.

    Args:
        model_class: a model class of transformers, or an AutoModel.
        config: path, attention implementation and activation checkpointing of the model.
        path: load the weights of this folder instead, that of a checkpoint.
        hints: the fix for a weight that the checkpoint lacks, by name.
        options: further keywords of `from_pretrained`.
    """
    source, revision = path or config.path, None if path else config.revision
    options |= {"dtype": "auto", "attn_implementation": config.attention}
    try:
        model: nn.Module = load_from(model_class, source, revision, hints=hints, **options)
    except LibraryError as error:
        if "attention" in str(error.__cause__).lower():
            way = "" if config.attention == "eager" else ": set it to eager"
            error.args = (f"{error} (model.attention is '{config.attention}'{way})",)
        raise
    if config.activation_checkpointing:
        enable_activation_checkpointing(model)
    return model


def load_from(
    model_class: Any,
    source: str,
    revision: str | None,
    key: str = "model.path",
    hints: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """Load a model; `key` is the setting that names its folder. Missing weights and wrong shapes are refused.

    Under `torch.device("meta")` the model is made from its config.json, and no weights are read.
    """
    with library_errors(source, "model", key):
        settings = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        build = model_class._from_config if issubclass(model_class, PreTrainedModel) else model_class.from_config
        if torch.get_default_device().type == "meta":
            return build(settings, **{**options, "dtype": settings.dtype or torch.float32})
        check_sizes(Path(source), settings, lambda: build(settings))
        model, info = model_class.from_pretrained(
            source,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            trust_remote_code=False,
            **options,
        )
    for name, stored, wanted in sorted(info["mismatched_keys"])[:1]:
        raise UserError(
            f"{source}: {name} is stored as {tuple(stored)}, its config.json makes it {tuple(wanted)}: fetch it again"
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would initialize them randomly
        hint = (hints or {}).get(missing[0], "fetch it again")
        raise UserError(f"{source} lacks {len(missing)} weights, first {missing[0]}: {hint}")
    return model


def can_checkpoint(model: nn.Module) -> bool:
    """Return whether a model has the activation checkpointing of transformers."""
    return hasattr(model, "gradient_checkpointing_enable")


def enable_activation_checkpointing(model: Any) -> None:
    """Switch on non-reentrant activation checkpointing (reentrant fails under DDP with unused parameters)."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def check_sizes(folder: Path, settings: Any, build: Callable[[], nn.Module]) -> None:
    """Refuse a config.json that asks for far more weights than the files have, before memory is allocated.

    Folders without safetensors files and quantized weights are not checked. `build` is called on the meta device.
    """
    stored, tensors = 0, 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            stored += sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
            tensors += len(names)
    if not stored or getattr(settings, "quantization_config", None):
        return
    for name, value in _numbers(settings.to_dict()):
        if LAYERS.search(name) and value > tensors:
            raise UserError(
                f"model.path is '{folder}', whose config.json has {name} {value:,}, and its files hold {tensors} "
                "tensors: they do not belong together"
            )
    with torch.device("meta"):
        model = build()
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * stored + 10**8:  # a head that is tied, buffers that are not stored
        raise UserError(
            f"model.path is '{folder}', whose config.json makes a model of {wanted:,} weights, and its files hold "
            f"{stored:,}: they do not belong together"
        )


def _numbers(tree: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(name), value
