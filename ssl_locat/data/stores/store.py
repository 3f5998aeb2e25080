"""Stores behind one interface: exact byte ranges of local files, of s3, gs, http(s) and hf objects, and of what else fsspec knows.

`Store.read(url, start, end)` returns exactly those bytes of exactly that object, or raises:
    Outage     no answer within the time budget, refused credentials, or the object was replaced meanwhile: stop, start again later
    Gone       the object is not there, or ends before `end`: its samples are damage
Everything else that a network does (resets, stalls, short bodies, 5xx, a 503 storm) is retried with full jitter until the *time* budget
is used up: counting attempts gives up within seconds under a storm.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its types forget the error

from ssl_locat.data.stores.local import Local
from ssl_locat.data.stores.objects import EXTRAS, Backend, Denied, Gone, Stat, join, normalise, scheme_of
from ssl_locat.errors import DataError, Outage
from ssl_locat.text.shown import shown

log = logging.getLogger(__name__)

T = TypeVar("T")

# botocore's errors that a network or a busy service may cause. Its others tell of credentials, or of settings that cannot be
_HEALING = {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ChecksumError", "FlexibleChecksumError"}
_HEALING |= {"CredentialRetrievalError", "MetadataRetrievalError"}
_CREDENTIALS = re.compile("Credential|Token|SSO|Login|Profile|MFA")
_PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


_reading = threading.local()  # of one thread: `stopped`, an event that ends its patience; `anew`, whether caches are passed by


def stop_waiting_when(stopped: threading.Event) -> None:
    """For a thread that reads ahead: once the event is set, it no longer waits for a store, so that the process can end."""
    _reading.stopped = stopped


@contextmanager
def anew() -> Iterator[None]:
    """What this thread reads within it comes from the store itself, and leaves the cache, which may hold a wrong answer of before."""
    _reading.anew = True
    try:
        yield
    finally:
        _reading.anew = False


def is_anew() -> bool:
    return getattr(_reading, "anew", False)


class Store:
    """Reads and lists. Cheap to copy into worker processes: connections are opened by the process that uses them.

    Args:
        budget_seconds: how long one request may fail before it counts as an Outage.
        timeout_seconds: silence after which one attempt is given up.
    """

    def __init__(self, budget_seconds: float = 300.0, timeout_seconds: float = 30.0):
        self.budget_seconds, self.timeout_seconds = budget_seconds, timeout_seconds
        self._process: int | None = None
        self._backends: dict[str, Backend] = {}
        self._versions: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"budget_seconds": self.budget_seconds, "timeout_seconds": self.timeout_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # of the subclass that gave this state

    def _backend(self, url: str) -> Backend:
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
                    f"{shown(url)} was replaced while this run was reading it. Start the same command again: the shard is indexed anew, "
                    "and the run continues if it holds the same samples."
                )
            if len(data) != end - start:
                raise ConnectionError(f"{len(data)} bytes instead of {end - start}")
            return data

        if start == end:
            return b""
        try:
            return self._retry(attempt, url)
        except Gone:  # samples are given up only if it is said twice: a proxy or a busy store may say it once
            if scheme_of(url) == "file":
                raise
            time.sleep(random.uniform(0.2, 0.6))
            return self._retry(attempt, url)

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
                    f"data pattern {shown(one)!r} has unbalanced braces: a range is written {{000..099}}, a choice {{a,b}}"
                ) from None
            for url in map(normalise, urls):
                found.update(self._glob(url) if _has_glob(url) else {url: None})
        return found

    def _glob(self, url: str) -> dict[str, Stat | None]:
        if scheme_of(url) == "file" and os.path.exists(url):
            return {url: None}
        if scheme_of(url) == "file":
            found: dict[str, Stat | None] = dict.fromkeys(sorted(glob.glob(url, recursive=True)))
        else:  # list the part before the first wildcard, match the rest
            wildcard = _has_glob(url)
            folder = url[: wildcard.start() if wildcard else None].rpartition("/")[0]
            pattern = url.removeprefix(folder + "/")
            found = {join(folder, name): stat for name, stat in self.walk(folder).items() if _matches(name, pattern)}
        if not found:
            raise DataError(
                f"data pattern {shown(url)!r} matches nothing. Check the folder and the wildcard (quote it in the shell)."
            )
        return found

    def _retry(self, attempt: Callable[[], T], url: str) -> T:
        deadline, pause, warned = time.monotonic() + self.budget_seconds, 0.25, False
        while True:
            try:
                return attempt()
            except (DataError, Outage, Gone):
                raise
            except Exception as error:
                if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in _PERMANENT):
                    raise Gone(url, None) from None
                if _is_access_denied(error) and scheme_of(url) == "file":
                    raise Denied(f"{url}: permission denied. Mend it (chmod u+r; of a folder u+rx), or leave it out.") from None
                if _is_access_denied(error):
                    raise Denied(
                        f"{shown(url)}: access denied ({shown(error)}). Check the rights, and the credentials: they may be missing or have "
                        "expired. Then start the same command again."
                    ) from None
                if _is_usage_error(error):
                    raise DataError(
                        f"{shown(url)} cannot be used: {shown(error)}. Check the URL and the settings of its store."
                    ) from None
                if not isinstance(error, OSError | TimeoutError | asyncio.TimeoutError | EOFError) and not _from_network(error):
                    raise
                what = f"{type(error).__name__}: {error}".rstrip(": ")
            left = deadline - time.monotonic()
            if left <= 0:
                raise Outage(
                    f"{shown(url)}: no answer within {self.budget_seconds:g} s (last: {shown(what)[:300]}). Nothing was skipped: start the "
                    "same command again when the store is back."
                )
            if not warned and pause > 4:
                warned = True
                log.warning("%s does not answer (%s); trying for another %.0f s", shown(url), shown(what)[:200], left)
            # full jitter: many readers that failed together must not come back together
            pause_now, stopped = min(left, random.uniform(0, pause)), getattr(_reading, "stopped", None)
            if stopped is None:
                time.sleep(pause_now)
            elif stopped.wait(pause_now):
                raise Outage(f"{shown(url)}: {shown(what)[:300]}; reading was stopped")
            pause = min(pause * 2, 20)


def _has_glob(url: str) -> re.Match | None:
    """The first wildcard; in http(s) URLs '?' starts a query."""
    return re.search(r"[*\[]" if url.startswith("http") else r"[*?\[]", url)


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _is_access_denied(error: Exception) -> bool:
    """Credentials are missing, wrong or expired, in each library's words."""
    kinds = _kinds(error)
    return (
        isinstance(error, PermissionError)
        or ("BotoCoreError" in kinds and not kinds & _HEALING and bool(_CREDENTIALS.search(type(error).__name__)))
        or bool(kinds & {"DefaultCredentialsError", "RefreshError"})  # Google's
        or getattr(error, "code", None) in (401, 403)  # gcsfs's HttpError
        or str(error).startswith("Forbidden: ")  # gcsfs's OSError
    )


def _is_usage_error(error: Exception) -> bool:
    """A bucket name, an endpoint, a region that cannot be."""
    kinds = _kinds(error)
    return isinstance(error, ValueError) or ("BotoCoreError" in kinds and not kinds & _HEALING)


def _kinds(error: Exception) -> set[str]:
    """Names of its classes: the libraries themselves need not be installed."""
    return {kind.__name__ for kind in type(error).__mro__}


def _from_network(error: Exception) -> bool:
    """Libraries' own errors (aiohttp.ClientError, botocore's, gcsfs's HttpError) that are no OSError."""
    return type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "gcsfs", "s3fs", "fsspec", "google")


def _open_backend(scheme: str, timeout: float) -> Backend:
    if scheme == "file":
        return Local()
    try:
        from ssl_locat.data.stores import remote

        return remote.open_backend(scheme, timeout)
    except ImportError as error:
        # fsspec's own words name the package
        mend = f"pip install 'ssl_locat[{EXTRAS[scheme]}]'" if scheme in EXTRAS else shown(error)
        raise DataError(f"reading {scheme}:// needs a package that is not installed: {mend}") from None
