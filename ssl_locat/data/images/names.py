"""Which files of a folder or a tar are images, by their names; and one line about those that look like images and are not read."""

import logging
from collections import Counter
from collections.abc import Iterable

log = logging.getLogger(__name__)

UNREAD: tuple[str, ...] = (
    "heic",
    "heif",
    "avif",
    "jxl",
    "jxr",
    "psd",
    "svg",
    "tga",
    "exr",
    "hdr",
    "ico",
    "pcx",
    "dds",
    "eps",
    "pdf",
    "fits",
)
UNREAD += ("raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf")  # cameras' own


def has_extension(name: str, extensions: Iterable[str]) -> bool:
    """Whether a file is of one of these kinds. A Mac's `._x.jpg` beside x.jpg, of a disk that is not its own, is none."""
    base = name.rpartition("/")[2]
    return not base.startswith("._") and base.rpartition(".")[2].lower() in extensions


def warn_of_unread(where: str, names: Iterable[str]) -> None:
    """Count the images of kinds that are not read, and name one."""
    found = [name for name in names if has_extension(name, UNREAD)]
    if found:
        kinds = Counter(name.rpartition(".")[2].lower() for name in found)
        listed = ", ".join(f"{count} .{kind}" for kind, count in kinds.most_common())
        log.warning(
            "%s: %d images are of kinds that are not read and are left out (%s), such as %s: convert them to JPEG or PNG",
            where,
            len(found),
            listed,
            found[0],
        )
