"""The one way to replace a small file: a reader, or a crash, finds the old contents or the new ones, never a part."""

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file, or make it, atomically, and force it to the disk. A failure leaves the old one alone.

    Raises:
        OSError: the disk is full or refuses.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries (new names, renames), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
