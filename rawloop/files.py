"""Files: reading and hashing them, replacing a small one atomically, forcing folders to the disk, deleting them.

Files are hashed in blocks, so a file of many gigabytes costs no memory.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, NamedTuple

from rawloop.errors import UserError

SYNC_THREADS = 16
WORDS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network file system has lost the folder",
    errno.ENOENT: "the folder has disappeared",
    errno.ENAMETOOLONG: "a name is too long for the file system",
}


class FileRecord(NamedTuple):
    """A file's size in bytes and the SHA-256 of its contents, in hex."""

    size: int
    sha256: str


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises OSError for a pipe, a socket or a device: reading it may never end."""
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

    Raises:
        UserError: the folder has no `config.json`, or no safetensors file.
    """
    config, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not weights:
        missing = "config.json" if not config.is_file() else "*.safetensors file"
        raise UserError(f"{folder} has no {missing}: point it at a folder that save_pretrained wrote")
    return sha256_files([config, *weights])


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file that must not exist yet. Returns its size and digest.

    The digest is that of the bytes in memory. Hashing the file after writing would hide a write error.
    """
    size, digest = 0, hashlib.sha256()
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def signed_json(body: dict[str, Any]) -> bytes:
    """Return JSON that ends with its own SHA-256. A reader renders what it has read, and compares the bytes."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1) + "\n").encode()


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file, or create it, atomically, and force it to the disk. A failure leaves the old one unchanged.

    Raises:
        OSError: the disk is full or refuses.
    """
    with replacing(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def unfinished_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder with a temporary name beside `output`; it is removed if it was not renamed.

    Raises:
        UserError: it cannot be created.
    """
    folder = Path(os.path.realpath(output))
    folder = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output is '{output}', which cannot be created: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a stream whose content replaces a file atomically at the end of the block; see `replace_file`."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries (created and renamed files), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force a folder and everything below it to the disk, in several threads.

    The file system then commits all files together, in a fifth of the time. The threads are plain ones, because an
    executor takes no work while Python exits and waits for a save.
    """
    paths = iter([*folder.rglob("*"), folder])
    errors: list[OSError] = []

    def work() -> None:
        for path in paths:  # all threads take from one iterator
            try:
                sync(path)
            except OSError as error:
                errors.append(error)

    threads = [Thread(target=work) for _ in range(SYNC_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def remove_tree(folder: Path) -> None:
    """Delete a folder, or a link to one. The folder is first renamed to `.trash-NAME`, so no half-deleted one is found.

    A folder whose name begins with a dot is deleted under its name.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    if not folder.name.startswith("."):
        trash = folder.with_name(f".trash-{folder.name}")
        if trash.is_symlink() or trash.exists():
            remove_tree(trash)
        folder = folder.rename(trash)
    shutil.rmtree(folder)


def in_words(error: Exception) -> str:
    """Describe an OSError or SafetensorError. safetensors has the error number in its message only."""
    match = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    text = WORDS.get(number) if number is not None else None
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{text}{where}" if text else str(error)


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def readable(size: int) -> str:
    """Return a number of bytes in MB or kB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
