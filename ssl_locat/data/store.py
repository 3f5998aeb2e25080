"""Stores behind one interface: exact byte ranges of local files, s3, gs, http(s) and hf objects.

`Store.read(url, start, end)` returns exactly those bytes of exactly that object, or raises:
    Outage     no answer within the time budget, refused credentials, or the object was replaced meanwhile: stop, start again later
    Gone       the object is not there, or ends before `end`: its samples are damage
Everything else that a network does (resets, stalls, short bodies, 5xx, a 503 storm) is retried with full jitter until the *time* budget
is used up: counting attempts gives up within seconds under a storm. Only the schemes below are ever opened: URLs are never executed.
"""

import asyncio
import errno
import fnmatch
import glob
import logging
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from braceexpand import UnbalancedBracesError, braceexpand

from ssl_locat.errors import DataError, Outage, did_you_mean

log = logging.getLogger(__name__)

SCHEMES = ("file", "memory", "s3", "gs", "http", "https", "hf")
_EXTRAS = {"s3": "s3", "gs": "gcs", "http": "http", "https": "http", "hf": "http"}  # of the package, for the message
# botocore's errors that a network or a busy service may cause. Its others tell of credentials, or of settings that cannot be
_HEALING = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ChecksumError", "FlexibleChecksumError"}
_HEALING |= {"CredentialRetrievalError", "MetadataRetrievalError"}
_CREDENTIALS = re.compile("Credential|Token|SSO|Login|Profile|MFA")
_PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


_reading = threading.local()  # what only reading threads have: `stopped`, an event that ends their patience


def let_stop(stopped: threading.Event) -> None:
    """For a thread that reads ahead: once the event is set, it no longer waits for a store, so that the process can end."""
    _reading.stopped = stopped


class Stat(NamedTuple):
    size: int
    version: str  # ETag, generation or modification time: another one means another object. '' if the store tells none


class Gone(Exception):
    """The object is missing (`size` None) or only `size` bytes long."""

    def __init__(self, url: str, size: int | None):
        super().__init__(f"{redact(url)}: not found" if size is None else f"{redact(url)}: only {size} bytes long")
        self.size = size


class Denied(Outage):
    """Credentials are missing, wrong or expired: no retry helps, and no sample is to blame."""


def redact(url: str) -> str:
    """The URL without user, password and query: signed URLs carry their credentials there."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def scheme_of(url: str) -> str:
    """'file' for plain paths. Raises DataError for anything off the list, `pipe:` commands and chained URLs above all."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", url)
    scheme = match[1].lower() if match else "file"
    if "::" in url or scheme not in SCHEMES or (match and scheme != "file" and not url.startswith(f"{scheme}://")):
        raise DataError(
            f"data URL {redact(url)!r} cannot be read: known are plain paths and {', '.join(s + '://' for s in SCHEMES)} "
            f"(no commands, no '::' chains).{did_you_mean(scheme, SCHEMES)}"
        )
    return scheme


def normalise(url: str) -> str:
    """Plain and file:// paths as absolute paths, so that a worker's folder does not matter; other URLs as they are."""
    if scheme_of(url) != "file":
        return url
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


