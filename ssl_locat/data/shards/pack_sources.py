"""What `shards pack` finds: samples as places in files, nothing read yet. Folders, tars, tars of tars, compressed tars of these; of everything else
that can be read as data (pack_spool.py) the tars that it was copied to."""

import glob
import logging
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ssl_locat.data.images.decode import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, LABEL_KEYS
from ssl_locat.data.images.names import has_extension, warn_of_unread
from ssl_locat.data.shards.pack_spool import copy_to_tars, is_to_be_copied
from ssl_locat.data.shards.tar import COMPRESSED, split_name
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import DataError

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """`size` bytes at `offset` of file number `file`, to become the member `extension`."""

    extension: str
    file: int
    offset: int
    size: int


class Source(NamedTuple):
    """A sample to be packed."""

    key: str
    places: tuple[Place, ...]
    group: str  # name of its folder or inner tar; "" if there is none
    name: str  # of the file, without folders and extension
    label: int | None = None  # class id to write as `cls`
    origin: str = ""  # where it came from, if not from the file itself


class Listing(NamedTuple):
    files: list[str]
    samples: list[Source]
    ignored: int  # files that are no images and belong to none
    classes: Sequence[str] = ()  # names, where the source has some


def list_source(source: str, unpacked: Path, split: str | None = None) -> Listing:
    """Everything that can be packed under a folder or a URL, or in one archive or a glob of them.

    A compressed tar is unpacked (to a plain tar) under `unpacked` first: its members cannot be reached by offset. So is what is no tar.
    Raises DataError if there is nothing.
    """
    if is_to_be_copied(source):
        copied = copy_to_tars(source, unpacked, split)
        found = _list_tars(copied.tars, unpacked)
        samples = found.samples
        if len(copied.origins) == len(samples):
            samples = [sample._replace(origin=origin) for sample, origin in zip(samples, copied.origins, strict=True)]
        return Listing(found.files, samples, found.ignored + copied.damaged, copied.classes)
    if os.path.isdir(source):
        tars = sorted(str(path) for path in Path(source).iterdir() if _is_archive(path))
        listing = _list_tars(tars, unpacked) if tars else _list_folder(source, IMAGE_EXTENSIONS)
        if not tars and not listing.samples:
            listing = _list_folder(source, ARRAY_EXTENSIONS)
    else:
        tars = sorted(glob.glob(source)) if not os.path.exists(source) else [source]
        if not tars:
            raise DataError(f"{source} does not exist; give a folder of images, an archive, or a quoted glob of archives")
        listing = _list_tars(tars, unpacked)
    if not listing.samples:
        endings = ", ".join(IMAGE_EXTENSIONS)
        raise DataError(f"{source} holds no images ({listing.ignored} other files); images end in {endings}")
    return listing


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith((".tar", *COMPRESSED)) and not path.is_dir()


def _list_folder(folder: str, extensions: tuple[str, ...]) -> Listing:
    files: list[str] = []
    samples: list[Source] = []
    broken: list[str] = []
    ignored = 0
    # the files that training on this folder finds, folder by folder
    names = sorted(Store().walk(folder), key=lambda name: (name.split("/")[:-1], name))
    warn_of_unread(folder, names)
    for relative in names:
        if not has_extension(relative, extensions):
            ignored += 1
            continue
        extension = relative.rpartition(".")[2].lower()
        path = os.path.join(folder, relative)
        try:
            size = os.path.getsize(path)
        except OSError:  # a link to nowhere: training passes over it too
            broken.append(path)
            continue
        group = relative.partition("/")[0] if "/" in relative else ""
        place = Place(extension, len(files), 0, size)
        stem = relative.rpartition(".")[0]
        samples.append(Source(_key(stem), (place,), group, stem.rpartition("/")[2].replace(".", "_")))
        files.append(path)
    if broken:
        log.warning("%d images cannot be opened and are left out, such as %s", len(broken), broken[0])
    return Listing(files, samples, ignored + len(broken))


def _list_tars(paths: list[str], unpacked: Path) -> Listing:
    files: list[str] = []
    samples: list[Source] = []
    ignored = 0
    for path in paths:
        if path.lower().endswith(COMPRESSED):
            path = _unpack(path, unpacked)
        files.append(path)
        found, skipped = _list_tar(path, len(files) - 1)
        samples += found
        ignored += skipped
    return Listing(files, samples, ignored)


