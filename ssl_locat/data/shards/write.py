"""Writes a tar shard, as webdataset does."""

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from ssl_locat.errors import DataError
from ssl_locat.text.shown import shown


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, {extension: bytes}) samples as one plain tar by webdataset's writer, all or nothing: the name appears when the file is whole.

    The same samples give the same bytes (no owner, time 0; members in the order of their extensions). Returns the number of samples.
    Raises DataError for a member that no reader of webdataset could tell from its own fields.
    """
    from webdataset import TarWriter  # imports torch, unless `_without_torch` has been called

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with (
            open(temporary, "wb") as file,
            # keep_meta: a repacked member whose extension begins with "_" is somebody's data, too
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False, keep_meta=True) as writer,
        ):
            # plain ustar but for names over 100 letters or not in ASCII, which pax would give a header of its own each. Set here, since
            # webdataset 1.0.2 does not pass its argument of that name on
            writer.tarstream.format = tarfile.GNU_FORMAT
            for key, members in samples:
                if wrong := [extension for extension in members if extension in ("", "__key__")]:
                    raise DataError(
                        f"{shown(key)}.{wrong[0]}: a member of {shown(path)} cannot have the extension {wrong[0]!r}, which webdataset takes "
                        "for the sample's key or for none: rename it in the source"
                    )
                writer.write({"__key__": key, **members})
                count += 1
        # a rename shows it whole or not at all: what is there is never packed again
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count
