"""Content hashes of files and folders, which identify a checkpoint, a codec or a clip whatever its name is.

Files are read in blocks, so that one of many gigabytes costs no memory.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from io import BufferedReader, TextIOWrapper
from pathlib import Path

from rawloop.errors import UserError


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. A pipe, a socket or a device may never end: an OSError."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if code == errno.EISDIR else "Not a regular file", str(path))
    return open(path, "rb")


def read_text(path: Path) -> str:
    """Return the text of a regular UTF-8 file, without the byte order mark that Windows editors write."""
    with TextIOWrapper(open_regular(path), encoding="utf-8-sig") as stream:
        return stream.read()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> str:
    """Return one SHA-256 over the names and contents of several files, independent of their order and folder."""
    lines = sorted(f"{path.name}\0{sha256_file(path)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sketch_file(path: Path, sample: int = 4096) -> str:
    """Return a file's size and 16 digits of the SHA-256 of `sample` bytes from its middle: a cheap comparison."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, (size - sample) // 2))
        return f"{size} {hashlib.sha256(file.read(sample)).hexdigest()[:16]}"


def hash_folder(folder: Path) -> str:
    """Return the content hash of a model folder: its `config.json` and all its `*.safetensors` files.

    Raises UserError if it has none of these.
    """
    config, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not weights:
        missing = "config.json" if not config.is_file() else "*.safetensors file"
        raise UserError(f"{folder} has no {missing}: point it at a folder that save_pretrained wrote")
    return sha256_files([config, *weights])
