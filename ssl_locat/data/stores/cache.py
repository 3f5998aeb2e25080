"""A page cache on local disk, for stores that are slow or charge for reading; shared by all ranks of a node.

Pages are fixed, aligned pieces of an object (chunks move with every pass), named by the object's URL and version, never by its base name.
A page is written beside and renamed, so a kill leaves whole pages or none; a full disk means less cache, not an error. The least recently
used pages go first once the limit is passed; several processes may do so at once.
"""

import hashlib
import logging
import os
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_locat.data.stores import private
from ssl_locat.data.stores.objects import Stat, scheme_of
from ssl_locat.data.stores.store import Store, is_anew
from ssl_locat.text.shown import redact

log = logging.getLogger(__name__)

PAGE_BYTES = 4 << 20
_TRIM_EVERY = 64  # pages written by a process between two looks at the size of the whole


class CachedStore(Store):
    """A Store whose remote reads go through pages under `folder`, of at most about `limit_bytes` altogether."""

    def __init__(self, folder: str | Path, limit_bytes: int, budget_seconds: float = 300.0):
        super().__init__(budget_seconds)
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._written, self._complained, self._trim_lock = 0, False, threading.Lock()
        self._usable: bool | None = None  # not looked at yet

    def _own_folder(self) -> bool:
        """Looked at once, by the first read that needs it."""
        if self._usable is not None:
            return self._usable
        try:
            reason = private.unusable(self.folder)
        except OSError as error:
            reason = error.strerror
        if reason:
            log.warning(
                "the data cache %s is not used (%s): reading continues without it. Name a folder of your own.",
                self.folder,
                reason,
            )
        self._usable = not reason
        return self._usable

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "limit_bytes": self.limit_bytes, "budget_seconds": self.budget_seconds}

    def read(self, url: str, start: int, end: int, stat: Stat | None = None) -> bytes:
        # without a size and a version there is no telling whether a page is still the object's
        if (
            stat is None
            or not stat.version
            or end > stat.size
            or start >= end
            or scheme_of(url) == "file"
            or not self._own_folder()
        ):
            return super().read(url, start, end, stat)
        pages = range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1)
        if is_anew():
            for number in pages:
                self._path(url, number, stat).unlink(missing_ok=True)
            return super().read(url, start, end, stat)
        pieces = []
        for number in pages:
            first = number * PAGE_BYTES
            page = self._page(url, number, stat)
            pieces.append(page[max(0, start - first) : end - first])
        return b"".join(pieces)

    def _path(self, url: str, number: int, stat: Stat) -> Path:
        name = hashlib.blake2b(f"{redact(url)}\0{stat.size}\0{stat.version}\0{number}".encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / name

    def _page(self, url: str, number: int, stat: Stat) -> bytes:
        path = self._path(url, number, stat)
        with suppress(OSError):
            stored = private.read(path)
            page, crc = stored[:-4], stored[-4:]
            if zlib.crc32(page).to_bytes(4, "little") == crc:  # a crash of the machine may leave holes
                os.utime(path)  # mount options often keep no access times
                return page
        first = number * PAGE_BYTES
        page = super().read(url, first, min(first + PAGE_BYTES, stat.size), stat)
        self._write(path, page)
        return page

    def _write(self, path: Path, page: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(private.create(temporary), "wb") as file:
                file.write(page)
                file.write(zlib.crc32(page).to_bytes(4, "little"))
            temporary.replace(path)
        except OSError as error:  # full or read-only: read without it
            with suppress(OSError):
                temporary.unlink()
            if not self._complained:
                self._complained = True
                log.warning("the data cache %s cannot be written (%s): reading continues without it", self.folder, error.strerror)
            self.trim(self.limit_bytes // 2)
            return
        with self._trim_lock:
            self._written += 1
            due = self._written % _TRIM_EVERY == 0 or (
                self._written * PAGE_BYTES > self.limit_bytes // 8 and self._written % 8 == 0
            )
        if due:
            self.trim(self.limit_bytes)

    def trim(self, limit: int) -> None:
        """Remove the least recently used pages until `limit` bytes remain, and what killed writers left behind."""
        pages = []
        for path in self.folder.glob("*/*"):
            with suppress(OSError):  # another process was faster
                status = path.stat()
                if path.suffix == ".tmp" and time.time() - status.st_mtime > 600:
                    path.unlink()
                elif path.suffix != ".tmp":
                    pages.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in pages)
        for _, size, path in sorted(pages):
            if total <= limit:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
