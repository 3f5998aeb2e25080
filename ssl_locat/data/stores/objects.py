"""Objects in stores: how they are addressed, what a store tells of one, and how one can be missing or out of reach.

Opened is what fsspec knows by its scheme, but for the schemes that lead on to other URLs or into files: URLs are never executed.
"""

import os
import re
from functools import lru_cache
from typing import NamedTuple, Protocol

from ssl_locat.errors import DataError, Outage, did_you_mean
from ssl_locat.text.shown import MARK, shown

SCHEMES = ("file", "memory", "s3", "gs", "http", "https", "hf")  # with a reader of our own
# of the package, where a scheme needs one
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http", "hf": "http"}
# fsspec's file systems over other ones: what they open stands behind the scheme, in a file or an option, where no check here would see it
_OVER_OTHERS = {
    *("async_wrapper", "asyncwrapper", "blockcache", "cached", "dir", "filecache", "generic", "reference", "simplecache"),
    *("libarchive", "tar", "zip"),  # archives: samples inside are not reached by offset
    *("dask", "pyscript"),  # another process reads
    *("asynclocal", "data", "local"),  # a plain path says it; bytes in the URL itself
}


class Stat(NamedTuple):
    size: int
    version: str  # ETag, generation or modification time: another one means another object. '' if the store tells none


class Backend(Protocol):
    """What `Store` asks of one kind of store. Errors are those of the library behind it; the store reads them."""

    def stat(self, url: str) -> Stat: ...

    def walk(self, folder: str) -> dict[str, Stat | None]:
        """{path below the folder: Stat, None where a listing does not tell}, at any depth."""

    def read(self, url: str, start: int, end: int) -> tuple[bytes, Stat]:
        """Bytes start..end, perhaps fewer, and what the answer said of the whole object."""

    def write(self, url: str, data: bytes) -> None: ...


class Gone(Exception):
    """The object is missing (`size` None) or only `size` bytes long."""

    def __init__(self, url: str, size: int | None):
        super().__init__(f"{shown(url)}: not found" if size is None else f"{shown(url)}: only {size} bytes long")
        self.size = size


class Denied(Outage):
    """Credentials are missing, wrong or expired: no retry helps, and no sample is to blame."""


def scheme_of(url: str) -> str:
    """'file' for plain paths. Raises DataError for anything that fsspec does not know, `pipe:` commands and chained URLs above all."""
    if f"{MARK}@" in url or f"?{MARK}" in url:
        raise DataError(
            f"data URL {url!r} is that of a checkpoint or a report, which keep no credentials. Give the URL with them again "
            "(data.train=URL on the command line), or without: ~/.netrc, AWS_PROFILE, gcloud's login and HF_TOKEN are read."
        )
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", url)
    scheme = match[1].lower() if match else "file"
    known = scheme in SCHEMES or scheme in others()
    if "::" in url or not known or (match and scheme != "file" and not url.startswith(f"{scheme}://")):
        raise DataError(
            f"data URL {shown(url)!r} cannot be read: known are plain paths, {', '.join(s + '://' for s in SCHEMES)} and what else fsspec "
            f"knows ({', '.join(s + '://' for s in ('az', 'sftp', 'ftp', 'hdfs'))} ...; no commands, no '::' chains, no scheme over another "
            f"one).{did_you_mean(scheme, (*SCHEMES, *others()))}"
        )
    return scheme


@lru_cache(1)
def others() -> frozenset[str]:
    """Schemes that fsspec knows besides ours, those of packages that register theirs with it too. Nothing of them is imported."""
    import fsspec

    known = {name for name in (*fsspec.available_protocols(), *fsspec.registry) if "_" not in name}  # which no URL's scheme has
    return frozenset(known - _OVER_OTHERS - {*SCHEMES})


def normalise(url: str) -> str:
    """Plain and file:// paths as absolute paths, so that a worker's folder does not matter; other URLs as they are."""
    if scheme_of(url) != "file":
        return url
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def folder_and_name(url: str) -> tuple[str, str]:
    """What stands before and behind the last slash of the path; the query of an http(s) URL, a signature perhaps, belongs to neither."""
    path = re.split(r"[?#]", url, maxsplit=1)[0] if url.startswith("http") else url
    folder, _, name = path.rpartition("/")
    return folder, name


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"
