"""GET over HTTP/1.1 with plain blocking sockets: what reading ranges needs of a web client, and no more.

A pool of threads reads chunks of megabytes. A blocking receive puts them straight into one buffer while other threads run Python; an event
loop hands over pieces of some 100 kB, each of which waits its turn for the interpreter: four times the processor time per byte, measured.
Proxies (http_proxy, no_proxy ...), ~/.netrc (or NETRC), credentials in the URL and certificates (SSL_CERT_FILE) are those of the environment.
"""

import netrc
import os
import select
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

_REDIRECTS = 10
_KEPT = 8 << 20  # bytes of a thread's buffer at most
_buffers = threading.local()
_SAFE = "%/:=&?~+!$,;'@()*[]"  # stays as it is in a path or query that somebody may have quoted already


class Response:
    """Status and headers; the body on demand. What remains unread closes the connection."""

    def __init__(self, response: HTTPResponse, deadline: float):
        self.status, self.reason, self.headers = response.status, response.reason, response.headers
        self.size: int | None = response.length  # of the body; None if the server does not tell
        self.whole = self.size == 0  # nothing is left to read
        self._response, self._deadline = response, deadline

    def read(self, limit: int) -> bytes:
        """The whole body; less than `size` bytes if the server cut it. Raises ConnectionError, before they are kept, for more than `limit`
        bytes, and TimeoutError past the deadline, however slowly bytes drip."""
        if (self.size or 0) > limit:
            raise ConnectionError(f"{self.size} bytes instead of {limit}")
        if self.size is None:  # in chunks, or up to the end of the connection
            pieces, got = [], 0
            while piece := self._response.read1(1 << 16):
                pieces.append(piece)
                got += len(piece)
                if got > limit:
                    raise ConnectionError(f"more than the {limit} bytes that were asked for")
                self._in_time()
            self.whole = True
            return b"".join(pieces)
        with _borrowed_buffer(self.size) as buffer:
            got = 0
            while got < self.size and (received := self._response.fp.readinto1(buffer[got : self.size])):
                got += received
                self._in_time()
            self.whole = got == self.size
            return bytes(buffer[:got])

    def read_part(self, start: int, end: int) -> bytes:
        """Bytes start..end of the body; what comes before is dropped as it comes, what comes after is not read."""
        kept, at = [], 0
        while at < end and (piece := self._response.read1(min(1 << 16, end - at))):
            kept.append(piece[max(0, start - at) :])
            at += len(piece)
            self._in_time()
        return b"".join(kept)

    def _in_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError("the answer is too slow")


@contextmanager
def _borrowed_buffer(size: int) -> Iterator[memoryview]:
    """Memory to receive into. A thread keeps its own: fresh pages would cost as much as the bytes put into them."""
    kept = getattr(_buffers, "kept", b"")
    if len(kept) < size:
        kept = bytearray(size)
        if size <= _KEPT:
            _buffers.kept = kept
    yield memoryview(kept)


class Web:
    """Connections of one process, kept open between requests. For any number of threads.

    Args:
        timeout: seconds of silence after which a request fails; six times that for all of it.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._idle: dict[tuple, list[HTTPConnection]] = {}
        self._proxies: dict[tuple, str | None] = {}
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None

    @contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[Response]:
        """The answer, after redirects. Raises OSError (ConnectionError, TimeoutError ...) for everything that a network does."""
        deadline = time.monotonic() + 6 * self.timeout
        for _ in range(_REDIRECTS):
            with self._exchange(url, headers, deadline) as answer:
                if answer.status not in (301, 302, 303, 307, 308) or "Location" not in answer.headers:
                    yield answer
                    return
                if answer.size is not None and answer.size < 1 << 16:
                    answer.read(1 << 16)  # keeps the connection
                before, url = urlsplit(url), urljoin(url, answer.headers["Location"])
            if urlsplit(url).scheme not in ("http", "https"):
                raise ConnectionError("redirected to something that is not http")
            if urlsplit(url)[:2] != before[:2]:  # another server must not see what was meant for the first
                headers = {name: value for name, value in headers.items() if name.lower() not in ("authorization", "cookie")}
        raise ConnectionError(f"redirected more than {_REDIRECTS} times")

    @contextmanager
    def _exchange(self, url: str, headers: dict[str, str], deadline: float) -> Iterator[Response]:
        parts = urlsplit(url)
        server = (parts.scheme, parts.hostname or "")
        if server not in self._proxies:
            self._proxies[server] = _proxy(*server)
        where = (*server, parts.port, self._proxies[server])
        connection = None
        try:
            while connection is None:
                connection, fresh = self._connection(where)
                try:
                    connection.request("GET", _target(parts, where[3]), headers=_headers(parts, where[3]) | headers)
                    response = connection.getresponse()
                except ConnectionError:  # the server may have ended a kept connection just now
                    if fresh:
                        raise
                    connection.close()
                    connection = None
            answer = Response(response, deadline)
            yield answer
            reusable = answer.whole and not response.will_close
            response.close()
            if reusable:
                with self._lock:
                    self._idle.setdefault(where, []).append(connection)
                connection = None
        except HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from None
        finally:
            if connection is not None:
                connection.close()

    def _connection(self, where: tuple) -> tuple[HTTPConnection, bool]:
        """(connection, whether it is new)"""
        with self._lock:
            idle = self._idle.get(where, [])
            while idle:
                connection = idle.pop()
                if not _readable(connection.sock):  # else the server has closed it
                    return connection, False
                connection.close()
            if where[0] == "https" and self._tls is None:
                self._tls = ssl.create_default_context()
        scheme, host, port, proxy = where
        through = urlsplit(proxy) if proxy else None
        address = (through.hostname, through.port or 80) if through else (host, port)
        if scheme == "http":
            return HTTPConnection(*address, timeout=self.timeout), True
        connection = HTTPSConnection(*address, timeout=self.timeout, context=self._tls)
        if through:
            connection.set_tunnel(host, port, headers=_basic("Proxy-Authorization", *_user(through)))
        return connection, True


def _target(parts: SplitResult, proxy: str | None) -> str:
    path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    return f"http://{parts.netloc.rpartition('@')[2]}{path}" if proxy and parts.scheme == "http" else path


def _headers(parts: SplitResult, proxy: str | None) -> dict[str, str]:
    headers = {"User-Agent": "ssl_locat", "Accept": "*/*"} | _basic(
        "Authorization", *(_user(parts) or _netrc(parts.hostname or ""))
    )
    return headers | _basic("Proxy-Authorization", *_user(urlsplit(proxy))) if proxy and parts.scheme == "http" else headers


def _basic(header: str, *user_and_password: str) -> dict[str, str]:
    return {header: "Basic " + b64encode(":".join(user_and_password).encode()).decode()} if user_and_password else {}


def _user(parts: SplitResult) -> tuple[str, ...]:
    """(user, password) of a URL; () if it has none."""
    return () if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))


def _netrc(host: str) -> tuple[str, ...]:
    try:
        found = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ()
    return (found[0], found[2] or "") if found else ()


def _proxy(scheme: str, host: str) -> str | None:
    proxy = getproxies().get(scheme)
    if not proxy or proxy_bypass(host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