class Store:
    """Reads and lists. Cheap to copy into worker processes: connections are opened by the process that uses them.

    Args:
        budget_seconds: how long one request may fail before it counts as an Outage.
        timeout_seconds: silence after which one attempt is given up.
    """

    def __init__(self, budget_seconds: float = 300.0, timeout_seconds: float = 30.0):
        self.budget_seconds, self.timeout_seconds = budget_seconds, timeout_seconds
        self._process: int | None = None
        self._backends: dict = {}
        self._versions: dict[str, str] = {}

    def __getstate__(self):
        return {"budget_seconds": self.budget_seconds, "timeout_seconds": self.timeout_seconds}

    def __setstate__(self, state):
        self.__init__(**state)

    def _backend(self, url: str):
        if self._process != os.getpid():  # event loops and sockets of a parent do not survive a fork
            self._process, self._backends, self._lock = os.getpid(), {}, threading.Lock()
        scheme = scheme_of(url)
        with self._lock:
            if scheme not in self._backends:
                self._backends[scheme] = _open_backend(scheme, self.timeout_seconds)
            return self._backends[scheme]

    def read(self, url: str, start: int, end: int, stat: Stat | None = None) -> bytes:
        """Bytes start..end, all of them. With `stat`, the object must still be the one it describes (an empty version matches any)."""
        backend = self._backend(url)

        def attempt() -> bytes:
            data, seen = backend.read(url, start, end)
            if 0 <= seen.size < end:
                raise Gone(url, seen.size)
            expected = stat.version if stat and stat.version else self._versions.setdefault(url, seen.version)
            # an object that became shorter was cut: the samples that remain are good, and those that do not are counted
            if (stat and seen.size > stat.size) or (
                expected and seen.version not in ("", expected) and not (stat and seen.size < stat.size)
            ):
                raise Outage(
                    f"{redact(url)} was replaced while this run was reading it. Start the same command again: the shard is indexed anew, "
                    "and the run continues if it holds the same samples."
                )
            if len(data) != end - start:
                raise ConnectionError(f"{len(data)} bytes instead of {end - start}")
            return data

        return b"" if start == end else self._retry(attempt, url)

    def stat(self, url: str) -> Stat:
        return self._retry(lambda: self._backend(url).stat(url), url)

    def read_all(self, url: str) -> bytes:
        stat = self.stat(url)
        return self.read(url, 0, stat.size, stat)

    def walk(self, folder: str) -> dict[str, Stat | None]:
        """All files under a folder: relative path -> Stat where listing gave it, sorted by path. Empty if there is no such folder."""
        with suppress(Gone):  # of a bucket that does not exist
            return dict(sorted(self._retry(lambda: self._backend(folder).walk(folder), folder).items()))
        return {}

    def write(self, url: str, data: bytes) -> None:
        """All or nothing. Stores that cannot be written (http) raise DataError."""
        self._retry(lambda: self._backend(url).write(url, data), url)

    def expand(self, pattern: str | Iterable[str]) -> dict[str, Stat | None]:
        """Braces ({000..099}) and globs (*, ?, [) -> objects in a fixed order; Stat where listing gave it. Unmatched globs raise DataError."""
        found: dict[str, Stat | None] = {}
        for one in [pattern] if isinstance(pattern, str) else pattern:
            try:
                urls = list(braceexpand(one)) if "{" in one else [one]
            except UnbalancedBracesError:
                raise DataError(
                    f"data pattern {one!r} has unbalanced braces: a range is written {{000..099}}, a choice {{a,b}}"
                ) from None
            for url in map(normalise, urls):
                found.update(self._glob(url) if _has_glob(url) else {url: None})
        return found

    def _glob(self, url: str) -> dict[str, Stat | None]:
        if scheme_of(url) == "file" and os.path.exists(url):
            return {url: None}
        if scheme_of(url) == "file":
            found = dict.fromkeys(sorted(glob.glob(url, recursive=True)))
        else:  # list the part before the first wildcard, match the rest
            folder = url[: _has_glob(url).start()].rpartition("/")[0]
            pattern = url.removeprefix(folder + "/")
            found = {join(folder, name): stat for name, stat in self.walk(folder).items() if _matches(name, pattern)}
        if not found:
            raise DataError(
                f"data pattern {redact(url)!r} matches nothing. Check the folder and the wildcard (quote it in the shell)."
            )
        return found

    def _retry(self, attempt, url: str):
        deadline, pause, warned = time.monotonic() + self.budget_seconds, 0.25, False
        while True:
            try:
                return attempt()
            except (DataError, Outage, Gone):
                raise
            except Exception as error:
                if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in _PERMANENT):
                    raise Gone(url, None) from None
                if _is_refused(error):
                    raise Denied(
                        f"{redact(url)}: access denied ({error}). Check the rights, and the credentials: they may be missing or have "
                        "expired. Then start the same command again."
                    ) from None
                if _is_misused(error):
                    raise DataError(
                        f"{redact(url)} cannot be used: {error}. Check the URL and the settings of its store."
                    ) from None
                if not isinstance(error, OSError | TimeoutError | asyncio.TimeoutError | EOFError) and not _from_network(error):
                    raise
                what = f"{type(error).__name__}: {error}".rstrip(": ")
            left = deadline - time.monotonic()
            if left <= 0:
                raise Outage(
                    f"{redact(url)}: no answer within {self.budget_seconds:g} s (last: {redact(what)[:300]}). Nothing was skipped: start the "
                    "same command again when the store is back."
                )
            if not warned and pause > 4:
                warned = True
                log.warning("%s does not answer (%s); trying for another %.0f s", redact(url), what[:200], left)
            # full jitter: many readers that failed together must not come back together
            pause_now, stopped = min(left, random.uniform(0, pause)), getattr(_reading, "stopped", None)
            if stopped is None:
                time.sleep(pause_now)
            elif stopped.wait(pause_now):
                raise Outage(f"{redact(url)}: {redact(what)[:300]}; reading was stopped")
            pause = min(pause * 2, 20)


