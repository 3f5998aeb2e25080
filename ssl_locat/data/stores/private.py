"""Caches that only their owner can have filled: folders of mode 0700, files of 0600, opened without following links.

What lies in a cache is believed (where a sample starts, which bytes it has), so nobody else may put it there.
"""

import os
import stat
from pathlib import Path


def unusable(folder: Path) -> str | None:
    """Makes the folder, for this user alone, if it is not there; says why it must not be used, None if it may. Raises OSError if it cannot be made."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        return "it is a link"
    if found.st_uid != os.geteuid():
        return "it belongs to another user"
    if found.st_mode & 0o077:  # of an earlier version, or made by hand
        os.chmod(folder, 0o700)
    return None


def create(path: Path, exclusive: bool = True) -> int:
    """Descriptor of a file for writing that its owner alone can read; a link of that name is not followed."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else 0), 0o600)


def read(path: Path) -> bytes:
    """The whole file. OSError for a link, or a file of another user."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to another user")
        return file.read()
