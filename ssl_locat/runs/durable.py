"""Files that survive a power cut: what is written waits in memory until fsync, and a new name until its folder is synced, too.

A rename alone keeps a reader from seeing half a file, but after a power cut the new name may hold nothing at all (seen on ext4). So each
file that counts is synced before it gets its name, and the folder after it.
"""

import errno
import os
from pathlib import Path


def write_atomically(path: Path, text: str, private: bool = False) -> None:
    """A reader sees the old file or the new one, never half of it; so does whoever starts after a power cut.

    private: for its owner alone, else as the umask has it."""
    # in the same folder: a rename is atomic within one file system only
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    write_and_flush(beside, text, 0o600 if private else 0o666)
    os.replace(beside, path)
    flush_folder(path.parent)


def write_and_flush(path: Path, text: str, mode: int = 0o666) -> None:
    """A new file, on disk when it returns. mode: of access, less what the umask forbids."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        # Python's buffer first, then the kernel's
        os.fsync(stream.fileno())


def flush(path: Path) -> None:
    """What any process wrote to this file, or which names this folder holds, is on disk when it returns. No such file: nothing to do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """The names in a folder; a file system that cannot sync folders (some network disks) keeps them its own way."""
    try:
        flush(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def make_folder(path: Path) -> None:
    """mkdir with parents, each new name on disk."""
    # a new name is kept by the folder above it
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush_folder(folder.parent)