def _has_glob(url: str) -> re.Match | None:
    """The first wildcard; in http(s) URLs '?' starts a query."""
    return re.search(r"[*\[]" if url.startswith("http") else r"[*?\[]", url)


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _is_refused(error: Exception) -> bool:
    """Credentials are missing, wrong or expired, in each library's words."""
    kinds = _kinds(error)
    return (
        isinstance(error, PermissionError)
        or ("BotoCoreError" in kinds and not kinds & _HEALING and bool(_CREDENTIALS.search(type(error).__name__)))
        or bool(kinds & {"DefaultCredentialsError", "RefreshError"})  # Google's
        or getattr(error, "code", None) in (401, 403)  # gcsfs's HttpError
        or str(error).startswith("Forbidden: ")  # gcsfs's OSError
    )


def _is_misused(error: Exception) -> bool:
    """A bucket name, an endpoint, a region that cannot be."""
    kinds = _kinds(error)
    return isinstance(error, ValueError) or ("BotoCoreError" in kinds and not kinds & _HEALING)


def _kinds(error: Exception) -> set[str]:
    """Names of its classes: the libraries themselves need not be installed."""
    return {kind.__name__ for kind in type(error).__mro__}


def _from_network(error: Exception) -> bool:
    """Libraries' own errors (aiohttp.ClientError, botocore's, gcsfs's HttpError) that are no OSError."""
    return type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "gcsfs", "s3fs", "fsspec", "google")


def _open_backend(scheme: str, timeout: float):
    if scheme == "file":
        return _Local()
    try:
        from ssl_locat.data import remote

        return remote.open_backend(scheme, timeout)
    except ImportError:
        raise DataError(
            f"reading {scheme}:// needs a package that is not installed: pip install 'ssl_locat[{_EXTRAS.get(scheme)}]'"
        ) from None


_MAX_OPEN = 128  # descriptors; a process may often have 1024


class _Local:
    """Files, through a bounded number of open descriptors."""

    def __init__(self):
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
        found, seen, starts = {}, set(), [folder]
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

    def __del__(self, close=os.close):
        with suppress(AttributeError):  # was never opened
            close(self.number)


def _check_mounted(url: str) -> None:
    """A missing file is damage; a missing folder is a mount that went away, which must not quarantine a whole data set."""
    if not os.path.isdir(os.path.dirname(url)):
        raise ConnectionError(f"its folder {os.path.dirname(url)} is not there (unmounted?)")


def _stat(status: os.stat_result) -> Stat:
    return Stat(status.st_size, str(status.st_mtime_ns))
