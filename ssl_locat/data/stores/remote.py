"""Remote stores: one exact range request each, and what the answer says about the object.

fsspec does addressing, credentials and listing. Ranges are asked for and checked here: fsspec's http reader accepts a server that ignores
Range, its s3 and gs readers do not tell which version of the object answered, and its event loop costs several times a blocking read.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import fsspec
from fsspec import asyn
from fsspec.asyn import sync

from ssl_locat.data.stores.objects import Backend, Gone, Stat
from ssl_locat.data.stores.web import Response, Web
from ssl_locat.errors import DataError
from ssl_locat.text.shown import shown

_MAX_WHOLE = 64 << 20  # bytes taken at most from a server that ignores Range and sends the whole object
_CONNECTIONS = 64
_SESSIONS = 8  # of other stores at once: an ssh server drops some of more than ten that log in together
# what changes when an object does, by each file system's name for it; the first that one has
_VERSIONS = ("ETag", "etag", "created", "mtime", "last_modified", "LastModified", "modify", "modified", "modificationTime")

if hasattr(os, "register_at_fork") and not hasattr(asyn, "reset_after_fork"):
    # fsspec before 2025.3.2: a forked worker has its parent's event loop, not the thread that runs it, and would wait for ever
    os.register_at_fork(after_in_child=asyn.reset_lock)


def open_backend(scheme: str, timeout: float) -> Backend:
    """Raises ImportError if the scheme's package is not installed."""
    kinds: dict[str, Callable[[float], Backend]] = {
        "memory": Memory,
        "s3": S3,
        "s3a": S3,
        "gs": Gcs,
        "gcs": Gcs,
        "hf": Hub,
        "http": Http,
        "https": Http,
    }
    return kinds[scheme](timeout) if scheme in kinds else Other(scheme, timeout)


class _Listing:
    """Listing and writing, as fsspec does it for all stores."""

    fs: fsspec.AbstractFileSystem

    def stat(self, url: str) -> Stat:
        self.fs.invalidate_cache()
        return _stat(self.fs.info(url))

    def walk(self, folder: str) -> dict[str, Stat | None]:
        self.fs.invalidate_cache()
        root = self.fs._strip_protocol(folder).rstrip("/") + "/"
        found = self.fs.find(root, detail=True)
        return {path[len(root) :]: self._from_info(info) for path, info in found.items() if path.startswith(root)}

    def write(self, url: str, data: bytes) -> None:
        self.fs.pipe_file(url, data)

    def _from_info(self, info: dict) -> Stat | None:
        return _stat(info)


def _stat(info: dict) -> Stat:
    """Of what fsspec tells of an object, in each store's words."""
    return Stat(info["size"], str(next((info[name] for name in _VERSIONS if info.get(name)), "")).strip('"'))


class Memory(_Listing):
    """fsspec's memory:// of this process, for trying things out."""

    def __init__(self, timeout: float):
        self.fs = fsspec.filesystem("memory")

    def read(self, url: str, start: int, end: int) -> tuple[bytes, Stat]:
        return self.fs.cat_file(url, start, end), self.stat(url)


class S3(_Listing):
    """Credentials, region and endpoint as for every AWS tool: environment, ~/.aws, instance role; AWS_ENDPOINT_URL for other servers."""

    def __init__(self, timeout: float):
        from botocore.config import Config

        options = {
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "max_pool_connections": _CONNECTIONS,
            "retries": {"max_attempts": 0},
        }
        if "response_checksum_validation" in Config.OPTION_DEFAULTS:  # some servers send the whole object's checksum with a range
            options["response_checksum_validation"] = "when_required"
        self.fs = fsspec.filesystem("s3", config_kwargs=options, skip_instance_cache=True)
        self.fs.retries = 1  # Store.read retries, against a time budget

    def read(self, url: str, start: int, end: int) -> tuple[bytes, Stat]:
        bucket, key, _ = self.fs.split_path(url)

        async def get() -> tuple[dict[str, Any], bytes]:
            answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
            body = answer["Body"]
            async with body:  # not `as body`: aiobotocore 2 gives the response below it then, which is read whole or not at all
                if "ContentRange" not in answer:
                    raise ConnectionError("the store ignored the range")
                pieces, left = [], end - start + 1  # one byte more than asked for would show
                while left and (piece := await body.read(left)):
                    pieces.append(piece)
                    left -= len(piece)
                return answer, b"".join(pieces)

        try:
            answer, data = sync(self.fs.loop, get)
        except OSError as error:
            return _beyond_end(error, self, url, end)
        return _cut(data, answer.get("ContentRange"), start, end, answer.get("ETag", ""), url)


