"""Objects in stores: how they are addressed, what a store tells of one, and how one can be missing or out of reach.

Only the schemes below are ever opened: URLs are never executed.
"""

import os
import re
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from ssl_locat.errors import DataError, Outage, did_you_mean

SCHEMES = ("file", "memory", "s3", "gs", "http", "https", "hf")


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
