"""The local disk as a store: exact byte ranges through a bounded number of open files, and folders walked once each."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ssl_locat.data.stores.objects import Stat

_MAX_OPEN = 128  # descriptors; a process may often have 1024


class Local:
    """Files, through a bounded number of open descriptors."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, url: str, start: int, end: int) -> tuple[bytes, Stat]:
        with self._lock:
            if url not in self._open:
                self._open[url] = _Descriptor(url)
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(url)
            file = self._open[url]  # stays open while we read, though another thread may push it out of the table
        try:
            data = os.pread(file.number, end - start, start)
            while 0 < len(data) < end - start:  # one call reads 2 GiB at most
                more = os.pread(file.number, end - start - len(data), start + len(data))
                if not more:
                    break
                data += more
            return data, _stat(os.fstat(file.number))
        except OSError:  # a stale handle (NFS) heals by opening again
            with self._lock:
                self._open.pop(url, None)
            raise

    def stat(self, url: str) -> Stat:
        return _stat(os.stat(url))

    def walk(self, folder: str) -> dict[str, Stat | None]:
        """Links are followed, but each folder counts once: a link to a parent would lead round and round."""
        found: dict[str, Stat | None] = {}
        seen: set[str] = set()
        starts = [folder]
        for start in starts:  # grows: links come last, so that a folder is met under its own name first
            for path, folders, names in os.walk(start):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                if (real := os.path.realpath(path)) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                starts += [link for name in folders if os.path.islink(link := os.path.join(path, name))]
                relative = os.path.relpath(path, folder)
                for name in names:
                    if name.startswith("._"):  # what a Mac leaves beside each file: no image, whatever its ending says
                        continue
                    found[name if relative == "." else f"{relative}/{name}"] = None
        return found

    def write(self, url: str, data: bytes) -> None:
        path = Path(url)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class _Descriptor:
    """Of an open file; closed with the last reference."""

    def __init__(self, url: str):
        try:
            self.number = os.open(url, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            _check_mounted(url)
            raise

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        with suppress(AttributeError):  # was never opened
            close(self.number)


def _check_mounted(url: str) -> None:
    """A missing file is damage; a missing folder is a mount that went away, which must not quarantine a whole data set."""
    if not os.path.isdir(os.path.dirname(url)):
        raise ConnectionError(f"its folder {os.path.dirname(url)} is not there (unmounted?)")


def _stat(status: os.stat_result) -> Stat:
    return Stat(status.st_size, str(status.st_mtime_ns))
