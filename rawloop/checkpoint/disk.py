"""Writing so that it is really on the disk, knowing the digest of what was meant to be written, and saying what failed.

A digest is taken from the bytes in memory while they are written. Reading a file back would bless whatever arrived.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rawloop.checkpoint.pack import Packed, safetensors_header
from rawloop.errors import CheckpointError
from rawloop.files import sync

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
}


class FileRecord(NamedTuple):
    """What the manifest knows of a file: its size in bytes and the SHA-256 of its contents, in hex."""

    size: int
    sha256: str


class Hashing:
    """A file being written, and the digest of all bytes that went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data` (a flat view of bytes)."""
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def record(self) -> FileRecord:
        """Return size and digest of what has been written."""
        return FileRecord(self.size, self.digest.hexdigest())


@contextmanager
def written(path: Path) -> Iterator[Hashing]:
    """Open a file that must not exist yet for writing."""
    with path.open("xb") as file:
        yield Hashing(file)


def write_packed(packed: Packed, folder: Path, name: str) -> dict[str, FileRecord]:
    """Write a state as NAME.json, and NAME.safetensors if it has tensors. Returns what was written, by file name."""
    records = {}
    with written(folder / f"{name}.json") as file:
        file.write(json.dumps(packed.tree, indent=1, allow_nan=False).encode())
    records[f"{name}.json"] = file.record()
    if packed.tensors:
        header, order = safetensors_header(packed.tensors)
        with written(folder / f"{name}.safetensors") as file:
            file.write(header)
            for tensor_name in order:
                file.write(_bytes(packed.tensors[tensor_name]))
        records[f"{name}.safetensors"] = file.record()
    return records


def _bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor as bytes, without copying it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_packed(folder: Path, name: str) -> Packed:
    """Read what `write_packed` wrote.

    The tensors are copied out of the file: one that stayed mapped would change, or crash the process, with the file.
    """
    tree = json.loads((folder / f"{name}.json").read_bytes())
    path = folder / f"{name}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    return Packed(tree, {key: tensor.clone() for key, tensor in tensors.items()})


def record_tree(folder: Path) -> dict[str, FileRecord]:
    """Hash every file below `folder` by reading it. Keys are posix paths.

    Raises:
        CheckpointError: there is none, or something that is no plain file.
    """
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is no plain file, and a checkpoint holds nothing else")
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                records[path.relative_to(folder).as_posix()] = FileRecord(os.fstat(file.fileno()).st_size, digest)
    if not records:
        raise CheckpointError(f"nothing was written into {folder}")
    return records


def sync_tree(folder: Path) -> None:
    """Force every file and folder below `folder`, and itself, to the disk.

    All at once: the file system then commits them together, which takes a fifth of the time of one after another. Plain
    threads: an executor takes no work when Python is about to exit and waits for a save.
    """
    paths = [*folder.rglob("*"), folder]
    errors: list[OSError] = []
    threads = [Thread(target=_sync_all, args=(paths, errors)) for _ in range(min(SYNC_THREADS, len(paths)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _sync_all(paths: list[Path], errors: list[OSError]) -> None:
    """Take paths off the list until none is left."""
    while True:
        try:
            sync(paths.pop())
        except IndexError:
            return
        except OSError as error:
            errors.append(error)


def remove_tree(folder: Path) -> None:
    """Delete a folder; one with a name that counts gets another first, so that no half-deleted one is ever found.

    Of a link, the link: what it leads to is somebody else's.
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


def in_words(error: OSError | SafetensorError) -> str:
    """Say what a failed write means. safetensors hides the error number in its message."""
    match = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    text = WORDS.get(number) if number is not None else None
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{text}{where}" if text else str(error)


def check_space(folder: Path, needed: int) -> None:
    """Check before a save that 1.2 times `needed` bytes are free below `folder`.

    Raises:
        CheckpointError: they are not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * 1.2:
        raise CheckpointError(
            f"too little space on the disk of {folder}: the last checkpoint took {readable(needed)}, "
            f"{readable(free)} are free, and 1.2 times the last size must be"
        )


def readable(size: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