class Http(_Listing):
    """Any web server that answers range requests. Proxies and ~/.netrc as the environment has them."""

    def __init__(self, timeout: float):
        self.web, self.timeout, self.ranges_work = Web(timeout), timeout, False

    @cached_property
    def fs(self) -> fsspec.AbstractFileSystem:
        """For listing only."""
        try:
            import aiohttp
        except ImportError:
            raise DataError(
                "listing a folder of a web server needs a package that is not installed: pip install 'ssl_locat[http]' "
                "(or name the files: shards-{000..099}.tar)"
            ) from None
        silence = aiohttp.ClientTimeout(total=6 * self.timeout, sock_connect=self.timeout, sock_read=self.timeout)
        return fsspec.filesystem("https", client_kwargs={"timeout": silence, "trust_env": True}, skip_instance_cache=True)

    def stat(self, url: str) -> Stat:
        return self.read(url, 0, 1)[1]

    def write(self, url: str, data: bytes) -> None:
        raise DataError(f"{shown(url)} cannot be written: http is read only. Write to the store behind it.")

    def _address(self, url: str) -> tuple[str, dict]:
        return url, {}

    def _from_info(self, info: dict) -> Stat | None:
        return None  # an index page tells names only

    def read(self, url: str, start: int, end: int) -> tuple[bytes, Stat]:
        url, headers = self._address(url)
        with self.web.get(url, headers | {"Range": f"bytes={start}-{end - 1}"}) as answer:
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            sent = answer.headers.get("Content-Range")
            if answer.status == 206:
                if sent is None:  # an error page perhaps, of something in between
                    raise ConnectionError("a part of something, without Content-Range")
                data = answer.read(end - start)
                self.ranges_work = True
                return _cut(data, sent, start, end, version, url)
            if answer.status == 416:
                return b"", Stat(_total(sent), version)
            if answer.status == 200:
                return self._whole(answer, start, end, version, url)
            if answer.status in (401, 403, 407):
                raise PermissionError(f"HTTP {answer.status}")
            if answer.status in (404, 410):
                raise FileNotFoundError
            if 400 <= answer.status < 500 and answer.status not in (408, 425, 429):
                raise DataError(f"{shown(url)}: the server answers HTTP {answer.status} ({shown(answer.reason)}). Check the URL.")
            raise ConnectionError(f"HTTP {answer.status}")

    def _whole(self, answer: Response, start: int, end: int, version: str, url: str) -> tuple[bytes, Stat]:
        """The server ignored Range. A small object is taken whole; of a large one each sample would cost a download."""
        size = answer.size
        if self.ranges_work:  # a proxy's or a busy server's mood
            raise ConnectionError("the server ignored the range this time")
        if size is None or size > _MAX_WHOLE:
            raise DataError(
                f"{shown(url)}: the server ignores range requests{'' if size is None else f' (it sends all {size} bytes)'}. Samples cannot be "
                "read from it one by one: use a server that supports them (nginx, any object store), or copy the shards."
            )
        return answer.read_part(start, end), Stat(size, version.strip('"'))


class Gcs(Http):
    """Credentials as for every Google tool: gcloud's login, GOOGLE_APPLICATION_CREDENTIALS, instance account."""

    def __init__(self, timeout: float):
        super().__init__(timeout)
        self.fs = fsspec.filesystem("gs", requests_timeout=timeout, skip_instance_cache=True)

    def _address(self, url: str) -> tuple[str, dict]:
        # gcsfs retries each read six times over a minute, out of reach of our time budget: it only signs
        try:
            return self.fs.url(self.fs._strip_protocol(url)), self.fs._get_headers(None)
        except Exception as error:
            _raise_denied(error)
            raise

    write = _Listing.write


class Hub(Http):
    """Files of the Hugging Face hub, hf://datasets/USER/NAME[@REVISION]/PATH. Token as `hf auth login` keeps it, or HF_TOKEN."""

    def __init__(self, timeout: float):
        super().__init__(timeout)
        from huggingface_hub import HfFileSystem

        self.fs = self.hub = HfFileSystem()
        self.addresses: dict[str, str] = {}
        self.lock = threading.Lock()

    def _address(self, url: str) -> tuple[str, dict]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        with self.lock:
            if url not in self.addresses:
                at: Any = self.hub.resolve_path(url)  # of a repository
                self.addresses[url] = hf_hub_url(
                    at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision, endpoint=self.hub.endpoint
                )
            return self.addresses[url], build_hf_headers(token=self.hub.token)