def _list_tar(path: str, file: int) -> tuple[list[Source], int]:
    samples, ignored, names = [], 0, []
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    with stream:
        for name, offset, _ in _members(stream, 0, path):
            names.append(name)
            if name.lower().endswith(".tar"):  # ImageNet: one inner tar per class
                inner = os.path.basename(name)[:-4]
                stream.seek(offset)
                found = list(_members(stream, offset, f"{name} in {path}"))
                group_samples, skipped = _group(found, file, inner)
                samples += group_samples
                ignored += skipped
        if not samples:
            samples, ignored = _group(list(_members(stream, 0, path)), file, None)
    warn_of_unread(path, names)
    return samples, ignored


def _members(stream: BinaryIO, start: int, name: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the outermost file, size) of the regular files of the tar that starts at byte `start`."""
    stream.seek(start)
    end = os.fstat(stream.fileno()).st_size
    try:
        # offsets of tarfile count from the start of the stream, also when that is not the start of the archive
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                # looked at before tarfile moves on: a size below zero would lead it backwards, a huge one beyond any file
                holds_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                if holds_data and not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError(f"it ends inside {member.name!r}, of {member.size} bytes")
                if member.isreg():
                    yield member.name, member.offset_data, member.size
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # of numbers in headers that no file can have
        raise DataError(f"{name} is not a whole tar archive: {error}") from None


def _group(found: list[tuple[str, int, int]], file: int, inner: str | None) -> tuple[list[Source], int]:
    """Neighbours that share their name up to the first dot become one sample, as in WebDataset."""
    samples: list[Source] = []
    places: list[Place] = []
    ignored, last = 0, ""  # no member's name is empty

    def close() -> int:
        if not any(place.extension.rpartition(".")[2] in (*IMAGE_EXTENSIONS, *ARRAY_EXTENSIONS) for place in places):
            return len(places)
        group = inner if inner is not None else (last.partition("/")[0] if "/" in last else "")
        samples.append(Source(_key(f"{inner}/{last}" if inner else last), tuple(places), group, last.rpartition("/")[2]))
        return 0

    for name, offset, size in found:
        parts = split_name(name.removeprefix("./"))
        if parts is None:
            ignored += 1
            continue
        if parts[0] != last or any(place.extension == parts[1] for place in places):
            ignored += close() if places else 0
            last, places = parts[0], []
        places.append(Place(parts[1], file, offset, size))
    ignored += close() if places else 0
    return samples, ignored


def has_labels(sample: Source) -> bool:
    return any(place.extension in LABEL_KEYS for place in sample.places)


def _key(stem: str) -> str:
    """A WebDataset key: dots of the name would begin the extension, folders are flattened, nothing climbs out."""
    return "_".join(part for part in stem.replace(".", "_").split("/") if part.strip("_")) or "sample"


def _unpack(path: str, folder: Path) -> str:
    """The plain tar of a compressed one, written whole or not at all, kept until the packing is done."""
    import bz2
    import gzip
    import lzma
    import shutil
    import zlib

    openers: dict[str, Callable[[str], Any]] = {
        "gz": gzip.open,
        "tgz": gzip.open,
        "bz2": bz2.open,
        "tbz2": bz2.open,
        "xz": lzma.open,
        "txz": lzma.open,
    }
    opener = openers.get(path.lower().rpartition(".")[2])
    if opener is None:
        raise DataError(f"{path}: this compression is not read here; known: {', '.join(openers)}. Decompress it first.")
    plain = folder / (os.path.basename(path) + ".plain.tar")
    if plain.exists():
        return str(plain)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = plain.with_suffix(".tmp")
    try:
        with opener(path) as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be unpacked: {error}") from None
    temporary.rename(plain)
    return str(plain)


def plan_shards(sizes: array, max_bytes: int) -> list[tuple[int, int]]:
    """Consecutive (start, stop) of samples whose members fill at most `max_bytes` (a larger single sample stands alone)."""
    shards, start, filled = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and filled + size > max_bytes:
            shards.append((start, index))
            start, filled = index, 0
        filled += size
    return [*shards, (start, len(sizes))]
