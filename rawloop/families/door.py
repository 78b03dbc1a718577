"""The one door to a checkpoint's folder: any error of a library becomes one line that names folder, file and cause.

Libraries raise errors of all types over files that anybody may have written: KeyError, PanicException, bare Exception.
"""

import json
import math
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from rawloop.errors import LibraryError, RawloopError, UserError

PASSED = (RawloopError, MemoryError, torch.OutOfMemoryError, Warning)
POINTER = b"version https://git-lfs"
LONGEST = 300  # characters of what a library says
READ = re.compile(
    r".*(config|token|processor|index|vocab|special).*\.json|.*\.(jinja|safetensors|bin|model)|merges\.txt"
)
LAYERS = re.compile(r"(layers|_layer|depth|quantizers)$")  # Gemma has a vocab_size_per_layer_input


@contextmanager
def door(path: str, file: str, key: str = "model.path") -> Iterator[None]:
    """Turn what a library raises over a checkpoint's folder into a `LibraryError`, or leave it as it is if in `PASSED`.

    Args:
        path: folder or hub id.
        file: the file that is read, such as config.json; it is named if no file of the folder is visibly damaged.
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
        said = f"{found}: fetch it again" if found else f"{file} cannot be loaded: {cause(error)}"
        raise library_error(f"{key} is '{path}', whose {said}", error) from error


def library_error(line: str, error: BaseException) -> LibraryError:
    """Return the refusal for a library's error, with its traceback."""
    refused = LibraryError(line)
    refused.trace = "".join(traceback.format_exception(error))
    return refused


def cause(error: BaseException) -> str:
    """Return a library's error in one line, with its type where the text alone does not say enough."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    plain = (
        isinstance(error, OSError | ValueError | RuntimeError | ImportError | TemplateError) or type(error) is Exception
    )
    return text if plain and text else f"{type(error).__name__} {text}".strip()


def damage(folder: Path, reading: str) -> str | None:
    """Return the first damaged file of a folder and what is wrong with it. Files that `reading` names come first."""
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


def check_sizes(folder: Path, settings: Any, build: Callable[[], torch.nn.Module]) -> None:
    """Refuse a config.json that asks for far more weights than the folder's files hold, before memory is.

    A folder without safetensors files is not looked at, nor are quantized weights. `build` makes the model; it is
    called on the meta device.
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