class Other:
    """Whatever else fsspec knows: az, sftp, ftp, hdfs, smb, webdav ... Host, port and user are those of the URL, all other settings those of fsspec's
    own configuration (FSSPEC_AZ_ACCOUNT_NAME=..., files in ~/.config/fsspec).

    fsspec's readers do not tell which version of an object answered: it is asked for after the bytes, one more request for each read.
    """

    def __init__(self, scheme: str, timeout: float):
        self.scheme, self.timeout = scheme, timeout
        self.kind = fsspec.get_filesystem_class(scheme)  # ImportError names the package
        self.idle: dict[str, list[Any]] = {}
        self.lock, self.sessions = threading.Lock(), threading.BoundedSemaphore(_SESSIONS)

    def read(self, url: str, start: int, end: int) -> tuple[bytes, Stat]:
        with self._session(url) as (fs, path):
            return fs.cat_file(path, start=start, end=end), _stat(fs.info(path))

    def stat(self, url: str) -> Stat:
        with self._session(url) as (fs, path):
            return _stat(fs.info(path))

    def walk(self, folder: str) -> dict[str, Stat | None]:
        with self._session(folder) as (fs, path):
            root = path.strip("/")
            # file systems differ in the slash that a path begins with, and some put it before what they list
            found = {name.lstrip("/"): info for name, info in fs.find(path, detail=True).items()}
            return {
                name[len(root) :].lstrip("/"): _stat(info) for name, info in found.items() if name.startswith(root and f"{root}/")
            }

    def write(self, url: str, data: bytes) -> None:
        with self._session(url) as (fs, path):
            try:
                if fs.async_impl:  # an object store: a name appears with the whole object
                    fs.pipe_file(path, data)
                    return
                temporary = f"{path}.{os.getpid()}.tmp"
                fs.pipe_file(temporary, data)
                fs.mv(temporary, path)
            except NotImplementedError:
                raise DataError(
                    f"{shown(url)} cannot be written: {self.scheme} is read only here. Write to the store behind it."
                ) from None

    @contextmanager
    def _session(self, url: str) -> Iterator[tuple[Any, str]]:
        """(file system, path): of this thread alone while it lasts, as ftplib's and others' connections serve one caller at a time. One that failed
        is not used again: a connection that broke stays so."""
        options = self.kind._get_kwargs_from_urls(url)
        key = repr(sorted(options.items()))
        with self.sessions:
            with self.lock:
                waiting = self.idle.setdefault(key, [])
                fs = waiting.pop() if waiting else None
            try:
                fs = fs or self._connect(options)
                fs.invalidate_cache()
                yield fs, self.kind._strip_protocol(url)
            except FileNotFoundError:
                self._keep(key, fs)
                raise
            except Exception as error:
                if (told := _in_our_words(error)) is error:
                    raise
                raise told from error
            self._keep(key, fs)

    def _keep(self, key: str, fs: Any) -> None:
        if fs is not None:
            with self.lock:
                self.idle[key].append(fs)

    def _connect(self, options: dict[str, Any]) -> Any:
        try:
            fs = self.kind(skip_instance_cache=True, **options)
        except TypeError as error:  # a setting is missing that the URL cannot hold
            raise ValueError(
                f"{error}; settings that a URL does not hold come from fsspec's configuration, such as FSSPEC_{self.scheme.upper()}_NAME=VALUE"
            ) from error
        if hasattr(getattr(fs, "ftp", None), "get_channel"):  # paramiko's would wait for ever
            fs.ftp.get_channel().settimeout(self.timeout)
        return fs


def _in_our_words(error: Exception) -> Exception:
    """A library's error as one that `Store` can read: refused credentials, a missing object, or something that may heal."""
    text, kind = str(error), type(error).__name__
    if isinstance(error, OSError | ValueError | DataError | Gone):
        return error
    if re.search("Auth|Credential|Forbidden|PermissionDenied", kind) or re.match(
        r"\W?(401|403|530)\b|.{0,40}uthentication", text
    ):
        return PermissionError(f"{kind}: {text}"[:300])
    if re.search("NotFound|NoSuch", kind):
        return FileNotFoundError(text)
    return ConnectionError(f"{kind}: {text}")


def _total(content_range: str | None) -> int:
    """Size of the whole object from 'bytes 0-99/1234' or 'bytes */1234'."""
    match = re.search(r"/(\d+)$", content_range or "")
    if not match:
        raise ConnectionError(f"the server does not tell the object's size (Content-Range: {content_range})")
    return int(match[1])


def _cut(data: bytes, content_range: str | None, start: int, end: int, version: str, url: str) -> tuple[bytes, Stat]:
    """Checks an answer against its Content-Range; without one, the store ignored the range and sent everything."""
    version = version.strip('"')
    if content_range is None:
        return data[start:end], Stat(len(data), version)
    if not content_range.startswith(f"bytes {start}-"):
        raise ConnectionError(f"asked for bytes {start}-{end - 1}, got {content_range}")
    return data, Stat(_total(content_range), version)


def _beyond_end(error: Exception, store: _Listing, url: str, end: int) -> tuple[bytes, Stat]:
    """Object stores answer a range behind the end (416) with an error of their own making: ask for the size."""
    if "416" not in str(error) and "range" not in str(error).lower():
        raise error
    stat = store.stat(url)
    if stat.size >= end:
        raise ConnectionError(str(error)) from error
    raise Gone(url, stat.size) from error


def _raise_denied(error: Exception) -> None:
    """PermissionError for what libraries say in many ways."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, PermissionError) or re.search(r"Credential|Forbidden|401|403|RefreshError|Anonymous caller", text):
        raise PermissionError(text[:300]) from error
