"""Digests of everything that changes how a family encodes samples: tokenizer, chat template, processor, source."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from rawloop.contracts import Family
from rawloop.hashing import sha256_files

UNRELATED = ("truncation", "padding")  # a tokenizer keeps them from its last call


def reading_of(family: Family) -> dict[str, str]:
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


def source_of(family: Family) -> str:
    """Return a digest of the imported source files of a family's package."""
    package = type(family).__module__.partition(".")[0]
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
